"""The store: blocks in three tiers behind one interface.

Owns who may call, when the background is heard, and the end. Blocks are moved by the mover, held
by lookups, written behind by the writer, read ahead by prefetch; this is where they meet. Never
looks inside a block, and knows nothing of models.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvstore.block import BlockSpec
from kvstore.check import check_mover
from kvstore.config import StoreConfig, format_size
from kvstore.errors import (
    CorruptBlockError,
    CorruptStoreError,
    KVStoreError,
    StoreClosedError,
    StoreFullError,
)
from kvstore.guard import Guard
from kvstore.heap import keep_together
from kvstore.jobs import Committer, Crew
from kvstore.lookups import Lookups, Pin
from kvstore.mover import Mover
from kvstore.prefetch import Prefetch
from kvstore.recorder import Recorder
from kvstore.residency import ABSENT, COLD, WARM, Ids
from kvstore.stats import StoreStats
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.spec_file import NAME, read_spec, write_spec
from kvstore.trace import TraceWriter
from kvstore.waves import cut_waves
from kvstore.writer import Writer

if TYPE_CHECKING:
    from kvstore.context import Context
    from kvstore.saved_contexts import SavedContexts


_VERIFIED = 1024  # blocks, between two words of progress


@dataclass(frozen=True)
class TierUsage:
    """How full a tier is.

    capacity_bytes, used_bytes: of memory, or of the file. blocks: that have a copy here.
    """

    capacity_bytes: int
    used_bytes: int
    blocks: int


class Store:
    """Blocks in hot, warm and cold tiers.

    spec: what every block looks like. config: sizes, device, policy; see StoreConfig. ValueError
    where a block does not fit into hot, or the directory cannot be used.

    A context manager; `close` at the latest when the process ends. With a directory the blocks are
    kept in it, without one they are gone when the store closes. The thread that makes a store owns
    it: calls from another one, or from a forked process, raise RuntimeError. What fails in the
    background raises at the next call; the store stays readable.
    """

    def __init__(self, spec: BlockSpec, config: StoreConfig | None = None) -> None:
        self.spec = spec
        self.config = config = config or StoreConfig()
        self.stats = StoreStats()
        # The open contexts, by name or number; they enter and leave by themselves.
        self.contexts: dict[str | int, Context] = {}
        self._thread, self._pid = get_ident(), os.getpid()
        self._closed = False
        if config.hot < spec.nbytes:
            raise ValueError(
                f"hot: {config.hot} bytes hold no block of {spec.nbytes} bytes; "
                f"give at least {spec.nbytes}"
            )
        if config.cold is not None and config.cold < spec.nbytes:
            raise ValueError(
                f"cold: {config.cold} bytes hold no block of {spec.nbytes} bytes; give more, "
                "or None for no disk tier"
            )
        if config.read_only and config.directory is None:
            raise ValueError("read_only: there is nothing to read without a directory")
        if config.read_only and config.warm < spec.nbytes:
            raise ValueError(
                "warm: a store that is only read keeps in it what is new; give it more"
            )
        keep_together()  # before it starts threads
        with ExitStack() as stack:
            disk = _open_disk(spec, config, stack)
            self._recorder = Recorder(_open_trace(spec, config, stack))
            self._mover = Mover(spec, config, disk, self.stats, self._recorder)
            self._disk = disk
            self._writer: Writer | None = None
            self._prefetch: Prefetch | None = None
            if disk is not None:
                writers, reader = Crew("kvstore-write", config.workers), Crew("kvstore-read", 1)
                committer = Committer(disk)
                stack.callback(committer.close)  # after those who pass their work on to it
                stack.callback(writers.close)
                stack.callback(reader.close)
                if self._mover.warm.slots:
                    self._writer = Writer(self._mover, disk, config, writers, committer, self.stats)
                self._prefetch = Prefetch(self._mover, disk, config, reader, self.stats)
            self._guard = Guard(self._mover, self._writer, self._prefetch)
            self._lookups = Lookups(
                self._mover, self._prefetch, self._guard, self.stats, self._recorder
            )
            self._release = weakref.finalize(self, _close_in, self._pid, stack.pop_all())

    @classmethod
    def open(cls, directory: str | PathLike[str], config: StoreConfig | None = None) -> Store:
        """Open the store that is kept in a directory, with the blocks it has.

        config: everything but the directory. ValueError where there is no store.
        """
        spec = read_spec(Path(directory))
        return cls(spec, replace(config or StoreConfig(), directory=directory))

    # The interface.

    @property
    def device(self) -> torch.device:
        """Where the hot tier lies."""
        return self._mover.hot_slab.planes[0].device

    @property
    def hot_planes(self) -> list[torch.Tensor]:
        """Per plane the hot tier's tensor [hot slots, *shape]: read it at pinned slots only."""
        return self._mover.hot_slab.planes

    @property
    def hot_slots(self) -> int:
        """Blocks that fit into hot."""
        return self._mover.hot.slots

    def ids(self) -> Ids:
        """The ids of all blocks stored, int64 [n], ascending."""
        self._enter()
        return self._mover.residency.present()

    def __len__(self) -> int:
        """The number of blocks stored."""
        return self._mover.live

    def put(self, planes: Sequence[torch.Tensor]) -> Ids:
        """Store n blocks.

        planes: per plane of the spec a tensor [n, *shape] of its dtype, on any device. Returns
        their ids, int64 [n]. ValueError for another shape or dtype; StoreFullError where they do
        not fit. Either all are stored or none.
        """
        self._enter()
        n = self._count(planes)
        self._require_memory(n)
        mover = self._mover
        ids, done = np.empty(0, np.int64), 0
        try:
            ids = mover.residency.allocate(n)
            while done < n:
                done += self._put_some(ids[done:], [plane[done:] for plane in planes])
            if self._writer is not None:
                self._writer.run()
        except KVStoreError:
            mover.remove(ids[:done])
            mover.residency.recycle(ids[done:])
            raise
        except BaseException:
            self._guard.rebuild()
            mover.remove(ids[mover.residency.tiers(ids) != ABSENT])
            raise
        self._recorder.note("put", ids)
        return ids

    def pinned(self, ids: Ids) -> Pin:
        """Hold blocks in hot: `with store.pinned(ids) as pin: ... pin.slots ...`.

        ids: int64, any shape, repeats allowed. When the `with` is entered, KeyError for an id that
        names no block, HotTierTooSmallError where the distinct blocks do not fit into hot beside
        what is pinned already, CorruptBlockError where a block's copy on disk is damaged.
        """
        return Pin(self._lookups, self._enter, self._explain, _as_ids(ids))

    def fetch(self, ids: Ids) -> list[torch.Tensor]:
        """Copy blocks out, as many as you like.

        ids: int64, any shape. Returns per plane a tensor [*ids.shape, *shape] on the hot device.
        """
        ids = _as_ids(ids)
        flat = ids.ravel()
        out = [
            torch.empty((len(flat), *plane.shape), dtype=plane.dtype, device=self.device)
            for plane in self.spec.planes
        ]
        for part in self.waves(flat[:, None]):
            with self.pinned(flat[part]) as pin:
                index = torch.from_numpy(pin.slots).to(self.device)
                for copy, slab in zip(out, self.hot_planes, strict=True):
                    torch.index_select(slab, 0, index, out=copy[part])
        return [copy.view(*ids.shape, *copy.shape[1:]) for copy in out]

    def waves(self, selection: Ids) -> Iterator[slice]:
        """Cut a selection into consecutive waves that can each be pinned at once.

        selection: int64 [groups, ids a group]. Yields slices of groups. A wave holds as many groups
        as have distinct ids for the hot slots that are not pinned when the first is asked for. A
        single group that does not fit raises HotTierTooSmallError.
        """
        selection = _as_ids(selection)
        if selection.ndim != 2:
            raise ValueError(f"a selection is [groups, ids], not {list(selection.shape)}")
        self._enter()
        room = self._lookups.room(self.hot_slots)
        for wave, distinct in cut_waves(selection, room):
            if distinct > room:
                raise self._lookups.too_small(self.hot_slots - room + distinct)
            yield wave

    def prefetch(self, ids: Ids) -> None:
        """Bring blocks up to hot before they are asked for.

        ids: int64, any shape. Those on disk are read in the background; a fetch that needs one of
        them waits for it. Never waits and never fails for want of room: what exceeds half of the
        hot slots that are not pinned, or the buffers, is left where it is. KeyError for an id that
        names no block.
        """
        self._enter()
        ids, tiers, (_, in_warm, in_cold, absent) = self._mover.residency.find(_as_ids(ids).ravel())
        if absent:
            self._lookups.require_present(ids, tiers)
        with self._guard:
            room = self._mover.room() // 2
            raised = min(room, in_warm)
            if raised:
                warm = ids[tiers == WARM][:raised]
                sources = self._mover.residency.warm[warm].astype(np.int64)
                self._mover.mark_early(self._mover.promote(warm, sources))
                self.stats.prefetch.issued += raised
            if self._prefetch is not None and in_cold:
                self._prefetch.begin(ids[tiers == COLD][: room - raised])
        self._recorder.note("prefetch", ids)

    def delete(self, ids: Ids) -> None:
        """Forget blocks. ids: int64; KeyError for one that names no block, ValueError if pinned."""
        self._enter()
        ids = np.unique(_as_ids(ids))
        self._lookups.require_present(ids, self._mover.residency.tiers(ids))
        self._lookups.end_pins(wait=True)
        with self._guard:
            if self._prefetch is not None:
                self._prefetch.await_blocks(ids)
            slots = self._mover.residency.hot[ids]
            pinned = ids[(slots >= 0) & self._mover.hot.pinned[slots]]
            if len(pinned):
                raise ValueError(f"block {pinned[0]} is pinned")
            self._mover.remove(ids)
            if self._writer is not None:
                self._writer.resume()
        self._recorder.note("delete", ids)

    def flush(self) -> None:
        """Write every block that has no copy on disk yet, and wait. Nothing without a disk tier.

        What survives a loss of power after that is the store's `durability`.
        """
        self._enter()
        if self._writer is not None:
            with self._guard:
                self._writer.flush()

    def context(
        self,
        name: str | None = None,
        *,
        streams: int | None = None,
        landmark_dim: int | None = None,
        fingerprint: str | None = None,
    ) -> Context:
        """Begin the past of a token sequence, or go on with the one kept under this name.

        A store with a directory keeps contexts that have a name. For the rest see Context.
        """
        from kvstore.context import Context

        self._enter()
        return Context(
            self, name, streams=streams, landmark_dim=landmark_dim, fingerprint=fingerprint
        )

    @property
    def kept(self) -> SavedContexts:
        """The contexts that are kept here, open or not: to list, fork, rename and delete."""
        from kvstore.saved_contexts import SavedContexts

        return SavedContexts(self)

    def sweep(self) -> int:
        """Delete the blocks that no context has, and return how many.

        A process that is killed leaves what it had not saved. For stores whose blocks are all put
        by contexts: what was put otherwise is deleted too.
        """
        self._enter()
        self.kept.sweep()
        present = self._mover.residency.present()
        lost = present[~np.isin(present, self.kept.used_ids())]
        self.delete(lost)
        return len(lost)

    def verify(self, progress: Callable[[int], None] = lambda blocks: None) -> dict[int, str]:
        """Read every block on disk; return those that are not what was written, and why.

        Tell now and then how many have been read. Takes a few MiB of memory. Blocks only: `check`
        and `kvstore.verify` look at kept contexts, too.
        """
        self._enter()
        residency = self._mover.residency
        ids = residency.present()
        ids = ids[residency.cold[ids] >= 0]
        ids = ids[np.argsort(residency.cold[ids], kind="stable")]
        found: dict[int, str] = {}
        for start in range(0, len(ids), _VERIFIED) if self._disk is not None else ():
            assert self._disk is not None
            some = ids[start : start + _VERIFIED]
            found |= self._disk.damaged(some, residency.cold[some])
            progress(start + len(some))
        return found

    def disk_bytes(self, ids: Ids) -> int:
        """Bytes that blocks take on disk, compressed. ids: int64 [n]; KeyError for one of none."""
        self._enter()
        table = self._mover.residency.cold
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
            raise KeyError(f"no block has the id {int(ids.max())}")
        locations = table[ids]
        return 0 if self._disk is None else self._disk.frame_bytes(locations[locations >= 0])

    def put_record(self, key: bytes, value: bytes | None) -> None:
        """Keep a small record beside the blocks; None forgets it."""
        self.put_records({key: value})

    def put_records(self, records: Mapping[bytes, bytes | None]) -> None:
        """Keep several records, all or none."""
        self._enter()
        self._records().put_meta(dict(records))

    def get_record(self, key: bytes) -> bytes | None:
        """A record's value, None if there is none."""
        self._enter()
        return self._records().get_meta(key)

    def record_keys(self, prefix: bytes = b"") -> list[bytes]:
        """The keys of the records that begin with this, sorted."""
        self._enter()
        return self._records().meta_keys(prefix)

    def usage(self) -> dict[str, TierUsage]:
        """How full hot, warm and cold are."""
        self._enter()
        nbytes, disk = self.spec.nbytes, self._disk
        usage = {
            name: TierUsage(tier.slots * nbytes, tier.used * nbytes, tier.used)
            for name, tier in (("hot", self._mover.hot), ("warm", self._mover.warm))
        }
        usage["cold"] = TierUsage(0, 0, 0)
        if disk is not None:
            usage["cold"] = TierUsage(disk.capacity_bytes, disk.used_bytes, disk.block_count)
        return usage

    def check(self) -> None:
        """Raise where anything is not as it must be.

        AssertionError where the tables contradict one another; CorruptBlockError where something
        that a directory keeps is not what was written, as `kvstore verify` finds it: reads all of
        it. OtherFormatError where a context is of another version.
        """
        from kvstore.verify import verify

        self.check_tables()
        if self.config.directory is not None:
            damaged = verify(self).damaged
            if damaged:
                more = f"; and {len(damaged) - 1} faults more" if len(damaged) > 1 else ""
                raise CorruptBlockError(damaged[0] + more)

    def check_tables(self) -> None:
        """Raise AssertionError where the tables contradict one another; reads nothing from disk."""
        self._enter()
        writer, prefetch = self._writer, self._prefetch
        check_mover(
            self._mover,
            writing=writer.writing() if writer is not None else [],
            waiting=writer.waiting() if writer is not None else None,
            reading=prefetch.reading() if prefetch is not None else [],
        )
        if writer is not None:
            assert writer.room() >= 0, "more blocks are unsaved than warm can take"
        nbytes = self.spec.nbytes
        assert self._mover.hot.slots * nbytes <= self.config.hot, "hot is over its budget"
        assert self._mover.warm.slots * nbytes <= self.config.warm, "warm is over its budget"
        if self._disk is not None:
            assert self._disk.used_bytes <= self._disk.capacity_bytes, "cold is over its budget"
        self.stats.check()

    def close(self, *, save: bool = True) -> None:
        """Close the contexts, write what a kept store has not written yet, let go of everything.

        save: False leaves kept contexts as they were saved last, as leaving `with` by an error
        does. Closing again does nothing. An error of the last writes is raised after all is closed.
        """
        if self._closed:
            return
        self._require_owner()
        if self._writer is not None:
            # What failed before is tried again by `flush`, or of no interest any more.
            self._writer.failure = None
        self._lookups.drop_pins()
        if self._disk is not None:
            self._disk.abandon()
        with ExitStack() as stack:
            stack.callback(self._end)
            if self.config.directory is not None:
                stack.callback(self.flush)
                for context in self.contexts.values():
                    stack.callback(context.close, save=save)

    def _end(self) -> None:
        self._closed = True
        for context in list(self.contexts.values()):
            context.close()
        self._release()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(save=kind is None)

    # Who may call, and what happened meanwhile.

    def _require_owner(self) -> None:
        if get_ident() != self._thread:
            raise RuntimeError("a store belongs to the thread that made it; this is another one")
        if os.getpid() != self._pid:
            raise RuntimeError("a store does not survive a fork; make one in the new process")

    def _enter(self) -> None:
        """Begin a call: take in what the background has done, raise what failed there."""
        self._require_owner()
        if self._closed:
            raise StoreClosedError("the store is closed")
        self._lookups.end_pins()
        writer, prefetch = self._writer, self._prefetch
        if writer is not None and writer.busy:
            with self._guard:
                writer.absorb()
        if prefetch is not None and prefetch.busy:
            with self._guard:
                prefetch.absorb()
        if writer is not None and writer.failure is not None:
            with self._guard:
                writer.raise_failure()
        self._recorder.raise_failure()

    def _explain(self, error: CorruptBlockError) -> CorruptBlockError:
        """Say whose block is damaged, and what to do."""
        message = str(error)
        # Those with a name first: a throwaway fork has most of its blocks from one of them.
        for context in sorted(self.contexts.values(), key=lambda context: context.name is None):
            if error.block is not None and (place := context.place_of(error.block)):
                message += f"; it is {place}"
                break
        if self.config.directory is not None:
            message += f"; `kvstore verify {self.config.directory} --repair` goes back to before it"
        return CorruptBlockError(message, error.block)

    def _records(self) -> DiskTier:
        if self._disk is None:
            raise ValueError("records need a disk tier; give cold a size")
        return self._disk

    # Putting.

    def _count(self, planes: Sequence[torch.Tensor]) -> int:
        """Check planes against the spec; returns how many blocks they are."""
        if len(planes) != len(self.spec.planes):
            names = ", ".join(plane.name for plane in self.spec.planes)
            raise ValueError(
                f"a block has {len(self.spec.planes)} planes ({names}), not {len(planes)}"
            )
        n = len(planes[0])
        for plane, tensor in zip(self.spec.planes, planes, strict=True):
            if tensor.shape != (n, *plane.shape) or tensor.dtype != plane.dtype:
                raise ValueError(
                    f"{plane.name}: expected {plane.dtype} {[n, *plane.shape]}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
        return n

    def _require_memory(self, n: int) -> None:
        """Without a disk tier, raise StoreFullError where n more blocks do not fit."""
        mover = self._mover
        lacking = mover.live + n - mover.hot.slots - mover.warm.slots
        if self._disk is None and lacking > 0:
            nbytes = lacking * self.spec.nbytes
            raise StoreFullError(
                f"hot and warm are full: {mover.live} blocks of {self.spec.nbytes} bytes, and {n} "
                f"more do not fit; give hot or warm {nbytes} bytes ({format_size(nbytes)}) more, "
                "or a cold tier"
            )

    def _put_some(self, ids: Ids, planes: Sequence[torch.Tensor]) -> int:
        """Store as many of these blocks as can be at a time; returns how many."""
        n = min(len(ids), self._lookups.room(len(ids)))
        if n == 0:
            raise self._lookups.too_small(self.hot_slots + 1)
        if self._disk is not None and self._writer is None:
            return self._mover.add_through(ids[:n], [plane[:n] for plane in planes])
        if self._writer is not None:
            n = self._writer.await_room(n)
        self._mover.add(ids[:n], [plane[:n] for plane in planes])
        if self._writer is not None:
            self._writer.enqueue(ids[:n])
        return n


def _open_disk(spec: BlockSpec, config: StoreConfig, stack: ExitStack) -> DiskTier | None:
    if config.cold is None:
        return None
    directory, said = config.directory, None
    if directory is None:
        directory = Path(tempfile.mkdtemp(prefix="kvstore-"))
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
    if config.directory is not None and (config.directory / NAME).exists():
        _require_file(config.directory)
        said = read_spec(config.directory)
    disk = DiskTier(
        directory,
        spec,
        config.cold,
        # What is temporary would not survive a loss of power anyway.
        precision=config.precision,
        durability="none" if config.directory is None else config.durability,
        read_only=config.read_only,
    )
    stack.callback(disk.close)
    if said not in (None, spec):  # the file itself has been compared with it
        raise ValueError(
            f"{directory / NAME} is of other blocks than the file beside it: remove it, and "
            f"`kvstore verify {directory} --repair` makes it anew"
        )
    if config.directory is not None and not config.read_only:
        write_spec(directory, spec)
    return disk


def _require_file(directory: Path) -> None:
    """Refuse a kept store without its file: LMDB would begin a new one."""
    path = directory / "data.mdb"
    if not path.exists() or not path.stat().st_size:
        raise CorruptStoreError(
            f"the store in {directory} is damaged: {path.name} is gone or empty"
        )


def _open_trace(spec: BlockSpec, config: StoreConfig, stack: ExitStack) -> TraceWriter | None:
    if config.trace is None:
        return None
    policy = config.policy
    header = {
        "block_bytes": spec.nbytes,
        "hot_slots": config.hot // spec.nbytes,
        "warm_slots": config.warm // spec.nbytes,
        "cold_bytes": config.cold,
        "policy": policy if isinstance(policy, str) else getattr(policy, "__name__", "unnamed"),
    }
    trace = TraceWriter(config.trace, header)
    stack.callback(trace.close)
    return trace


def _close_in(pid: int, stack: ExitStack) -> None:
    """Close what a store had open, but only in its own process: a fork has a copy of this."""
    if os.getpid() == pid:
        stack.close()


def _as_ids(ids: Any) -> Ids:
    given = np.asarray(ids)
    if given.dtype.kind not in "iu" and given.size:
        raise TypeError(f"block ids are integers, not {given.dtype}")
    return given.astype(np.int64, copy=False)
