"""A slab of slots on a torch device. Owns a memory tier's bytes; never knows which block is where.

Blocks travel between tiers as *rows*: per plane a C-contiguous uint8 array [n, plane's bytes] in
host memory, the form in which the disk tier takes and gives them too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore._native import copy_rows
from kvstore.block import BlockSpec

Slots = NDArray[np.int64]
Rows = list[NDArray[np.uint8]]

_PAGE = 4096


def rows_of(spec: BlockSpec, planes: Sequence[torch.Tensor]) -> Rows:
    """View blocks as rows; copies only what is not contiguous in host memory.

    planes: per plane a tensor [n, *shape] of the plane's dtype, on any device.
    """
    return [
        tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        .reshape(len(tensor), plane.nbytes)
        for plane, tensor in zip(spec.planes, planes, strict=True)
    ]  # fmt: skip


class Buffer:
    """Rows for a fixed number of blocks on their way, reused.

    blocks: how many; pinned: in page-locked memory, so that CUDA copies from it run by themselves.
    Untouched pages cost nothing.
    """

    def __init__(self, spec: BlockSpec, blocks: int, pinned: bool = False) -> None:
        self.blocks = blocks
        self._rows: Rows = [
            torch.empty((blocks, plane.nbytes), dtype=torch.uint8, pin_memory=pinned).numpy()
            for plane in spec.planes
        ]
        self._read: torch.cuda.Event | None = None

    def rows(self, n: int) -> Rows:
        """The first n blocks' rows, once nothing reads what was there before."""
        if self._read is not None:
            self._read.synchronize()
            self._read = None
        return [row[:n] for row in self._rows]

    def lend(self, read: torch.cuda.Event | None) -> None:
        """Leave the rows as they are until this event has passed; None: they are free at once."""
        self._read = read


class SlotTier:
    """Slots in host memory: per plane one tensor [slots, *shape].

    pinned: page-locked, so that a CUDA device copies from and to it by itself.

    rows: all slots as rows [slots, bytes], to be written in place; None where they are not in host
    memory.
    """

    def __init__(self, spec: BlockSpec, slots: int, pinned: bool = False) -> None:
        self.spec = spec
        self.slots = slots
        self.planes = [
            _whole_pages(slots * plane.nbytes, pinned).view(plane.dtype).view(slots, *plane.shape)
            for plane in spec.planes
        ]
        self.rows: Rows | None = [
            tensor.view(-1).view(torch.uint8).numpy().reshape(slots, plane.nbytes)
            for plane, tensor in zip(spec.planes, self.planes, strict=True)
        ]

    def gather(self, slots: Slots, rows: Rows) -> None:
        """Copy the blocks in these slots [n] to rows [n]. Any thread."""
        assert self.rows is not None
        for slab, row in zip(self.rows, rows, strict=True):
            copy_rows(slab, slots, row, None)

    def scatter(self, slots: Slots, rows: Rows) -> torch.cuda.Event | None:
        """Copy rows [n] to these slots [n].

        Returns an event: the rows must not change before it has passed. None: they may at once.
        """
        assert self.rows is not None
        for slab, row in zip(self.rows, rows, strict=True):
            copy_rows(row, None, slab, slots)
        return None

    def take_from(self, source: SlotTier, source_slots: Slots, slots: Slots) -> None:
        """Copy blocks from slots [n] of another tier in host memory to these slots [n]."""
        assert self.rows is not None
        assert source.rows is not None
        for given, slab in zip(source.rows, self.rows, strict=True):
            copy_rows(given, source_slots, slab, slots)

    def place(self, slots: Slots, planes: Sequence[torch.Tensor]) -> None:
        """Copy a caller's tensors, per plane [n, *shape] on any device, to these slots [n]."""
        self.scatter(slots, rows_of(self.spec, planes))

    def await_writes(self) -> None:
        """Make what the caller does next with `planes` see everything written so far."""

    def mark_reads(self) -> torch.cuda.Event | None:
        """Mark the reads of `planes` that the caller has issued so far.

        None: they are over. Otherwise an event that passes when they are.
        """
        return None


def _whole_pages(nbytes: int, pinned: bool) -> torch.Tensor:
    """Return uint8 [nbytes] that begins with a page of memory.

    A block of 4 KiB then lies in one page, not two: 2 to 7% less time a copy.
    """
    given = torch.empty(nbytes + _PAGE, dtype=torch.uint8, pin_memory=pinned)
    first = -given.data_ptr() % _PAGE
    return given[first : first + nbytes]


def copy_slots(
    source: SlotTier,
    source_slots: Slots,
    target: SlotTier,
    target_slots: Slots,
    via: Sequence[Buffer],
) -> None:
    """Copy blocks from slots [n] of one tier to slots [n] of another.

    via: what goes to or comes from a device goes through these, of one size, which take turns, so
        that one is filled while the device reads another.
    """
    if source.rows is not None and target.rows is not None:
        target.take_from(source, source_slots, target_slots)
        return
    step = via[0].blocks
    for turn, start in enumerate(range(0, len(source_slots), step)):
        buffer = via[turn % len(via)]
        from_slots = source_slots[start : start + step]
        rows = buffer.rows(len(from_slots))
        source.gather(from_slots, rows)
        buffer.lend(target.scatter(target_slots[start : start + step], rows))
