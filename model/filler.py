"""What needles are hidden in while a model is trained, apart from real text: made-up bytes."""

from __future__ import annotations

import numpy as np

from model.corpus import Bytes

_GRASS = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_ALPHABETS = ((0x3B1, 25), (0x430, 32), (0x5D0, 27), (0x561, 38), (0x3041, 80), (0x4E00, 2000))
_KEYWORDS = (
    "def", "return", "if", "for", "while", "import", "class", "self", "None", "pass", "else",
    "key", "value", "int", "is", "not", "in", "the", "raise", "try", "with", "as", "assert",
)  # fmt: skip


def words(rng: np.random.Generator, length: int) -> Bytes:
    """Random lower-case words."""
    letters = rng.integers(97, 123, length, dtype=np.uint8)
    letters[rng.random(length) < 0.18] = 32
    return letters


def noise(rng: np.random.Generator, length: int) -> Bytes:
    """Random bytes: all of them, or the printable ones."""
    low, high = (0, 256) if rng.random() < 0.5 else (32, 127)
    return rng.integers(low, high, length, dtype=np.uint8)


def foreign(rng: np.random.Generator, length: int) -> Bytes:
    """Random words in the UTF-8 letters of another alphabet."""
    start, size = _ALPHABETS[rng.integers(len(_ALPHABETS))]
    points = start + rng.integers(0, size, length)
    points[rng.random(length) < 0.16] = 32
    text = "".join(map(chr, points)).encode()
    return np.frombuffer(text, dtype=np.uint8)[:length]


def sentences(rng: np.random.Generator, length: int) -> Bytes:
    """The paper's filler: the same few sentences again and again."""
    text = np.frombuffer(_GRASS.encode(), dtype=np.uint8)
    start = rng.integers(len(text))
    return np.resize(np.roll(text, -start), length)


def code(rng: np.random.Generator, length: int) -> Bytes:
    """Made-up program text: indented lines of identifiers, keywords, numbers and signs."""
    out: list[str] = []
    size = 0
    depth = 0
    names = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 10)))) for _ in range(12)]
    signs = (" ", " = ", ".", "(", ")", ", ", "_", ": ", " == ", "[", "]", " + ", '"', "'", " -> ")
    while size < length:
        line = "    " * depth
        for _ in range(rng.integers(1, 9)):
            kind = rng.random()
            if kind < 0.3:
                line += _KEYWORDS[rng.integers(len(_KEYWORDS))]
            elif kind < 0.9:
                line += names[rng.integers(len(names))]
            else:
                line += str(rng.integers(10 ** rng.integers(1, 7)))
            line += signs[rng.integers(len(signs))]
        out.append(line + "\n")
        size += len(line) + 1
        depth = int(np.clip(depth + rng.integers(-1, 2), 0, 4))
    return np.frombuffer("".join(out).encode(), dtype=np.uint8)[:length]
