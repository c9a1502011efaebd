"""Changes to kept contexts, drawn at random, and what a store must hold after each.

A context's content follows from a list of seeds and lengths, so that any process can tell whether
what it reads is right. Used by the measurements that kill, cut the power, damage and wear out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvstore import BlockSpec, Context, IndexConfig, Store, StoreConfig
from kvstore.verify import verify

STREAMS = 2

Segments = list[list[int]]
"""What a context holds: [seed, tokens] one after the other."""

State = dict[str, Segments]
"""What a store holds: the segments of each context."""

Act = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """The size of what is worked on.

    block: tokens of a block; dim: numbers of a key, a value and a landmark; longest: tokens of a
    segment at most; segments: how many an append adds; hot, warm: blocks in memory; cold: of the
    file; graph: blocks of the smallest graph of an index.
    """

    block: int = 8
    dim: int = 4
    longest: int = 200
    segments: int = 2
    hot: int = 64
    warm: int = 256
    cold: str = "16MiB"
    graph: int = 16

    @property
    def spec(self) -> BlockSpec:
        """What the blocks look like."""
        return BlockSpec.kv(self.block, self.dim, torch.float32)

    def config(self, directory: Path | str, **given: Any) -> StoreConfig:
        """A store's settings; `given` are others."""
        nbytes = self.spec.nbytes
        settings = {
            "hot": self.hot * nbytes,
            "warm": self.warm * nbytes,
            "cold": self.cold,
            "staging": min(4 * self.hot * nbytes, 2**24),
            "device": "cpu",
            "index": IndexConfig(kind="hnsw", segment=self.graph, sample=0),
        }
        return StoreConfig(directory=directory, **settings | given)  # type: ignore[arg-type]

    def open(self, directory: Path | str, **given: Any) -> Store:
        """Open a store; `given` are other settings."""
        return Store(self.spec, self.config(directory, **given))

    # What a context holds.

    def keys_of(self, seed: int, count: int) -> torch.Tensor:
        """The keys of a segment, float32 [STREAMS, tokens, dim]; values are their negatives."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(STREAMS, count, self.dim, generator=generator)

    def landmarks_of(self, seed: int, count: int) -> torch.Tensor:
        """The landmarks of blocks that a segment seals, float32 [STREAMS, blocks, dim]."""
        generator = torch.Generator().manual_seed(seed + 1)
        return torch.randn(STREAMS, count, self.dim, generator=generator)

    def append(self, context: Context, seed: int, count: int) -> None:
        """Append a segment."""
        keys = self.keys_of(seed, count)
        sealed = (context.tokens(0) % self.block + count) // self.block
        context.append(slice(None), [keys, -keys], self.landmarks_of(seed, sealed))
        context.info["segments"] = [*context.info.get("segments", []), [seed, count]]

    def fault_of(self, store: Store, name: str, segments: Segments) -> str | None:
        """Say how a context differs from what it must hold, read in a throwaway fork."""
        context = store.context(name)
        try:
            with context.fork() as fork:
                return self._fault_of(fork, segments)
        finally:
            context.close(save=False)

    def _fault_of(self, context: Context, segments: Segments) -> str | None:
        if context.info.get("segments", []) != segments:
            return f"it holds {context.info.get('segments')}, not {segments}"
        total = sum(count for _, count in segments)
        if {context.tokens(s) for s in range(STREAMS)} != {total}:
            return f"it has {context.tokens(0)} tokens, not {total}"
        read = 0
        rest = context.open_block(slice(None))
        for seed, count in segments:
            keys, start = self.keys_of(seed, count), read
            read += count
            first, last = start // self.block, read // self.block
            marks = self.landmarks_of(seed, last - first)
            for stream in range(STREAMS):
                if not torch.equal(context.index.landmarks(stream)[first:last], marks[stream]):
                    return "its landmarks are not those that were written"
            # The blocks that this segment touches, and what it left in the open one.
            ids = context.ids(slice(None), np.tile(np.arange(first, last), (STREAMS, 1)))
            want = keys[:, : max(0, last * self.block - start)]
            skip = start - first * self.block
            for sign, blocks in zip((1, -1), context.store.fetch(ids), strict=True):
                if last > first and not torch.equal(blocks.flatten(1, 2)[:, skip:], sign * want):
                    return "its blocks are not those that were written"
        if context.sealed(0) * self.block < total and not self._open_is_right(rest, segments):
            return "its open block is not what was written"
        return None

    def _open_is_right(self, rest: list[torch.Tensor], segments: Segments) -> bool:
        lacking = rest[0].shape[1]
        parts: list[torch.Tensor] = []
        for seed, count in reversed(segments):
            if lacking > 0:
                parts.insert(0, self.keys_of(seed, count)[:, -lacking:])
                lacking -= count
        want = torch.cat(parts, dim=1)
        return torch.equal(rest[0], want) and torch.equal(rest[1], -want)

    # Changes.

    def draw(self, store: Store, state: State, rng: random.Random) -> tuple[str, Act, State]:
        """Draw a change: its kind, the change itself, and the state after it."""
        names = sorted(state)
        kind = rng.choice(["append", "append", "append", "fork", "rename", "delete", "ask"])
        name, new = rng.choice(names or ["c0"]), f"c{rng.randrange(6)}"
        after = {each: list(segments) for each, segments in state.items()}
        if names and kind == "delete":
            return self.removal(store, state, name)
        if names and kind == "ask":
            return kind, partial(self.ask, store, name), after
        if names and kind == "fork" and new not in state:
            after[new] = list(after[name])
            return kind, partial(store.kept.fork, name, new), after
        if names and kind == "rename" and new not in state:
            after[new] = after.pop(name)
            return kind, partial(store.kept.rename, name, new), after
        name = rng.choice([*names, new])
        seeds = [
            (rng.randrange(2**31), rng.randrange(1, self.longest)) for _ in range(self.segments)
        ]
        after[name] = [*after.get(name, []), *([s, n] for s, n in seeds)]
        return "append", partial(self.grow, store, name, seeds), after

    def removal(self, store: Store, state: State, name: str) -> tuple[str, Act, State]:
        """Return the removal of a context."""
        after = {each: list(segments) for each, segments in state.items() if each != name}
        return "delete", partial(store.kept.delete, name), after

    def grow(self, store: Store, name: str, seeds: list[tuple[int, int]]) -> int:
        """Append segments and save; return the bytes of the index."""
        with store.context(name, streams=STREAMS, landmark_dim=self.dim) as context:
            for seed, count in seeds:
                self.append(context, seed, count)
            return context.index.stats.bytes

    def ask(self, store: Store, name: str) -> int:
        """Read in a throwaway fork, as an answer does: append, search, fetch what was found.

        Returns the bytes of the index.
        """
        with store.context(name) as context, context.fork() as fork:
            self.append(fork, 1, 50)
            if fork.sealed(0):
                queries = self.landmarks_of(2, 1).repeat(1, 4, 1)
                blocks, _ = fork.search(slice(None), queries, min(8, fork.sealed(0)))
                store.fetch(fork.ids(slice(None), blocks.clamp(min=0)))
            return fork.index.stats.bytes

    def found_state(self, directory: Path, *states: State) -> State:
        """Open the store; return which of these states it is in, all of it checked."""
        with self.open(directory) as store:
            store.check()
            names = store.kept.names()
            found = {name: store.kept.require(name)["info"].get("segments", []) for name in names}
            if found not in states:
                raise AssertionError(f"it holds {found}, none of {states}")
            for name, segments in found.items():
                if fault := self.fault_of(store, name, segments):
                    raise AssertionError(f"context {name}: {fault}")
            store.sweep()
            if verify(store).unreferenced:
                raise AssertionError("blocks are left that no context has")
        return found


SMALL = Work()
"""Small enough for thousands of changes a minute."""

LARGE = Work(
    block=64, dim=64, longest=1024, segments=20, hot=64 * 32, warm=256 * 32, cold="4GiB", graph=1024
)
"""Blocks of 32 KiB, 64 MiB of them hot and 256 MiB warm."""
