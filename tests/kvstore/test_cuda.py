"""What the store asks of a CUDA device, and in what order, on one that is not there."""

import numpy as np
import pytest
import torch
from pretend_cuda import Event, pretend_cuda

from kvstore.block import BlockSpec
from kvstore.config import StoreConfig
from kvstore.errors import HotTierTooSmallError
from kvstore.store import Store
from kvstore.tiers.cuda import CudaSlotTier

SPEC = BlockSpec.kv(4, 5, torch.int16)


@pytest.fixture
def fake(monkeypatch):
    with pretend_cuda(monkeypatch) as fake:
        yield fake


def make(hot=8, warm=16, cold="1GiB"):
    return Store(SPEC, StoreConfig(hot=hot * SPEC.nbytes, warm=warm * SPEC.nbytes, cold=cold))


def random_planes(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-999, 999, (n, *plane.shape), generator=generator).to(plane.dtype)
        for plane in SPEC.planes
    ]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_blocks_go_up_and_down(fake):
    with make() as store:
        assert isinstance(store._mover.hot_slab, CudaSlotTier)
        ids = store.put(random_planes(60))
        assert same(store.fetch(ids), random_planes(60))
        store.prefetch(ids[:4])
        assert same(store.fetch(ids[:4]), [plane[:4] for plane in random_planes(60)])
        store.check()


def test_a_consumer_waits_for_what_was_written(fake):
    with make() as store:
        ids = store.put(random_planes(4))
        written = Event.all[-1]
        with store.pinned(ids):
            assert fake.consumer.waited[-1] is written


def test_a_slot_is_used_again_only_after_its_readers(fake):
    with make(hot=4) as store:
        ids = store.put(random_planes(20))
        Event.patience = 10**9
        with store.pinned(ids[:3]) as pin:
            pass
        readers = Event.all[-1]
        before = [slab[torch.from_numpy(pin.slots)].clone() for slab in store.hot_planes]
        # One slot is left; that is enough, so nobody waits.
        with store.pinned(ids[10:11]):
            pass
        assert not readers.passed
        found = [slab[torch.from_numpy(pin.slots)] for slab in store.hot_planes]
        assert same(found, before)
        store.check()
        # Now one is not enough.
        with store.pinned(ids[12:14]):
            assert readers.passed
        store.check()


def test_pins_that_end_later_still_end(fake):
    with make(hot=4) as store:
        ids = store.put(random_planes(20))
        Event.patience = 3
        for start in range(16):
            with store.pinned(ids[start : start + 4]) as pin:
                slots = torch.from_numpy(pin.slots)
                found = [slab[slots] for slab in store.hot_planes]
                expected = [plane[start : start + 4] for plane in random_planes(20)]
                assert same(found, expected)
                with pytest.raises(HotTierTooSmallError):
                    store.pinned(ids[[(start + 5) % 20]]).__enter__()
        Event.patience = 0
        store.delete(ids)
        assert not store._lookups._ending
        assert not store._mover.hot.pinned.any()
        store.check()


def test_nothing_on_disk(fake):
    with make(hot=4, warm=6, cold=None) as store:
        ids = store.put(random_planes(10))
        rng = np.random.default_rng(0)
        for _ in range(50):
            chosen = rng.choice(10, 3)
            with store.pinned(ids[chosen]) as pin:
                slots = torch.from_numpy(pin.slots)
                found = [slab[slots] for slab in store.hot_planes]
                assert same(found, [plane[chosen] for plane in random_planes(10)])
            store.check()
