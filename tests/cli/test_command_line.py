"""Wrong command lines and bad input: one line on stderr, the exit code, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kvstore as package
from kvstore.cli import main as entry
from kvstore.cli import run as run_command
from kvstore.errors import KVStoreError, StoreFullError

Kvstore = Callable[..., Any]

COMMANDS = ("run", "demo", "ask", "chat", "contexts", "verify")
OPTIONS = (
    *("--model", "--store", "--hot", "--warm", "--cold", "--device", "--index", "--policy"),
    *("--top-k", "--max-new-tokens", "--temperature", "--top-p", "--stop", "--seed"),
    *("--trace", "--json"),
)


def refused(ran: Any, command: str, *says: str) -> None:
    """Assert exit code 2 with one line on stderr that says this."""
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith(f"kvstore {command}".rstrip() + ": error: ")
    assert ran.err.count("\n") == 1
    assert ran.err.endswith("\n")
    for part in says:
        assert part in ran.err


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_has_an_example(kvstore: Kvstore, argv: list[str]) -> None:
    ran = kvstore(*argv)
    assert ran.code == 0
    assert ran.err == ""
    assert re.search(r"examples?:\s+kvstore ", ran.out)
    assert max(map(len, ran.out.splitlines())) <= 96


def test_help_names_every_option_of_both_commands(kvstore: Kvstore) -> None:
    for command in ("run", "demo"):
        text = kvstore(command, "--help").out
        for option in OPTIONS:
            assert f"  {option}" in text, option


def test_version(kvstore: Kvstore) -> None:
    assert kvstore("--version") == (0, f"kvstore {package.__version__}\n", "")
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{package.__version__}"\n' in project


@pytest.mark.parametrize(
    ("argv", "command", "says"),
    [
        ([], "", "COMMAND"),
        (["fly"], "", "'fly'"),
        (["run"], "run", "--text"),
        (["run", "--text", "x"], "run", "--prompt"),
        (["run", "--text", "x", "--prompt", "y", "--context", "z"], "run", "--store DIR"),
        (["ask", "somewhere"], "ask", "NAME, --prompt"),
        (["ask", "nowhere", "x", "--prompt", "y"], "ask", "nowhere"),
        (["chat", "nowhere", "x"], "chat", "nowhere"),
        (["verify", "nowhere"], "verify", "nowhere"),
        (["contexts"], "contexts", "DIR"),
        (["contexts", "nowhere"], "contexts", "nowhere"),
        (["contexts", "nowhere", "fly"], "contexts", "'fly'"),
        (["contexts", "nowhere", "fork", "a"], "contexts", "NEW"),
        (["demo", "--jso"], "demo", "--jso"),
        (["demo", "extra"], "demo", "extra"),
        (["run", "--text", "x", "--prompt", ""], "run", "--prompt"),
        (["run", "--text", "x", "--prompt", "\udcff"], "run", "UTF-8"),
        (["demo", "--tokens", "many"], "demo", "'many'"),
        (["demo", "--tokens", "0"], "demo", "--tokens"),
        (["demo", "--tokens", "20"], "demo", "20 tokens are too few"),
        (["demo", "--depth", "1.5"], "demo", "'1.5' is not a number from 0 to 1"),
        (["demo", "--depth", "-0.1"], "demo", "--depth"),
        (["demo", "--depth", "nan"], "demo", "--depth"),
        (["demo", "--top-k", "0"], "demo", "--top-k"),
        (["demo", "--hot", "64 parsecs"], "demo", "hot: "),
        (["demo", "--hot", "0"], "demo", "hot: "),
        (["demo", "--warm", "-1"], "demo", "warm: "),
        (["demo", "--cold", "some"], "demo", "cold: "),
        (["demo", "--index", "tree"], "demo", "'tree'"),
        (["demo", "--policy", "fifo"], "demo", "'fifo'"),
        (["demo", "--seed", "-1"], "demo", "--seed"),
        (["demo", "--max-new-tokens", "0"], "demo", "--max-new-tokens"),
        (["demo", "--temperature", "hot"], "demo", "--temperature"),
        (["demo", "--temperature=-1"], "demo", "temperature"),
        (["demo", "--top-p", "0"], "demo", "top-p"),
        (["demo", "--top-p", "1.1"], "demo", "--top-p"),
        (["demo", "--device", "tpu"], "demo", "'tpu'"),
        (["demo", "--model", "gpt-5"], "demo", "'gpt-5'"),
        (["demo", "--model", "a\nb"], "demo", "model"),
        (["demo", "--cold", "none", "--store", "x"], "demo", "would stay empty"),
        (["demo", "--store", ""], "demo", "empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage(kvstore: Kvstore, argv: list[str], command: str, says: str) -> None:
    refused(kvstore(*argv), command, says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(kvstore: Kvstore, weights: Path) -> None:
    refused(kvstore("demo", "--model", weights, "--device", "cuda"), "demo", "cuda", "auto")


class TestInput:
    """Paths that cannot be used."""

    @pytest.fixture
    def book(self, tmp_path: Path) -> Path:
        path = tmp_path / "book.txt"
        path.write_text("It was a dark night. " * 9)
        return path

    def test_a_text_that_is_not_there(self, kvstore: Kvstore, tmp_path: Path) -> None:
        path = tmp_path / "none.txt"
        refused(kvstore("run", "--text", path, "--prompt", "x"), "run", str(path), "No such file")

    def test_a_directory_given_as_text(self, kvstore: Kvstore, tmp_path: Path) -> None:
        ran = kvstore("run", "--text", tmp_path, "--prompt", "x")
        refused(ran, "run", str(tmp_path), "directory")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
    def test_a_text_that_may_not_be_read(self, kvstore: Kvstore, book: Path) -> None:
        book.chmod(0)
        refused(kvstore("run", "--text", book, "--prompt", "x"), "run", str(book), "ermission")

    def test_the_second_text_counts_too(self, kvstore: Kvstore, book: Path) -> None:
        ran = kvstore("run", "--text", book, "--text", "none.txt", "--prompt", "x")
        refused(ran, "run", "none.txt")

    def test_an_empty_text(self, kvstore: Kvstore, tmp_path: Path) -> None:
        path = tmp_path / "empty.txt"
        path.touch()
        refused(kvstore("run", "--text", path, "--prompt", "x"), "run", "empty")

    def test_something_else_given_as_model(self, kvstore: Kvstore, book: Path) -> None:
        ran = kvstore("run", "--text", book, "--prompt", "x", "--model", book)
        refused(ran, "run", str(book), "not a checkpoint")

    def test_a_store_that_is_a_file(self, kvstore: Kvstore, book: Path, weights: Path) -> None:
        given = book.read_bytes()
        ran = kvstore("run", "--text", book, "--prompt", "x", "--model", weights, "--store", book)
        refused(ran, "run", str(book))
        assert book.read_bytes() == given

    def test_a_store_that_cannot_be_made(self, kvstore: Kvstore, book: Path, weights: Path) -> None:
        place = book / "store"
        ran = kvstore("run", "--text", book, "--prompt", "x", "--model", weights, "--store", place)
        refused(ran, "run", str(place))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_store_that_cannot_be_written(
        self, kvstore: Kvstore, book: Path, weights: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "closed"
        place.mkdir(mode=0o500)
        ran = kvstore("run", "--text", book, "--prompt", "x", "--model", weights, "--store", place)
        refused(ran, "run", str(place))

    def test_a_trace_that_cannot_be_written(
        self, kvstore: Kvstore, book: Path, weights: Path, temporary: Path
    ) -> None:
        trace = book / "trace.kvt"
        ran = kvstore("run", "--text", book, "--prompt", "x", "--model", weights, "--trace", trace)
        refused(ran, "run", str(trace))
        assert not list(temporary.iterdir())

    def test_a_hot_tier_without_room_for_a_block(
        self, kvstore: Kvstore, book: Path, weights: Path, temporary: Path
    ) -> None:
        ran = kvstore("run", "--text", book, "--prompt", "x", "--model", weights, "--hot", "100")
        refused(ran, "run", "hot", "block")
        assert not list(temporary.iterdir())


class TestEndings:
    """How what happens in the middle of the work is told."""

    @pytest.fixture(autouse=True)
    def usual_signals(self) -> Iterator[None]:
        """Whoever runs the tests in the background ignores SIGINT, and so would they."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    @pytest.fixture
    def failing(self, kvstore: Kvstore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
        text = tmp_path / "text"
        text.write_text("x")

        def run(error: BaseException | Callable[[], object]) -> Any:
            def main(args: object) -> int:
                if isinstance(error, BaseException):
                    raise error
                error()
                return 0

            monkeypatch.setattr(run_command, "main", main)
            return kvstore("run", "--text", text, "--prompt", "x")

        return run

    @pytest.mark.parametrize("error", [StoreFullError("no\nroom"), KVStoreError("no room")])
    def test_what_could_not_be_done(self, failing, error: KVStoreError) -> None:
        assert failing(error) == (1, "", "kvstore run: error: no room\n")

    def test_no_memory(self, failing) -> None:
        said = "kvstore run: error: not enough memory with --hot 64MiB and --warm 256MiB\n"
        assert failing(MemoryError()) == (1, "", said)

    def test_ctrl_c(self, failing) -> None:
        before = signal.getsignal(signal.SIGINT)
        ran = failing(lambda: signal.raise_signal(signal.SIGINT))
        assert ran == (130, "", "kvstore run: interrupted\n")
        assert signal.getsignal(signal.SIGINT) is before

    def test_sigterm(self, failing) -> None:
        before = signal.getsignal(signal.SIGTERM)
        ran = failing(lambda: signal.raise_signal(signal.SIGTERM))
        assert ran == (143, "", "kvstore run: interrupted\n")
        assert signal.getsignal(signal.SIGTERM) is before

    def test_a_second_signal_does_not_stop_the_tidying(self, failing) -> None:
        tidied = []

        def work() -> None:
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                tidied.append(True)

        assert failing(work).code == 130
        assert tidied

    def test_a_signal_that_was_ignored_stays_ignored(self, failing) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            assert failing(lambda: signal.raise_signal(signal.SIGINT)).code == 0
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_bug_keeps_its_traceback(self, failing) -> None:
        with pytest.raises(ZeroDivisionError):
            failing(lambda: 1 / 0)
        with pytest.raises(ValueError, match="ours"):
            failing(ValueError("a bug of ours"))


def test_threads_sleep_while_they_wait_unless_told_otherwise(
    kvstore: Kvstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    kvstore("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    kvstore("--version")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_the_entry_can_be_called_from_any_thread(kvstore: Kvstore) -> None:
    from threading import Thread

    codes: list[int] = []
    thread = Thread(target=lambda: codes.append(entry.main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
