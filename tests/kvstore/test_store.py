"""What the state machine cannot see: errors from outside, threads, forks, files, time."""

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import typing
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import kvstore.jobs
import kvstore.mover
from kvstore.block import BlockSpec, Plane
from kvstore.config import StoreConfig
from kvstore.errors import (
    CorruptBlockError,
    HotTierTooSmallError,
    StoreClosedError,
    StoreFullError,
    WriteFailedError,
)
from kvstore.stats import StoreStats
from kvstore.store import Store
from kvstore.tiers.slots import SlotTier
from kvstore.trace import Kind, read_trace, read_trace_header

SPEC = BlockSpec.kv(4, 8, torch.int16)
NBYTES = SPEC.nbytes


def make(hot=8, warm=16, cold="1GiB", spec=SPEC, **settings):
    sizes = {"hot": hot * spec.nbytes, "warm": max(warm * spec.nbytes, 1), "cold": cold}
    return Store(spec, StoreConfig(**{"device": "cpu", **sizes, **settings}))


def random_planes(n, seed=0, spec=SPEC):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(-(2**15), 2**15, (n, *plane.shape), generator=generator).to(plane.dtype)
        for plane in spec.planes
    ]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# What is asked


def test_put_and_fetch_in_a_few_lines():
    planes = random_planes(100)
    with make() as store:
        ids = store.put(planes)
        assert len(store) == 100
        assert same(store.fetch(ids), planes)
        grid = ids[[[3, 1, 3], [99, 0, 50]]]
        assert same(store.fetch(grid), [plane[grid] for plane in planes])
        with store.pinned(grid) as pin:
            assert pin.slots.shape == (2, 3)
            slots = torch.from_numpy(pin.slots)
            assert same([slab[slots] for slab in store.hot_planes], [p[grid] for p in planes])


def test_nothing_is_a_selection_too():
    with make() as store:
        none = store.put(random_planes(0))
        assert none.shape == (0,)
        assert [list(plane.shape) for plane in store.fetch(none)] == [[0, 4, 8], [0, 4, 8]]
        with store.pinned(np.empty((2, 0), np.int64)) as pin:
            assert pin.slots.shape == (2, 0)
            pin.weigh(torch.zeros(2, 0))
        store.prefetch(none)
        store.delete(none)
        assert store.stats.lookups == 0


@pytest.mark.parametrize(
    ("planes", "message"),
    [
        ([torch.zeros(2, 4, 8, dtype=torch.int16)], "2 planes"),
        ([torch.zeros(2, 4, 8, dtype=torch.int16), torch.zeros(2, 4, 8)], "float32"),
        ([torch.zeros(2, 4, 8, dtype=torch.int16)] * 1 + [torch.zeros(3, 4, 8, dtype=torch.int16)],
         r"values: expected torch.int16 \[2, 4, 8\], got torch.int16 \[3, 4, 8\]"),
        ([torch.zeros(2, 4, 7, dtype=torch.int16)] * 2, r"\[2, 4, 7\]"),
        ([torch.zeros(4, 8, dtype=torch.int16)] * 2, r"\[4, 8\]"),
    ],
)  # fmt: skip
def test_other_planes_are_refused(planes, message):
    with make() as store:
        with pytest.raises(ValueError, match=message):
            store.put(planes)
        assert len(store) == 0
        store.check()


def test_ids_are_integers():
    with make() as store:
        ids = store.put(random_planes(3))
        with pytest.raises(TypeError, match="float64"):
            store.pinned(ids / 2)
        assert same(store.fetch(torch.from_numpy(ids)), random_planes(3))
        assert same(store.fetch(ids.astype(np.uint8).tolist()), random_planes(3))


def test_weights_have_the_shape_of_the_ids():
    class Heard:
        """Keeps what it hears; evicts the lowest slot."""

        heard: typing.ClassVar = []

        def __init__(self, slots):
            self.held = np.zeros(slots, bool)

        def admit(self, slots):
            self.held[slots] = True

        def touch(self, slots):
            pass

        def weigh(self, slots, weights):
            self.heard.append((slots.tolist(), weights.tolist(), weights.dtype))

        def release(self, slots):
            self.held[slots] = False

        def victims(self, count, pinned):
            chosen = self.peek(count, pinned)
            self.release(chosen)
            return chosen

        def peek(self, count, pinned):
            return np.flatnonzero(self.held & ~pinned)[:count]

    with make(policy=Heard) as store:
        ids = store.put(random_planes(4))
        with store.pinned(ids[[[2, 0], [2, 3]]]) as pin:
            (two, zero), (_, three) = pin.slots.tolist()
            with pytest.raises(ValueError, match="shape"):
                pin.weigh(np.ones(4))
            weights = torch.tensor([[0.5, 0.25], [1.0, 0.125]], dtype=torch.bfloat16)
            pin.weigh(weights.requires_grad_())
        assert Heard.heard == [([two, zero, three], [1.5, 0.25, 0.125], np.float32)]
        store.put(random_planes(40))
        store.check()


def test_a_policy_that_does_not_listen_is_named():
    class Deaf:
        def __init__(self, slots):
            self.slots = slots

        def admit(self, slots): ...
        def touch(self, slots): ...
        def weigh(self, slots, weights): ...
        def release(self, slots): ...

        def victims(self, count, pinned):
            return np.arange(min(count, self.slots))

        peek = victims

    with make(hot=2, policy=Deaf) as store:
        ids = store.put(random_planes(2))
        with store.pinned(ids[:1]), pytest.raises(RuntimeError, match="Deaf"):
            store.put(random_planes(1))


def test_stats_count_each_block_where_it_lay():
    with make(hot=2, warm=4) as store:
        ids = store.put(random_planes(20))
        store.flush()
        with store.pinned(ids[[19, 18, 19]]):
            pass
        with store.pinned(ids[[17]]):
            pass
        with store.pinned(ids[[0]]):
            pass
        stats = store.stats
        assert (stats.lookups, stats.hot.hits, stats.warm.hits, stats.cold.hits) == (4, 2, 1, 1)
        with pytest.raises(KeyError, match="no block has the id 77"):
            store.fetch(np.array([77]))
        assert stats.not_found == 1
        stats.check()
        usage = store.usage()
        assert (usage["hot"].blocks, usage["hot"].used_bytes) == (2, 2 * NBYTES)
        assert (usage["warm"].blocks, usage["warm"].capacity_bytes) == (4, 4 * NBYTES)
        assert usage["cold"].blocks == 20
        assert 0 < usage["cold"].used_bytes < usage["cold"].capacity_bytes


