"""The store against a dict: whatever is asked, in whatever order, under whatever pressure.

The oracle is a dict from id to bytes and shares no code with the store. It also says exactly when a
call has to fail for want of room. `Store.check` runs after every step.

Threads make how far a full store gets a matter of luck, so no rule has a precondition: what is
drawn must not depend on what happened.
"""

import shutil
import tempfile
from contextlib import ExitStack
from threading import get_ident

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from pretend_cuda import pretend_cuda

import kvstore.mover
import kvstore.residency
from kvstore.block import BlockSpec, Plane
from kvstore.config import StoreConfig
from kvstore.errors import HotTierTooSmallError, StoreFullError, WriteFailedError
from kvstore.policy import LRU
from kvstore.store import Store

SPEC = BlockSpec((Plane("keys", (4, 3), torch.bfloat16), Plane("values", (4, 5), torch.int32)))
NBYTES = SPEC.nbytes
COLD = 1 << 24
BOUNDED = 72 * 4096 + 60 * 4096

seeds = st.integers(0, 2**32 - 1)
# Places in a list, taken modulo its length.
picks = st.lists(st.integers(0, 999), min_size=1, max_size=12)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


class Strict(LRU):
    """Holds the store to its promises: admit what is free, name only what was admitted."""

    def __init__(self, slots):
        super().__init__(slots)
        self.held = set()

    def admit(self, slots):
        assert not self.held & set(slots.tolist())
        self.held |= set(slots.tolist())
        super().admit(slots)

    def touch(self, slots):
        self.require(slots)
        super().touch(slots)

    def weigh(self, slots, weights):
        self.require(slots)
        assert weights.dtype == np.float32
        assert weights.shape == slots.shape

    def release(self, slots):
        self.require(slots)
        self.held -= set(slots.tolist())
        super().release(slots)

    def victims(self, count, pinned):
        chosen = super().victims(count, pinned)
        self.held -= set(chosen.tolist())
        return chosen

    def require(self, slots):
        assert slots.dtype == np.int64
        assert len(set(slots.tolist())) == len(slots)
        assert self.held >= set(slots.tolist())


class Fuse:
    """Makes one of the next calls that touch a medium fail, before or after it did half its work.

    left: calls until then. Calls of background threads fail with OSError instead.
    """

    def __init__(self):
        self.left = None
        self.half = False
        self.owner = get_ident()

    def guard(self, call, halve):
        def guarded(*args):
            if self.left is not None:
                self.left -= 1
                if self.left < 0:
                    self.left = None
                    if get_ident() != self.owner:
                        raise OSError("the disk is gone")
                    if self.half and halve:
                        call(*halve(*args))
                    raise Interrupted
            return call(*args)

        return guarded

    def arm(self, store):
        mover = store._mover
        for slab in (mover.hot_slab, mover.warm_slab):
            for name in ("scatter", "place", "gather"):
                setattr(slab, name, self.guard(getattr(slab, name), half_of))
            slab.take_from = self.guard(slab.take_from, half_of_copy)
        if mover.disk is not None:
            mover.disk.read = self.guard(mover.disk.read, None)
            mover.disk.write_packs = self.guard(mover.disk.write_packs, None)


def half_of(slots, blocks):
    n = len(slots) // 2
    return slots[:n], [plane[:n] for plane in blocks]


def half_of_copy(source, source_slots, slots):
    n = len(slots) // 2
    return source, source_slots[:n], slots[:n]


def random_blocks(n, seed):
    """Random bits that compress more or less; per plane a tensor [n, *shape]."""
    rng = np.random.default_rng(seed)
    planes = []
    for plane in SPEC.planes:
        data = rng.integers(0, rng.choice([1, 3, 256]), n * plane.nbytes, np.uint8)
        planes.append(torch.empty((n, *plane.shape), dtype=plane.dtype))
        planes[-1].view(-1).view(torch.uint8).numpy()[:] = data
    return planes


def bytes_of(planes, i):
    return b"".join(
        plane[i].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for plane in planes
    )


