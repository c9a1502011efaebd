"""Slots of a tier: free ones, spare ones, pins."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.occupancy import Occupancy


def test_free_slots_come_lowest_first_and_come_back():
    tier = Occupancy(4, "lru")
    assert tier.take_free(3).tolist() == [0, 1, 2]
    assert tier.take_free(3).tolist() == [3]
    assert (tier.used, tier.take_free(1).tolist()) == (4, [])
    tier.give_back(np.array([2, 0]))
    assert sorted(tier.take_free(9).tolist()) == [0, 2]


def test_pins_nest():
    tier = Occupancy(3, "lru")
    tier.pin(np.array([0, 2]))
    tier.pin(np.array([2]))
    assert (tier.pinned.tolist(), tier.pinned_count) == ([True, False, True], 2)
    tier.unpin(np.array([0, 2]))
    assert (tier.pinned.tolist(), tier.pinned_count) == ([False, False, True], 1)
    tier.unpin(np.array([2]))
    assert (tier.pinned.any(), tier.pinned_count) == (False, 0)


@given(
    st.lists(st.sampled_from(["spare", "pinned", "other"]), max_size=30),
    st.lists(st.integers(0, 9), max_size=8),
)
def test_spare_slots_go_round(kinds, counts):
    """Each call gives what there is, from where the last one stopped."""
    tier = Occupancy(len(kinds), "lru")
    tier.spare[:] = [kind != "other" for kind in kinds]
    tier.pins[:] = [kind == "pinned" for kind in kinds]
    tier.pinned[:] = tier.pins > 0
    spare = [slot for slot, kind in enumerate(kinds) if kind == "spare"]
    last = -1
    for n in counts:
        ahead = [slot for slot in spare if slot > last] + [s for s in spare if s <= last]
        found = tier.next_spare(n).tolist()
        assert found == ahead[:n]
        if found:
            last = found[-1]
            if len(found) < n:
                return
