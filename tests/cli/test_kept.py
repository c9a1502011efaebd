"""Contexts that are kept: `run --context`, `ask`, `chat`, `contexts`, with a small model."""

from __future__ import annotations

import io
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import Store, StoreConfig
from kvstore.cli import session
from kvstore.cli.text_chain import PAGE, TextChain, TextDigests
from kvstore.tiers import spec_file
from kvstore.tiers.tree import readable
from model import checkpoint
from model.families import family_of
from model.stream import Stream

Kvstore = Callable[..., Any]
BLOCK_BYTES = 32 * 16 * 2 * 2
SMALL = ("--hot", 16 * BLOCK_BYTES, "--warm", 48 * BLOCK_BYTES, "--cold", "64MiB")
ASKED = ("--prompt", "And then", "--max-new-tokens", 6)


@pytest.fixture(params=["landmark", "gca"])
def weights(families: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """What is kept is kept of any family."""
    return families[request.param]


def streams_of(weights: Path) -> int:
    model = checkpoint.load(str(weights))
    return family_of(model).stream.layout(model.config).streams


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book"
    path.write_bytes(np.random.default_rng(0).bytes(10_010))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def keep(kvstore: Kvstore, weights: Path, book: Path, store: Path) -> Kvstore:
    """Read the book, or another text, into a kept context."""

    def run(name: str, *argv: object, text: Path = book) -> Any:
        given = ("--text", text, "--model", weights, "--store", store, "--context", name)
        return kvstore("run", *given, *SMALL, *argv)

    return run


@pytest.fixture
def ask(kvstore: Kvstore, store: Path) -> Kvstore:
    return lambda name, *argv: kvstore("ask", store, name, *ASKED, *SMALL, "--json", *argv)


def test_a_kept_context_answers_as_the_run_did(keep: Kvstore, ask: Kvstore, store: Path) -> None:
    first = keep("a", *ASKED, "--json")
    assert first.code == 0
    for _ in range(2):
        ran = ask("a")
        assert ran.code == 0, ran.err
        figures = ran.figures
        assert figures["answer"] == first.figures["answer"]
        assert figures["tokens"] == 10_010
        assert figures["prefill_seconds"] == 0
        assert figures["prefill_tokens_per_s"] is None
        assert figures["first_token_seconds"] > 0
        assert figures["cache_bytes"] == first.figures["cache_bytes"]
    assert oct((store / "data.mdb").stat().st_mode & 0o777) == "0o600"


def test_a_text_may_be_kept_unasked(keep: Kvstore, ask: Kvstore) -> None:
    ran = keep("a", "--json")
    assert ran.code == 0
    assert ran.figures["answer"] is None
    assert ran.figures["first_token_seconds"] is None
    assert ask("a").code == 0
    shown = keep("b")
    assert shown.code == 0
    assert "10,010 of 10,010 tokens were read before" in shown.out


def test_what_is_appended_is_read_with_the_rest(
    kvstore: Kvstore, keep: Kvstore, ask: Kvstore, book: Path, tmp_path: Path
) -> None:
    keep("a")
    appended = ask("a", "--append").figures
    longer = tmp_path / "longer"
    raw = kvstore("ask", tmp_path / "store", "a", *ASKED, *SMALL).out  # the answer's own bytes
    assert raw
    tokens = ask("a").figures["tokens"]
    assert tokens == 10_010 + len("And then") + 6
    assert appended["tokens"] == tokens
    longer.write_bytes(book.read_bytes() + b"And then")
    refused = keep("a", text=longer)
    assert refused.code == 2
    assert "has read 10,024 tokens, more than the 10,018 of this" in refused.err
    # The end of the reading can be gone back to.
    assert keep("b", "--json").figures["reused_tokens"] == 10_010


def test_an_interrupted_run_goes_on(
    keep: Kvstore, ask: Kvstore, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SNAPSHOT", 4096)
    want = keep("whole", *ASKED, "--json", "--no-reuse").figures
    pieces, left = Stream._pieces, 4

    def stop(self: Any, tokens: torch.Tensor, wanted: int) -> Iterator[torch.Tensor]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return pieces(self, tokens, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "_pieces", stop)
        assert keep("a", "--no-reuse").code == 130
    assert ask("a").figures["tokens"] == 8192
    ran = keep("a", *ASKED, "--json")
    assert ran.code == 0, ran.err
    assert ran.figures["reused_tokens"] >= 8192
    assert ran.figures["answer"] == want["answer"]
    assert ran.figures["tokens"] == 10_010
    with monkeypatch.context() as patch:
        left = 1
        patch.setattr(Stream, "_pieces", stop)
        other = tmp_path / "other"
        other.write_bytes(b"another text " * 1000)
        assert keep("b", text=other).code == 130
    assert "no context 'b' is kept; there are: a, whole" in ask("b").err


def test_a_longer_text_begins_where_another_context_ends(
    kvstore: Kvstore, keep: Kvstore, ask: Kvstore, book: Path, store: Path, tmp_path: Path
) -> None:
    keep("a")
    ask("a")
    longer = tmp_path / "longer"
    longer.write_bytes(book.read_bytes() + b"More of it. " * 300)
    reused = keep("b", *ASKED, "--json", text=longer).figures
    assert listed(kvstore, store)["b"]["info"]["asked"] is None  # unlike the one it began with
    assert reused["reused_tokens"] == 10_010
    assert reused["tokens"] == 13_610
    before = listed(kvstore, store)
    assert (before["a"]["tokens"], before["b"]["tokens"]) == (10_010, 13_610)
    anew = keep("c", *ASKED, "--json", "--no-reuse", text=longer).figures
    assert anew["reused_tokens"] == 0
    refused = keep("c", "--no-reuse", text=longer)
    assert refused.code == 2
    assert "'c' is kept already" in refused.err
    otherwise = keep("d", *ASKED, "--json", "--top-k", 3, text=longer).figures
    assert otherwise["reused_tokens"] == 0
    rounded = keep("e", "--json", "--precision", "int4", text=longer).figures
    assert rounded["reused_tokens"] == 0
    refused = keep("a", "--top-k", 3, text=longer)
    assert refused.code == 2
    assert "'a' was read with another --top-k, --index or --precision" in refused.err


def test_a_text_that_parts_ways_begins_at_a_snapshot(
    keep: Kvstore, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SNAPSHOT", 4096)
    keep("a")
    other = tmp_path / "other"
    other.write_bytes(book.read_bytes()[:9000] + b"another end")
    reused = keep("b", *ASKED, "--json", text=other).figures
    assert (reused["reused_tokens"], reused["tokens"]) == (8192, 9011)
    anew = keep("c", *ASKED, "--json", "--no-reuse", text=other).figures
    assert anew["answer"] == reused["answer"]
    other.write_bytes(book.read_bytes()[:5000])
    assert keep("d", "--json", text=other).figures["reused_tokens"] == 4096


def test_snapshots_are_dense_at_the_beginning(
    keep: Kvstore, book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SNAPSHOT", 8192)
    book.write_bytes(np.random.default_rng(1).bytes(30_000))
    keep("a")
    other, reused = tmp_path / "other", []
    for cut in (4000, 5000, 8191, 8192, 16_000, 17_000, 29_999):
        other.write_bytes(book.read_bytes()[:cut] + b"\0another end")
        reused.append(keep(str(cut), "--json", text=other).figures["reused_tokens"])
    assert reused == [0, 4096, 4096, 8192, 12_288, 16_384, 28_672]


def test_json_is_said_before_a_change_or_behind_it(
    kvstore: Kvstore, keep: Kvstore, store: Path
) -> None:
    keep("a")
    for argv in (("--json", "fork", "a", "b"), ("fork", "a", "c", "--json")):
        listed = kvstore("contexts", store, *argv).figures["contexts"]
    assert [each["name"] for each in listed] == ["a", "b", "c"]


def test_a_context_of_another_version_stands_in_nobodys_way(
    kvstore: Kvstore, keep: Kvstore, store: Path
) -> None:
    from kvstore import Store, StoreConfig

    keep("a")
    with Store.open(store, StoreConfig(cold="64MiB", device="cpu")) as opened:
        manifest = json.loads(opened.get_record(b"context/a") or b"")
        opened.put_record(b"context/a", json.dumps(manifest | {"format": 9}).encode())
    assert keep("b\x1b[7m").code == 0
    ran = kvstore("contexts", store)
    assert ran.code == 1
    assert "10,010" in ran.out
    assert "\x1b" not in ran.out
    (line,) = ran.err.splitlines()
    assert "'a' was saved in format 9" in line
    figures = kvstore("contexts", store, "--json").figures
    assert list(figures["other_format"]) == ["a"]
    for command in ("ask", "verify"):
        refused = kvstore(command, store, *(["a", *ASKED] if command == "ask" else []))
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert keep("a").code == 2
    assert kvstore("contexts", store, "rm", "a").code == 0
    assert kvstore("contexts", store).code == 0
    assert kvstore("verify", store).code == 0


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"format": 2}, 2, "is of format 2, this program reads 1: use another directory"),
        ({"planes": []}, 1, "makes no sense"),
        (
            {"planes": [{"name": "k", "shape": [8, 8], "dtype": "float32"}]},
            2,
            "is of other blocks than the file",
        ),
    ],
)
def test_a_specification_that_is_not_this_stores(
    keep: Kvstore, store: Path, change: dict[str, Any], code: int, says: str
) -> None:
    keep("a")
    path = store / "spec.json"
    text = json.dumps(json.loads(path.read_text().splitlines()[1]) | change)
    path.write_text(f"{spec_file._checksum(text)}\n{text}\n")
    before = (store / "data.mdb").read_bytes()
    refused = keep("b")
    assert refused.code == code
    (line,) = refused.err.splitlines()
    assert says in line
    assert (store / "data.mdb").read_bytes() == before