# Where room ends


def test_a_block_larger_than_hot():
    with pytest.raises(ValueError, match=f"give at least {NBYTES}"):
        Store(SPEC, StoreConfig(hot=NBYTES - 1, device="cpu"))


def test_a_block_larger_than_cold():
    with pytest.raises(ValueError, match="cold"):
        Store(SPEC, StoreConfig(hot=NBYTES, cold=NBYTES - 1, device="cpu"))


def test_a_block_larger_than_warm_goes_straight_to_disk():
    with make(hot=2, warm=0) as store:
        ids = store.put(random_planes(9))
        assert store.usage()["cold"].blocks == 9
        assert same(store.fetch(ids), random_planes(9))
        assert store.usage()["warm"].capacity_bytes == 0
        store.check()


def test_hot_smaller_than_one_fetch():
    with make(hot=4) as store:
        ids = store.put(random_planes(10))
        with pytest.raises(HotTierTooSmallError, match=f"holds 4 blocks and 5 .* {5 * NBYTES} b"):
            store.pinned(ids[:5]).__enter__()
        with store.pinned(ids[:2]):
            with pytest.raises(HotTierTooSmallError, match=f"{5 * NBYTES} bytes"):
                store.pinned(ids[2:5]).__enter__()
            with store.pinned(ids[1:4]):
                pass
        store.check()
        assert same(store.fetch(ids), random_planes(10))


def test_waves_of_a_selection_that_does_not_fit():
    with make(hot=4) as store:
        ids = store.put(random_planes(10))
        selection = ids[[[0, 1, 2], [2, 1, 3], [4, 5, 6], [6, 7, 7], [8, 8, 9]]]
        seen = []
        for wave in store.waves(selection):
            with store.pinned(selection[wave]) as pin:
                seen += range(wave.start, wave.stop)
                assert len(np.unique(pin.slots)) <= 4
        assert seen == [0, 1, 2, 3, 4]
        with pytest.raises(HotTierTooSmallError, match=f"{5 * NBYTES} bytes"):
            list(store.waves(ids[None, :5]))
        with pytest.raises(ValueError, match="groups"):
            list(store.waves(ids))


def test_hot_and_warm_full_without_cold():
    with make(hot=4, warm=6, cold=None) as store:
        ids = store.put(random_planes(10))
        for _ in range(2):
            with pytest.raises(StoreFullError, match=r"10 blocks .* 1 more"):
                store.put(random_planes(1))
        assert same(store.fetch(ids), random_planes(10))
        store.check()
        store.delete(ids[3:5])
        more = store.put(random_planes(2, seed=1))
        kept = np.delete(np.arange(10), [3, 4])
        assert same(store.fetch(ids[kept]), [plane[kept] for plane in random_planes(10)])
        assert same(store.fetch(more), random_planes(2, seed=1))
        with pytest.raises(ValueError, match="disk tier"):
            store.put_record(b"key", b"value")


def fill(store, ids, stored):
    for turn in range(1000):
        planes = random_planes(16, turn, store.spec)
        ids.append(store.put(planes))
        stored.append(planes)


def test_an_id_that_stands_in_line_twice_is_written_once():
    """It was deleted before it was written, and given out again."""
    with make(hot=2048, warm=4096) as store:
        first = store.put(random_planes(1020))
        store.flush()
        store.delete(store.put(random_planes(4, 1)))
        again = store.put(random_planes(4, 2))
        assert set(again.tolist()) == {1020, 1021, 1022, 1023}
        store.flush()
        store.check()
        assert store.stats.writes_behind == len(store) == 1024
        same(store.fetch(first), random_planes(1020))
        same(store.fetch(again), random_planes(4, 2))


def put_many(store, turns, n):
    for turn in range(turns):
        store.put(random_planes(n, turn))


def test_a_full_cold_tier(tmp_path):
    """Ten MiB, then an error that names the tier; all that was stored is still there."""
    spec = BlockSpec.kv(16, 64, torch.int16)
    config = StoreConfig(
        hot="64KiB", warm="256KiB", cold="10MiB", directory=tmp_path / "store", device="cpu"
    )
    stored, ids = [], []
    with Store(spec, config) as store:
        with pytest.raises(StoreFullError, match="cold tier is full"):
            fill(store, ids, stored)
        assert 8 << 20 < len(store) * spec.nbytes < 12 << 20
        for _ in range(2):
            with pytest.raises(StoreFullError):
                store.put(random_planes(100, 0, spec))
            store.check()
        for block, planes in zip(ids, stored, strict=True):
            assert same(store.fetch(block), planes)
        # Room can be made, and is used.
        for block in ids[:10]:
            store.delete(block)
        again = store.put(random_planes(16, 7, spec))
        assert same(store.fetch(again), random_planes(16, 7, spec))
        store.flush()
        files = sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
        assert files <= 10 << 20
    with Store.open(tmp_path / "store", config) as store:
        assert same(store.fetch(ids[10]), stored[10])
        assert same(store.fetch(again), random_planes(16, 7, spec))


def test_slabs_take_no_memory_before_they_are_used():
    with make(hot=1000, warm=2000, spec=BlockSpec.kv(64, 512, torch.int16), cold=None) as store:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        store.put(random_planes(1, spec=store.spec))
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown < 50 << 10, f"{grown} KiB"


# Where things fail


class SlowWriter:
    """Lets a store's workers write only once they may; one block at a time and `quiet` unasked."""

    def __init__(self, store, quiet=0):
        self._write = store._disk.write_packs
        self.begun, self.go = threading.Event(), threading.Event()
        store._disk.write_packs = self
        store._writer._batch = 1
        store._writer._quiet = quiet

    def __call__(self, *args):
        self.begun.set()
        assert self.go.wait(10)
        return self._write(*args)


