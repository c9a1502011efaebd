"""Texts that every machine has, with a pass key hidden in them. Never trained on."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from model import keys
from model.keys import QUESTIONS, needle

_TESTS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Haystack:
    """text: the bytes with the needle in them; number: the pass key; question: how to ask."""

    text: bytes
    number: int
    question: str = QUESTIONS[0]

    def right(self, answer: str) -> bool:
        """Say whether an answer gives the key: its first digits, all five, are the number.

        An answer that first says whose key it is (`keys.answer`) gives it after that.
        """
        if answer.startswith(" that of "):
            answer = answer.partition(" is")[2]
        digits = answer.lstrip()[:5]
        return digits == str(self.number)


def library_source() -> list[Path]:
    """Return the source files of Python's standard library without its tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _TESTS & set(path.relative_to(root).parts[:-1]) and path.stat().st_size
    )


def source_text(length: int, seed: int) -> bytes:
    """Return `length` bytes of library source: files in a seeded order, then in other orders."""
    files = library_source()
    if not files:
        raise ValueError("this Python has no standard library source on disk to read")
    rng = np.random.default_rng([seed, 0])

    def endless() -> Iterator[bytes]:
        while True:
            for i in rng.permutation(len(files)):
                yield files[i].read_bytes()

    return _first(endless(), length)


def random_words(length: int, seed: int) -> bytes:
    """Return `length` bytes of random lower-case words."""
    rng = np.random.default_rng([seed, 1])
    letters = rng.integers(97, 123, length, dtype=np.uint8)
    letters[rng.random(length) < 0.18] = ord(" ")
    return letters.tobytes()


def random_bytes(length: int, seed: int) -> bytes:
    """Return `length` random bytes."""
    return np.random.default_rng([seed, 2]).bytes(length)


def other_letters(length: int, seed: int) -> bytes:
    """Return `length` bytes of random words in Georgian letters (UTF-8)."""
    rng = np.random.default_rng([seed, 3])
    points = 0x10D0 + rng.integers(0, 33, length // 3 + 1)
    points[rng.random(len(points)) < 0.16] = ord(" ")
    text = "".join(map(chr, points)).encode()
    return _first(iter(lambda: text, None), length)


def excerpt(text: bytes) -> Callable[[int, int], bytes]:
    """Return a filler that reads a given text from a seeded place on, again and again."""

    def filler(length: int, seed: int) -> bytes:
        start = int(np.random.default_rng([seed, 4]).integers(len(text)))
        turned = text[start:] + text[:start]
        return _first(iter(lambda: turned, None), length)

    return filler


def hide(
    filler: Callable[[int, int], bytes],
    tokens: int,
    seed: int,
    depth: float | None = None,
    phrase: Callable[[int], str] = needle,
    question: str = QUESTIONS[0],
) -> Haystack:
    """Hide a pass key in `tokens` bytes of filler, needle counted in.

    depth: share of the filler before the needle, 0 to 1; None: a random one.
    Raises ValueError if the needle does not fit or the depth is out of range.
    """
    rng = np.random.default_rng([seed, 5])
    number = int(rng.integers(10000, 100000))
    chance = float(rng.random())
    depth = chance if depth is None else depth
    if not 0 <= depth <= 1:
        raise ValueError(f"depth {depth:g} must be between 0 (the beginning) and 1 (the end)")
    hidden = phrase(number).encode()
    room = tokens - len(hidden)
    if room < 0:
        raise ValueError(f"{tokens} tokens are too few: the needle alone has {len(hidden)}")
    text = filler(room, seed)
    at = round(room * depth)
    return Haystack(text[:at] + hidden + text[at:], number, question)


def hide_keys(
    filler: Callable[[int, int], bytes], tokens: int, seed: int, count: int, hops: int = 1
) -> tuple[bytes, list[Haystack]]:
    """Hide named pass keys at random places in `tokens` bytes of filler, and nothing else.

    hops: 1, or 2: each name's key is said to be another name's, whose number is said elsewhere.
    Returns the text, and for each name the question and its number (with no text). Raises
    ValueError if the keys do not fit.
    """
    rng = np.random.default_rng([seed, 6])
    names = keys.draw_names(rng, count * hops)
    asked, holding = names[:count], names[-count:]
    numbers = rng.integers(10000, 100000, count).tolist()
    hidden = [keys.say(name, number) for name, number in zip(holding, numbers, strict=True)]
    if hops == 2:
        hidden += [keys.refer(*pair) for pair in zip(asked, holding, strict=True)]
    room = tokens - sum(map(len, hidden))
    if room < 0:
        raise ValueError(f"{tokens} tokens are too few for {count} keys")
    text = filler(room, seed)
    cuts = [0, *sorted(rng.integers(0, room + 1, len(hidden)).tolist()), room]
    order = [hidden[i].encode() for i in rng.permutation(len(hidden))]
    parts = [text[a:b] for a, b in pairwise(cuts)]
    whole = b"".join(part for both in zip(parts, [*order, b""], strict=True) for part in both)
    questions = zip(asked, numbers, strict=True)
    return whole, [Haystack(b"", number, keys.ask(name)) for name, number in questions]


def _first(pieces: Iterator[bytes], length: int) -> bytes:
    taken: list[bytes] = []
    size = 0
    while size < length:
        piece = next(pieces)
        taken.append(piece)
        size += len(piece)
    return b"".join(taken)[:length]
