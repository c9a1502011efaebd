"""What a fault is, and what is none: owns `Fault`, and the errors that are documented."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# How what has run out of memory says so, where it is turned into an error that is documented.
OUT_OF_MEMORY = ("not enough memory", "llocation error", "allocate memory", "MDB_MAP_FULL: ENOMEM")


MOST_SAID = 1000  # characters of an error, whatever it is about


class Fault(Exception):
    """Something that must not be."""


def check(right: object, otherwise: str) -> None:
    """Raise Fault; a bare assert could be told from one in what is tested by its place only."""
    if not right:
        raise Fault(otherwise)


@contextlib.contextmanager
def refusing(*documented: type[Exception]) -> Iterator[list[Exception]]:
    """Take the documented errors; what is yielded has the one that was raised."""
    raised: list[Exception] = []
    try:
        yield raised
    except documented as error:
        if any(words in str(error) for words in OUT_OF_MEMORY):
            raise Fault(f"out of memory: {error}") from error
        check(len(str(error)) <= MOST_SAID, f"an error of {len(str(error))} characters")
        raised.append(error)
