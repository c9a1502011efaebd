"""What is compiled: see kvstore/native/."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# search.cpp

class Codes:
    def __init__(
        self,
        landmarks: NDArray[np.float32],  # [streams, width, dim], kept alive
        bases: list[int],  # of each stream: the number of the landmark in row 0
    ) -> None: ...
    def follow(self, other: Codes) -> None: ...
    def encode(self, stream: int, first: int, last: int) -> None: ...
    @property
    def nbytes(self) -> int: ...

def top_k(
    pages: list[Codes],
    streams: Sequence[int],
    counts: list[int],  # of each stream
    queries: int,  # the address of float32 [streams, m, dim]
    m: int,
    dim: int,
    k: int,
    before: NDArray[np.int64] | int | None,  # [m]
    start: int,
    plain: bool = False,  # by the code that every processor runs
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...  # numbers, scores [streams, m, k]
def gather(
    pages: list[Codes],
    streams: Sequence[int],
    counts: list[int],
    blocks: int,  # the address of int64 of `shape`, [streams, ...]
    shape: Sequence[int],
    dim: int,
) -> NDArray[np.float32]: ...  # [*shape, dim]
def finite(numbers: int, count: int) -> bool: ...  # the address of float32
