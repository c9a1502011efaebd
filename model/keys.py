"""Pass keys, without names and with: how they are said, asked for and answered.

Those with names in one hop, or in two: A's key is said to be B's. Owns the words. Where they are
hidden is tasks.py's and haystack.py's business.
"""

from __future__ import annotations

import numpy as np

QUESTIONS = (" What is the pass key? The pass key is", " The pass key is")


def needle(number: int) -> str:
    """Return the sentence that hides a pass key of five digits."""
    return f" The pass key is {number}. Remember it. {number} is the pass key. "


_CONSONANTS = "bdfgjklmnprstvz"
_VOWELS = "aeiou"


def draw_name(rng: np.random.Generator) -> str:
    """Draw a name of two to four syllables, like "velora"."""
    return "".join(
        _CONSONANTS[rng.integers(len(_CONSONANTS))] + _VOWELS[rng.integers(len(_VOWELS))]
        for _ in range(rng.integers(2, 5))
    )


def draw_names(rng: np.random.Generator, count: int) -> list[str]:
    """Draw different names."""
    names: dict[str, None] = {}  # in order
    while len(names) < count:
        names[draw_name(rng)] = None
    return list(names)


def say(name: str, number: int) -> str:
    """Return the sentence that hides a named key of five digits."""
    return f" The pass key of {name} is {number}. Remember it. {number} is the key of {name}. "


def refer(name: str, other: str) -> str:
    """Return the sentence that says where else a key is found: two hops from the question."""
    return f" The pass key of {name} is that of {other}. Remember it. "


def ask(name: str) -> str:
    """Return the question, up to where the number is the answer."""
    return f" What is the pass key of {name}? The pass key of {name} is"


def answer(number: int, other: str | None = None) -> str:
    """Return what follows the question; aloud where the key is another's: whose, and then it."""
    return f" that of {other}. The pass key of {other} is {number}" if other else f" {number}"