def test_a_specification_is_not_read_without_bound(
    keep: Kvstore, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep("a")
    monkeypatch.setattr(spec_file, "_LONGEST", 30)
    refused = keep("b")
    assert (refused.code, len(refused.err.splitlines())) == (1, 1)
    assert "spec.json is damaged" in refused.err


def listed(kvstore: Kvstore, store: Path) -> dict[str, Any]:
    ran = kvstore("contexts", store, "--json")
    assert ran.code == 0, ran.err
    return {each["name"]: each for each in json.loads(ran.out)["contexts"]}


def test_contexts_are_listed_forked_renamed_and_removed(
    kvstore: Kvstore, keep: Kvstore, ask: Kvstore, store: Path, weights: Path
) -> None:
    keep("a")
    answer = ask("a").figures["answer"]
    (a,) = listed(kvstore, store).values()
    assert a["blocks"] == 10_010 // 32 * streams_of(weights)
    assert a["nbytes"] == a["blocks"] * BLOCK_BYTES
    assert 0 < a["disk_bytes"] < a["nbytes"]
    assert a["info"]["model"] == str(weights)
    assert a["created"] <= a["info"]["asked"]
    for argv in (("fork", "a", "b"), ("rename", "b", "c"), ("rm", "a")):
        assert kvstore("contexts", store, *argv) == (0, "", "")
    assert listed(kvstore, store)["c"]["info"]["asked"] is None
    assert ask("c").figures["answer"] == answer
    for argv, says in [
        (("fork", "x", "y"), "no context 'x'"),
        (("fork", "c", "c"), "'c' is kept already"),
        (("rm", "x"), "no context 'x'"),
    ]:
        ran = kvstore("contexts", store, *argv)
        assert ran.code == 2
        assert says in ran.err
    shown = kvstore("contexts", store).out
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("name", "model", "tokens", "raw", "on disk", "age", "asked", "10,010"):
        assert word in shown
    assert kvstore("contexts", store, "sweep").out.startswith("0 blocks")
    kvstore("contexts", store, "rm", "c")
    assert kvstore("contexts", store).out == "no context is kept here\n"
    assert "there are: none" in ask("c").err


def test_damage_is_found_and_mended(
    kvstore: Kvstore,
    keep: Kvstore,
    ask: Kvstore,
    weights: Path,
    store: Path,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "SNAPSHOT", 4096)
    keep("a")
    other = tmp_path / "other"
    other.write_bytes(b"another text " * 1000)
    keep("b", text=other)
    answer = ask("b").figures["answer"]
    ran = kvstore("verify", store)
    assert ran.code == 0
    blocks = 718 * streams_of(weights)
    assert f"2 contexts and {blocks:,} blocks were read, 0 faults were found" in ran.out
    from kvstore import Store, StoreConfig

    with Store.open(store, StoreConfig(cold="64MiB", device="cpu")) as opened:
        ids = opened.kept.ids("a", opened.kept.require("a"))
        opened.delete(ids[290:291])  # of the first stream: token 9,280
    ran = kvstore("verify", store, "--json")
    assert ran.code == 1
    assert ran.figures["damaged"] == [
        f"context 'a': stream 0, block 290 (id {ids[290]}) is not there"
    ]
    ran = kvstore("verify", store, "--repair")
    assert ran.code == 0
    stored = {1: 9984}.get(streams_of(weights), 10_010)  # a model may have the rest in its state
    assert f"context 'a' of {stored:,} tokens was cut back to its save at 8,192" in ran.out
    assert kvstore("verify", store, "--json").figures["damaged"] == []
    assert ask("a").figures["tokens"] == 8192
    assert ask("b").figures["answer"] == answer
    assert keep("a", "--json").figures["reused_tokens"] == 8192


def test_a_damaged_context_is_named_and_the_others_are_listed(
    kvstore: Kvstore, keep: Kvstore, ask: Kvstore, store: Path
) -> None:
    keep("a")
    kvstore("contexts", store, "fork", "a", "b")
    from kvstore import Store, StoreConfig

    with Store.open(store, StoreConfig(cold="64MiB", device="cpu")) as opened:
        opened.put_record(b"context/a", b"{}")
    ran = kvstore("contexts", store)
    assert ran.code == 1
    assert "b " in ran.out
    assert ran.err.count("\n") == 1
    assert "context 'a'" in ran.err
    assert f"`kvstore verify {store}` says what is damaged, --repair mends it" in ran.err
    ran = kvstore("contexts", store, "--json")
    assert ran.code == 1
    assert list(ran.figures["damaged"]) == ["a"]
    assert [each["name"] for each in ran.figures["contexts"]] == ["b"]
    assert kvstore("contexts", store, "rename", "b", "c").code == 0
    assert "kvstore verify" in ask("a").err


def test_a_file_with_a_damaged_structure_is_made_anew(
    kvstore: Kvstore, keep: Kvstore, ask: Kvstore, store: Path
) -> None:
    keep("a")
    answer = ask("a").figures["answer"]
    path = store / "data.mdb"
    raw = bytearray(path.read_bytes())
    leaves = [
        at
        for at in range(8192, len(raw), 4096)
        if raw[at + 10] in (1, 2) and int.from_bytes(raw[at : at + 8], "little") * 4096 == at
    ]
    mended = 0
    for at in leaves:
        broken = bytearray(raw)
        broken[at + 12 : at + 20] = bytes(8)
        path.write_bytes(broken)
        ran = ask("a")
        if ran.code == 0:
            continue  # a page that is free
        assert "is damaged: its tree" in ran.err
        assert f"`kvstore verify {store}` says" in ran.err
        ran = kvstore("verify", store)
        assert ran.code == 1
        assert ran.err.endswith("; --repair makes it anew of what can be read\n")
        ran = kvstore("verify", store, "--repair")
        if ran.code:
            assert "nothing can be read" in ran.err
            assert ran.err.endswith("; put a copy of it in its place, or remove it\n")
            continue
        mended += 1
        assert "the damaged file is kept as" in ran.out
        assert kvstore("verify", store).code == 0
        ran = ask("a")
        assert ran.code == 2 or ran.figures["answer"] == answer or ran.figures["tokens"] < 10_010
    assert mended


@pytest.mark.parametrize("mode", ["sync", "async", "none"])
def test_any_durability_keeps(keep: Kvstore, ask: Kvstore, mode: str) -> None:
    first = keep("a", *ASKED, "--durability", mode, "--json")
    assert first.code == 0
    assert ask("a", "--durability", mode).figures["answer"] == first.figures["answer"]
    assert keep("b", "--durability", "always").code == 2


def test_a_chat_asks_again_and_again(
    kvstore: Kvstore, keep: Kvstore, ask: Kvstore, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep("a")
    want = ask("a").figures["answer"]
    chat = ("chat", store, "a", "--max-new-tokens", 6, *SMALL)
    monkeypatch.setattr("sys.stdin", io.StringIO("And then\n\nSomething else\nAnd then"))
    ran = kvstore(*chat, "--json")
    assert ran.code == 0
    answers = [json.loads(line)["answer"] for line in ran.out.splitlines()]
    assert len(answers) == 3
    assert answers[0] == answers[2] == want
    assert listed(kvstore, store)["a"]["tokens"] == 10_010
    monkeypatch.setattr("sys.stdin", io.StringIO("And then\n"))
    assert "tier" in kvstore(*chat).out
    monkeypatch.setattr("sys.stdin", io.StringIO("And then\nAnd then\n"))
    assert kvstore(*chat, "--append", "--json").code == 0
    assert listed(kvstore, store)["a"]["tokens"] == 10_010 + 2 * (8 + 6)


def test_another_model_is_never_served(
    keep: Kvstore, ask: Kvstore, weights: Path, tmp_path: Path, store: Path
) -> None:
    """Not even one of the same sizes in the same file's place."""
    mine = tmp_path / "mine.safetensors"
    shutil.copy(weights, mine)
    keep("a", "--model", mine)
    model = checkpoint.load(str(mine))
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    checkpoint.save(model, mine, {})
    ran = ask("a")
    assert ran.code == 2
    assert "mine.safetensors: its weights have changed since" in ran.err
    other = ask("a", "--model", mine).err
    assert f"was read by {mine}: {mine} is another model" in other
    ran = keep("a", "--model", mine)
    assert ran.code == 2
    assert "was read by another model" in ran.err
    mine.unlink()
    ran = ask("a")
    assert ran.code == 2
    moved = "which is not there: if it was moved, say with --model FILE where to"
    assert f"context 'a' was read by {mine}, {moved}" in ran.err
    assert ask("a", "--model", weights).code == 0  # the same one, elsewhere
    assert keep("a", "--json").figures["reused_tokens"] == 10_010
    assert ask("a").code == 0


def test_a_store_is_for_models_of_one_kind(
    keep: Kvstore, weights: Path, families: dict[str, Path], store: Path
) -> None:
    keep("a")
    (other,) = set(families.values()) - {weights}
    ran = keep("b", "--model", other)
    assert ran.code == 2
    assert f"--store {store} holds other blocks than {other} makes" in ran.err


def test_a_context_that_has_read_more_says_so(keep: Kvstore, ask: Kvstore) -> None:
    keep("a")
    assert ask("a", "--append").figures["tokens"] == 10_024
    ran = keep("a")
    assert ran.code == 2
    assert "context 'a' has read 10,024 tokens, more than the 10,010 of this: " in ran.err


def test_figures_of_an_answer(ask: Kvstore, keep: Kvstore, kvstore: Kvstore, store: Path) -> None:
    keep("a")
    assert ask("a").figures["reused_tokens"] == ask("a").figures["tokens"] == 10_010
    (told,) = kvstore("contexts", "--json", store).figures["contexts"]
    assert set(told["info"]) == {"model", "retrieval", "index", "precision", "asked"}


def test_a_store_in_use_can_be_verified_but_not_repaired(
    kvstore: Kvstore, keep: Kvstore, store: Path
) -> None:
    keep("a")
    keep("b")
    config = StoreConfig(hot="1MiB", warm="1MiB", cold="64MiB", device="cpu")
    with Store.open(store, config) as opened:
        opened.put([torch.zeros(1, *p.shape, dtype=p.dtype) for p in opened.spec.planes])
        opened.flush()
        command = (sys.executable, "-m", "kvstore.cli.main", "verify", store)
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "2 contexts and" in ran.stdout
        sweep = f"`kvstore contexts {store} sweep` removes them"
        assert f"1 blocks belong to no context: {sweep}" in ran.stdout
        ran = subprocess.run((*command, "--repair"), capture_output=True, text=True)
        assert ran.returncode == 2
        assert "in use by process" in ran.stderr
    assert "1 blocks that no context had" in kvstore("contexts", store, "sweep").out


def test_many_damaged_pages_are_counted(kvstore: Kvstore, keep: Kvstore, store: Path) -> None:
    keep("a")
    with (store / "data.mdb").open("r+b") as file:
        file.truncate(8 * 4096)
    ran = kvstore("verify", store, "--repair")
    if ran.code == 0:
        assert ran.out.count("in the file: ") <= 4
        assert "0 faults" not in ran.out
        assert len(set(ran.out.splitlines())) == len(ran.out.splitlines())


def test_a_context_of_another_program_is_told_apart(
    keep: Kvstore, ask: Kvstore, store: Path
) -> None:
    keep("a")
    from kvstore import Store, StoreConfig

    with Store.open(store, StoreConfig(cold="64MiB", device="cpu")) as opened:
        opened.context("bare", streams=1, landmark_dim=2).close()
    ran = ask("bare")
    assert ran.code == 2
    assert "`kvstore run` has not made it" in ran.err
    assert keep("b").code == 0


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, 3 * PAGE + 5])
def test_a_chain_knows_what_begins_with_it(size: int) -> None:
    text = np.random.default_rng(1).bytes(4 * PAGE)
    chain = TextChain()
    for start in range(0, size, 1000):
        chain = chain.extended(text[start : min(start + 1000, size)])
    assert chain == TextChain().extended(text[:size])
    assert TextChain.from_json(json.loads(json.dumps(chain.to_json()))) == chain
    assert TextDigests(text).begin_with(chain)
    digests = TextDigests(text[:size])
    assert digests.begin_with(chain)
    assert digests.begin_with(TextChain().extended(text[: size // 2]))
    if size:
        assert not TextDigests(text[: size - 1]).begin_with(chain)
        for at in (0, size // 2, size - 1):
            wrong = bytearray(text)
            wrong[at] ^= 1
            assert not TextDigests(bytes(wrong)).begin_with(chain)


def test_several_ask_beside_one_who_writes(
    keep: Kvstore, ask: Kvstore, store: Path, weights: Path
) -> None:
    keep("a")
    answer = ask("a").figures["answer"]
    from kvstore import Store, StoreConfig

    argv = ["ask", store, "a", *ASKED, *SMALL, "--json"]
    command = [sys.executable, "-m", "kvstore.cli.main", *map(str, argv)]
    with Store.open(store, StoreConfig(cold="64MiB", device="cpu")) as writer:
        asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        shape = (2, 64, *writer.spec.planes[0].shape[1:])
        with writer.context("b", streams=2, landmark_dim=16) as context:
            for _ in range(50):
                planes = [torch.randn(shape).bfloat16() for _ in "kv"]
                context.append(slice(None), planes, torch.randn(2, 2, 16))
                context.save()
        for each in asking:
            out, _ = each.communicate(timeout=60)
            assert each.returncode == 0
            assert json.loads(out)["answer"] == answer
        listing = [sys.executable, "-m", "kvstore.cli.main", "contexts", str(store), "--json"]
        out = subprocess.run(
            [*listing, "--cold", "64MiB"], capture_output=True, text=True, check=True
        ).stdout
        assert [each["name"] for each in json.loads(out)["contexts"]] == ["a", "b"]
        refused = subprocess.run(
            [*command[:-1], "--append"], capture_output=True, text=True, check=False
        )
        assert refused.returncode == 2
        assert f"is in use by process {os.getpid()}" in refused.stderr
    assert ask("a").figures["answer"] == answer


def damage_manifest(store: Path, name: str) -> None:
    """Change a byte of what is said of a context."""
    path = store / "data.mdb"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        tables, _ = readable(data)
    [at] = [at for key, at, _ in tables[b"records"] if key == f"context/{name}".encode()]
    raw = bytearray(path.read_bytes())
    raw[at + 60] ^= 1
    path.write_bytes(raw)


def test_others_can_be_removed_and_made_beside_a_damaged_context(
    kvstore: Kvstore, keep: Kvstore, ask: Kvstore, store: Path, tmp_path: Path
) -> None:
    keep("a")
    other = tmp_path / "other"
    other.write_bytes(b"another text " * 1000)
    keep("b", text=other)
    damage_manifest(store, "b")
    assert keep("c", *ASKED, "--json", text=other).figures["reused_tokens"] == 0
    assert keep("d", *ASKED, "--json").figures["reused_tokens"] == 10_010
    for name in ("a", "b"):  # the damaged one, too
        ran = kvstore("contexts", store, "rm", name)
        assert (ran.code, ran.err) == (0, "")
    assert listed(kvstore, store).keys() == {"c", "d"}
    assert ask("d").code == 0
    assert kvstore("contexts", store, "sweep").code == 0
    assert kvstore("verify", store).code == 0
    refused = kvstore("contexts", store, "rm", "a")
    assert refused.code == 2
    assert "no context 'a' is kept; there are: c, d" in refused.err


def test_a_name_that_is_too_long_is_no_damage(kvstore: Kvstore, keep: Kvstore, store: Path) -> None:
    keep("a")
    for argv in (("rm", "x" * 400), ("fork", "x" * 400, "b"), ("rename", "x" * 400, "b")):
        ran = kvstore("contexts", store, *argv)
        assert ran.code == 2
        assert "1 to 300 bytes" in ran.err
        assert "verify" not in ran.err


def test_a_trace_replaces_nothing_but_a_trace(
    keep: Kvstore, ask: Kvstore, store: Path, book: Path, tmp_path: Path
) -> None:
    keep("a")
    files = [book, store / "data.mdb", store / "spec.json"]
    before = [path.read_bytes() for path in files]
    for path, bytes_before in zip(files, before, strict=True):
        ran = ask("a", "--trace", path)
        assert ran.code == 2
        assert f"{path} is there already and is no trace" in ran.err
        assert path.read_bytes() == bytes_before
    trace = tmp_path / "trace"
    for _ in range(2):
        assert ask("a", "--trace", trace).code == 0
        assert trace.stat().st_size > 100


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
def test_output_that_nobody_takes(keep: Kvstore, store: Path) -> None:
    keep("a")
    asking = [sys.executable, "-m", "kvstore.cli.main", "contexts", str(store)]
    shell = "exec " + " ".join(f"'{part}'" for part in asking)
    full = subprocess.run(f"{shell} > /dev/full", shell=True, capture_output=True, text=True)
    assert full.returncode == 1
    assert full.stderr == "kvstore contexts: error: No space left on device\n"
    for closed in (">&-", "<&-", "2>&-"):
        ran = subprocess.run(f"{shell} {closed}", shell=True, capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, ""), closed
    ran = subprocess.run(f"{shell}x 2>&-", shell=True, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stdout == ""
