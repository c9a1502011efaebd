"""Cutting a large selection into waves that fit into the hot tier. Owns nothing; pure."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def cut_waves(
    selection: NDArray[np.int64], room: int, least: int = 16
) -> Iterator[tuple[slice, int]]:
    """Cut groups into consecutive waves, each as long as its distinct ids fit.

    selection: int64 [groups, ids a group]; room: blocks. Yields each wave's slice of groups and its
    number of distinct ids. A group that does not fit by itself comes alone, with a number above
    `room`. least: groups to look at in one go at first.
    """
    groups, width = selection.shape
    # How far back the same id came last, as a place in the flat selection: an id is new to a wave
    # if that place lies before the wave.
    flat = selection.ravel()
    order = np.argsort(flat, kind="stable")
    same = flat[order[1:]] == flat[order[:-1]]
    places = np.full(len(flat), -1, np.int64)
    places[order[1:][same]] = order[:-1][same]
    before = places.reshape(groups, width)
    start, reach = 0, least
    while start < groups:
        new = before[start : start + reach] < start * width
        distinct = new.sum(axis=1).cumsum()
        fitting = int(np.searchsorted(distinct, room, side="right"))
        if fitting == len(distinct) and start + reach < groups:
            reach *= 2
            continue
        taken = max(fitting, 1)
        yield slice(start, start + taken), int(distinct[taken - 1])
        start += taken
        reach = max(2 * taken, least)
