"""Kept contexts against plain lists: whatever is done, killed, damaged and repaired in between.

The oracle is a few dicts of `Past`, which never change and share no tensor with the store. Each has
a version, which its context keeps in `info`: so it is known of whatever is read what it must be.
Blocks have numbers of the oracle's own, so that it knows how many there are, shared ones once.

Threads decide what is on disk at a crash, and so where damage falls: no rule has a precondition,
and what is drawn depends on nothing that happened.

The long run, from the root of the repository:

    python tests/kvstore/test_context_machine.py 5000
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from urllib.parse import quote

import hypothesis
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
from twin import LANDMARK, SIZE, SPEC, assert_past, marks_of, tokens

import kvstore.saved_contexts
import kvstore.tiers.lmdb_file
from kvstore.config import IndexConfig, StoreConfig
from kvstore.context import Context
from kvstore.errors import CorruptStoreError, KVStoreError
from kvstore.salvage import salvage
from kvstore.store import Store
from kvstore.verify import repair, verify

EXAMPLES = 1000
STEPS = 50
PAGE = 4096
META = 2 * PAGE  # LMDB's two meta pages

NAMES = ["a", "b", "c", "d", "é/ 1"]

seeds = st.integers(0, 2**32 - 1)
names = st.sampled_from(NAMES)
# A place in a list, taken modulo its length.
picks = st.integers(0, 999)
bounds = st.integers(0, 12)
lengths = st.one_of(st.integers(0, 2 * SIZE + 3), st.sampled_from([5 * SIZE, 40]))
durabilities = st.sampled_from(["sync", "async", "none"])


@dataclass(frozen=True)
class Past:
    """What a context must hold.

    planes: per stream a tensor a plane; marks: per stream [blocks, LANDMARK]; blocks: per stream
    the oracle's numbers of the sealed blocks.
    """

    version: int
    planes: tuple[tuple[torch.Tensor, ...], ...]
    marks: tuple[torch.Tensor, ...]
    blocks: tuple[tuple[int, ...], ...]
    state: dict[str, torch.Tensor]

    @property
    def streams(self) -> int:
        return len(self.planes)

    def filled(self, stream: int) -> int:
        return len(self.planes[stream][0]) % SIZE


@dataclass(frozen=True)
class Saved:
    """A kept context: as it was saved last, and what it can go back to."""

    past: Past
    snapshots: tuple[Past, ...] = ()

    def pasts(self) -> tuple[Past, ...]:
        return (self.past, *self.snapshots)


@dataclass
class Open:
    """An open context; snapshots: those that its next save will have."""

    context: Context
    past: Past
    snapshots: tuple[Past, ...] = ()

    @property
    def name(self) -> str | None:
        return self.context.name


Kept = dict[str, Saved]


class ContextMachine(RuleBasedStateMachine):
    @initialize(
        hot=st.integers(1, 8),
        warm=st.integers(0, 12),
        kind=st.sampled_from(["exact", "hnsw"]),
        segment=st.integers(2, 6),
        durability=durabilities,
        workers=st.integers(1, 2),
    )
    def begin_store(self, hot, warm, kind, segment, durability, workers):
        self.root = Path(tempfile.mkdtemp())
        self.numbers = count()
        self.exact = kind == "exact"
        self.config = StoreConfig(
            hot=hot * SPEC.nbytes,
            warm=warm * SPEC.nbytes + 1,
            cold="16MiB",
            directory=self.new_directory(),
            device="cpu",
            index=IndexConfig(kind=kind, segment=segment, sample=0),
            durability=durability,
            workers=workers,
            staging=1 << 16,
        )
        self.kept: Kept = {}
        self.open: list[Open] = []
        self.versions: dict[int, Past] = {}
        # Under each name all that was ever saved: what a file that went back may hold.
        self.history: dict[str, set[int]] = {name: set() for name in NAMES}
        # Blocks that no context has, left by a crash and not swept.
        self.lost = 0
        self.store = Store(SPEC, self.config)

    def teardown(self):
        if not hasattr(self, "store"):
            return
        try:
            # A step that failed is to be read about, not what follows from it.
            if sys.exc_info()[0] is None:
                self.close_store(save=True)
                self.open_store()
                self.compare_all_kept()
                assert self.store.sweep() == self.lost
                assert_whole(self.store)
        finally:
            with contextlib.suppress(KVStoreError):
                self.store.close(save=False)
            shutil.rmtree(self.root)

    # What the oracle says.

    def new_version(self, planes, marks, blocks, state) -> Past:
        past = Past(next(self.numbers), planes, marks, blocks, state)
        self.versions[past.version] = past
        return past

    def nothing(self, streams: int) -> Past:
        planes = tuple(tuple(plane[0] for plane in tokens(1, 0)) for _ in range(streams))
        marks = tuple(marks_of(1, 0)[0] for _ in range(streams))
        return self.new_version(planes, marks, ((),) * streams, {})

    def keep(self, name: str, saved: Saved) -> None:
        self.kept[name] = saved
        self.history[name] |= {past.version for past in saved.pasts()}

    def saved_of(self, each: Open, snapshot: bool = False) -> Saved:
        return Saved(each.past, each.snapshots + (each.past,) * snapshot)

    def find(self, name: str | None) -> Open | None:
        return next((each for each in self.open if name and each.name == name), None)

    def pick(self, place: int) -> Open:
        """One of the open contexts; where there is none, one is opened or begun."""
        if not self.open:
            name = self.choose(place)
            if name in self.kept:
                self.go_on(name)
            else:
                self.begin(name, place % 3 + 1)
                self.append_to(self.open[-1], 0, place % 23, place)
        return self.open[place % len(self.open)]

    def choose(self, place: int) -> str:
        """One of the kept contexts mostly, of all names now and then."""
        choice = sorted(self.kept) if self.kept and place % 5 else NAMES
        return choice[place % len(choice)]

    def blocks(self) -> int:
        """How many blocks contexts have."""
        pasts = [each.past for each in self.open] + [each.past for each in self.kept.values()]
        return len({block for past in pasts for stream in past.blocks for block in stream})

    def note(self, each: Open, past: Past) -> None:
        each.past = past
        each.context.info["version"] = past.version

    # What the store says.

    def compare(self, context: Context, past: Past) -> None:
        assert context.info == {"version": past.version}
        assert context.streams == past.streams
        assert context.fingerprint == "mine"
        for stream in range(past.streams):
            assert_past(context, stream, list(past.planes[stream]), past.marks[stream])
        state = context.get_state()
        assert state.keys() == past.state.keys()
        for name, tensor in past.state.items():
            assert torch.equal(state[name], tensor)
            assert state[name].dtype == tensor.dtype

    def compare_kept(self, store: Store, name: str, past: Past) -> None:
        context = store.context(name)
        try:
            self.compare(context, past)
        finally:
            context.close(save=False)

    def compare_snapshots(self, store: Store, name: str, pasts: Sequence[Past]) -> None:
        for snapshot, past in enumerate(pasts):
            store.kept.fork(name, "back", snapshot)
            self.compare_kept(store, "back", past)
            store.kept.delete("back")

    def compare_all_kept(self) -> None:
        for name, saved in self.kept.items():
            if self.find(name) is None:
                self.compare_kept(self.store, name, saved.past)

    def search_and_compare(self, each: Open, streams: list[int], seed: int, k: int, before=None):
        """Three queries. before: one bound, or one for each of them."""
        queries = marks_of(len(streams), 3, seed)
        given = torch.tensor(before) if isinstance(before, list) else before
        numbers, scores = each.context.search(streams, queries, k, given)
        assert numbers.shape == scores.shape == (len(streams), 3, k)
        bounds = before if isinstance(before, list) else [before] * 3
        for i, stream in enumerate(streams):
            for query, found, got, bound in zip(
                queries[i], numbers[i], scores[i], bounds, strict=True
            ):
                want = each.past.marks[stream][:bound] @ query
                n = min(k, len(want))
                assert (found[n:] == -1).all()
                assert (got[n:] == -torch.inf).all()
                assert len(set(found[:n].tolist())) == n
                assert ((found[:n] >= 0) & (found[:n] < len(want))).all()
                near(got[:n], want[found[:n]])
                if self.exact:
                    near(got[:n], want.topk(n).values)
        return numbers, scores

    # Opening and closing the store.

    def new_directory(self) -> Path:
        return self.root / str(next(self.numbers))

    def open_store(self) -> None:
        self.store = Store(SPEC, self.config)
        assert self.store.kept.names() == sorted_names(self.kept)
        assert len(self.store) == self.blocks() + self.lost

    def close_store(self, save: bool) -> None:
        self.store.close(save=save)
        for each in self.open:
            if save and each.name is not None:
                self.keep(each.name, self.saved_of(each))
        self.open = []

    def copy_files(self, source: Path) -> Path:
        """What of a store lies in its files, in another directory."""
        target = self.new_directory()
        (target / "index").mkdir(parents=True)
        for name in ("data.mdb", "spec.json"):
            shutil.copy(source / name, target / name)
        # The graphs first: a sum is written before its graph, and a copy is not made in a moment.
        for path in sorted((source / "index").glob("*"), key=lambda p: p.suffix == ".sum"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(path, target / "index" / path.name)
        return target

    # Rules: one context.

    @rule(name=names, streams=st.integers(1, 3))
    def begin(self, name, streams):
        def ask():
            return self.store.context(
                name, streams=streams, landmark_dim=LANDMARK, fingerprint="mine"
            )

        saved = self.kept.get(name)
        if self.find(name):
            with pytest.raises(ValueError, match="is open already"):
                ask()
        elif saved and saved.past.streams != streams:
            with pytest.raises(ValueError, match="was kept with streams"):
                ask()
        elif saved:
            self.open.append(Open(ask(), saved.past, saved.snapshots))
        else:
            each = Open(ask(), self.nothing(streams))
            self.note(each, each.past)
            self.open.append(each)

    @rule(place=picks)
    def go_on_with_one(self, place):
        self.go_on(self.choose(place))

    def go_on(self, name: str) -> None:
        if self.find(name):
            with pytest.raises(ValueError, match="is open already"):
                self.store.context(name)
        elif name not in self.kept:
            with pytest.raises(KeyError, match="no context"):
                self.store.context(name)
        else:
            with pytest.raises(ValueError, match="kept with fingerprint mine, not yours"):
                self.store.context(name, fingerprint="yours")
            saved = self.kept[name]
            self.open.append(Open(self.store.context(name), saved.past, saved.snapshots))

    @rule(place=picks, mask=st.integers(0, 7), t=lengths, seed=seeds)
    def append(self, place, mask, t, seed):
        each = self.pick(place)
        self.append_to(each, mask, t, seed)

    def append_to(self, each: Open, mask: int, t: int, seed: int) -> None:
        """Append to the streams of a mask, to all where it has none."""
        past = each.past
        streams = masked(past, mask)
        planes = tokens(len(streams), t, seed)
        if len({past.filled(stream) for stream in streams}) > 1:
            with pytest.raises(ValueError, match="not equally full"):
                each.context.append(streams, planes)
            return
        sealed = (past.filled(streams[0]) + t) // SIZE
        marks = marks_of(len(streams), sealed, seed)
        if sealed:
            with pytest.raises(ValueError, match="landmarks of shape"):
                each.context.append(streams, planes)
        each.context.append(streams, planes, marks if sealed or seed % 2 else None)
        new_planes, new_marks, blocks = list(past.planes), list(past.marks), list(past.blocks)
        for i, s in enumerate(streams):
            new_planes[s] = tuple(
                torch.cat((old, new[i])) for old, new in zip(past.planes[s], planes, strict=True)
            )
            new_marks[s] = torch.cat((past.marks[s], marks[i]))
            blocks[s] += tuple(next(self.numbers) for _ in range(sealed))
        self.note(
            each,
            self.new_version(tuple(new_planes), tuple(new_marks), tuple(blocks), past.state),
        )

    @rule(place=picks, t=lengths, seed=seeds, snapshot=st.booleans())
    def append_and_save(self, place, t, seed, snapshot):
        each = self.pick(place)
        self.append_to(each, seed, t, seed)
        if each.name is not None:
            self.save_one(each, snapshot)

    @rule(place=picks, lengths=st.lists(lengths, min_size=1, max_size=4), seed=seeds)
    def append_more(self, place, lengths, seed):
        for i, t in enumerate(lengths):
            self.append_to(self.pick(place + i), 0, t, seed + i)

    @rule(place=picks, seed=seeds, n=st.integers(0, 3))
    def set_state(self, place, seed, n):
        each = self.pick(place)
        given = {f"s{i}": tokens(i + 1, 3 + n, seed)[i] for i in range(n)}
        state = {name: tensor.clone() for name, tensor in given.items()}
        each.context.set_state(given)
        for tensor in given.values():
            tensor.zero_()  # it keeps copies
        past = each.past
        self.note(each, self.new_version(past.planes, past.marks, past.blocks, state))

    @rule(place=picks, snapshot=st.booleans())
    def save(self, place, snapshot):
        each = self.pick(place)
        if each.name is None:
            with pytest.raises(ValueError, match="only a context with a name"):
                each.context.save()
            return
        self.save_one(each, snapshot)

    def save_one(self, each: Open, snapshot: bool) -> None:
        each.context.save(snapshot=snapshot)
        saved = self.saved_of(each, snapshot)
        each.snapshots = saved.snapshots
        self.keep(each.name, saved)

    @rule(place=picks, how=st.sampled_from(["close", "with", "drop", "error"]))
    def close(self, place, how):
        each = self.pick(place)
        self.close_one(each, how)

    def close_one(self, each: Open, how: str) -> None:
        if how == "close":
            each.context.close()
        elif how == "drop":
            each.context.close(save=False)
        else:
            with contextlib.suppress(ZeroDivisionError), each.context:
                if how == "error":
                    raise ZeroDivisionError
        self.open.remove(each)
        if how in ("close", "with") and each.name is not None:
            self.keep(each.name, self.saved_of(each))
        each.context.close()  # closing again does nothing

    @rule(place=picks, name=st.none() | names)
    def fork(self, place, name):
        each = self.pick(place)
        if self.find(name):
            with pytest.raises(ValueError, match="is open already"):
                each.context.fork(name)
        elif name in self.kept:
            with pytest.raises(ValueError, match="is kept already"):
                each.context.fork(name)
        else:
            self.open.append(Open(each.context.fork(name), each.past, each.snapshots))

    @rule(place=picks, mask=st.integers(0, 7), t=lengths, seed=seeds, leave=st.booleans())
    def throw_away(self, place, mask, t, seed, leave):
        """What an answer does: a fork that nobody keeps."""
        each = self.pick(place)
        fork = Open(each.context.fork(), each.past)
        self.open.append(fork)
        self.append_to(fork, mask, t, seed)
        self.append_to(fork, 0, SIZE + 1, seed + 1)
        self.compare(fork.context, fork.past)
        self.close_one(fork, "with" if leave else "error")
        self.compare(each.context, each.past)

    @rule(
        place=picks,
        name=names,
        t=st.tuples(lengths, lengths),
        seed=seeds,
        how=st.sampled_from(["save", "close", "drop", "delete", "delete kept"]),
    )
    def part(self, place, name, t, seed, how):
        """A fork is saved after what it was forked from has gone on, or has gone."""
        each = self.pick(place)
        if self.find(name) or name in self.kept:
            return
        self.fork(place, name)
        fork = self.find(name)
        self.append_to(each, 0, t[0], seed)
        if how == "save" and each.name is not None:
            self.save_one(each, snapshot=bool(seed % 2))
        elif how == "delete":
            self.delete_one(each)
        elif how in ("close", "drop", "delete kept"):
            self.close_one(each, "drop" if how == "drop" else "close")
        if how == "delete kept" and each.name is not None:
            self.store.kept.delete(each.name)
            del self.kept[each.name]
        self.append_to(fork, 0, t[1], seed + 1)
        self.save_one(fork, snapshot=False)
        self.close_one(fork, "drop")
        self.compare_kept(self.store, name, fork.past)

    @rule(place=picks)
    def delete_open(self, place):
        each = self.pick(place)
        self.delete_one(each)

    def delete_one(self, each: Open) -> None:
        each.context.delete()
        self.open.remove(each)
        self.kept.pop(each.name, None)

    @rule(place=picks)
    def fetch(self, place):
        each = self.pick(place)
        self.compare(each.context, each.past)

    @rule(
        place=picks,
        mask=st.integers(0, 7),
        seed=seeds,
        k=st.integers(1, 12),
        before=st.none()
        | st.integers(0, 12)
        | st.lists(st.integers(0, 12), min_size=3, max_size=3),
    )
    def search(self, place, mask, seed, k, before):
        each = self.pick(place)
        self.search_and_compare(each, masked(each.past, mask), seed, k, before)

    # Rules: kept contexts.

    def refuse_unknown(self, name: str, change) -> bool:
        if name in self.kept:
            return False
        with pytest.raises(KeyError, match="no context"):
            change()
        return True

    def refuse_open(self, name: str, change) -> bool:
        if not self.find(name):
            return False
        with pytest.raises(ValueError, match="is open: close it first"):
            change()
        return True

    def refuse_taken(self, new: str, change) -> bool:
        if not self.find(new) and new not in self.kept:
            return False
        with pytest.raises(ValueError, match="is kept already"):
            change()
        return True

    @rule(place=picks, new=names, snapshot=st.none() | st.integers(0, 3))
    def fork_kept(self, place, new, snapshot):
        name = self.choose(place)

        def change():
            self.store.kept.fork(name, new, snapshot)

        if self.refuse_unknown(name, change) or self.refuse_taken(new, change):
            return
        saved = self.kept[name]
        if snapshot is not None and snapshot >= len(saved.snapshots):
            with pytest.raises(IndexError):
                change()
            return
        change()
        if snapshot is not None:
            saved = Saved(saved.snapshots[snapshot], saved.snapshots[: snapshot + 1])
        self.keep(new, saved)

    @rule(place=picks, new=names)
    def rename(self, place, new):
        name = self.choose(place)

        def change():
            self.store.kept.rename(name, new)

        refusals = (
            lambda: self.refuse_unknown(name, change),
            lambda: self.refuse_open(name, change),
            lambda: self.refuse_taken(new, change),
        )
        if not any(refused() for refused in refusals):
            change()
            self.keep(new, self.kept.pop(name))

    @rule(place=picks)
    def delete(self, place):
        name = self.choose(place)

        def change():
            self.store.kept.delete(name)

        if not (self.refuse_unknown(name, change) or self.refuse_open(name, change)):
            change()
            del self.kept[name]

    def note_of_owner(self, place: int) -> None:
        name = self.choose(place)
        past = self.kept[name].past if name in self.kept else self.nothing(1)
        past = self.new_version(past.planes, past.marks, past.blocks, past.state)

        def change():
            self.store.kept.note(name, version=past.version)

        if not (self.refuse_unknown(name, change) or self.refuse_open(name, change)):
            change()
            self.keep(name, replace(self.kept[name], past=past))

    def sweep(self) -> None:
        assert self.store.sweep() == self.lost
        self.lost = 0

    @rule(place=picks, what=st.sampled_from(["sweep", "note", "describe", "describe"]))
    def look_after(self, place, what):
        if what == "sweep":
            self.sweep()
        elif what == "note":
            self.note_of_owner(place)
        else:
            self.describe(place)

    def describe(self, place: int) -> None:
        name = self.choose(place)

        def ask():
            return self.store.kept.describe(name)

        if self.refuse_unknown(name, ask):
            return
        found, saved = ask(), self.kept[name]
        assert found.blocks == sum(map(len, saved.past.blocks))
        assert found.tokens == max(len(planes[0]) for planes in saved.past.planes)
        assert (found.info, found.fingerprint) == ({"version": saved.past.version}, "mine")
        assert found.snapshots == len(saved.snapshots)
        if not self.find(name):
            self.compare_kept(self.store, name, saved.past)
        self.compare_snapshots(self.store, name, saved.snapshots)

    # Rules: the store ends and begins again.

    @rule(save=st.sampled_from([True, True, False]), durability=durabilities, seed=seeds)
    def reopen(self, save, durability, seed):
        """Properly, or by an error: then each is as it was saved last."""
        asked = []
        for each in self.open:
            if save and each.name is not None:
                streams = list(range(each.past.streams))
                asked.append((each, streams, self.search_and_compare(each, streams, seed, 5)))
        self.close_store(save)
        self.config = replace(self.config, durability=durability)
        self.open_store()
        self.compare_all_kept()
        for each, streams, answer in asked:
            # Also what graphs answer, which are approximate, stays the same.
            with self.store.context(each.name) as context:
                again = self.search_and_compare(Open(context, each.past), streams, seed, 5)
            assert all(map(torch.equal, answer, again))

    @rule(
        during=st.sampled_from(["", "append", "save", "snapshot", "close", "error", "delete"]),
        commits=st.integers(0, 8),
        place=picks,
        seed=seeds,
        swept=st.booleans(),
    )
    def crash(self, during, commits, place, seed, swept):
        """Be killed while a context is changed."""
        each = self.pick(place)

        def change():
            if during:
                self.append_to(each, 0, seed % 30, seed)
            if during in ("save", "snapshot") and each.name is not None:
                self.save_one(each, during == "snapshot")
            elif during in ("close", "error"):
                self.close_one(each, during)
            elif during == "delete":
                self.delete_one(each)

        self.kill(commits, change, swept)

    @rule(
        during=st.sampled_from(["delete", "rename", "fork", "note", "sweep"]),
        commits=st.integers(0, 3),
        place=picks,
        snapshot=st.none() | st.integers(0, 3),
        swept=st.booleans(),
    )
    def crash_over_kept(self, during, commits, place, snapshot, swept):
        """Be killed while kept contexts are changed."""
        if self.choose(place) not in self.kept:
            self.append_to(self.pick(place), 0, 20, place)
        if (each := self.find(self.choose(place))) is not None:
            self.close_one(each, "close")
        free = [name for name in NAMES if name not in self.kept and not self.find(name)]
        new = free[0] if free else NAMES[0]
        change = {
            "delete": lambda: self.delete(place),
            "rename": lambda: self.rename(place, new),
            "fork": lambda: self.fork_kept(place, new, snapshot),
            "note": lambda: self.note_of_owner(place),
            "sweep": self.sweep,
        }
        self.kill(commits, change[during], swept)

    def kill(self, commits: int, change: Callable[[], None], swept: bool) -> None:
        """Go on with what a process leaves that is killed after so many commits of a change, or at
        its end. Each context is as it was saved last, before the change or by it."""
        before = dict(self.kept)
        killed = self.files_after(commits, change)
        after = self.kept
        with contextlib.suppress(KVStoreError):
            self.store.close(save=False)
        shutil.rmtree(self.config.directory)
        self.open = []
        self.config = replace(self.config, directory=killed)
        self.store = Store(SPEC, self.config)
        found = manifests_of(self.store)
        assert found in (contents_of(before), contents_of(after))
        self.kept = dict(before if found == contents_of(before) else after)
        self.compare_all_kept()
        self.lost = len(self.store) - self.blocks()
        findings = verify(self.store)
        # Of two forks that build the same graph one writes its sum again: killed in that moment it
        # leaves a file that is taken for a damaged one, and built anew.
        assert len(findings.damaged) == len(findings.graphs)
        assert findings.unreferenced == self.lost
        repair(self.store, findings)
        if swept:
            self.sweep()
            assert_whole(self.store)

    def files_after(self, commits: int, change: Callable[[], None]) -> Path:
        """The files as they are after so many commits of a change, or at its end."""
        disk = self.store._disk
        commit, taken, done = disk._commit, [], 0

        def counted(*given):
            nonlocal done
            commit(*given)
            done += 1
            if done == commits and not taken:
                taken.append(self.copy_files(disk.directory))  # whoever commits holds the lock

        if not commits:
            with disk._changing:
                taken.append(self.copy_files(disk.directory))
        disk._commit = counted
        change()
        disk._commit = commit
        with disk._changing:
            if not taken:
                taken.append(self.copy_files(disk.directory))
        return taken[0]

    # Damage

    @rule(
        save=st.booleans(),
        damages=st.lists(
            st.tuples(
                st.sampled_from(["value", "value", "bit", "bit", "zeros", "swap", "cut"]),
                st.integers(0, 2**40),
                st.integers(0, 2**40),
            ),
            min_size=1,
            max_size=4,
        ),
        repaired=st.booleans(),
    )
    def damage(self, save, damages, repaired):
        """Damage copies of the files, each in its way; go on with the files."""
        self.close_store(save)
        for kind, at, other in damages:
            aside = self.copy_files(self.config.directory)
            values = []
            if kind == "value":
                with Store(SPEC, replace(self.config, directory=aside)) as store:
                    values = values_of(store)
            safe = damage_file(aside / "data.mdb", kind, at, other, values)
            self.open_damaged(aside, safe, repaired)
            shutil.rmtree(aside)
        self.open_store()

    def open_damaged(self, directory: Path, safe: bool, repaired: bool) -> None:
        config = replace(self.config, directory=directory)
        try:
            store = Store(SPEC, config)
        except (KVStoreError, ValueError) as error:
            if repaired and isinstance(error, CorruptStoreError):
                self.salvage(directory, config)
            return
        try:
            self.read_damaged(store, safe)
            if repaired:
                self.repair(store, safe)
        finally:
            with contextlib.suppress(KVStoreError):
                store.close(save=False)

    def read_damaged(self, store: Store, safe: bool) -> None:
        """What is read is right, or refused, and then `verify` has something to say."""
        refused = []
        for name, saved in self.kept.items():
            try:
                if safe:
                    self.compare_kept(store, name, saved.past)
                else:
                    self.compare_earlier(store, name)
            except (KVStoreError, KeyError) as error:
                refused.append(error)
        if refused and safe:
            assert verify(store).damaged, refused

    def compare_earlier(self, store: Store, name: str, versions: set[int] | None = None) -> None:
        """Compare a context with the one of those it may be that it says it is."""
        version = store.kept.require(name)["info"]["version"]
        assert version in (self.history[name] if versions is None else versions)
        self.compare_kept(store, name, self.versions[version])

    def repair(self, store: Store, safe: bool) -> None:
        found = verify(store)
        words = repair(store, found)
        assert bool(words) >= bool(found.broken)
        store.sweep()
        assert_whole(store)
        left = store.kept.names()
        for name in left:
            if not safe:
                self.compare_earlier(store, name)
            elif name in found.broken:
                allowed = {past.version for past in self.kept[name].pasts()}
                self.compare_earlier(store, name, allowed)
            else:
                self.compare_kept(store, name, self.kept[name].past)
        if safe:
            gone = self.kept.keys() - set(left)
            assert not gone or found.damaged
        self.go_on_with(store)

    def salvage(self, directory: Path, config: StoreConfig) -> None:
        try:
            salvage(directory, config.cold)
        except CorruptStoreError:
            return
        with Store(SPEC, config) as store:
            store.sweep()
            assert_whole(store)
            for name in store.kept.names():
                self.compare_earlier(store, name)
            self.go_on_with(store)

    def go_on_with(self, store: Store) -> None:
        """What was repaired is a store like any other."""
        for name in store.kept.names():
            _, *versions = versions_of(store, name)
            self.compare_snapshots(store, name, [self.versions[v] for v in versions])
            with store.context(name) as context:
                each = Open(context, self.versions[context.info["version"]])
                self.append_to(each, 1, SIZE + 1, each.past.version)
            self.compare_kept(store, name, each.past)
            store.kept.delete(name)
        store.check()
        assert not len(store)
        assert not store.record_keys()

    # After every step.

    @invariant()
    def check(self):
        if not hasattr(self, "store"):
            return
        self.store.check()
        assert manifests_of(self.store) == contents_of(self.kept)
        assert len(self.store) == self.blocks() + self.lost
        for each in self.open:
            for stream, planes in enumerate(each.past.planes):
                assert each.context.tokens(stream) == len(planes[0])
                assert each.context.sealed(stream) == len(each.past.blocks[stream])


def masked(past: Past, mask: int) -> list[int]:
    streams = range(past.streams)
    return [stream for stream in streams if mask >> stream & 1] or list(streams)


def near(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def sorted_names(kept: Kept) -> list[str]:
    """As their keys are sorted, in which an é is %C3%A9."""
    return sorted(kept, key=lambda name: quote(name, safe=""))


def assert_whole(store: Store) -> None:
    found = verify(store)
    assert found.damaged == []
    assert found.unreferenced == 0


def manifests_of(store: Store) -> dict[str, tuple[int, ...]]:
    """What kept contexts say they are."""
    return {name: versions_of(store, name) for name in store.kept.names()}


def versions_of(store: Store, name: str) -> tuple[int, ...]:
    """The version that a context says it is, and those of its snapshots."""
    manifest = store.kept.require(name)
    return tuple(save["info"]["version"] for save in (manifest, *manifest["snapshots"]))


def contents_of(kept: Kept) -> dict[str, tuple[int, ...]]:
    return {name: tuple(past.version for past in saved.pasts()) for name, saved in kept.items()}


def values_of(store: Store) -> list[bytes]:
    """What lies on disk: records and frames."""
    records = [store.get_record(key) for key in store.record_keys()]
    return [*filter(None, records), *(frame for _, frame in store._disk.frames())]


def damage_file(path: Path, kind: str, at: int, other: int, values: list[bytes]) -> bool:
    """Damage a file somewhere; say whether what is read of it must be what was saved last.

    values: what "value" has a bit changed of, wherever there is a copy. What is unsafe are the two
    meta pages, which have no checksum: another number of a commit in one makes the commit before it
    the last.
    """
    raw = bytearray(path.read_bytes())
    at %= len(raw)
    page, from_page = at // PAGE * PAGE, other % len(raw) // PAGE * PAGE
    if kind == "value":
        value = values[at % len(values)] if values else b"none"
        changed = bytearray(value)
        changed[other // 8 % len(value)] ^= 1 << other % 8
        raw = raw.replace(value, changed)
    elif kind == "bit":
        raw[at] ^= 1 << other % 8
    elif kind == "zeros":
        raw[page : page + PAGE] = bytes(PAGE)
    elif kind == "swap":
        raw[page : page + PAGE] = raw[from_page : from_page + PAGE]
    else:
        del raw[at:]
    path.write_bytes(raw)
    return kind in ("cut", "value") or page >= META


MACHINE = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}


@contextlib.contextmanager
def small_numbers():
    """Pieces of a few blocks, and a map that grows, where the real ones hold thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvstore.saved_contexts, "PIECE", 400)
        patch.setattr(kvstore.tiers.lmdb_file, "_FIRST_MAP_PAGES", 16)
        yield


def run(examples: int, steps: int) -> None:
    with small_numbers():
        run_state_machine_as_test(
            ContextMachine,
            settings=hypothesis.settings(
                max_examples=examples, stateful_step_count=steps, **MACHINE
            ),
        )


def test_contexts_are_lists():
    run(40, 30)


@pytest.mark.slow
def test_contexts_are_lists_for_long():
    run(EXAMPLES, STEPS)


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else EXAMPLES, STEPS)