def test_blocks_change_places_with_what_is_not_being_written():
    """Warm holds one block that is being written and three that are saved; all four are wanted."""
    with make(hot=4, warm=4) as store:
        saved = store.put(random_planes(4))
        store.flush()
        writer = SlowWriter(store, quiet=3)
        new = store.put(random_planes(4, seed=1))
        assert writer.begun.wait(10)
        with store.pinned(saved[[1]]):
            pass
        store.check()
        tables = store._mover.residency
        assert store._mover.warm.pinned[tables.warm[new[0]]]
        assert tables.hot[new[0]] < 0
        both = np.concatenate((new[:1], saved[2:]))
        olds, news = random_planes(4), random_planes(4, seed=1)
        expected = [torch.cat((b[:1], a[2:])) for a, b in zip(olds, news, strict=True)]
        assert same(store.fetch(both), expected)
        store.check()
        writer.go.set()
        store.flush()
        store.check()
        assert same(store.fetch(new), random_planes(4, seed=1))
        assert same(store.fetch(saved), random_planes(4))


def put_over_saved(store, saved, new):
    """Put blocks that are written, and then others that nobody writes; return the ids of both."""
    old = store.put(random_planes(saved))
    store.flush()
    SlowWriter(store, quiet=new)
    return old, store.put(random_planes(new, seed=1))


def test_blocks_change_places_while_others_come_from_disk(monkeypatch):
    """Hot holds two blocks that nobody has written, and warm has room for one of them."""
    monkeypatch.setattr(kvstore.mover, "_FEW", 1)
    with make(hot=2, warm=2) as store:
        saved, new = put_over_saved(store, 4, 2)
        tables = store._mover.residency
        in_warm = saved[tables.warm[saved] >= 0]
        on_disk = saved[tables.warm[saved] < 0]
        wanted = np.array([on_disk[0], in_warm[0]])
        with store.pinned(wanted) as pin:
            assert store._mover.hot.pinned[pin.slots].all()
            found = [plane[pin.slots] for plane in store.hot_planes]
            assert same(found, [plane[wanted] for plane in random_planes(4)])
        store.check()
        assert (tables.warm[new] >= 0).all()
        assert same(store.fetch(new), random_planes(2, seed=1))
        store.check()
        store._disk.write_packs = store._disk.write_packs._write
        assert same(store.fetch(saved), random_planes(4))


