"""`kvstore run`, whole, with a small model that has learned nothing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvstore import Store
from kvstore.cli import session
from kvstore.trace import Kind, read_trace

Kvstore = Callable[..., Any]

BLOCK_BYTES = 32 * 16 * 2 * 2  # 32 tokens of keys and values [16], bfloat16


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """4 KiB of bytes that are hardly ever UTF-8: 128 blocks in each of two streams."""
    path = tmp_path / "book"
    path.write_bytes(np.random.default_rng(0).bytes(4096))
    return path


@pytest.fixture
def read(kvstore: Kvstore, weights: Path, book: Path) -> Kvstore:
    """Run on the book."""

    def run(*argv: object, text: Path = book, prompt: str = "And then") -> Any:
        given = ("--text", text, "--prompt", prompt, "--model", weights, "--max-new-tokens", 6)
        return kvstore("run", *given, *argv)

    return run


SMALL = ("--hot", 16 * BLOCK_BYTES, "--warm", 48 * BLOCK_BYTES)


def test_the_answer_is_followed_by_the_figures(read: Kvstore, temporary: Path) -> None:
    ran = read(*SMALL)
    assert ran.code == 0
    assert ran.err == ""
    assert "\ufffd" in ran.out.split("tier")[0]
    for word in ("capacity", "used", "blocks", "hits", "hit rate", "promotions", "demotions"):
        assert word in ran.out
    for word in ("evictions", "bytes in", "bytes out", "smaller", "index", "tokens/s"):
        assert word in ran.out
    assert not list(temporary.iterdir())


def test_json_is_all_there_is(read: Kvstore, temporary: Path) -> None:
    ran = read(*SMALL, "--json")
    assert ran.code == 0
    assert ran.err == ""
    assert ran.out.count("\n") == 1
    figures = ran.figures
    assert figures["tokens"] == 4096
    assert figures["expected"] is None
    assert figures["correct"] is None
    assert isinstance(figures["answer"], str)
    assert figures["prefill_seconds"] > 0
    assert figures["prefill_tokens_per_s"] == pytest.approx(4096 / figures["prefill_seconds"])
    assert 0 < figures["decode_ms_per_token"] < 10_000
    assert figures["peak_memory_bytes"] > 2**26
    assert figures["cache_bytes"] == 2 * 128 * BLOCK_BYTES
    assert figures["index"]["landmarks"] == 2 * 128
    assert figures["index"]["kind"] == "exact"
    assert figures["index"]["recall"] is None
    assert figures["index"]["queries"] > 0
    assert not list(temporary.iterdir())


def test_hits_and_not_found_make_the_lookups(read: Kvstore) -> None:
    figures = read(*SMALL, "--json").figures
    tiers = figures["tiers"]
    assert figures["lookups"] > 0
    assert figures["not_found"] == 0
    assert sum(tier["hits"] for tier in tiers.values()) == figures["lookups"]
    assert tiers["cold"]["hits"] > 0
    reached = figures["lookups"]
    for name in ("hot", "warm", "cold"):
        assert tiers[name]["hit_rate"] == pytest.approx(tiers[name]["hits"] / reached)
        reached -= tiers[name]["hits"]
    assert tiers["hot"]["capacity_bytes"] == tiers["hot"]["used_bytes"] == 16 * BLOCK_BYTES
    assert tiers["warm"]["capacity_bytes"] == 48 * BLOCK_BYTES
    assert tiers["cold"]["capacity_bytes"] == 64 * 2**30
    assert tiers["cold"]["blocks"] * BLOCK_BYTES / tiers["cold"]["used_bytes"] == pytest.approx(
        figures["compression_ratio"]
    )
    prefetch = figures["prefetch"]
    assert prefetch["used"] + prefetch["wasted"] <= prefetch["issued"]


def test_the_same_command_gives_the_same_answer_whatever_the_tiers(read: Kvstore) -> None:
    drawn = ("--temperature", 1, "--top-p", 0.9, "--seed", 3)
    roomy = read(*drawn, "--json").figures
    tight = read(*drawn, *SMALL, "--policy", "sieve", "--json").figures
    none = read(*drawn, "--cold", "none", "--json").figures
    assert roomy["answer"] == tight["answer"] == none["answer"]
    assert roomy["tiers"]["hot"]["hits"] == roomy["lookups"]
    assert none["tiers"]["cold"]["capacity_bytes"] == 0
    assert none["compression_ratio"] is None
    other = read("--temperature", 1, "--top-p", 0.9, "--seed", 4, "--json").figures
    assert other["answer"] != roomy["answer"]


def test_several_texts_are_read_one_after_the_other(
    read: Kvstore, book: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(book.read_bytes()[:1000])
    second.write_bytes(book.read_bytes()[1000:])
    whole = read("--json").figures
    parts = read("--text", second, "--json", text=first).figures
    assert parts["tokens"] == 4096
    assert parts["answer"] == whole["answer"]


@pytest.mark.parametrize("size", [1, 31, 32, 33])
def test_a_text_about_as_long_as_a_block(read: Kvstore, tmp_path: Path, size: int) -> None:
    text = tmp_path / "short"
    text.write_bytes(b"x" * size)
    figures = read("--json", text=text).figures
    assert figures["tokens"] == size
    assert figures["cache_bytes"] == size // 32 * 2 * BLOCK_BYTES
    assert len(figures["answer"]) > 0


def test_a_text_that_is_utf8_and_a_prompt_that_is_not_ascii(read: Kvstore, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Łódź " * 40, encoding="utf-8")
    assert read(text=text, prompt="Gdańsk").code == 0


def test_more_blocks_a_token_than_there_are(read: Kvstore, tmp_path: Path) -> None:
    text = tmp_path / "short"
    text.write_bytes(bytes(range(256)))
    figures = read("--top-k", 500, "--json", text=text).figures
    assert figures["not_found"] == 0
    assert figures["lookups"] > read("--top-k", 1, "--json", text=text).figures["lookups"]


def test_only_the_tokens_of_the_answer_are_timed(
    read: Kvstore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(stream: Any, prompt: str, sampling: Any) -> Iterator[bytes]:
        asker = stream.fork()
        for _ in range(reads):
            asker.read(torch.tensor([65]))
            yield b"A"

    text = tmp_path / "text"
    text.write_bytes(b"x" * 2049)  # the last piece read is a single token
    monkeypatch.setattr(session, "generate", answer)
    reads = 1  # the prompt
    assert read("--json", text=text).figures["decode_ms_per_token"] is None
    reads = 2
    assert read("--json", text=text).figures["decode_ms_per_token"] > 0


def test_a_text_without_an_end_is_refused(
    kvstore: Kvstore, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.cli.run.LONGEST", 10_000)
    ran = kvstore("run", "--text", "/dev/zero", "--prompt", "x", "--model", weights)
    assert ran.code == 2
    assert "/dev/zero is longer than 10,000 bytes" in ran.err


def test_a_stop_ends_the_answer(read: Kvstore) -> None:
    said = read("--json", "--temperature", 1).figures["answer"]
    stop = next(c for c in said if c != "\ufffd")
    again = read("--json", "--temperature", 1, "--stop", stop).figures["answer"]
    assert again == said[: said.index(stop)]
    assert read("--json", "--temperature", 1, "--stop", "").figures["answer"] == said


def test_a_trace_has_every_lookup(read: Kvstore, tmp_path: Path) -> None:
    trace = tmp_path / "trace.kvt"
    figures = read(*SMALL, "--trace", trace, "--json").figures
    found: Counter[int] = Counter()
    for event in read_trace(trace):
        if event.kind is Kind.FETCH:
            assert event.tiers is not None
            found.update(event.tiers.tolist())
    assert [found[t] for t in range(3)] == [
        figures["tiers"][name]["hits"] for name in ("hot", "warm", "cold")
    ]


def test_a_store_directory_stays_and_can_be_used_again(read: Kvstore, tmp_path: Path) -> None:
    place = tmp_path / "store"
    answers = []
    for _ in range(2):
        ran = read(*SMALL, "--store", place, "--json")
        assert ran.code == 0
        assert ran.figures["tiers"]["cold"]["blocks"] > 0
        answers.append(ran.figures["answer"])
        with Store.open(place) as store:
            assert len(store) == 0  # nothing is left in the way of the next
    assert answers[0] == answers[1]


def test_a_hot_tier_too_small_for_one_selection(read: Kvstore, temporary: Path) -> None:
    ran = read("--hot", BLOCK_BYTES)
    assert ran.code == 2
    assert ran.err.startswith("kvstore run: error: ")
    assert ran.err.count("\n") == 1
    assert "hot" in ran.err
    assert not list(temporary.iterdir())


def test_a_hot_tier_of_one_selection(read: Kvstore) -> None:
    roomy = read("--json").figures
    tight = read("--hot", 4 * BLOCK_BYTES, "--json").figures
    assert tight["answer"] == roomy["answer"]


@pytest.mark.parametrize("tier", ["--hot", "--warm"])
def test_more_than_memory_holds(read: Kvstore, temporary: Path, tier: str) -> None:
    ran = read(tier, "100TiB")
    assert ran.code == 1
    assert "allocate" in ran.err
    assert ran.err.count("\n") == 1
    assert not list(temporary.iterdir())


def test_what_torch_says_when_memory_ends(read: Kvstore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        torch.empty(2**46, dtype=torch.uint8)

    monkeypatch.setattr(session, "prefill", fail)
    ran = read()
    assert ran.code == 1
    assert re.match("kvstore run: error: not enough memory with --hot .* and --warm .*: ", ran.err)
    assert ran.err.count("\n") == 1


def test_a_run_time_error_that_is_not_about_memory_is_a_bug(
    read: Kvstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(session, "prefill", fail)
    with pytest.raises(RuntimeError, match="ours"):
        read()


@pytest.mark.parametrize(("cold", "repeats"), [("none", 4), ("512KiB", 4), ("10MiB", 50)])
def test_a_store_that_is_full(
    read: Kvstore, book: Path, tmp_path: Path, temporary: Path, cold: str, repeats: int
) -> None:
    text = tmp_path / "longer"
    text.write_bytes(book.read_bytes() * repeats)
    ran = read("--cold", cold, *SMALL, text=text)
    assert ran.code == 1
    assert ran.err.startswith("kvstore run: error: ")
    assert ran.err.count("\n") == 1
    assert "cold tier" in ran.err
    assert not list(temporary.iterdir())


def on_a_terminal(*argv: str) -> str:
    """What a command draws on a terminal of 160 columns."""
    pty = pytest.importorskip("pty")
    code = "import sys; from kvstore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = bytearray()
    with contextlib.suppress(OSError):  # what Linux says when the other side has gone
        while data := os.read(mine, 65536):
            output += data
    os.close(mine)
    assert process.wait(60) == 0
    return output.decode(errors="replace")


def test_progress_on_a_terminal(weights: Path, book: Path) -> None:
    argv = ("run", "--text", str(book), "--prompt", "x", "--model", str(weights))
    drawn = on_a_terminal(*argv, "--hot", "32KiB", "--warm", "64KiB")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
    assert re.search(r"4,096/4,096 .*tokens/s\r\nhot .*100%.*warm .*%.*cold .*%", plain), drawn
    assert "demotions" in drawn
    quiet = on_a_terminal(*argv, "--json")
    assert quiet.startswith("{")
    assert quiet.endswith("}\r\n")
    assert "\x1b" not in quiet


class TestProcess:
    """What only a real process shows."""

    def command(self, weights: Path, text: Path) -> list[str]:
        # Whoever runs the tests in the background ignores SIGINT or SIGHUP, and so would the child.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "signal.signal(signal.SIGHUP, signal.SIG_DFL);"
            "from kvstore.cli.main import main; sys.exit(main(sys.argv[1:]))"
        )
        given = ["run", "--text", str(text), "--prompt", "x", "--model", str(weights)]
        return [sys.executable, "-c", code, *given]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_a_stopped_reading_leaves_nothing(
        self, weights: Path, tmp_path: Path, temporary: Path, number: signal.Signals
    ) -> None:
        text = tmp_path / "long"
        text.write_bytes(b"long text " * 2_000_000)
        process = subprocess.Popen(
            [*self.command(weights, text), "--hot", "32KiB", "--warm", "64KiB"],
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not any(p.stat().st_size > 200_000 for p in temporary.rglob("*.mdb")):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (128 + number, "", "kvstore run: interrupted\n")
        assert not list(temporary.iterdir())

    def test_a_reader_that_goes_away(self, weights: Path, book: Path, temporary: Path) -> None:
        process = subprocess.Popen(
            [*self.command(weights, book), "--max-new-tokens", "100"],
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        with process.stderr as stderr:
            assert stderr.read() == b""
        assert process.wait(30) == 1
        assert not list(temporary.iterdir())

    def test_a_command_line_is_refused_without_importing_torch(self) -> None:
        code = (
            "import sys; from kvstore.cli.main import main; "
            "main(['run', '--text']); main(['run', '--hot', '1', '--help']); "
            "sys.exit('torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

    def test_the_console_script(self) -> None:
        script = Path(sys.executable).with_name("kvstore")
        if not script.exists():
            pytest.skip("the package is not installed")
        ran = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
        assert ran.stdout.startswith("kvstore ")

    def test_ascii_output(self, weights: Path, book: Path) -> None:
        ran = subprocess.run(
            self.command(weights, book),
            env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
            capture_output=True,
            check=True,
        )
        assert ran.stdout.isascii()
        assert json.dumps(ran.stderr.decode()) == '""'
