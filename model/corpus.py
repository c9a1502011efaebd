"""The texts that are learnt from, and a text that is held out."""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_NAME = re.compile(rb"(?<=[a-z,] )[A-Z][a-z]{4,}")
"""A capitalised word inside a sentence: most often somebody's or some place's name."""


class Source(Protocol):
    """Where samples have their text from."""

    names: list[list[NDArray[np.int64]]]
    """By text, the places where each of its names is said."""

    def mentions(self, rng: np.random.Generator, count: int, length: int) -> list[Bytes]:
        """Return `count` excerpts of `length` bytes, in order, that all say the same name.

        Some text must have `names`.
        """

    def window(self, rng: np.random.Generator, length: int) -> Bytes:
        """Return `length` bytes from a random place."""


class Corpus:
    """The texts of a folder (*.txt, *.txt.gz), each as bytes, and where their names are said."""

    def __init__(self, folder: Path, leave_out: tuple[str, ...] = ()) -> None:
        paths = sorted([*folder.glob("*.txt"), *folder.glob("*.txt.gz")])
        self.paths = [p for p in paths if p.name.split(".")[0] not in leave_out]
        if not self.paths:
            raise ValueError(f"no *.txt or *.txt.gz files to train on in {folder}")
        self.texts = [read_text(path) for path in self.paths]
        sizes = np.array([len(t) for t in self.texts], dtype=float)
        if not sizes.any():
            raise ValueError(f"the texts to train on in {folder} are all empty")
        self.share = sizes / sizes.sum()
        self.names: list[list[NDArray[np.int64]]] = [_names(text) for text in self.texts]

    def mentions(self, rng: np.random.Generator, count: int, length: int) -> list[Bytes]:
        """Return `count` excerpts of `length` bytes, in order, that all say the same name.

        Some text must have `names`.
        """
        while True:
            which = rng.choice(len(self.texts), p=self.share)
            if self.names[which]:
                break
        text, names = self.texts[which], self.names[which]
        places = names[rng.integers(len(names))]
        chosen = np.sort(rng.choice(places, count, replace=len(places) < count))
        starts = chosen - rng.integers(0, length - 16, count)
        starts = np.clip(starts, 0, max(0, len(text) - length))
        return [np.resize(text[at : at + length], length) for at in starts]

    def window(self, rng: np.random.Generator, length: int) -> Bytes:
        """Return `length` bytes from a random place, texts weighed by size."""
        text = self.texts[rng.choice(len(self.texts), p=self.share)]
        start = rng.integers(0, max(1, len(text) - length))
        return np.resize(text[start : start + length], length)


def text_named(folder: Path, name: str) -> Path:
    """Return the path of a folder's text. Raises ValueError if there is none."""
    for path in (folder / f"{name}.txt", folder / f"{name}.txt.gz"):
        if path.is_file():
            return path
    raise ValueError(f"no {name}.txt or {name}.txt.gz in {folder}")


def read_text(path: Path) -> Bytes:
    """Read a text file, gzip-compressed or plain, as bytes."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    return np.frombuffer(raw, dtype=np.uint8)


def _names(text: Bytes) -> list[NDArray[np.int64]]:
    """Return the places of each name that is said 4 to 400 times."""
    places: dict[bytes, list[int]] = {}
    for match in _NAME.finditer(text.tobytes()):
        places.setdefault(match.group(), []).append(match.start())
    return [np.array(at) for _, at in sorted(places.items()) if 4 <= len(at) <= 400]


class Excerpts:
    """A held-out text in place of a corpus: windows of it, and no names."""

    def __init__(self, text: Bytes) -> None:
        self.text = text
        self.names: list[list[NDArray[np.int64]]] = []

    def mentions(self, rng: np.random.Generator, count: int, length: int) -> list[Bytes]:
        raise ValueError("this text has no names")

    def window(self, rng: np.random.Generator, length: int) -> Bytes:
        """Return an excerpt of `length` bytes."""
        start = rng.integers(0, len(self.text) - length)
        return self.text[start : start + length]
