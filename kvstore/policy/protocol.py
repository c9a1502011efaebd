"""What a policy is: the eviction order of one memory tier. Never touches a block's bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class Policy(Protocol):
    """Orders the slots of one memory tier for eviction.

    Slots are numbers in [0, slots of the tier). Every array of slots is int64, one-dimensional
    and holds each slot at most once. The store calls from one thread, and keeps these promises:
    `admit` names free slots, the other calls name admitted ones; a slot is admitted until it is
    released or returned by `victims`.

    A batch means its slots one after the other. At batch size one a policy is exactly the
    textbook algorithm; at any size the answers are those of the same calls made one by one with
    the batch pinned.
    """

    def admit(self, slots: Slots) -> None:
        """Hear that a block was just placed in each of these free slots."""

    def touch(self, slots: Slots) -> None:
        """Hear that each of these slots was hit."""

    def weigh(self, slots: Slots, weights: NDArray[np.float32]) -> None:
        """Hear the share of attention (gate weight) that each of these slots received."""

    def release(self, slots: Slots) -> None:
        """Forget these slots: their blocks left otherwise than through `victims`."""

    def victims(self, count: int, pinned: NDArray[np.bool_]) -> Slots:
        """Choose `count` slots to evict, in order, and forget them.

        pinned: [slots of the tier]; a pinned slot is passed over and keeps its place in the order.
        Returns int64 [count], shorter only when fewer admitted slots are unpinned.
        """

    def peek(self, count: int, pinned: NDArray[np.bool_]) -> Slots:
        """Return what `victims` would, and change nothing."""


PolicyFactory = Callable[[int], Policy]
"""Makes the policy of one tier with so many slots; a policy's class is one."""
