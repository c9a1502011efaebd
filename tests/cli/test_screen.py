"""The answer as it is shown: whole characters, and nothing that commands a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from kvstore.cli.screen import Screen

PIECES = [bytes([c]) for c in b"\x1b[2J" + "ą\n".encode() + b"\xff\xc4"]


def test_bytes_become_characters_as_soon_as_they_are_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown: list[str] = []

    def pieces():
        for piece in PIECES:
            yield piece
            shown.append(capsys.readouterr().out)

    assert Screen(as_json=False).answer(pieces()) == "\x1b[2Ją\n\ufffd\ufffd"
    assert shown == ["\x1b", "[", "2", "J", "", "ą", "\n", "\ufffd", ""]
    assert capsys.readouterr().out == "\ufffd\n"


def test_a_terminal_is_not_commanded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert Screen(as_json=False).answer(PIECES) == "\x1b[2Ją\n\ufffd\ufffd"
    assert capsys.readouterr().out == "\ufffd[2Ją\n\ufffd\ufffd\n"


def test_each_character_is_shown_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Out(io.StringIO):
        shown = ""

        def flush(self) -> None:
            self.shown = self.getvalue()

    out = Out()
    monkeypatch.setattr(sys, "stdout", out)
    seen: list[str] = []

    def pieces():
        for piece in (b"a", b"b"):
            yield piece
            seen.append(out.shown)

    Screen(as_json=False).answer(pieces())
    assert seen == ["a", "ab"]
    assert out.shown == "ab\n"


def test_json_keeps_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=True)
    screen.say("words")
    assert screen.answer(PIECES) == "\x1b[2Ją\n\ufffd\ufffd"
    assert capsys.readouterr() == ("", "")


def test_brackets_are_words(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=False).say("[bold]x[/bold]")
    assert capsys.readouterr().out == "[bold]x[/bold]\n"