class StoreMachine(RuleBasedStateMachine):
    @initialize(
        hot=st.integers(1, 9),
        warm=st.integers(0, 14),
        cold=st.sampled_from([None, BOUNDED, COLD]),
        kept=st.booleans(),
        policy=st.sampled_from(["lru", "sieve", Strict]),
        workers=st.integers(1, 2),
        staging=st.sampled_from([1, 16 * NBYTES, 1 << 20]),
        patience=st.sampled_from([None, None, 0, 3]),
        durability=st.sampled_from(["sync", "async", "none"]),
    )
    def open(self, hot, warm, cold, kept, policy, workers, staging, patience, durability):
        self.capacity = hot + warm if cold is None else None
        self.bounded = cold == BOUNDED
        self.hot, self.warm = hot, warm
        self.directory = tempfile.mkdtemp() if kept and cold else None
        self.config = StoreConfig(
            hot=hot * NBYTES + NBYTES // 2,
            warm=warm * NBYTES + 1,
            cold=cold,
            directory=self.directory,
            device="cpu",
            policy=policy,
            workers=workers,
            staging=staging,
            durability=durability,
        )
        # A CUDA device that is not there, whose events take their time.
        self.cuda = ExitStack()
        if patience is not None:
            patch = self.cuda.enter_context(pytest.MonkeyPatch.context())
            self.cuda.enter_context(pretend_cuda(patch, patience))
        self.blocks = {}
        self.groups = []
        self.pins = []
        self.fuse = Fuse()
        self.begin()

    def begin(self):
        self.store = Store(SPEC, self.config)
        self.fuse.arm(self.store)

    def teardown(self):
        if hasattr(self, "store"):
            self.fuse.left = None
            while self.pins:
                self.release_pin()
            try:
                self.store.close()
            except (StoreFullError, WriteFailedError) as error:
                self.justify(error)
            self.cuda.close()
            if self.directory:
                shutil.rmtree(self.directory)

    # What the oracle says.

    def choose(self, places):
        ids = sorted(self.blocks)
        return np.array([ids[place % len(ids)] for place in places], np.int64)

    def pinned(self):
        return {i for _, ids in self.pins for i in ids.tolist()}

    def fits(self, ids):
        return len(self.pinned() | set(ids.tolist())) <= self.hot

    def call(self, function, *args):
        """Call the store; what failed in the background before may surface once, then not again."""
        try:
            return function(*args)
        except StoreFullError:
            if not self.bounded:
                raise
        except WriteFailedError as error:
            self.justify(error)
        return function(*args)

    def justify(self, error, full=False, stuck=False):
        """Compare an error with what the oracle knows."""
        if isinstance(error, HotTierTooSmallError):
            assert stuck
            assert f"{(self.hot + 1) * NBYTES} bytes" in str(error)
        elif isinstance(error, StoreFullError):
            assert full or self.bounded
            assert "full" in str(error)
        else:
            assert "the disk is gone" in str(error)

    def compare(self, ids, planes):
        for place, i in enumerate(ids.ravel().tolist()):
            flat = [
                plane.reshape(-1, *p.shape) for plane, p in zip(planes, SPEC.planes, strict=True)
            ]
            assert bytes_of(flat, place) == self.blocks[i]

    def compare_pin(self, pin, ids):
        assert pin.slots.shape == ids.shape
        assert pin.slots.dtype == np.int64
        assert self.store._mover.hot.pinned[pin.slots].all()
        slots = torch.from_numpy(pin.slots)
        self.compare(ids, [slab[slots] for slab in self.store.hot_planes])

    # Rules.

    @rule(n=st.integers(0, 12), seed=seeds)
    def put(self, n, seed):
        planes = random_blocks(n, seed)
        full = self.capacity is not None and len(self.blocks) + n > self.capacity
        stuck = n > 0 and len(self.pinned()) == self.hot
        try:
            ids = self.call(self.store.put, planes)
        except (StoreFullError, HotTierTooSmallError) as error:
            assert len(self.store) == len(self.blocks)
            self.justify(error, full, stuck)
            return
        assert not full
        assert not stuck
        assert ids.dtype == np.int64
        assert len(set(ids.tolist())) == n
        assert not set(ids.tolist()) & self.blocks.keys()
        for i, block in enumerate(ids.tolist()):
            self.blocks[block] = bytes_of(planes, i)
        self.groups.append(ids)

    @rule(places=picks, width=st.integers(1, 3), weigh=st.booleans())
    def fetch(self, places, width, weigh):
        if not self.blocks:
            return
        ids = self.choose(places * width).reshape(width, -1)
        if not self.fits(ids.ravel()):
            with pytest.raises(HotTierTooSmallError) as caught:
                self.call(self.enter, ids)
            least = len(self.pinned() | set(ids.ravel().tolist()))
            assert f"at least {least * NBYTES} bytes" in str(caught.value)
            return
        pin = self.call(self.enter, ids)
        self.compare_pin(pin, ids)
        if weigh:
            pin.weigh(np.full(ids.shape, 0.25, np.float32))
        pin.__exit__(None, None, None)

    def enter(self, ids):
        return self.store.pinned(ids).__enter__()

    @rule(places=picks)
    def hold_pin(self, places):
        if not self.blocks or len(self.pins) == 3:
            return
        ids = self.choose(places)
        if self.fits(ids):
            self.pins.append((self.call(self.enter, ids), ids))

    @rule()
    def release_pin(self):
        if not self.pins:
            return
        pin, ids = self.pins.pop()
        self.compare_pin(pin, ids)
        pin.__exit__(None, None, None)

    @rule(places=picks)
    def copy_out(self, places):
        if not self.blocks:
            return
        ids = self.choose(places)
        if len(self.pinned()) < self.hot:
            self.compare(ids, self.call(self.store.fetch, ids))

    @rule(places=picks, width=st.integers(1, 4))
    def in_waves(self, places, width):
        if not self.blocks:
            return
        selection = self.choose(places * width).reshape(-1, width)
        room = self.hot - len(self.pinned())
        if max(len(set(group)) for group in selection.tolist()) > room:
            with pytest.raises(HotTierTooSmallError):
                self.call(lambda: list(self.store.waves(selection)))
            return
        seen = 0
        for wave in self.call(lambda: list(self.store.waves(selection))):
            assert wave.start == seen
            seen = wave.stop
            assert len(set(selection[wave].ravel().tolist())) <= room
        assert seen == len(selection)

    @rule(places=picks)
    def prefetch(self, places):
        if not self.blocks:
            return
        self.call(self.store.prefetch, self.choose(places))

    @rule()
    def let_reads_end(self):
        if self.store._prefetch is None:
            return
        for job in self.store._prefetch._jobs:
            job.wait()

    @rule()
    def let_writes_end(self):
        if self.store._writer is None:
            return
        for job in self.store._writer._jobs:
            job.wait()

    @rule(places=picks)
    def delete(self, places):
        if not self.blocks:
            return
        ids = self.choose(places)
        if set(ids.tolist()) & self.pinned():
            with pytest.raises(ValueError, match="pinned"):
                self.call(self.store.delete, ids)
            return
        self.call(self.store.delete, ids)
        for i in set(ids.tolist()):
            del self.blocks[i]

    @rule(place=st.integers(0, 999))
    def delete_group(self, place):
        if not self.groups:
            return
        group = self.groups.pop(place % len(self.groups)).tolist()
        ids = [i for i in group if i in self.blocks and i not in self.pinned()]
        self.call(self.store.delete, np.array(ids, np.int64))
        for i in ids:
            del self.blocks[i]

    @rule(i=st.integers(-3, 2**40), places=picks)
    def ask_for_what_is_not_there(self, i, places):
        if i in self.blocks:
            return
        ids = np.array([i])
        if self.blocks:
            ids = np.concatenate((self.choose(places), ids))
        before = self.store.stats.not_found
        for ask in (self.enter, self.store.prefetch, self.store.delete):
            with pytest.raises(KeyError, match=str(i)):
                self.call(ask, ids)
        assert self.store.stats.not_found > before

    @rule()
    def flush(self):
        try:
            self.call(self.store.flush)
        except StoreFullError:
            assert self.bounded

    @rule()
    def reopen(self):
        if self.directory is None or self.pins:
            return
        try:
            self.call(self.store.flush)
        except StoreFullError:
            assert self.bounded
            return
        self.store.close()
        self.begin()
        assert len(self.store) == len(self.blocks)
        self.groups = [ids[np.isin(ids, list(self.blocks))] for ids in self.groups]

    @rule(
        left=st.integers(0, 8),
        half=st.booleans(),
        action=st.integers(0, 4),
        places=picks,
        seed=seeds,
    )
    def interrupt(self, left, half, action, places, seed):
        """Do something with Ctrl-C in the middle of it: all that was there is still there."""
        if action and not self.blocks:
            return
        ids = self.choose(places) if self.blocks else None
        self.fuse.half = half
        self.fuse.left = left
        try:
            if action == 0:
                n = len(places)
                planes = random_blocks(n, seed)
                new = self.store.put(planes)
                for i, block in enumerate(new.tolist()):
                    self.blocks[block] = bytes_of(planes, i)
            elif action == 1:
                self.enter(ids).__exit__()
            elif action == 2:
                self.store.prefetch(ids)
            elif action == 3:
                self.store.fetch(ids)
            else:
                self.store.flush()
        except (Interrupted, HotTierTooSmallError, StoreFullError, WriteFailedError):
            pass
        finally:
            self.fuse.left = None
        assert len(self.store) == len(self.blocks)

    @invariant()
    def check(self):
        if hasattr(self, "store"):
            self.call(self.store.check)


MACHINE = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch):
    """Move blocks in pieces of three, where the real ones hold thousands of such small blocks, use
    ids again after sixteen, take a quarter of warm for few, and empty a third of hot ahead."""
    monkeypatch.setattr(kvstore.residency, "_FIRST_IDS", 16)
    monkeypatch.setattr(kvstore.mover, "_HOP_BYTES", 3 * NBYTES)
    monkeypatch.setattr(kvstore.mover, "_FEW", 4)
    monkeypatch.setattr(kvstore.mover, "_AHEAD_SHARE", 3)
    monkeypatch.setattr(kvstore.mover, "_CUDA_HOP_BYTES", 3 * NBYTES)


def test_the_store_is_a_dict():
    run_state_machine_as_test(
        StoreMachine,
        settings=hypothesis.settings(max_examples=60, stateful_step_count=30, **MACHINE),
    )


@pytest.mark.slow
def test_the_store_is_a_dict_for_long():
    run_state_machine_as_test(
        StoreMachine,
        settings=hypothesis.settings(max_examples=1000, stateful_step_count=50, **MACHINE),
    )
