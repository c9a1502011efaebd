"""What a person or a program sees of a session: words, progress, answer, figures.

Owns stdout and stderr, and that --json leaves stdout to one line. Never measures or decides.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from kvstore.cli.progress import ReadingProgress
from kvstore.cli.report import Report
from kvstore.cli.session import Session


class Screen:
    """Where a command shows what it does. as_json: only the last line, as JSON."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._console = Console(highlight=False)
        self._progress = Console(stderr=True)

    def say(self, words: str, style: str = "", end: str = "\n") -> None:
        """Print words, a line unless `end` says otherwise."""
        if not self._json:
            self._console.print(Text(words, style=style), soft_wrap=True, end=end)

    def read(self, session: Session, text: bytes) -> None:
        """Let a session read a text while a bar says how far it is."""
        with ReadingProgress(len(text), self._progress, quiet=self._json) as progress:
            session.read(text, lambda tokens: progress.update(tokens, session.fills()))

    def answer(self, pieces: Iterable[bytes]) -> str:
        """Print an answer as it comes and return it; bytes that are not UTF-8 become U+FFFD.

        On a terminal so do control characters: a text could make a model write any.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        careful = sys.stdout.isatty()
        words: list[str] = []

        def write(word: str) -> None:
            words.append(word)
            if self._json or not word:
                return
            if careful:
                word = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in word)
            sys.stdout.write(word)
            sys.stdout.flush()

        for piece in pieces:
            write(decoder.decode(piece))
        write(decoder.decode(b"", final=True))
        if not self._json:
            print(flush=True)
        return "".join(words)

    def converse(self, session: Session, prompt: str, append: bool) -> str:
        """Ask, print the answer as it comes, and where that is wanted keep both."""
        heard = bytearray()

        def pieces() -> Iterable[bytes]:
            for piece in session.ask(prompt):
                heard.extend(piece)
                yield piece

        answer = self.answer(pieces())
        if append:
            session.append(prompt.encode() + bytes(heard))
        return answer

    def report(self, report: Report) -> None:
        """Print the figures."""
        if self._json:
            print(report.to_json())
        else:
            report.show(self._console)
