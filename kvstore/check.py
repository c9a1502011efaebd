"""What must always hold of a store's tables. Owns the assertions; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.mover import Mover
from kvstore.occupancy import Occupancy
from kvstore.residency import Ids
from kvstore.tiers.slots import Slots

_NONE = np.empty(0, np.int64)


def check_mover(
    mover: Mover,
    writing: Sequence[tuple[Ids, Slots]],
    waiting: Ids | None,
    reading: Sequence[Ids],
) -> None:
    """Raise AssertionError where tables contradict one another.

    writing: ids and warm slots of each batch being written. waiting: ids in line for that, None
    where nobody writes behind. reading: ids of each batch being read ahead.
    """
    residency, hot, warm = mover.residency, mover.hot, mover.warm
    _check_tier("hot", hot, residency.hot)
    _check_tier("warm", warm, residency.warm)
    assert not hot.spare.any(), "hot: a spare copy"
    assert not hot.sole.any(), "hot: marked as having no copy on disk"
    assert (hot.block[hot.early] >= 0).all(), "hot: an empty slot came early"
    assert mover.early == hot.early.sum(), "hot: early is miscounted"
    slots = np.flatnonzero(warm.block >= 0)
    blocks = warm.block[slots]
    assert np.array_equal(warm.spare[slots], residency.hot[blocks] >= 0), "warm: spare is wrong"
    assert np.array_equal(warm.sole[slots], residency.cold[blocks] < 0), "warm: sole is wrong"
    pins = np.zeros(warm.slots, np.int64)
    for _, written in writing:
        pins[written] += 1
    assert np.array_equal(warm.pins, pins), "warm: pinned, but not being written"
    assert pins.max(initial=0) <= 1, "warm: a block is being written twice"

    present = residency.present()
    assert len(present) == mover.live, f"{len(present)} blocks have a place, not {mover.live}"
    idle = residency.idle()
    free = np.zeros(len(residency.hot), bool)
    free[idle] = True
    assert np.count_nonzero(free) == len(idle), "an id is free twice"
    assert not free[present].any(), "the id of a block is free"
    removed = sum(int((warm.block[at] != ids).sum()) for ids, at in writing)
    total = mover.live + len(idle) + removed
    assert total == residency.issued, f"{total} ids are accounted for of {residency.issued}"
    on_the_way = np.sort(np.concatenate([_NONE, *reading]))
    assert np.array_equal(np.flatnonzero(residency.reading), on_the_way), "reading is wrong"

    if mover.disk is None:
        assert (residency.cold < 0).all(), "on disk, without a disk tier"
        assert mover.live <= hot.slots + warm.slots, "more blocks than slots"
        return
    saved = residency.cold >= 0
    extra = mover.disk.block_count - saved.sum() - mover.abandoned
    assert extra == 0 or (writing and extra > 0), f"{extra} blocks on disk are in no table"
    unsaved = present[~saved[present]]
    assert len(unsaved) == mover.unsaved, f"{len(unsaved)} unsaved, not {mover.unsaved}"
    if waiting is not None:
        will_be = np.concatenate([waiting, *(ids for ids, _ in writing)])
        assert np.isin(unsaved, will_be).all(), "nobody will write it"


def _check_tier(name: str, tier: Occupancy, table: NDArray[np.int32]) -> None:
    ids = np.flatnonzero(table >= 0)
    assert (table < tier.slots).all(), f"{name}: a slot beyond the tier"
    assert np.array_equal(tier.block[table[ids]], ids), f"{name}: the tables differ"
    held = tier.block >= 0
    assert held.sum() == len(ids), f"{name}: {held.sum()} slots hold {len(ids)} blocks"
    free = np.zeros(tier.slots, bool)
    free[tier.free] = True
    assert np.count_nonzero(free) == len(tier.free), f"{name}: a slot is free twice"
    assert not (held & free).any(), f"{name}: a free slot holds a block"
    assert not (tier.pinned & free).any(), f"{name}: a free slot is pinned"
    assert np.array_equal(tier.pinned, tier.pins > 0), f"{name}: pins differ"
    assert tier.pinned_count == tier.pinned.sum(), f"{name}: pins are miscounted"
    assert (tier.pins >= 0).all(), f"{name}: unpinned once too often"
    lost = ~(held | tier.pinned | free)
    assert not lost.any(), f"{name}: slots {np.flatnonzero(lost)} are neither free nor taken"
    order = tier.policy.peek(tier.slots, np.zeros(tier.slots, bool))
    ordered = np.zeros(tier.slots, bool)
    ordered[order] = True
    assert np.array_equal(ordered, held & ~tier.spare), f"{name}: the policy orders other slots"
    assert np.count_nonzero(ordered) == len(order), f"{name}: the policy has a slot twice"
