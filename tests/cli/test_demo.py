"""`kvstore demo` with a small model that has learned nothing, so its answer is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.cli import session
from model.haystack import hide, source_text

Kvstore = Callable[..., Any]


@pytest.fixture
def demo(kvstore: Kvstore, weights: Path) -> Kvstore:
    """Run the demo on 4,096 tokens."""

    def run(*argv: object) -> Any:
        return kvstore("demo", "--model", weights, "--tokens", 4096, *argv)

    return run


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the model say the right thing for seed 7; collects the prompts it is asked."""
    number = hide(source_text, 4096, 7, 0.25).number
    prompts: list[str] = []

    def generate(stream: Any, prompt: str, sampling: Any) -> Iterator[bytes]:
        prompts.append(prompt)
        assert sampling.stop == (".",)
        yield from (bytes([c]) for c in f" {number}".encode())

    monkeypatch.setattr(session, "generate", generate)
    return prompts


def test_a_wrong_answer_is_said_to_be_wrong(demo: Kvstore, temporary: Path) -> None:
    ran = demo("--seed", 7)
    assert ran.code == 1
    assert ran.err == ""
    assert ran.out.rstrip().splitlines()[-1].startswith("Wrong: the pass key is ")
    assert not list(temporary.iterdir())


def test_a_right_answer_is_said_to_be_right(demo: Kvstore, told: list[str]) -> None:
    hidden = hide(source_text, 4096, 7, 0.25)
    ran = demo("--seed", 7, "--depth", 0.25)
    assert ran.code == 0
    assert f"{hidden.text.index(b' The pass key is'):,}" in ran.out
    assert f" The pass key is {hidden.number}. Remember it." in ran.out
    assert ran.out.rstrip().splitlines()[-1] == f"Right: the pass key is {hidden.number}."
    assert told == [" What is the pass key? The pass key is"]


def test_json(demo: Kvstore, told: list[str]) -> None:
    hidden = hide(source_text, 4096, 7, 0.25)
    ran = demo("--seed", 7, "--depth", 0.25, "--json")
    assert ran.code == 0
    assert ran.out.count("\n") == 1
    assert ran.figures["tokens"] == 4096
    assert ran.figures["expected"] == str(hidden.number)
    assert ran.figures["correct"] is True
    assert ran.figures["answer"] == f" {hidden.number}"
    assert ran.figures["decode_ms_per_token"] is None
    wrong = demo("--seed", 8, "--json")
    assert wrong.code == 1
    assert wrong.figures["correct"] is False


def test_hits_and_not_found_make_the_lookups(demo: Kvstore) -> None:
    figures = demo("--hot", "64KiB", "--warm", "128KiB", "--json").figures
    hits = sum(tier["hits"] for tier in figures["tiers"].values())
    assert hits + figures["not_found"] == figures["lookups"] > 0


def test_a_full_disk_tier_is_named(demo: Kvstore, temporary: Path) -> None:
    ran = demo("--tokens", 32768, "--hot", "32KiB", "--warm", "32KiB", "--cold", "512KiB")
    assert ran.code == 1
    assert ran.err.startswith("kvstore demo: error: ")
    assert ran.err.count("\n") == 1
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(("model", "size"), [("landmark", 16 * 2**20), ("gca", 8 * 2**20)])
def test_the_shipped_models_find_the_key(kvstore: Kvstore, model: str, size: int) -> None:
    small = ("--tokens", 16384, "--hot", "1MiB", "--warm", "2MiB")
    ran = kvstore("demo", "--model", model, *small, "--json")
    assert ran.code == 0
    assert ran.figures["correct"] is True
    assert ran.figures["answer"].strip() == ran.figures["expected"]
    assert ran.figures["decode_ms_per_token"] > 0
    assert ran.figures["cache_bytes"] == size
    assert ran.figures["tiers"]["cold"]["blocks"] > 0


@pytest.mark.slow
def test_a_million_tokens(kvstore: Kvstore) -> None:
    ran = kvstore("demo", "--json")
    assert ran.code == 0
    figures = ran.figures
    assert figures["tokens"] == 2**20
    assert figures["correct"] is True
    assert figures["cache_bytes"] == 2**30
    tiers = figures["tiers"]
    memory = tiers["hot"]["capacity_bytes"] + tiers["warm"]["capacity_bytes"]
    assert memory < figures["cache_bytes"] / 5
    assert tiers["cold"]["hits"] > 0
    assert sum(tier["hits"] for tier in tiers.values()) == figures["lookups"]
    assert figures["not_found"] == 0
