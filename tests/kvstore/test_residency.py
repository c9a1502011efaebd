"""Ids: given out once, found where they are, repeated or not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.residency import ABSENT, COLD, HOT, WARM, Residency

ids = st.lists(st.integers(-5, 3000), max_size=40)


@given(ids)
def test_what_is_found_keeps_the_order_of_first_appearance(asked):
    found, tiers, counts = Residency().find(np.array(asked, np.int64))
    assert found.tolist() == list(dict.fromkeys(asked))
    assert len(tiers) == len(found)
    assert counts == (0, 0, 0, len(found))


@given(ids, ids, ids, ids)
def test_tiers_are_the_highest_that_has_the_block(asked, hot, warm, cold):
    residency = Residency()
    residency.allocate(2000)
    for table, members in (
        (residency.hot, hot),
        (residency.warm, warm),
        (residency.cold, cold),
    ):
        for block in members:
            if 0 <= block < 2000:
                table[block] = 0  # as good a place as any
    found, tiers, counts = residency.find(np.array(asked, np.int64))
    assert counts == tuple(np.bincount(tiers, minlength=4))
    for block, tier in zip(found.tolist(), tiers, strict=True):
        inside = 0 <= block < 2000
        expected = ABSENT
        for members, value in ((cold, COLD), (warm, WARM), (hot, HOT)):
            if inside and block in members:
                expected = value
        assert tier == expected


@given(st.lists(st.tuples(st.integers(0, 900), st.booleans()), max_size=12))
def test_an_id_is_given_out_once(requests):
    residency = Residency()
    taken = set()
    for n, back in requests:
        new = residency.allocate(n)
        assert len(new) == n
        assert not taken & set(new.tolist())
        assert new.max(initial=0) < len(residency.hot)
        if back:
            residency.recycle(new)
        else:
            taken |= set(new.tolist())
    assert len(taken) + len(residency.idle()) == residency.issued


def test_recycled_ids_come_last():
    residency = Residency()
    first = residency.allocate(10)
    residency.recycle(first)
    assert residency.allocate(1000).min() == 10
    assert residency.allocate(20).tolist() == [*range(1010, 1024), *range(6)]


def test_what_is_restored_is_not_given_out():
    residency = Residency()
    kept = np.array([3, 0, 5000])
    residency.restore(kept, np.array([30, 0, 50]))
    assert residency.tiers(np.array([0, 1, 3, 5000])).tolist() == [COLD, ABSENT, COLD, COLD]
    assert residency.present().tolist() == [0, 3, 5000]
    new = residency.allocate(9000)
    assert not set(new.tolist()) & set(kept.tolist())
    assert len(set(new.tolist())) == 9000
