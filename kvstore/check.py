"""What must always hold of a store's tables. Owns the assertions; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvstore.occupancy import Occupancy
from kvstore.residency import Ids, Residency
from kvstore.tiers.slots import Slots


def check_tables(
    residency: Residency,
    hot: Occupancy,
    warm: Occupancy,
    *,
    writes: Sequence[tuple[Ids, Slots]],
    reads: Sequence[Ids],
    disk: bool,
    live: int,
    unsaved: int,
    condemned: int,
    queued: Ids,
) -> None:
    """Raise AssertionError where a store's tables contradict one another.

    writes: ids and warm slots of each batch being written. reads: ids of each batch being read
    ahead. live, unsaved, condemned: the store's counts. queued: ids waiting to be written.
    """
    for name, tier, table in (("hot", hot, residency.hot), ("warm", warm, residency.warm)):
        ids = np.flatnonzero(table >= 0)
        assert (table < tier.slots).all(), f"{name}: a slot beyond the tier"
        assert (tier.block[table[ids]] == ids).all(), f"{name}: the tables differ"
        slots = np.flatnonzero(tier.block >= 0)
        assert len(slots) == len(ids), f"{name}: {len(slots)} slots hold {len(ids)} blocks"
        free = tier._free[: tier.free_count]
        assert len(np.unique(free)) == len(free), f"{name}: a slot is free twice"
        assert (tier.block[free] < 0).all(), f"{name}: a free slot holds a block"
        assert not tier.pinned[free].any(), f"{name}: a free slot is pinned"
        assert (tier.pinned == (tier.pins > 0)).all(), f"{name}: pins differ"
        assert (tier.pins >= 0).all(), f"{name}: unpinned once too often"
        neither = tier.slots - tier.free_count - len(slots)
        leaving = np.count_nonzero((tier.block < 0) & tier.pinned)
        assert neither == leaving, f"{name}: {neither} slots are neither free nor taken"
        ordered = np.sort(tier.policy.peek(tier.slots, np.zeros(tier.slots, bool)))
        expected = np.flatnonzero((tier.block >= 0) & ~tier.spare)
        assert np.array_equal(ordered, expected), f"{name}: the policy orders other slots"

    assert not hot.spare.any(), "hot: a spare copy"
    assert not hot.sole.any(), "hot: marked as having no copy on disk"
    assert (hot.block[hot.early] >= 0).all(), "hot: an empty slot came early"
    slots = np.flatnonzero(warm.block >= 0)
    blocks = warm.block[slots]
    assert (warm.spare[slots] == (residency.hot[blocks] >= 0)).all(), "warm: spare is wrong"
    assert (warm.sole[slots] == (residency.cold[blocks] < 0)).all(), "warm: sole is wrong"
    pins = np.zeros(warm.slots, np.int64)
    for _, written in writes:
        pins[written] += 1
    assert (warm.pins == pins).all(), "warm: pinned, but not being written"
    assert pins.max(initial=0) <= 1, "warm: a block is being written twice"

    present = residency.present()
    assert len(present) == live, f"{len(present)} blocks lie in a tier, {live} are counted"
    idle = np.concatenate([np.empty(0, np.int64), *residency._recycled])
    assert len(np.unique(idle)) == len(idle), "an id is free twice"
    deleted = sum(int((warm.block[at] != ids).sum()) for ids, at in writes)
    assert deleted == condemned, f"{deleted} were deleted while written, {condemned} are counted"
    total = live + len(idle) + condemned
    assert total == residency._next, f"{total} ids are accounted for of {residency._next}"
    assert not np.isin(idle, present).any(), "the id of a block is free"
    reading = np.concatenate([np.empty(0, np.int64), *reads])
    assert np.array_equal(np.flatnonzero(residency.reading), np.sort(reading)), "reading is wrong"

    if disk:
        without = present[residency.cold[present] < 0]
        assert len(without) == unsaved, f"{len(without)} blocks unsaved, {unsaved} counted"
        assert unsaved + condemned <= warm.slots, "more blocks are unsaved than warm could hold"
        writing = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in writes)])
        assert np.isin(without, np.concatenate((queued, writing))).all(), "nobody will write it"
    else:
        assert (residency.cold < 0).all(), "on disk, without a disk tier"
        assert live <= hot.slots + warm.slots
