"""Freed memory: kept in one place, and given back to the system where the C library would keep it.

Owns the calls for that. What a context needed while it was open is large, and glibc keeps much of
it, in as many heaps as threads have asked for some: after an hour of opening and closing, a quarter
as much as all that was in use.
"""

from __future__ import annotations

import ctypes
from functools import cache

_ARENA_MAX = -8  # of mallopt, in glibc's malloc.h


def keep_together() -> None:
    """Let threads that start from now on share one heap. Nothing but for glibc."""
    if mallopt := _of_the_c_library("mallopt"):
        mallopt(_ARENA_MAX, 1)


def give_back() -> None:
    """Let the C library return what is free to the system; about 1 ms. Nothing but for glibc."""
    if trim := _of_the_c_library("malloc_trim"):
        trim(0)


@cache
def _of_the_c_library(name: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), name, None)
