"""Waves cover every group once, in order, and fill what room there is."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.waves import cut_waves

selections = st.integers(1, 5).flatmap(
    lambda width: st.lists(
        st.lists(st.integers(0, 12), min_size=width, max_size=width), min_size=1, max_size=60
    )
)


def slow_waves(selection, room):
    start = 0
    while start < len(selection):
        seen = set(selection[start])
        stop = start + 1
        while stop < len(selection) and len(seen | set(selection[stop])) <= room:
            seen |= set(selection[stop])
            stop += 1
        yield slice(start, stop), len(seen)
        start = stop


@given(selections, st.integers(1, 12), st.sampled_from([1, 2, 16]))
def test_waves_are_the_obvious_greedy_ones(selection, room, least):
    waves = list(cut_waves(np.array(selection), room, least))
    assert waves == list(slow_waves(selection, room))


def test_a_group_that_does_not_fit_comes_alone():
    selection = np.array([[1, 2], [3, 4], [1, 1]])
    assert list(cut_waves(selection, 1)) == [
        (slice(0, 1), 2),
        (slice(1, 2), 2),
        (slice(2, 3), 1),
    ]


def test_no_groups():
    assert list(cut_waves(np.empty((0, 3), np.int64), 4)) == []
    assert list(cut_waves(np.empty((2, 0), np.int64), 4)) == [(slice(0, 2), 0)]
