"""A slab of slots on a CUDA device. Owns its bytes and the stream they are copied on.

Never knows which block is where. The order of things on the device:

- every write to the slab runs on the side stream; `await_writes` makes the consumer's stream wait
  for the last one;
- a caller's tensors are read after what its stream has been given so far;
- a slot is written again only after the store has seen the event of `mark_reads` pass, so a write
  never waits for a consumer on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvstore.block import BlockSpec
from kvstore.tiers.slots import Rows, Slots, SlotTier


class CudaSlotTier(SlotTier):
    """Slots in device memory: per plane one tensor [slots, *shape] on `device`."""

    def __init__(self, spec: BlockSpec, slots: int, device: torch.device) -> None:
        self.spec = spec
        self.slots = slots
        self.rows = None
        self.planes = [
            torch.empty((slots, *plane.shape), dtype=plane.dtype, device=device)
            for plane in spec.planes
        ]
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._written: torch.cuda.Event | None = None
        self._words = [_words(tensor, slots) for tensor in self.planes]
        # The slabs were allocated on the current stream; their memory may have been another
        # tensor's that is still in use there.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def gather(self, slots: Slots, rows: Rows) -> None:
        """Copy the blocks in these slots [n] to rows [n], and wait until they are there."""
        with torch.cuda.stream(self._stream):
            index = self._index(slots)
            for words, row in zip(self._words, rows, strict=True):
                host = torch.from_numpy(row).view(words.dtype)
                host.copy_(words.index_select(0, index), non_blocking=True)
        self._stream.synchronize()

    def scatter(self, slots: Slots, rows: Rows) -> torch.cuda.Event | None:
        with torch.cuda.stream(self._stream):
            index = self._index(slots)
            for words, row in zip(self._words, rows, strict=True):
                device_rows = torch.from_numpy(row).to(self._device, non_blocking=True)
                words.index_copy_(0, index, device_rows.view(words.dtype))
            self._written = _event(self._stream)
        return self._written

    def place(self, slots: Slots, planes: Sequence[torch.Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            index = self._index(slots)
            for slab, tensor in zip(self.planes, planes, strict=True):
                given = tensor.detach()
                # What lies in host memory is the caller's again when this returns.
                slab.index_copy_(0, index, given.to(self._device, non_blocking=given.is_cuda))
                if given.is_cuda:
                    given.record_stream(self._stream)
            self._written = _event(self._stream)

    def await_writes(self) -> None:
        if self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)

    def mark_reads(self) -> torch.cuda.Event | None:
        return _event(torch.cuda.current_stream(self._device))

    def _index(self, slots: Slots) -> torch.Tensor:
        # Pinned: copying from other memory would wait for everything on the stream before it.
        return torch.from_numpy(slots).pin_memory().to(self._device, non_blocking=True)


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _words(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    """View a plane as [slots, words] of the widest integers that divide it."""
    flat = tensor.view(-1).view(torch.uint8).view(slots, -1)
    for dtype in (torch.int64, torch.int32, torch.int16):
        if flat.shape[1] % dtype.itemsize == 0:
            return flat.view(dtype)
    return flat
