"""SIEVE. Owns a tier's queue in order of admission, its visited bits and the hand; nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore import _native
from kvstore.policy.protocol import Slots


class SIEVE(_native.SIEVE):
    """Evict the first unvisited slot at a hand that moves from the oldest to the newest.

    Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024. A hit sets a slot's visited bit and moves
    nothing; the hand clears the bits it passes, evicts the first slot without one, stays behind it,
    and goes from the newest back to the oldest. A pinned slot is passed with its bit as it is.

    The textbook's queue, linked between slots (native/policies.cpp).

    slots: of the tier. Takes 8 bytes and a bit a slot.
    """

    def weigh(self, slots: Slots, weights: NDArray[np.float32]) -> None:
        """Ignored: one bit of use decides."""
