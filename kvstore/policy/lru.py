"""Least recently used. Owns the order of a tier's slots by last access, and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore import _native
from kvstore.policy.protocol import Slots


class LRU(_native.LRU):
    """Evict the slot whose last admission or hit lies furthest back.

    The textbook's doubly linked list, with links between slots (native/policies.cpp): a batch is
    one call, each slot of it a few writes.

    slots: of the tier. Takes 8 bytes a slot.
    """

    def weigh(self, slots: Slots, weights: NDArray[np.float32]) -> None:
        """Ignored: recency alone decides."""
