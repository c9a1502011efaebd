"""Which block lies in each slot of one memory tier. Owns pins, free slots and the eviction order.

Never touches a byte, and never decides where a block goes: the mover does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.policy import Policy, PolicyFactory, make_policy
from kvstore.residency import Ids
from kvstore.tiers.slots import Slots

_REACH = 4096


class Occupancy:
    """The slots of one memory tier.

    block: int64 [slots], the id of the block, -1 where there is none.
    pins: int32 [slots], how often the slot is in use right now; pinned: bool [slots], pins > 0.
    spare: bool [slots], a copy of a block that lies in the tier above as well: the first to be
        reclaimed, so the policy does not hear of it.
    sole: bool [slots], the block has no copy on disk, so the policy may not choose it.
    early: bool [slots], brought up by a prefetch and not looked up since.

    A slot with a block that is not spare is in the policy's order.
    """

    def __init__(self, slots: int, policy: str | PolicyFactory) -> None:
        self.slots = slots
        self.block = np.full(slots, -1, np.int64)
        self.pins = np.zeros(slots, np.int32)
        self.pinned = np.zeros(slots, bool)
        self.spare = np.zeros(slots, bool)
        self.sole = np.zeros(slots, bool)
        self.early = np.zeros(slots, bool)
        self.policy: Policy = make_policy(policy, slots)
        self._make_policy = policy
        # The lowest slots lie on top of the stack.
        self._free = np.arange(slots - 1, -1, -1, dtype=np.int64)
        self.free_count = slots
        self._hand = 0

    @property
    def used(self) -> int:
        """Slots that are not free."""
        return self.slots - self.free_count

    @property
    def free(self) -> Slots:
        """The free slots; a view."""
        return self._free[: self.free_count]

    def take_free(self, n: int) -> Slots:
        """At most n free slots, no longer free."""
        n = min(n, self.free_count)
        slots: Slots = self._free[self.free_count - n : self.free_count][::-1].copy()
        self.free_count -= n
        return slots

    def give_back(self, slots: Slots) -> None:
        """Make these slots free. Their blocks, if any, are forgotten, by the policy too already."""
        self.block[slots] = -1
        self.spare[slots] = False
        self.sole[slots] = False
        self.early[slots] = False
        self._free[self.free_count : self.free_count + len(slots)] = slots
        self.free_count += len(slots)

    def pin(self, slots: Slots) -> None:
        """Hold distinct slots in place."""
        self.pins[slots] += 1
        self.pinned[slots] = True

    def unpin(self, slots: Slots) -> None:
        """Let go of distinct slots, once."""
        self.pins[slots] -= 1
        self.pinned[slots] = self.pins[slots] > 0

    def victims(self, count: int, kept: NDArray[np.bool_]) -> Slots:
        """At most `count` victims, in order, no longer in the policy's order.

        kept: bool [slots], those that may not be chosen.
        """
        chosen = self.policy.victims(count, kept)
        if kept[chosen].any():
            raise RuntimeError(
                f"the policy {type(self.policy).__name__} chose a slot that it was told to keep"
            )
        return chosen

    def next_spare(self, n: int) -> Slots:
        """At most n spare slots that are not pinned. Whoever was passed longest ago comes first."""
        found: list[Slots] = []
        start, left = self._hand, self.slots
        while n > 0 and left > 0:
            # A few blocks of a million need not look at a million slots.
            stop = min(start + max(_REACH, 8 * n), start + left, self.slots)
            part = start + np.flatnonzero(self.spare[start:stop] & ~self.pinned[start:stop])[:n]
            found.append(part)
            n -= len(part)
            left -= stop - start
            start = int(part[-1]) + 1 if n == 0 else stop % self.slots
        self._hand = start % max(1, self.slots)
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def rebuild(self, ids: Ids, slots: Slots) -> None:
        """Start over with these blocks in these slots; the order of eviction is lost.

        Pins stay; a pinned slot without a block is not free.
        """
        self.block[:] = -1
        self.block[slots] = ids
        self.pinned[:] = self.pins > 0
        self.spare[:] = False
        self.sole[:] = False
        self.early &= self.block >= 0
        free = np.flatnonzero((self.block < 0) & ~self.pinned)[::-1]
        self._free[: len(free)] = free
        self.free_count = len(free)
        self.policy = make_policy(self._make_policy, self.slots)
