"""Every bench runs from its command line, at its smallest, and says what it may not be given."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from model import haystack

BENCHES = sorted(
    path.stem
    for path in (Path(__file__).parents[2] / "bench").glob("*.py")
    if "__main__" in path.read_text()
)

SMALLEST = {
    "codec": "--turns 2",
    "decode": "--lengths 1024 2048 --steps 16 -n 3",
    "faults": "--kills 1 --damages 2",
    "harvest": "--out {folder}/landmarks.safetensors --count 1000 --queries 64",
    "index": "--synthetic --least 256 --most 1024 --dim 16 --seconds 0.01 --batch 1 4",
    "kept": "--tokens 4096 --n 1",
    "keys": "--tokens 4096 --keys 2 --readings 1 --hops 2",
    "passkey": "--model gca --corpus {folder} --lengths 2048:1 --variants 0 --jobs 1",
    "perplexity": "--corpus {folder} --targets 2 --score 16 --longest 1024 --jobs 1",
    "policies": "--slots 64 --steps 50",
    "powerloss": "--cuts 1 --changes 2",
    "precision": "--corpus {folder} --tokens 1024 --keys 1 --context 1024 --targets 2 --jobs 1"
    " --n 1",
    "quality": "--corpus {folder} --models gca landmark --controls gca landmark --lengths 1024"
    " --excerpts 2 --score 16 --jobs 1",
    "scaling": "--lengths 2048 4096 --steps 16",
    "soak": "--seconds 1 --readers 1",
    "tiers": "--turns 2",
    "training": "{folder}/log.jsonl --plot {folder}/training.png",
}

WRONG = {
    "codec": ("--data nowhere.npz", "'nowhere.npz' is not a file"),
    "decode": ("--model gca", "'gca' is of family 'gca', not 'landmark'"),
    "faults": ("--kills -1", "'-1' is not a whole number of at least 0"),
    "harvest": ("--out {folder}/x --corpus nowhere", "'nowhere' is not a folder"),
    "index": ("--synthetic --seconds nan", "'nan' is not a number of seconds above 0"),
    "kept": ("--n 0", "'0' is not a whole number of at least 1"),
    "keys": ("--top-k many", "'many' is not a whole number of at least 1"),
    "passkey": ("--lengths 4096", "'4096' is not TOKENS:READINGS, like 65536:20"),
    "perplexity": ("--corpus {folder} --text no", "no no.txt or no.txt.gz in {folder}"),
    "policies": ("--slots 1", "'1' is not a whole number of at least 2"),
    "powerloss": ("--durability some", "invalid choice: 'some'"),
    "precision": ("--corpus {folder}", "no great_expectations.txt or great_expectations.txt.gz"),
    "quality": ("--corpus {folder} --models none", "no model 'none'"),
    "scaling": ("--steps 15", "'15' is not a whole number of at least 16"),
    "soak": ("--seconds 0", "'0' is not a number of seconds above 0"),
    "tiers": ("--directory nowhere", "'nowhere' is not a folder"),
    "training": ("nowhere --plot {folder}/plot.exe", "does not end in .png, .svg or .pdf"),
}


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "training":
        pytest.importorskip("matplotlib")
    return name


def run(monkeypatch: pytest.MonkeyPatch, bench: str, line: str, folder: Path) -> int:
    words = [word.format(folder=folder) for word in line.split()]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    try:
        return importlib.import_module(f"bench.{bench}").main() or 0
    except SystemExit as stop:
        return int(stop.code or 0)


def test_none_is_left_out() -> None:
    assert sorted(SMALLEST) == sorted(WRONG) == BENCHES


@pytest.mark.slow
@pytest.mark.parametrize("bench", SMALLEST, indirect=True)
def test_it_runs_and_ends_with_json(
    bench: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for novel in ("moby_dick", "great_expectations"):
        (tmp_path / f"{novel}.txt").write_bytes(haystack.random_words(4096, len(novel)))
    (tmp_path / "log.jsonl").write_text('{"step": 50, "length": 512, "loss": 2.0}\n')
    assert run(monkeypatch, bench, SMALLEST[bench], tmp_path) == 0
    report = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert report["bench"] == bench
    assert len(report) > 1


@pytest.mark.parametrize("bench", WRONG, indirect=True)
def test_wrong_input_is_one_line(
    bench: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    line, reason = WRONG[bench]
    assert run(monkeypatch, bench, line, tmp_path) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"python -m bench.{bench}: error: ")
    assert reason.format(folder=tmp_path) in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("bench", BENCHES, indirect=True)
def test_help_has_an_example(
    bench: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, bench, "--help", tmp_path) == 0
    assert f"\npython -m bench.{bench}" in capfd.readouterr().out
