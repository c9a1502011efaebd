"""Which streams a call means: a slice, or numbers in any order."""

from __future__ import annotations

from collections.abc import Sequence


def stream_numbers(streams: slice | Sequence[int], total: int) -> list[int]:
    """Return the numbers of the streams meant, of `total`. ValueError for one that is not there.

    ValueError too for one that is named twice.
    """
    if isinstance(streams, slice):
        return list(range(*streams.indices(total)))
    numbers = [int(stream) for stream in streams]
    for number in numbers:
        if not 0 <= number < total:
            raise ValueError(f"stream {number} is not one of 0 to {total - 1}")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"streams {numbers} name one twice")
    return numbers
