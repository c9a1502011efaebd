"""A slab of slots on a torch device. Owns a memory tier's bytes; never knows which block is where.

Blocks travel between tiers as *rows*: per plane a C-contiguous uint8 array [n, plane's bytes] in
host memory, the form in which the disk tier takes and gives them too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.block import BlockSpec

Slots = NDArray[np.int64]
Rows = list[NDArray[np.uint8]]

# Blocks, and bytes of them, for which a call of their own costs less than a second copy.
_RUN_BLOCKS = 8
_RUN_BYTES = 128 * 1024
# Of one block in one plane, from which on it is copied by a call of its own.
_ROW_BYTES = 8 * 1024
# What stays in a core's second-level cache, with room for what else is there.
_BOUNCE_BYTES = 256 * 1024


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
            torch.empty((slots, *plane.shape), dtype=plane.dtype, pin_memory=pinned)
            for plane in spec.planes
        ]
        # A slot of a plane as one opaque element: numpy then copies each with one memcpy, as fast
        # as index_select gathers. torch's own index_copy_ on bytes scatters at 0.15 of that.
        self.rows: Rows | None = [
            tensor.view(-1).view(torch.uint8).numpy().reshape(slots, plane.nbytes)
            for plane, tensor in zip(spec.planes, self.planes, strict=True)
        ]
        self._cell_types = [np.dtype((np.void, plane.nbytes)) for plane in spec.planes]
        self._cells = self._as_cells(self.rows)
        self._bytes = [row.reshape(-1).data for row in self.rows]
        self._bounce = np.empty(_BOUNCE_BYTES, np.uint8)

    def gather(self, slots: Slots, rows: Rows) -> None:
        """Copy the blocks in these slots [n] to rows [n]. Any thread."""
        for cells, out in zip(self._cells, self._as_cells(rows), strict=True):
            cells.take(slots, out=out, mode="clip")

    def scatter(self, slots: Slots, rows: Rows) -> torch.cuda.Event | None:
        """Copy rows [n] to these slots [n].

        Returns an event: the rows must not change before it has passed. None: they may at once.
        """
        for cells, given in zip(self._cells, self._as_cells(rows), strict=True):
            cells[slots] = given
        return None

    def take_from(self, source: SlotTier, source_slots: Slots, slots: Slots) -> None:
        """Copy blocks from slots [n] of another tier in host memory to these slots [n]."""
        for plane, to_cells in enumerate(self._cells):
            from_cells, size = source._cells[plane], to_cells.dtype.itemsize
            if size >= _ROW_BYTES:
                # One at a time, but once: a piece of memory this large is copied in more time than
                # the call for it takes.
                given, taken = source._bytes[plane], self._bytes[plane]
                ends = zip((slots * size).tolist(), (source_slots * size).tolist(), strict=True)
                for to, start in ends:
                    taken[to : to + size] = given[start : start + size]
                continue
            # Twice, but the second time from the processor's cache.
            piece = self._bounce[: len(self._bounce) // size * size].view(to_cells.dtype)
            for start in range(0, len(slots), len(piece)):
                chosen = source_slots[start : start + len(piece)]
                part = piece[: len(chosen)]
                from_cells.take(chosen, out=part, mode="clip")
                to_cells[slots[start : start + len(piece)]] = part

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

    def _as_cells(self, rows: Rows) -> list[NDArray[np.void]]:
        return [row.view(kind)[:, 0] for row, kind in zip(rows, self._cell_types, strict=True)]


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
    if target.rows is not None:
        source_slots, target_slots = _copy_runs(source, source_slots, target.rows, target_slots)
        if source.rows is not None:
            target.take_from(source, source_slots, target_slots)
            return
    step = via[0].blocks
    for turn, start in enumerate(range(0, len(source_slots), step)):
        buffer = via[turn % len(via)]
        from_slots = source_slots[start : start + step]
        rows = buffer.rows(len(from_slots))
        source.gather(from_slots, rows)
        buffer.lend(target.scatter(target_slots[start : start + step], rows))


def _copy_runs(
    source: SlotTier, source_slots: Slots, rows: Rows, target_slots: Slots
) -> tuple[Slots, Slots]:
    """Copy the blocks that go to slots in a row: they need no buffer. Returns the others' slots.

    Gathering is quick, and what came together often leaves together and leaves slots in a row.
    """
    n = len(target_slots)
    least = max(_RUN_BLOCKS, _RUN_BYTES // source.spec.nbytes)
    ends = np.flatnonzero(target_slots[1:] - target_slots[:-1] != 1) + 1
    if len(ends) > n // 2:
        return source_slots, target_slots
    others = np.ones(n, bool)
    start = 0
    for stop in (*ends.tolist(), n):
        if stop - start >= least:
            first = int(target_slots[start])
            run = [row[first : first + stop - start] for row in rows]
            source.gather(source_slots[start:stop], run)
            others[start:stop] = False
        start = stop
    return source_slots[others], target_slots[others]
