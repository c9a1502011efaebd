"""The disk tier: what was written comes back, the capacity holds, and damage is named."""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from functools import lru_cache

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore.block import BlockSpec
from kvstore.errors import (
    CorruptBlockError,
    CorruptStoreError,
    StoreClosedError,
    StoreFullError,
    WriteFailedError,
)
from kvstore.tiers import lmdb_file
from kvstore.tiers.commits import newest_first
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.lmdb_file import LmdbFile
from kvstore.tiers.tree import readable

SPEC = BlockSpec.kv(16, 64)  # 4 KiB a block, about 2.9 KiB compressed
PLANE = SPEC.planes[0].nbytes
CAPACITY = 16 << 20
PAGE = 4096


@lru_cache(maxsize=4096)
def content(block):
    """The two planes of a block: a function of its id."""
    generator = np.random.default_rng(block)
    values = generator.normal(size=(2, PLANE // 2)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)


def planes(ids):
    both = [content(int(block)) for block in ids]
    empty = np.empty((0, PLANE), np.uint8)
    return [np.stack([pair[plane] for pair in both]) if both else empty for plane in (0, 1)]


def write(tier, ids):
    ids = np.asarray(ids, np.int64)
    return tier.write(ids, planes(ids))


def read(tier, ids, locations):
    ids, locations = np.asarray(ids, np.int64), np.asarray(locations, np.int64)
    out = [np.zeros((len(ids), PLANE), np.uint8) for _ in range(2)]
    tier.read(ids, locations, out)
    return out


def assert_stored(tier, ids, locations):
    for wanted, found in zip(planes(ids), read(tier, ids, locations), strict=True):
        assert (wanted == found).all()


def in_child(work):
    """Run `work` in a process that may die of it; returns the exit status, 0 for success."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def size_on_disk(directory):
    return sum(file.stat().st_size for file in directory.iterdir())


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def tier(directory):
    with_blocks = DiskTier(directory, SPEC, CAPACITY)
    yield with_blocks
    with_blocks.close()


# What it keeps


def test_blocks_come_back_in_any_order(tier):
    locations = np.concatenate([write(tier, range(200)), write(tier, [1000]), write(tier, [])])
    ids = np.append(np.arange(200), 1000)
    assert len(np.unique(locations)) == 201 == tier.block_count
    assert_stored(tier, ids, locations)
    order = np.random.default_rng(0).permutation(201)
    assert_stored(tier, ids[order], locations[order])
    assert_stored(tier, [7, 7, 1000, 7], locations[[7, 7, 200, 7]])
    assert_stored(tier, ids[:1], locations[:1])
    read(tier, [], [])


def test_blocks_go_to_the_rows_asked_for(tier):
    ids = np.arange(5)
    locations = write(tier, ids)
    out = [np.zeros((9, PLANE), np.uint8) for _ in range(2)]
    rows = np.array([8, 0, 3, 2, 6])
    tier.read(ids, locations, out, rows)
    assert (out[1][rows] == planes(ids)[1]).all()
    assert not out[1][[1, 4, 5, 7]].any()


def test_neighbours_share_values_of_64_kib(tier, directory):
    locations = write(tier, range(400))
    stored = sum(len(frame) for _, frame in tier.frames())
    packs = len(np.unique(locations >> 16))
    assert stored / packs >= 1 << 16
    assert tier.used_bytes < 1.06 * stored + 20 * 4096
    assert tier.used_bytes < 0.8 * 400 * SPEC.nbytes
    assert [block for block, _ in tier.frames()] == list(range(400))


@pytest.mark.parametrize("durability", ["sync", "async", "none"])
def test_everything_is_there_after_reopening(directory, durability):
    tier = DiskTier(directory, SPEC, CAPACITY, durability=durability)
    locations = write(tier, range(100))
    tier.delete(locations[10:60])
    tier.put_meta({b"context/a": b"state", b"context/b": b"", b"other": bytes(100_000)})
    kept = np.r_[0:10, 60:100]
    tier.close()
    tier = DiskTier(directory, SPEC, CAPACITY)
    ids, found = tier.scan()
    assert ids.tolist() == kept.tolist()
    assert found.tolist() == locations[kept].tolist()
    assert tier.block_count == 50
    assert_stored(tier, ids, found)
    assert tier.get_meta(b"context/a") == b"state"
    assert tier.get_meta(b"context/b") == b""
    assert tier.get_meta(b"context") is None
    assert tier.get_meta(b"other") == bytes(100_000)
    assert tier.meta_keys(b"context/") == [b"context/a", b"context/b"]
    assert tier.meta_keys(b"o") == [b"other"]
    assert tier.meta_keys() == [b"context/a", b"context/b", b"other"]
    tier.put_meta({b"context/a": None, b"absent": None, b"new": b"1"})
    assert tier.meta_keys() == [b"context/b", b"new", b"other"]
    tier.close()


def test_the_map_grows_before_anything_is_put_in_vain(tier, monkeypatch):
    why = []
    grow = LmdbFile._grow
    monkeypatch.setattr(LmdbFile, "_grow", lambda t: [why.append(sys.exc_info()[0]), grow(t)][1])
    for first in range(0, 1000, 100):
        write(tier, range(first, first + 100))
    assert {error.__name__ for error in why} == {"MapTooSmall"}


def test_the_map_grows_while_others_read(directory):
    tier = DiskTier(directory, SPEC, 64 << 20)
    first = tier._file._env.info()["map_size"]
    locations = write(tier, range(50))
    wrong, stop = [], threading.Event()

    def reading():
        while not stop.is_set():
            try:
                assert_stored(tier, range(50), locations)
                assert tier.meta_keys() == []
            except Exception as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=reading) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(50, 4000, 50):
        write(tier, range(start, start + 50))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert first == 1 << 20
    assert tier._file._env.info()["map_size"] == 16 << 20
    tier.close()
    tier = DiskTier(directory, SPEC, 64 << 20)
    assert tier.block_count == 4000
    assert_stored(tier, *tier.scan())
    tier.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_what_ctrl_c_left_unfinished_is_not_waited_for(directory, read_only):
    """It strikes in between: the body has ended, and the context manager has not heard of it."""
    with contextlib.closing(DiskTier(directory, SPEC, CAPACITY)) as tier:
        write(tier, range(8))
    tier = DiskTier(directory, SPEC, CAPACITY, read_only=read_only)
    unfinished = []

    def interrupted():
        for left in (tier._file.snapshot(), tier._file.operation(), tier._file.snapshot()):
            left.__enter__()
            unfinished.append(left)
        tier.abandon()
        if not read_only:
            locations = write(tier, range(100, 2000))  # the map grows
            assert_stored(tier, range(100, 2000), locations)
        unfinished.append(tier._file.snapshot())
        unfinished[-1].__enter__()
        tier.close()
        unfinished.clear()  # as late as a traceback is dropped

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_nobody_begins_to_read_while_the_map_moves(directory, monkeypatch):
    with contextlib.closing(DiskTier(directory, SPEC, CAPACITY)) as tier:
        file, reading = tier._file, threading.Event()

        def read_on():
            with file.snapshot():
                reading.set()

        with file._idle:
            file._growing = True
        thread = threading.Thread(target=read_on, daemon=True)
        thread.start()
        assert not reading.wait(0.2)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)  # a child, where it moves for ever
            with pytest.raises(StoreClosedError, match="another process"), file.snapshot():
                pass
        with file._idle:
            file._growing = False
            file._idle.notify_all()
        assert reading.wait(10)
        thread.join()


def test_readers_of_one_view_take_turns(directory):
    with contextlib.closing(DiskTier(directory, SPEC, CAPACITY)) as tier:
        write(tier, range(8))
    with contextlib.closing(DiskTier(directory, SPEC, CAPACITY, read_only=True)) as tier:
        reading = threading.Event()

        def read_on():
            with tier._file.snapshot():
                reading.set()

        thread = threading.Thread(target=read_on, daemon=True)
        with tier._file.snapshot():
            thread.start()
            assert not reading.wait(0.2)
        assert reading.wait(10)
        thread.join()


def test_what_lmdb_cannot_follow_is_damage(tier):
    damage = pytest.raises(CorruptStoreError, match=r"the store in .* is damaged: .*page")
    with damage, tier._file.snapshot():
        raise lmdb.PageNotFoundError("a page")
    assert tier.block_count == 0


def test_close_waits_for_what_other_threads_read(directory):
    tier = DiskTier(directory, SPEC, CAPACITY)
    reading, seen = threading.Event(), []

    def read_on():
        with tier._file.snapshot():
            reading.set()
            seen.append(closed.wait(0.3))

    closed = threading.Event()
    thread = threading.Thread(target=read_on)
    thread.start()
    reading.wait()
    tier.close()
    closed.set()
    thread.join()
    assert seen == [False]


def test_a_map_that_cannot_grow_is_a_named_error(directory, monkeypatch):
    tier = DiskTier(directory, SPEC, 64 << 20)
    locations = write(tier, range(50))

    class Env:
        """LMDB's environment where the system gives no more addresses."""

        def __init__(self, env):
            self.env = env

        def __getattr__(self, name):
            return getattr(self.env, name)

        def set_mapsize(self, nbytes):
            raise lmdb.Error("mmap: Cannot allocate memory")

    real = tier._file._env
    tier._file._env = Env(real)
    with pytest.raises(WriteFailedError, match="Cannot allocate memory"):
        write(tier, range(50, 4000))
    tier._file._env = real
    assert_stored(tier, range(50), locations)
    write(tier, range(50, 4000))
    tier.close()


def test_the_numbers_of_packs_are_never_used_again(directory):
    seen = set()
    for turn in range(3):
        tier = DiskTier(directory, SPEC, CAPACITY)
        for _ in range(2):
            locations = write(tier, range(turn, turn + 40))
            assert not seen & set(locations.tolist())
            seen |= set(locations.tolist())
            tier.delete(locations)
        assert tier.block_count == 0
        tier.close()


def test_a_pack_goes_when_its_last_block_goes(tier):
    empty = tier.used_bytes
    locations = write(tier, range(100))
    full = tier.used_bytes
    tier.delete(locations[::2])
    assert tier.block_count == 50
    assert_stored(tier, np.arange(1, 100, 2), locations[1::2])
    tier.delete(locations[1::2])
    assert tier.used_bytes <= empty + 2 * 4096 < full
    assert tier.scan()[0].tolist() == []


def test_deleting_what_is_not_there_changes_nothing(tier):
    locations = write(tier, range(100))
    tier.delete(locations[:1])
    for wrong in ([locations[1], locations[0]], [locations[1], 1 << 40], [locations[2] + 5000]):
        with pytest.raises(KeyError, match="no block"):
            tier.delete(np.array(wrong))
    with pytest.raises(KeyError, match="twice"):
        tier.delete(locations[[1, 2, 1]])
    assert tier.block_count == 99
    assert_stored(tier, np.arange(1, 100), locations[1:])
    assert len(tier.scan()[0]) == 99


# Its capacity


def fill(tier, directory, first=0, batch=7):
    """Write until it is full; the files are measured at every step."""
    ids, locations = [], []
    while True:
        fresh = list(range(first, first + batch))
        try:
            locations += write(tier, fresh).tolist()
        except StoreFullError:
            assert size_on_disk(directory) <= tier.capacity_bytes
            return ids, locations
        ids += fresh
        first += batch
        assert size_on_disk(directory) <= tier.capacity_bytes
        assert tier.file_bytes <= tier.capacity_bytes
        assert tier.used_bytes <= tier.file_bytes


def test_a_full_tier_refuses_whole_batches_and_reads_on(directory):
    tier = DiskTier(directory, SPEC, 2 << 20)
    ids, locations = fill(tier, directory)
    assert len(ids) * SPEC.nbytes > 0.95 * tier.capacity_bytes
    assert tier.block_count == len(ids)
    assert_stored(tier, ids, locations)
    with pytest.raises(StoreFullError, match="2097152 B"):
        write(tier, range(5000, 5800))
    with pytest.raises(StoreFullError, match="1 records"):
        tier.put_meta({b"large": bytes(1 << 20)})
    tier.close()
    tier = DiskTier(directory, SPEC, 2 << 20)
    assert tier.scan()[0].tolist() == ids
    assert_stored(tier, ids, locations)
    tier.close()


@pytest.mark.parametrize("together", [True, False], ids=["neighbours", "scattered"])
def test_a_full_tier_can_delete_and_write_again(directory, together):
    tier = DiskTier(directory, SPEC, 4 << 20)
    batch = 23  # a pack
    ids, locations = fill(tier, directory, batch=batch)
    held = dict(zip(ids, locations, strict=True))
    generator = np.random.default_rng(1)
    most = len(held)
    for turn in range(1, 8):
        gone = list(held) if together else generator.permutation(list(held)).tolist()
        gone = gone[: most // 3]
        tier.delete(np.array([held.pop(block) for block in gone]))
        assert size_on_disk(directory) <= tier.capacity_bytes
        ids, locations = fill(tier, directory, first=turn * 10_000, batch=batch)
        # Single blocks leave holes in which a pack may not fit.
        assert len(ids) >= (0.85 * len(gone) if together else batch)
        held |= dict(zip(ids, locations, strict=True))
        assert_stored(tier, list(held), list(held.values()))
    tier.delete(np.array(list(held.values())))
    assert tier.block_count == 0
    assert len(fill(tier, directory, batch=batch)[0]) >= 0.9 * most
    tier.close()


@pytest.mark.parametrize(
    ("mib", "batch", "shares"),
    # By sizes alone the first would not be gathered, and the second by the file's order alone.
    [(32, 256, [0.5]), (24, 64, [0.02, 0.6])],
    ids=["every other", "at random"],
)
def test_what_was_deleted_all_over_a_full_tier_is_used_again(directory, mib, batch, shares):
    tier = DiskTier(directory, SPEC, mib << 20)
    held = dict(zip(*fill(tier, directory, batch=256), strict=True))
    generator = np.random.default_rng(1)
    for turn, share in enumerate(shares):
        if share == 0.5:
            gone = list(held)[::2]
        else:
            gone = generator.choice(list(held), int(len(held) * share), replace=False)
        tier.delete(np.array([held.pop(int(block)) for block in gone]))
        fresh, places = fill(tier, directory, first=(turn + 1) * 100_000, batch=batch)
        held |= dict(zip(fresh, places, strict=True))
    assert len(fresh) >= 0.85 * len(gone)
    assert_stored(tier, list(held), list(held.values()))
    tier.close()


def test_nothing_is_gathered_in_vain_while_somebody_reads(directory, monkeypatch):
    """What is freed is of no use then, and would take the pages that are kept for deleting."""
    monkeypatch.setattr("kvstore.tiers.disk._PATIENCE_SECONDS", 0.1)
    tier = DiskTier(directory, SPEC, 8 << 20)
    ids, locations = fill(tier, directory, batch=64)
    held = dict(zip(ids, locations, strict=True))
    for block in ids[::10]:
        tier.delete(np.array([held.pop(block)]))
    with tier._file.snapshot():
        tier.delete(np.array([held.pop(block) for block in list(held)[: len(ids) // 4]]))
        began = time.monotonic()
        for first in (100_000, 200_000):
            with pytest.raises(StoreFullError):
                write(tier, range(first, first + 256))
        assert time.monotonic() - began < 5
        for block in list(held)[-8:]:
            tier.delete(np.array([held.pop(block)]))
    fresh, places = fill(tier, directory, first=300_000, batch=64)
    assert len(fresh) > 0.25 * len(ids)
    held |= dict(zip(fresh, places, strict=True))
    assert_stored(tier, list(held), list(held.values()))
    tier.close()


def test_a_deletion_looks_at_no_other_pack(directory, monkeypatch):
    """It needs no room but what is kept for it, and damage elsewhere is not its business."""
    monkeypatch.setattr("kvstore.tiers.disk._PATIENCE_SECONDS", 0.0)
    tier = DiskTier(directory, SPEC, 4 << 20)
    _, locations = fill(tier, directory, batch=64)
    tier._reclaimer._loose = None
    monkeypatch.setattr(tier._reclaimer, "_find", lambda: pytest.fail("it looked"))
    with tier._file.snapshot(), contextlib.suppress(StoreFullError):
        for location in locations:
            tier.delete(np.array([location]))
    assert 0 < tier.block_count < len(locations)
    tier.close()


def test_a_killed_reader_keeps_no_room(directory):
    tier = DiskTier(directory, SPEC, 8 << 20)
    ids, locations = fill(tier, directory, batch=64)
    script = (
        "import os, sys; from kvstore.block import BlockSpec; "
        "from kvstore.tiers.disk import DiskTier; "
        "held = DiskTier(sys.argv[1], BlockSpec.kv(16, 64), 8 << 20, read_only=True); "
        "os.kill(os.getpid(), 9)"
    )
    ran = subprocess.run([sys.executable, "-c", script, directory], check=False)
    assert ran.returncode == -signal.SIGKILL
    tier.delete(np.array(locations[::2]))
    assert len(fill(tier, directory, first=100_000, batch=64)[0]) >= 0.85 * len(ids[::2])
    tier.close()


def test_a_pack_that_is_gone_is_not_shrunk(directory, monkeypatch):
    """Ctrl-C may come between a deletion and what is remembered of it."""
    tier = DiskTier(directory, SPEC, 4 << 20)
    ids, locations = fill(tier, directory, batch=64)
    held = dict(zip(ids, locations, strict=True))
    tier.delete(np.array([held.pop(block) for block in ids[::2]]))
    held |= dict(zip(*fill(tier, directory, first=100_000, batch=64), strict=True))
    for block in list(held)[::7]:
        tier.delete(np.array([held.pop(block)]))
    pack = next(iter(tier._reclaimer._loose))
    gone = [block for block, location in held.items() if location >> 16 == pack]
    with monkeypatch.context() as patch:
        patch.setattr(tier._reclaimer, "note", lambda left: None)
        tier.delete(np.array([held.pop(block) for block in gone]))
    held |= dict(zip(*fill(tier, directory, first=200_000, batch=64), strict=True))
    assert_stored(tier, list(held), list(held.values()))
    tier.close()


def test_a_full_tier_deletes_one_by_one(directory):
    tier = DiskTier(directory, SPEC, 1 << 20)
    ids, locations = fill(tier, directory)
    for index, location in enumerate(locations):
        tier.delete(np.array([location]))
        assert_stored(tier, ids[index + 1 :], locations[index + 1 :])
    assert tier.block_count == 0
    tier.close()


def test_a_deletion_all_over_a_full_tier_goes_in_short_steps(directory, monkeypatch):
    monkeypatch.setattr("kvstore.tiers.lmdb_file._RESERVED_PAGES", 24)
    monkeypatch.setattr("kvstore.tiers.disk._PACK_BYTES", 1)
    tier = DiskTier(directory, BlockSpec.kv(1, 4), 3 << 19)
    ids, rows = np.arange(50), [np.zeros((50, 8), np.uint8)] * 2
    written = []
    with contextlib.suppress(StoreFullError):
        while True:
            written.append(tier.write(ids, rows))
    locations = np.concatenate(written)
    tier.delete(locations[::4])
    assert tier.block_count == len(locations) - len(locations[::4])
    assert tier.scan()[1].tolist() == np.delete(locations, np.s_[::4]).tolist()
    tier.close()


def test_changes_wait_for_pages_that_a_read_still_needs(directory):
    tier = DiskTier(directory, SPEC, 1 << 20)
    ids, locations = fill(tier, directory)
    reading, enough = threading.Event(), threading.Event()

    def hold():
        with tier._file.snapshot():
            reading.set()
            enough.wait(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    reading.wait()
    for location in locations[: len(ids) // 2]:
        tier.delete(np.array([location]))
    fresh = write(tier, range(9000, 9020))
    assert_stored(tier, range(9000, 9020), fresh)
    thread.join()
    tier.close()


def test_capacities_that_cannot_be_held_are_refused(directory):
    with pytest.raises(ValueError, match="cannot hold one block") as refused:
        DiskTier(directory, SPEC, 100_000)
    assert not directory.exists()
    least = int(str(refused.value).split()[-2])
    tier = DiskTier(directory, SPEC, least)
    locations = write(tier, [1])
    tier.delete(locations)
    write(tier, [2])
    tier.close()
    large = DiskTier(directory, SPEC, CAPACITY)
    write(large, range(1000))
    large.close()
    with pytest.raises(ValueError, match=f"cannot be {least} B"):
        DiskTier(directory, SPEC, least)


def test_blocks_larger_than_a_pack(directory):
    spec = BlockSpec.kv(512, 128)
    tier = DiskTier(directory, spec, 2 << 20)
    noise = np.random.default_rng(0).integers(0, 256, (2, 3, spec.nbytes // 2), np.uint8)
    locations = tier.write(np.arange(3), list(noise))
    assert len(np.unique(locations >> 16)) == 3
    out = [np.zeros_like(noise[0]) for _ in range(2)]
    tier.read(np.arange(3), locations, out)
    assert (np.stack(out) == noise).all()
    with pytest.raises(StoreFullError):
        tier.write(np.arange(3, 9), [np.tile(plane, (2, 1)) for plane in noise])
    tier.delete(locations[:1])
    tier.write(np.arange(3, 4), [plane[:1] for plane in noise])
    tier.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_full_disk_is_a_full_store(directory, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        tier = DiskTier(directory, SPEC, CAPACITY)
        locations = write(tier, range(200))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        with pytest.raises(StoreFullError, match=r"the disk under .* is full"):
            write(tier, range(1000, 1400))
        assert tier.block_count == 200
        assert_stored(tier, range(200), locations)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        more = write(tier, range(1000, 1400))
        assert_stored(tier, range(1000, 1400), more)
        assert_stored(tier, range(200), locations)
        tier.close()

    assert in_child(work) == 0


# Where it may be


def test_its_files_are_for_its_owner_alone(tier, directory):
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}


def one_line(error):
    assert "\n" not in str(error.value)


def test_a_path_that_is_a_file_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"mine")
    for wrong in (path, path / "below"):
        with pytest.raises(ValueError, match="file") as error:
            DiskTier(wrong, SPEC, CAPACITY)
        one_line(error)
    assert path.read_bytes() == b"mine"


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cannot use /proc/store") as error:
        DiskTier("/proc/store", SPEC, CAPACITY)
    one_line(error)
    # A test may run as root, who may write everywhere.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="not writable") as error:
        DiskTier(tmp_path, SPEC, CAPACITY)
    one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="not writable"):
        DiskTier(tmp_path, SPEC, CAPACITY)


def test_a_store_in_use_is_refused(tier, directory):
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        DiskTier(directory, SPEC, CAPACITY)
    tier.close()
    DiskTier(directory, SPEC, CAPACITY).close()


def test_another_specification_is_refused(directory):
    DiskTier(directory, SPEC, CAPACITY).close()
    with pytest.raises(ValueError, match=r"keys:bfloat16\[16,64\].*use another directory") as error:
        DiskTier(directory, BlockSpec.kv(16, 64, torch.float16), CAPACITY)
    one_line(error)
    DiskTier(directory, SPEC, CAPACITY).close()


def test_another_format_is_refused(directory, monkeypatch):
    monkeypatch.setattr("kvstore.tiers.disk.FORMAT_VERSION", 1)
    DiskTier(directory, SPEC, CAPACITY).close()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 1, this program reads 2"):
        DiskTier(directory, SPEC, CAPACITY)


def test_an_lmdb_file_of_something_else_is_refused(directory):
    directory.mkdir()
    with lmdb.open(str(directory)) as other, other.begin(write=True) as transaction:
        transaction.put(b"mine", b"1")
    with pytest.raises(ValueError, match="no store"):
        DiskTier(directory, SPEC, CAPACITY)


# Damage


def test_a_damaged_block_is_named_and_the_others_are_read(tier, directory):
    locations = write(tier, range(60))
    frames = dict(tier.frames())
    tier.close()
    data = (directory / "data.mdb").read_bytes()
    place = data.index(frames[33]) + len(frames[33]) // 2
    with (directory / "data.mdb").open("r+b") as file:
        file.seek(place)
        file.write(bytes([data[place] ^ 16]))
    damaged = DiskTier(directory, SPEC, CAPACITY)
    with pytest.raises(CorruptBlockError, match="block 33 "):
        read(damaged, range(60), locations)
    others = np.delete(np.arange(60), 33)
    assert_stored(damaged, others, locations[others])
    damaged.close()


def test_a_location_of_another_block_is_noticed(tier):
    locations = write(tier, range(10))
    with pytest.raises(CorruptBlockError, match=r"block 4 .* holds the frame of block 5"):
        read(tier, [3, 4], locations[[3, 5]])
    for nowhere in (1 << 30, locations[4] + 200):
        with pytest.raises(CorruptBlockError, match="block 4 "):
            read(tier, [3, 4], [locations[3], nowhere])
    tier.delete(locations[4:5])
    tier.delete(locations[:4])
    assert_stored(tier, range(5, 10), locations[5:])


def test_damage_anywhere_is_never_read_as_a_block(directory):
    """Flip bytes all over a file's values, in tables and records too."""
    tier = DiskTier(directory, SPEC, CAPACITY)
    locations = write(tier, range(40))
    tier.put_meta({b"key": bytes(range(256)) * 30})
    _, frame = next(tier.frames())
    tier.close()
    path = directory / "data.mdb"
    good = path.read_bytes()
    record = good.index(bytes(range(256)) * 30)
    table = good.index(frame) - 4 * (40 + 1)
    generator = np.random.default_rng(3)
    places = [record - 3, record + 5, *(table + generator.integers(0, 4 * 41, 60)).tolist()]

    def read_everything():
        assert_stored(tier, range(40), locations)
        assert tier.get_meta(b"key") == bytes(range(256)) * 30

    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        tier = DiskTier(directory, SPEC, CAPACITY)
        with pytest.raises(CorruptBlockError, match=r"block \d+ |record b'key'"):
            read_everything()
        tier.close()
    path.write_bytes(good)
    tier = DiskTier(directory, SPEC, CAPACITY)
    read_everything()
    tier.close()


def test_a_damaged_directory_is_noticed(directory):
    tier = DiskTier(directory, SPEC, CAPACITY)
    write(tier, range(1_000_000, 1_000_005))
    tier.close()
    path = directory / "data.mdb"
    good = path.read_bytes()
    place = good.rindex(np.arange(1_000_000, 1_000_005, dtype="<i8").tobytes())
    path.write_bytes(good[:place] + b"\xff" + good[place + 1 :])
    tier = DiskTier(directory, SPEC, CAPACITY)
    with pytest.raises(CorruptBlockError, match="directory of pack 0"):
        tier.scan()
    tier.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("keep", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_does_not_kill_the_process(directory, keep):
    tier = DiskTier(directory, SPEC, CAPACITY)
    locations = write(tier, range(300))
    tier.close()
    path = directory / "data.mdb"
    os.truncate(path, int(keep * path.stat().st_size))

    def work():
        with pytest.raises(CorruptBlockError, match=r"damaged|not on disk"):
            read(DiskTier(directory, SPEC, CAPACITY), range(300), locations)

    assert in_child(work) == 0


# Where the two first pages say the number of the last page, and of their commit.
LAST_PAGE, COMMIT = 136, 144


@pytest.mark.parametrize("commits", [2, 5])
@pytest.mark.parametrize("read_only", [False, True])
def test_the_commit_before_is_never_taken_for_the_last(directory, commits, read_only):
    """LMDB takes the commit of the larger number, and nothing of its own would tell."""
    tier = DiskTier(directory, SPEC, CAPACITY)
    for i in range(1, commits):  # making it was one
        write(tier, [i])
    tier.close()
    path = directory / "data.mdb"
    whole = path.read_bytes()
    refused = {0: 0, 1: 0}
    for page in refused:
        for bit in range(64):
            raw = bytearray(whole)
            raw[page * PAGE + COMMIT + bit // 8] ^= 1 << bit % 8
            path.write_bytes(raw)
            try:
                opened = DiskTier(directory, SPEC, CAPACITY, read_only=read_only)
            except CorruptStoreError as error:
                refused[page] += "commit" in str(error)
            else:
                assert opened.scan()[0].tolist() == list(range(1, commits))
                opened.close()
    last = commits % 2
    assert refused[last] == 64
    # An older commit of another number is no harm, as long as it is not larger than the last.
    assert refused[1 - last] >= 60
    # The next commit would go where the last one is.
    path.write_bytes(whole[PAGE : 2 * PAGE] + whole[:PAGE] + whole[2 * PAGE :])
    with pytest.raises(CorruptStoreError, match="last commit has the number"):
        DiskTier(directory, SPEC, CAPACITY, read_only=read_only)
    path.write_bytes(whole)
    DiskTier(directory, SPEC, CAPACITY).close()


def test_what_is_salvaged_is_of_the_last_commit(directory):
    tier = DiskTier(directory, SPEC, CAPACITY)
    for i in range(4):
        write(tier, [i])
    tier.close()
    path = directory / "data.mdb"
    raw = bytearray(path.read_bytes())
    assert raw[PAGE + COMMIT] == 5
    raw[PAGE + COMMIT] = 1
    path.write_bytes(raw)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert newest_first(data) == [1, 4]
        tables, _ = readable(data, newest_first(data))
        assert len(tables[b"packs"]) == 4
        assert len(readable(data)[0][b"packs"]) == 3


@pytest.mark.parametrize("added", [1, 2, 500])
def test_a_file_does_not_grow_because_damage_says_so(directory, added):
    """It may lack its last pages only where they are free."""
    tier = DiskTier(directory, SPEC, CAPACITY)
    write(tier, range(20))
    tier.close()
    path = directory / "data.mdb"
    raw = bytearray(path.read_bytes())
    assert raw[COMMIT] == 2
    pages = len(raw) // PAGE
    raw[LAST_PAGE : LAST_PAGE + 8] = (pages - 1 + added).to_bytes(8, "little")
    path.write_bytes(raw)
    with pytest.raises(CorruptStoreError, match=f"has {pages} pages of {pages + added}"):
        DiskTier(directory, SPEC, CAPACITY)
    assert path.stat().st_size == len(raw)


def test_a_file_of_something_else_is_damage(directory):
    directory.mkdir()
    (directory / "data.mdb").write_bytes(b"something else" * 5000)
    with pytest.raises(CorruptBlockError, match="damaged") as error:
        DiskTier(directory, SPEC, CAPACITY)
    one_line(error)


# Threads and processes


def test_one_thread_reads_while_others_write_and_delete(tier):
    ids = np.arange(200)
    locations = write(tier, ids)
    stop = threading.Event()
    failures = []

    def guarded(work):
        def run():
            try:
                while not stop.is_set():
                    work()
            except BaseException as error:
                failures.append(error)

        return threading.Thread(target=run)

    generator = np.random.default_rng(5)

    def reading():
        some = generator.integers(0, 200, 30)
        assert_stored(tier, ids[some], locations[some])

    def writing(first):
        def work():
            fresh = write(tier, range(first, first + 50))
            assert_stored(tier, range(first, first + 50), fresh)
            tier.delete(fresh)

        return work

    threads = [guarded(reading), guarded(writing(1000)), guarded(writing(2000))]
    for thread in threads:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert tier.block_count == 200
    assert sorted(tier.scan()[0].tolist()) == ids.tolist()


def test_closing_waits_for_a_read_and_refuses_the_next(tier):
    locations = write(tier, range(300))
    outcomes = []

    def reading():
        try:
            while True:
                assert_stored(tier, range(300), locations)
                outcomes.append("read")
        except StoreClosedError:
            outcomes.append("closed")

    thread = threading.Thread(target=reading)
    thread.start()
    while not outcomes:
        pass
    tier.close()
    thread.join()
    assert outcomes[-1] == "closed"
    for work in (
        tier.scan,
        lambda: write(tier, [1]),
        lambda: tier.delete(locations),
        lambda: tier.get_meta(b"key"),
        lambda: tier.put_meta({b"key": b"1"}),
        lambda: tier.used_bytes,
    ):
        with pytest.raises(StoreClosedError):
            work()
    tier.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_refused(tier):
    locations = write(tier, range(3))

    def work():
        with pytest.raises(StoreClosedError, match="another process"):
            read(tier, range(3), locations)
        tier.close()

    assert in_child(work) == 0
    assert_stored(tier, range(3), locations)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_lives_on_does_not_keep_the_store(directory):
    tier = DiskTier(directory, SPEC, CAPACITY)
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(begin)
        os.read(end, 1)
        os._exit(0)
    tier.close()
    DiskTier(directory, SPEC, CAPACITY).close()
    os.close(begin)
    os.close(end)
    os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_killed_writers_child_does_not_keep_the_store(directory):
    end, begin = os.pipe()

    def work():
        tier = DiskTier(directory, SPEC, CAPACITY)
        write(tier, range(3))
        forked, fork_is_done = os.pipe()
        if os.fork() == 0:
            os.write(fork_is_done, b"1")
            os.close(begin)
            os.read(end, 1)
            os._exit(0)
        os.read(forked, 1)  # what the child does first, it has done
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == -signal.SIGKILL
    DiskTier(directory, SPEC, CAPACITY).close()
    os.close(begin)
    os.close(end)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_killed_readers_leave_room_for_others(directory):
    def work():
        held = DiskTier(directory, SPEC, CAPACITY, read_only=True)
        os.kill(os.getpid(), signal.SIGKILL)
        held.close()

    tier = DiskTier(directory, SPEC, CAPACITY)
    write(tier, range(3))
    tier.close()
    end, begin = os.pipe()
    opened, open_now = os.pipe()
    living = os.fork()  # while anybody has the file open, LMDB's table of readers is as it was
    if living == 0:
        os.close(begin)
        held = DiskTier(directory, SPEC, CAPACITY, read_only=True)
        os.write(open_now, b"1")
        os.read(end, 1)
        held.close()
        os._exit(0)
    os.close(open_now)
    assert os.read(opened, 1) == b"1"
    os.close(opened)
    for _ in range(140):  # more than the table has rows
        assert in_child(work) == -signal.SIGKILL
    DiskTier(directory, SPEC, CAPACITY).close()
    os.close(begin)
    os.close(end)
    os.waitpid(living, 0)


def test_more_readers_than_there_is_room_for(tier, directory, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise lmdb.ReadersFullError

    monkeypatch.setattr(lmdb_file.lmdb, "open", full)
    with pytest.raises(ValueError, match="has as many readers as it takes"):
        DiskTier(directory, SPEC, CAPACITY, read_only=True)


def test_records_with_bad_keys_are_refused(tier):
    for key in (b"", b"k" * 501):
        with pytest.raises(ValueError, match="key"):
            tier.put_meta({b"good": b"1", key: b"2"})
    assert tier.meta_keys() == []


# Against a dict


class DiskMachine(RuleBasedStateMachine):
    """A small tier that is full most of the time, against a dict of its blocks."""

    root = None

    @initialize(capacity=st.integers(700_000, 1_200_000))
    def open(self, capacity):
        self.directory = type(self).root / str(np.random.default_rng().integers(1 << 62))
        self.capacity = capacity
        self.tier = DiskTier(self.directory, SPEC, capacity)
        self.held = {}
        self.records = {}
        self.next_id = 0

    @rule(count=st.integers(1, 120))
    def write(self, count):
        ids = range(self.next_id, self.next_id + count)
        self.next_id += count
        try:
            locations = write(self.tier, ids).tolist()
        except StoreFullError:
            return
        assert not set(locations) & set(self.held.values())
        self.held |= dict(zip(ids, locations, strict=True))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), share=st.floats(0, 1))
    def delete(self, data, share):
        seed = data.draw(st.integers(0, 1000))
        gone = np.random.default_rng(seed).permutation(list(self.held))
        gone = gone[: max(1, int(share * len(gone)))].tolist()
        self.tier.delete(np.array([self.held.pop(block) for block in gone]))

    @precondition(lambda self: self.held)
    @rule(seed=st.integers(0, 1000), count=st.integers(1, 40))
    def read(self, seed, count):
        ids = np.random.default_rng(seed).choice(list(self.held), count)
        assert_stored(self.tier, ids, [self.held[int(block)] for block in ids])

    @rule(name=st.sampled_from([b"a", b"b", b"c"]), size=st.integers(0, 30_000))
    def put(self, name, size):
        try:
            self.tier.put_meta({name: bytes(size)})
        except StoreFullError:
            return
        self.records[name] = size

    @rule(name=st.sampled_from([b"a", b"b", b"c"]))
    def drop(self, name):
        self.tier.put_meta({name: None})
        self.records.pop(name, None)

    @rule()
    def reopen(self):
        self.tier.close()
        self.tier = DiskTier(self.directory, SPEC, self.capacity)

    @invariant()
    def holds_what_it_should(self):
        ids, locations = self.tier.scan()
        assert dict(zip(ids.tolist(), locations.tolist(), strict=True)) == self.held
        assert self.tier.block_count == len(self.held)
        assert self.tier.meta_keys() == sorted(self.records)
        for name, size in self.records.items():
            assert self.tier.get_meta(name) == bytes(size)
        assert size_on_disk(self.directory) <= self.capacity
        assert self.tier.used_bytes <= self.tier.file_bytes <= self.capacity

    def teardown(self):
        if hasattr(self, "tier"):
            if self.held:
                assert_stored(self.tier, list(self.held), list(self.held.values()))
            self.tier.close()


def run_machine(tmp_path, examples, steps):
    DiskMachine.root = tmp_path
    run_state_machine_as_test(
        DiskMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_against_a_dict(tmp_path):
    run_machine(tmp_path, 15, 25)


@pytest.mark.slow
def test_against_a_dict_at_length(tmp_path):
    run_machine(tmp_path, 300, 50)
