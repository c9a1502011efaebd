"""Which block lies in each slot of one memory tier. Owns pins, free slots and the eviction order.

Never touches a byte, and never decides where a block goes: the mover does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore import _native
from kvstore.policy import Policy, PolicyFactory, make_policy
from kvstore.residency import Ids
from kvstore.tiers.slots import Slots

_NONE = np.empty(0, np.int64)


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
        # In an array, so that one call changes it and the masks.
        self._pinned_count = np.zeros(1, np.int64)
        self._place = np.zeros(slots, np.int64)  # for the calls that want one
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
    def pinned_count(self) -> int:
        """Slots that are pinned."""
        return int(self._pinned_count[0])

    @property
    def free(self) -> Slots:
        """The free slots; a view."""
        return self._free[: self.free_count]

    def take_free(self, n: int) -> Slots:
        """At most n free slots, no longer free."""
        n = min(n, self.free_count)
        if not n:
            return _NONE
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
        _native.pin(slots, self.pins, self.pinned, self._pinned_count)

    def unpin(self, slots: Slots) -> None:
        """Let go of distinct slots, once."""
        _native.unpin(slots, self.pins, self.pinned, self._pinned_count)

    def pin_present(self, ids: Ids, table: NDArray[np.int32]) -> tuple[Slots, Slots] | None:
        """Hold blocks [n] in place that all have a slot in the table of this tier.

        Returns each id's slot [n] and the distinct slots; None, with nothing held, where one has
        none.
        """
        return _native.pin_present(
            ids, table, self.pins, self.pinned, self._pinned_count, self._place
        )

    def sum_weights(
        self, slots: Slots, weights: NDArray[np.float32]
    ) -> tuple[Slots, NDArray[np.float32]]:
        """The distinct slots among slots [n] and the sum of the weights [n] of each."""
        return _native.sum_by_slot(slots, weights, self._place)

    def drop_pins(self) -> None:
        """Let go of all slots, however often they are held."""
        self.pins[:] = 0
        self.pinned[:] = False
        self._pinned_count[0] = 0

    def victims(self, count: int, kept: NDArray[np.bool_]) -> Slots:
        """At most `count` victims, in order, no longer in the policy's order.

        kept: bool [slots], those that may not be chosen.
        """
        chosen = self.policy.victims(count, kept)
        if _native.any_marked(chosen, kept):
            raise RuntimeError(
                f"the policy {type(self.policy).__name__} chose a slot that it was told to keep"
            )
        return chosen

    def next_spare(self, n: int) -> Slots:
        """At most n spare slots that are not pinned. Whoever was passed longest ago comes first."""
        found, self._hand = _native.next_spare(self.spare, self.pinned, self._hand, n)
        return found

    def rebuild(self, ids: Ids, slots: Slots) -> None:
        """Start over with these blocks in these slots; the order of eviction is lost.

        Pins stay; a pinned slot without a block is not free.
        """
        self.block[:] = -1
        self.block[slots] = ids
        self.pinned[:] = self.pins > 0
        self._pinned_count[0] = np.count_nonzero(self.pinned)
        self.spare[:] = False
        self.sole[:] = False
        self.early &= self.block >= 0
        free = np.flatnonzero((self.block < 0) & ~self.pinned)[::-1]
        self._free[: len(free)] = free
        self.free_count = len(free)
        self.policy = make_policy(self._make_policy, self.slots)