def test_making_room_at_once_does_not_push_others_out_of_warm(monkeypatch):
    """A drifting working set is read from disk as often as if room were made one by one."""

    def reads(few):
        monkeypatch.setattr(kvstore.mover, "_FEW", few)
        rng = np.random.default_rng(1)
        with make(hot=32, warm=64) as store:
            for start in range(0, 600, 20):
                store.put(random_planes(20, start))
            store.flush()
            for turn in range(300):
                ids = (rng.choice(144, 32, replace=False) + turn // 4) % 600
                with store.pinned(ids):
                    pass
            return store.stats.cold.hits

    assert reads(kvstore.mover._FEW) <= 1.01 * reads(1 << 30)


def test_nothing_leaves_ahead_without_room_below(monkeypatch):
    """Hot holds three blocks that nobody has written, and warm has room for two of them."""
    monkeypatch.setattr(kvstore.mover, "_AHEAD_SHARE", 1)
    with make(hot=3, warm=3) as store:
        saved, new = put_over_saved(store, 6, 3)
        tables, hot = store._mover.residency, store._mover.hot
        assert (tables.hot[new] >= 0).all()
        (block,) = saved[tables.warm[saved] >= 0][:1]
        with store.pinned(np.array([block])):
            store.check()
            assert np.count_nonzero(tables.hot[new] >= 0) == 2
            assert hot.free_count == 0
        store._disk.write_packs = store._disk.write_packs._write
        assert same(store.fetch(new), random_planes(3, seed=1))
        assert same(store.fetch(saved), random_planes(6))
        store.check()


@pytest.mark.parametrize(
    ("cold", "most", "ahead"), [("1GiB", 16, 3), ("1GiB", 2, 2), (None, 16, 0)]
)
def test_a_full_hot_tier_is_emptied_a_little_ahead(cold, most, ahead, monkeypatch):
    monkeypatch.setattr(kvstore.mover, "_AHEAD_SHARE", 4)
    monkeypatch.setattr(kvstore.mover, "_MOST_AHEAD", most)
    with make(hot=12, warm=64, cold=cold) as store:
        hot = store._mover.hot
        ids = store.put(random_planes(40))
        store.flush()
        free, in_hot = [], []
        for block in ids[:12].tolist():
            with store.pinned(np.array([block])):
                free.append(hot.free_count)
                in_hot.append(set(hot.block[hot.block >= 0].tolist()))
            store.check()
        # Between the times that room is made nothing leaves.
        assert set(free) == set(range(ahead + 1))
        left = [before - after for before, after in itertools.pairwise(in_hot)]
        assert {len(some) for some in left} == ({0, ahead + 1} if ahead else {1})
        # Who came last leaves last.
        came = [*range(20, 40), *range(12)]
        gone = [block for some in left for block in sorted(some, key=came.index)]
        first = came.index(gone[0])
        assert gone == came[first : first + len(gone)]
        assert same(store.fetch(ids), random_planes(40))


def test_slots_of_deleted_blocks_that_are_being_written_are_no_room():
    with make(hot=2, warm=4, workers=1) as store:
        store._writer._most_jobs = 3
        writer = SlowWriter(store)
        ids = store.put(random_planes(4))
        assert writer.begun.wait(10)
        written = np.concatenate([ids for ids, _ in store._writer.writing()])
        assert len(written) == 3
        store.delete(written)
        left = np.setdiff1d(ids, written)
        threading.Timer(0.05, writer.go.set).start()
        new = store.put(random_planes(4, seed=1))
        assert store.stats.write_waits > 0
        store.check()
        assert same(store.fetch(new), random_planes(4, seed=1))
        assert same(store.fetch(left), [plane[left] for plane in random_planes(4)])


MOVING = ("mover", "writer", "prefetch", "occupancy", "residency", "lookups", "slots")


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that runs in the files that move blocks."""

    def __init__(self, n):
        self.left = n

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, arg):
        if Path(frame.f_code.co_filename).stem not in MOVING:
            return None
        if event == "line":
            self.left -= 1
            if self.left == -1:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def interrupt_everywhere(prepare, act, step=1):
    """Do something again and again, with Ctrl-C one line later each time, until none comes."""
    for n in range(0, 100_000, step):
        with prepare() as (store, oracle), Interrupter(n) as interrupter:
            with contextlib.suppress(KeyboardInterrupt):
                act(store)
            sys.settrace(None)
            # A pin that was cut short may stay; it would be no wonder if all of hot was pinned.
            store._mover.hot.drop_pins()
            # And counters may have been added to by halves.
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StoreStats, "check", lambda _: None)
                store.check()
            assert len(store) == len(oracle)
            for block, planes in oracle.items():
                assert same(store.fetch(np.array(block)), planes)
            if interrupter.left >= 0:
                return n
    raise AssertionError("it never came to an end")


@contextlib.contextmanager
def prepared(**settings):
    """A store under pressure, and what is in it."""
    with make(**settings) as store:
        ids = store.put(random_planes(12))
        store.fetch(ids[[0, 5]])
        blocks = {int(i): [p[k] for p in random_planes(12)] for k, i in enumerate(ids)}
        yield store, blocks


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({"hot": 4, "warm": 8, "cold": None}, 1),
        ({"hot": 4, "warm": 9, "cold": None}, 1),
        ({"hot": 3, "warm": 4}, 7),
        ({"hot": 4, "warm": 0}, 7),
    ],
)
def test_ctrl_c_at_any_line_of_a_fetch(settings, step):
    def act(store):
        with store.pinned(np.array([1, 5, 9])):
            pass

    lines = interrupt_everywhere(lambda: prepared(**settings), act, step)
    assert lines > 50


@pytest.mark.parametrize(
    ("settings", "step"),
    [({"hot": 4, "warm": 12, "cold": None}, 1), ({"hot": 3, "warm": 4}, 3)],
)
def test_ctrl_c_at_any_line_of_a_put(settings, step):
    """What was being put is there or not; if the call did not return, it is not."""

    def act(store):
        ids = store.put(random_planes(4, seed=1))
        store.delete(ids)

    with pytest.MonkeyPatch.context() as patch:
        # Only the put, and not the deletion, is interrupted.
        delete = Store.delete

        def quietly(store, ids):
            sys.settrace(None)
            delete(store, ids)

        patch.setattr(Store, "delete", quietly)
        interrupt_everywhere(lambda: prepared(**settings), act, step)


def test_ctrl_c_at_any_line_of_a_flush():
    interrupt_everywhere(lambda: prepared(hot=4, warm=12), Store.flush, 11)


def test_a_failing_writer_is_heard_and_reading_goes_on():
    with make(hot=4, warm=16) as store:
        ids = store.put(random_planes(8))
        write = store._disk.write_packs

        def fail(*_):
            raise OSError("no such device")

        store._disk.write_packs = fail
        with pytest.raises(WriteFailedError, match="no such device") as caught:
            put_many(store, 100, 1)
        assert isinstance(caught.value.__cause__, OSError)
        count = len(store)
        for _ in range(3):
            assert same(store.fetch(ids), random_planes(8))
            store.check()
        with pytest.raises(WriteFailedError):
            store.flush()
        assert same(store.fetch(ids), random_planes(8))
        store._disk.write_packs = write
        store.flush()
        assert store.usage()["cold"].blocks == count == len(store)
        assert same(store.fetch(ids), random_planes(8))


def test_a_failing_writer_is_heard_at_the_next_call():
    with make(hot=2, warm=16) as store:
        ids = store.put(random_planes(8))

        def fail(*_):
            raise OSError("no such device")

        store._disk.write_packs = fail
        store.put(random_planes(8))
        for job in list(store._writer._jobs):
            job.wait()
        with pytest.raises(WriteFailedError, match="no such device"):
            store.fetch(ids)
        assert same(store.fetch(ids), random_planes(8))


def committed_together(store, write):
    """Let blocks wait, each compressed by itself, while the first is committed; then go on.

    Returns the ids put and how many were committed in each transaction.
    """
    store._writer._batch, store._writer._quiet = 1, 0
    begun, go = threading.Event(), threading.Event()
    groups = []

    def slow(ids, packs):
        groups.append(len(ids))
        begun.set()
        assert go.wait(10)
        return write(ids, packs)

    store._disk.write_packs = slow
    ids = store.put(random_planes(1, 0))
    assert begun.wait(10)
    more = [store.put(random_planes(1, seed)) for seed in range(1, 5)]
    ids = np.concatenate([ids, *more])
    waiting = store._writer._committer._waiting
    until = time.monotonic() + 10
    while len(waiting) < 4:
        assert time.monotonic() < until
        time.sleep(0.001)
    go.set()
    return ids, groups


def test_what_waits_for_the_disk_is_committed_together():
    with make(hot=4, warm=16, workers=2) as store:
        ids, groups = committed_together(store, store._disk.write_packs)
        store.flush()
        store.check()
        assert groups == [1, 4]
        frames = dict(store._disk.frames())
        assert sorted(frames) == ids.tolist()
        store.put(random_planes(20, 9))  # whatever is in memory has to go
        store.flush()
        for block, seed in zip(ids, range(5), strict=True):
            assert same(store.fetch([block]), random_planes(1, seed))


def test_what_cannot_be_committed_together_is_committed_one_by_one():
    with make(hot=4, warm=16, workers=2) as store:
        write = store._disk.write_packs
        bad = []

        def picky(ids, packs):
            bad[:] = bad or [ids[-1]] if len(ids) > 1 else bad
            if bad and bad[0] in ids:
                raise StoreFullError("there is no room for this one")
            return write(ids, packs)

        ids, groups = committed_together(store, picky)
        with pytest.raises(StoreFullError, match="this one"):
            store.flush()
        assert groups[:6] == [1, 4, 1, 1, 1, 1]
        assert (store._mover.residency.cold[ids] < 0).tolist() == [i == bad[0] for i in ids]
        store.check()
        store._disk.write_packs = write
        store.flush()
        for block, seed in zip(ids, range(5), strict=True):
            assert same(store.fetch([block]), random_planes(1, seed))


def test_whatever_fails_in_committing_together_is_heard(monkeypatch):
    with make(hot=4, warm=16, workers=2) as store:
        write, failures = store._disk.write_packs, [OSError("no such device")]

        def fail_once(ids, packs):
            if len(ids) > 1 and failures:
                raise failures.pop()
            return write(ids, packs)

        ids, groups = committed_together(store, fail_once)
        with pytest.raises(WriteFailedError, match="no such device"):
            store.flush()
        assert groups == [1, 4]
        store.check()
        with monkeypatch.context() as patch:
            patch.setattr(kvstore.jobs, "chain_packs", Mock(side_effect=MemoryError("too much")))
            with pytest.raises(WriteFailedError, match="too much"):
                store.flush()
        store.flush()
        assert sorted(dict(store._disk.frames())) == ids.tolist()


@pytest.mark.parametrize("fails", [False, True], ids=["goes on", "fails"])
def test_what_is_compressed_waits_for_what_is_being_compressed(fails):
    with make(hot=4, warm=16, workers=2) as store:
        store._writer._batch, store._writer._quiet = 1, 0
        encode, write = store._disk.encode, store._disk.write_packs
        slow, go, groups = threading.Event(), threading.Event(), []

        def first_is_slow(ids, *rest):
            if ids[0] == 0 and not slow.is_set():
                slow.set()
                assert go.wait(10)
                if fails:
                    raise MemoryError("too much")
            return encode(ids, *rest)

        def noted(ids, packs):
            groups.append(len(ids))
            return write(ids, packs)

        store._disk.encode, store._disk.write_packs = first_is_slow, noted
        store.put(random_planes(1, 0))
        assert slow.wait(10)
        store.put(random_planes(1, 1))
        committer = store._writer._committer
        until = time.monotonic() + 10
        while not committer._waiting:
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(0.05)
        assert not groups
        go.set()
        if fails:
            with pytest.raises(WriteFailedError, match="too much"):
                store.flush()
        store.flush()
        assert groups == ([1, 1] if fails else [2])
        assert not committer._expected
        assert same(store.fetch([0]), random_planes(1, 0))
        assert same(store.fetch([1]), random_planes(1, 1))
        store.check()


def test_what_fills_a_transaction_waits_for_nothing(monkeypatch):
    with make(hot=4, warm=16, workers=2) as store:
        store._writer._batch, store._writer._quiet = 1, 0
        encode = store._disk.encode
        slow, go = threading.Event(), threading.Event()

        def first_is_slow(ids, *rest):
            if ids[0] == 0:
                slow.set()
                assert go.wait(10)
            return encode(ids, *rest)

        store._disk.encode = first_is_slow
        monkeypatch.setattr(kvstore.jobs, "_COMMITTED_BYTES", 1)
        store.put(random_planes(1, 0))
        assert slow.wait(10)
        store.put(random_planes(1, 1))
        until = time.monotonic() + 10
        while not store._disk.block_count:
            assert time.monotonic() < until
            time.sleep(0.001)
        go.set()
        store.flush()
        assert store._disk.block_count == 2


def test_what_could_not_be_given_to_the_committer_is_not_written_twice():
    with make(hot=4, warm=16, workers=2) as store:
        pool = store._writer._committer._pool
        submit = pool.submit

        def no_thread(work):
            pool.submit = submit
            raise RuntimeError("can't start new thread")

        pool.submit = no_thread
        store._writer._quiet = 0
        store.put(random_planes(3))
        with pytest.raises(WriteFailedError, match="new thread"):
            store.flush()
        store.flush()
        assert store._disk.block_count == 3
        store.check()


def test_put_waits_for_a_slow_writer_and_never_overruns(monkeypatch):
    with make(hot=4, warm=8, workers=2) as store:
        write = store._disk.write_packs

        def slow(*args):
            time.sleep(0.002)
            return write(*args)

        store._disk.write_packs = slow
        ids = [store.put(random_planes(5, turn)) for turn in range(30)]
        assert store.stats.write_waits > 0
        store.check()
        for turn, block in enumerate(ids):
            assert same(store.fetch(block), random_planes(5, turn))


def test_a_damaged_block_is_named_and_the_others_are_read(tmp_path):
    with make(hot=4, warm=4, directory=tmp_path) as store:
        ids = store.put(random_planes(40))
        store.flush()
        read = store._disk.read
        bad = int(ids[3])

        def damaged(ids, *rest):
            if bad in ids:
                raise CorruptBlockError(f"block {bad} is damaged on disk")
            read(ids, *rest)

        store._disk.read = damaged
        for _ in range(2):
            with pytest.raises(CorruptBlockError, match=f"block {bad} "):
                store.fetch(ids[2:5])
            store.check_tables()
            store.prefetch(ids[2:5])
            for job in list(store._prefetch._jobs):
                job.wait()
            with pytest.raises(CorruptBlockError, match=f"block {bad} "):
                store.fetch(ids[2:5])
            assert same(store.fetch(ids[5:]), [plane[5:] for plane in random_planes(40)])
            store.check_tables()


def test_bits_flipped_in_the_file_are_found(tmp_path):
    with make(directory=tmp_path) as store:
        ids = store.put(random_planes(64))
        store.flush()
        frames = [frame for _, frame in store._disk.frames()]
    path = tmp_path / "data.mdb"
    data = bytearray(path.read_bytes())
    # One bit in each frame; LMDB has some of them twice, in pages that it no longer uses.
    for frame in frames:
        found = [match.start() for match in re.finditer(re.escape(frame), data)]
        assert found
        for start in found:
            data[start + 60] ^= 1
    path.write_bytes(data)
    with make(directory=tmp_path, hot=64) as store:
        for block in ids:
            with pytest.raises(CorruptBlockError, match=f"block {block} "):
                store.fetch(ids[block : block + 1])
        store.check_tables()


def first_of(arg):
    """The first slot, the first row of each plane, the tier itself."""
    if isinstance(arg, SlotTier):
        return arg
    return [row[:1] for row in arg] if isinstance(arg, list) else arg[:1]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("cold", [None, "1GiB"])
def test_ctrl_c_in_the_middle_of_a_move_loses_nothing(at, half, cold, monkeypatch):
    """Both tiers are full, so blocks change places; whatever call it comes in."""
    monkeypatch.setattr(kvstore.mover, "_HOP_BYTES", 2 * NBYTES)
    with make(hot=4, warm=8, cold=cold) as store:
        ids = store.put(random_planes(12))
        left = [at]

        owner = threading.get_ident()

        def guard(call):
            def guarded(*args):
                if threading.get_ident() != owner:
                    return call(*args)
                left[0] -= 1
                if left[0] != -1:
                    return call(*args)
                if half:
                    call(*map(first_of, args))
                raise KeyboardInterrupt

            return guarded

        for slab in (store._mover.hot_slab, store._mover.warm_slab):
            for name in ("scatter", "gather", "take_from"):
                monkeypatch.setattr(slab, name, guard(getattr(slab, name)))
        try:
            for start in (0, 4, 8):
                with store.pinned(ids[start : start + 4]):
                    pass
        except KeyboardInterrupt:
            assert left[0] < 0
        # Where fewer calls were made than that, it does not come any more.
        left[0] = -2
        store.check()
        assert same(store.fetch(ids), random_planes(12))
        assert len(store) == 12


def test_ctrl_c_while_deleted_blocks_are_being_written(monkeypatch):
    with make(hot=4, warm=16, cold="1GiB") as store:
        write = store._disk.write_packs
        begun, go = threading.Event(), threading.Event()

        def slow(*args):
            begun.set()
            assert go.wait(10)
            return write(*args)

        monkeypatch.setattr(store._disk, "write_packs", slow)
        ids = store.put(random_planes(16))
        written = store._writer.writing()[0][0]
        assert begun.wait(10)
        store.delete(written)
        left = np.setdiff1d(ids, written)
        expected = [plane[left] for plane in random_planes(16)]

        def interrupted(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store._mover.hot_slab, "take_from", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.fetch(left)
        store.check()
        go.set()
        store.flush()
        store.check()
        new = store.put(random_planes(2000, seed=1))
        assert same(store.fetch(left), expected)
        assert same(store.fetch(new), random_planes(2000, seed=1))
        store.check()


# Prefetch


def wait_for_reads(store):
    for job in list(store._prefetch._jobs):
        job.wait()


def test_prefetch_brings_blocks_up():
    with make(hot=8, warm=4) as store:
        ids = store.put(random_planes(40))
        store.flush()
        store.prefetch(ids[:3])
        assert store.stats.prefetch.issued == 3
        wait_for_reads(store)
        assert same(store.fetch(ids[:3]), [plane[:3] for plane in random_planes(40)])
        assert store.stats.hot.hits == 3
        assert store.stats.prefetch.used == 3
        store.prefetch(ids[3:5])
        wait_for_reads(store)
        store.fetch(ids[10:])
        assert store.stats.prefetch.wasted == 2
        store.check()


def test_a_fetch_waits_for_what_is_on_its_way():
    with make(hot=8, warm=4) as store:
        ids = store.put(random_planes(40))
        store.flush()
        read = store._disk.read
        go = threading.Event()
        calls = []

        def slow(*args):
            calls.append(args[0].tolist())
            assert go.wait(10)
            return read(*args)

        store._disk.read = slow
        store.prefetch(ids[:3])
        threading.Timer(0.05, go.set).start()
        assert same(store.fetch(ids[:4]), [plane[:4] for plane in random_planes(40)])
        assert sorted(map(len, calls)) == [1, 3]
        assert (store.stats.cold.hits, store.stats.prefetch.used) == (4, 3)
        store.check()


def test_what_is_on_its_way_is_not_asked_for_again_and_needs_room():
    with make(hot=8, warm=4) as store:
        ids = store.put(random_planes(40))
        store.flush()
        read = store._disk.read
        go = threading.Event()

        def slow(*args):
            assert go.wait(10)
            return read(*args)

        with store.pinned(ids[20:27]):
            pass
        store._disk.read = slow
        store.prefetch(ids[:4])
        store.prefetch(ids[:4])
        assert store.stats.prefetch.issued == 4
        with store.pinned(ids[20:27]):
            go.set()
            wait_for_reads(store)
            store.check()
            assert store.stats.prefetch.wasted == 3
        assert same(store.fetch(ids[:4]), [plane[:4] for plane in random_planes(40)])
        assert store.stats.prefetch.used == 1


def test_prefetch_is_bounded_and_never_evicts_what_is_pinned():
    with make(hot=8, warm=4, staging=8 * NBYTES) as store:
        ids = store.put(random_planes(40))
        store.flush()
        with store.pinned(ids[:6]) as pin:
            before = [slab[torch.from_numpy(pin.slots)].clone() for slab in store.hot_planes]
            store.prefetch(ids[10:])
            assert store.stats.prefetch.issued == 1
            wait_for_reads(store)
            store.check()
            assert same(store.fetch(ids[:6]), before)
        store.prefetch(ids[10:])
        store.check()
        assert store.stats.prefetch.issued <= 5


def test_deleting_what_is_on_its_way():
    with make(hot=8, warm=4) as store:
        ids = store.put(random_planes(40))
        store.flush()
        store.prefetch(ids[:3])
        store.delete(ids[:3])
        store.check()
        assert store.stats.prefetch.wasted == 3
        new = store.put(random_planes(40, seed=1))
        assert same(store.fetch(new), random_planes(40, seed=1))


# Whose it is, and when it ends


def test_another_thread_is_refused():
    with make() as store:
        ids = store.put(random_planes(1))
        caught = []

        def ask():
            for call in (lambda: store.fetch(ids), store.flush, store.close):
                try:
                    call()
                except RuntimeError as error:
                    caught.append(str(error))

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert len(caught) == 3
        assert all("thread" in message for message in caught)
        assert same(store.fetch(ids), random_planes(1))


def test_a_forked_process_is_refused_and_removes_nothing():
    with make() as store:
        ids = store.put(random_planes(40))
        store.flush()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store.fetch(ids)
            except RuntimeError as error:
                if "fork" in str(error):
                    store._release()
                    status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert store._disk.directory.exists()
        assert same(store.fetch(ids), random_planes(40))


def test_a_closed_store():
    store = make()
    ids = store.put(random_planes(1))
    with store.pinned(ids):
        store.close()
    store.close()
    for call in (lambda: store.fetch(ids), store.flush, store.check, lambda: store.put([])):
        with pytest.raises(StoreClosedError):
            call()


def test_a_temporary_store_is_removed():
    store = make()
    directory = store._disk.directory
    store.put(random_planes(40))
    store.flush()
    assert any(directory.iterdir())
    assert directory.stat().st_mode & 0o077 == 0
    store.close()
    assert not directory.exists()


def test_a_temporary_store_is_removed_after_an_error():
    store = make()
    directory = store._disk.directory
    with pytest.raises(ZeroDivisionError), store:
        raise ZeroDivisionError
    assert not directory.exists()


def test_a_temporary_store_that_nobody_holds_is_removed():
    store = make()
    store.put(random_planes(40))
    directory = store._disk.directory
    del store
    assert not directory.exists()


PROGRAM = """
import signal, sys, time, torch
from kvstore.block import BlockSpec
from kvstore.config import StoreConfig
from kvstore.store import Store
store = Store(BlockSpec.kv(4, 8), StoreConfig(hot=1 << 12, warm=1 << 14, device="cpu"))
store.put([torch.zeros(500, 4, 8, dtype=torch.bfloat16)] * 2)
# What a shell starts in the background inherits that Ctrl-C is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
print(store._disk.directory, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
if sys.argv[1] == "raise":
    raise SystemExit(3)
"""


def test_temporary_stores_are_removed_when_the_process_ends():
    """By Ctrl-C, by an error, by its end."""
    processes = {
        ending: subprocess.Popen(
            [sys.executable, "-c", PROGRAM, ending],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for ending in ("wait", "raise", "end")
    }
    for ending, process in processes.items():
        with process:
            directory = Path(process.stdout.readline().strip())
            assert directory.name.startswith("kvstore-")
            if ending == "wait":
                assert directory.exists()
                process.send_signal(signal.SIGINT)
            process.wait(60)
        assert not directory.exists()


def test_a_store_that_cannot_be_opened_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    trace = tmp_path / "not there" / "trace"
    with pytest.raises(ValueError, match="trace"):
        make(trace=trace)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_directory(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=str(tmp_path)):
        make(directory=tmp_path / "store")


def test_a_directory_where_none_can_be():
    with pytest.raises(ValueError, match="/proc/nowhere"):
        make(directory="/proc/nowhere")


def test_a_path_that_is_a_file(tmp_path):
    path = tmp_path / "store"
    path.write_text("not a store")
    with pytest.raises(ValueError, match="file"):
        make(directory=path)
    assert path.read_text() == "not a store"


# Kept stores


def test_a_kept_store_is_found_again(tmp_path):
    directory = tmp_path / "store"
    with make(directory=directory) as store:
        ids = store.put(random_planes(50))
        store.delete(ids[10:20])
        store.put_records({b"a/1": b"one", b"a/2": b"two", b"b": b"x" * 100_000})
        store.put_record(b"a/2", None)
    assert directory.stat().st_mode & 0o077 == 0
    with Store.open(directory, StoreConfig(hot=5 * NBYTES, warm=7 * NBYTES, device="cpu")) as store:
        assert store.spec == SPEC
        store.check()
        assert len(store) == 40
        kept = np.r_[0:10, 20:50]
        assert same(store.fetch(ids[kept]), [plane[kept] for plane in random_planes(50)])
        for block in ids[10:20]:
            with pytest.raises(KeyError):
                store.fetch(np.array([block]))
        assert store.record_keys() == [b"a/1", b"b"]
        assert store.record_keys(b"a/") == [b"a/1"]
        assert store.get_record(b"b") == b"x" * 100_000
        assert store.get_record(b"a/2") is None
        new = store.put(random_planes(30, seed=1))
        assert not set(new.tolist()) & set(ids[kept].tolist())
        assert same(store.fetch(new), random_planes(30, seed=1))
        store.check()


def test_a_kept_store_writes_behind_before_it_is_asked_to(tmp_path):
    with make(hot=64, warm=64, directory=tmp_path) as store:
        store.put(random_planes(32))
        assert store._writer.busy or store.usage()["cold"].blocks
    with make(hot=64, warm=64) as store:
        store.put(random_planes(32))
        assert not store._writer.busy
        assert store.usage()["cold"].blocks == 0


def test_what_was_deleted_while_it_was_written_stays_deleted(tmp_path):
    with make(hot=4, warm=16, directory=tmp_path) as store:
        write = store._disk.write_packs
        go = threading.Event()

        def slow(*args):
            assert go.wait(10)
            return write(*args)

        store._disk.write_packs = slow
        ids = store.put(random_planes(8))
        assert store._writer.busy
        store.delete(ids)
        store.check()
        assert len(store) == 0
        threading.Timer(0.05, go.set).start()
    with make(directory=tmp_path) as store:
        assert len(store) == 0


def test_another_specification_is_refused(tmp_path):
    with make(directory=tmp_path) as store:
        store.put(random_planes(1))
    other = BlockSpec((Plane("keys", (4, 8), torch.float16), Plane("values", (4, 8), torch.int16)))
    with pytest.raises(ValueError, match=r"planes|blocks"):
        make(directory=tmp_path, spec=other)


def test_opening_what_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="holds no store"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "spec.json").write_text("0000\n{}\n")
    with pytest.raises(CorruptBlockError, match=r"spec\.json"):
        Store.open(tmp_path)
    (tmp_path / "spec.json").write_text("")
    with pytest.raises(CorruptBlockError, match=r"spec\.json"):
        Store.open(tmp_path)


def test_ids_are_used_again_but_not_at_once():
    with make(hot=8, warm=8, cold=None) as store:
        seen = []
        for turn in range(300):
            ids = store.put(random_planes(10, turn))
            seen += ids.tolist()
            store.delete(ids)
        assert len(set(seen[:1000])) == 1000
        assert max(seen) < 2048
        store.check()


# Contexts and traces


def test_contexts_share_a_store_and_a_fetch():
    with make(hot=40) as store:
        contexts = [store.context(streams=2, landmark_dim=3) for _ in range(2)]
        planes = [torch.randint(0, 99, (2, 12, 8)).to(torch.int16) for _ in range(4)]
        for context, keys, values in zip(contexts, planes[:2], planes[2:], strict=True):
            context.append(slice(None), [keys, values], torch.zeros(2, 3, 3))
        streams, blocks = np.array([0, 1]), np.array([[0, 2], [1, 1]])
        ids = np.stack([context.ids(streams, blocks) for context in contexts])
        keys, values = store.fetch(ids)
        for place, context in np.ndindex(4, 2):
            stream, block = place // 2, blocks[place // 2, place % 2]
            tokens = slice(4 * block, 4 * block + 4)
            found = keys[context, stream, place % 2], values[context, stream, place % 2]
            assert same(
                found, [planes[context][stream, tokens], planes[2 + context][stream, tokens]]
            )
        contexts[0].delete()
        store.check()
        assert len(store) == 6
    assert not store.contexts


def test_kept_contexts_are_saved_when_the_store_closes(tmp_path):
    tokens = torch.arange(2 * 10 * 8).view(2, 10, 8).to(torch.int16)
    with make(directory=tmp_path) as store:
        context = store.context("novel", streams=2, landmark_dim=3)
        context.append(slice(None), [tokens, -tokens], torch.zeros(2, 2, 3))
        store.context(streams=1, landmark_dim=3)
    with Store.open(tmp_path, StoreConfig(device="cpu")) as store:
        context = store.context("novel", streams=2, landmark_dim=3)
        ids = context.ids(np.array([0, 1]), np.array([[0, 1], [0, 1]]))
        assert same(store.fetch(ids), [t[:, :8].reshape(2, 2, 4, 8) for t in (tokens, -tokens)])
        store.check()


def test_a_trace_has_every_access(tmp_path):
    path = tmp_path / "trace"
    with make(hot=2, warm=4, trace=path) as store:
        ids = store.put(random_planes(8))
        store.flush()
        with store.pinned(ids[[7, 6, 7]]) as pin:
            pin.weigh(np.array([0.5, 0.25, 0.25], np.float32))
        store.fetch(ids[:1])
        store.prefetch(ids[1:2])
        with pytest.raises(KeyError):
            store.fetch(np.array([99]))
        store.delete(ids[:2])
    assert read_trace_header(path)["hot_slots"] == 2
    events = list(read_trace(path))
    assert [e.ids.tolist() for e in events if e.kind is Kind.PUT] == [ids.tolist()]
    fetches = [(e.ids.tolist(), e.tiers.tolist()) for e in events if e.kind is Kind.FETCH]
    assert fetches[0] == ([7, 6], [0, 0])
    assert fetches[1][0] == [0]
    assert fetches[2] == ([99], [3])
    weights = [(e.ids.tolist(), e.weights.tolist()) for e in events if e.kind is Kind.WEIGH]
    assert weights == [([7, 6], [0.75, 0.25])]
    assert [e.ids.tolist() for e in events if e.kind is Kind.PREFETCH] == [[1]]
    assert [e.ids.tolist() for e in events if e.kind is Kind.DELETE] == [[0, 1]]
    assert any(e.kind is Kind.EVICT for e in events)


def test_a_trace_that_cannot_be_written_stops_no_move(tmp_path):
    with make(hot=2, warm=4, trace=tmp_path / "trace") as store:
        ids = store.put(random_planes(8))

        def fail(*_):
            raise WriteFailedError("the trace could not be written: no space")

        store._recorder._trace.evict = fail
        with pytest.raises(WriteFailedError, match="trace"):
            put_many(store, 3, 4)
        store._recorder._trace.evict = lambda *_: None
        assert same(store.fetch(ids), random_planes(8))
        store.check()


def test_a_hit_is_quick():
    """Generous: the bench measures. A Python loop over 128 blocks would not pass."""
    with make(hot=2000, warm=10) as store:
        ids = store.put(random_planes(1500))
        wanted = np.random.default_rng(0).choice(ids, (8, 16))
        times = []
        for _ in range(200):
            start = time.perf_counter()
            with store.pinned(wanted):
                pass
            times.append(time.perf_counter() - start)
        assert sorted(times)[100] < 150e-6


def test_everything_about_a_store_is_json():
    with make() as store:
        store.put(random_planes(3))
        json.dumps(store.stats.snapshot())


@pytest.mark.gpu
def test_on_cuda():
    planes = random_planes(500)
    config = StoreConfig(hot=32 * NBYTES, warm=64 * NBYTES, device="cuda")
    rng = np.random.default_rng(0)
    with Store(SPEC, config) as store:
        ids = store.put([plane.cuda() for plane in planes[:1]] + planes[1:])
        for _ in range(200):
            chosen = rng.choice(500, (4, 4))
            store.prefetch(ids[rng.choice(500, 8)])
            with store.pinned(ids[chosen]) as pin:
                slots = torch.from_numpy(pin.slots).cuda()
                found = [slab[slots] for slab in store.hot_planes]
            store.put([plane.cuda() for plane in random_planes(2)])
            assert same([plane.cpu() for plane in found], [plane[chosen] for plane in planes])
            store.check()
        assert same([plane.cpu() for plane in store.fetch(ids)], planes)
