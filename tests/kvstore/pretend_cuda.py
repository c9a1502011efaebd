"""A CUDA device that is not there: its streams do everything at once, its events pass when told.

So that the order of calls, which is all that the store adds to CUDA, is tested without a GPU.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import torch

import kvstore.mover
import kvstore.tiers.cuda
import kvstore.tiers.slots
from kvstore.config import StoreConfig


class Event:
    """Passes after so many queries, or when it is waited for."""

    patience = 0
    all: list[Event] = []  # noqa: RUF012 - the tests empty it

    def __init__(self) -> None:
        self.left = Event.patience
        self.passed = False
        Event.all.append(self)

    def record(self, stream) -> None:
        pass

    def query(self) -> bool:
        self.left -= 1
        self.passed = self.passed or self.left < 0
        return self.passed

    def synchronize(self) -> None:
        self.passed = True


class Stream:
    def __init__(self, device=None) -> None:
        self.waited: list[object] = []

    def wait_stream(self, stream) -> None:
        self.waited.append(stream)

    def wait_event(self, event) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        pass


class FakeTorch:
    """torch, except for what needs a device."""

    def __init__(self) -> None:
        self.consumer = Stream()
        self.cuda = SimpleNamespace(
            Event=Event,
            Stream=Stream,
            stream=lambda stream: contextlib.nullcontext(),
            current_stream=lambda device: self.consumer,
        )

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*args, pin_memory=False, **options):
        return torch.empty(*args, **options)


@contextlib.contextmanager
def pretend_cuda(patch, patience=0):
    """Let stores made within use a device that is not there; gives the fake torch.

    patch: a pytest.MonkeyPatch.
    """
    fake = FakeTorch()
    real = kvstore.tiers.cuda.CudaSlotTier
    cpu = torch.device("cpu")
    Event.patience = patience
    Event.all.clear()
    patch.setattr(kvstore.tiers.cuda, "torch", fake)
    patch.setattr(kvstore.tiers.slots, "torch", fake)
    patch.setattr(kvstore.mover, "CudaSlotTier", lambda spec, slots, _: real(spec, slots, cpu))
    patch.setattr(StoreConfig, "torch_device", property(lambda _: torch.device("cuda", 0)))
    patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    yield fake
    Event.patience = 0
