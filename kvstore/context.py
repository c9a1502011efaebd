"""One token sequence's past: append, seal, find, fork, keep.

Owns the open blocks, which block has which id, and the model's state. Never moves a block between
tiers, and never looks at what a model means by its streams.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.block_map import BlockMap
from kvstore.config import IndexConfig
from kvstore.errors import CorruptBlockError, StoreClosedError, brief
from kvstore.heap import give_back
from kvstore.index import GraphFiles, LandmarkIndex
from kvstore.manifest import Manifest, describe_blocks, numbers_of
from kvstore.saved_contexts import Past, check_name
from kvstore.streams import stream_numbers

if TYPE_CHECKING:
    from kvstore.store import Store

_scratch = count()


class Context:
    """The past of one token sequence, in `streams` independent series of blocks.

    Made by `Store.context`. With a name and in a store with a directory it is kept: `close` saves
    it, and the same name finds it again. All others are gone when they are closed, and what blocks
    only they had with them. A context manager: left by an error it is as it was saved last.

    `index` finds blocks by their landmarks, of landmark_dim numbers each. `fingerprint` says what
    made the blocks; `info` is a dict of plain values to be kept with it, free for its owner's use.
    """

    def __init__(
        self,
        store: Store,
        name: str | None = None,
        *,
        streams: int | None = None,
        landmark_dim: int | None = None,
        fingerprint: str | None = None,
        origin: Context | None = None,
    ) -> None:
        """Reopen the context of this name if the store keeps one, otherwise begin an empty one.

        streams, landmark_dim, fingerprint: of a new context; of a kept one they may be left out.
        origin: begin with this one's past instead; see `fork`. ValueError if the name is in use,
        or what is kept has others; KeyError if streams are left out and none is kept.
        """
        if name is not None and name in store.contexts:
            raise ValueError(f"context {name!r} is open already")
        if name is not None:
            check_name(name)
        self.store: Store = store
        self.name = name
        of_disk = name is not None and store.config.directory is not None
        self._kept = of_disk and not store.config.read_only
        manifest = store.kept.manifest(name) if of_disk and name is not None else None
        if streams is None or landmark_dim is None:
            if manifest is None:
                raise KeyError(
                    f"no context {name!r} is kept: a new one needs streams and landmarks"
                )
            streams, landmark_dim = manifest["streams"], manifest["landmark_dim"]
        self.streams: int = streams
        self.landmark_dim: int = landmark_dim
        self.fingerprint = fingerprint or ""
        self.info: dict[str, Any] = {}
        # What of this context's past is in records already, in pieces that others may name too.
        self._past: list[dict[str, Any]] = []
        self._rest: list[int] = []
        self._snapshots: list[dict[str, Any]] = []
        self._created: float | None = None
        self._closed = False
        if origin is not None:
            if manifest is not None:
                raise ValueError(f"context {name!r} is kept already")
            self.index: LandmarkIndex = origin.index.fork()
            self._map: BlockMap = origin._map.fork()
            self._open: list[torch.Tensor] = [plane.clone() for plane in origin._open]
            self._filled: list[int] = list(origin._filled)
            self._state: dict[str, torch.Tensor] = dict(origin._state)
            self.fingerprint, self.info = origin.fingerprint, dict(origin.info)
            self._past, self._snapshots = list(origin._past), list(origin._snapshots)
        else:
            index = IndexConfig(**manifest["index"]) if manifest else store.config.index
            files = None
            if of_disk and store.config.directory is not None:
                place = store.config.directory / "index"
                files = GraphFiles(place, writable=not store.config.read_only)
            self.index = LandmarkIndex(index, streams, landmark_dim, store.device, files)
            self._map = BlockMap(streams)
            self._filled = [0] * streams
            self._state = {}
            if manifest is not None:
                self._restore(manifest, fingerprint)
            else:
                self._open = [
                    torch.zeros((streams, *plane.shape), dtype=plane.dtype, device=store.device)
                    for plane in store.spec.planes
                ]
        self._key: str | int = next(_scratch) if name is None else name
        store.contexts[self._key] = self

    def append(
        self,
        streams: slice | Sequence[int],
        planes: Sequence[torch.Tensor],
        landmarks: torch.Tensor | None = None,
    ) -> None:
        """Append T tokens to each of s streams; blocks that they fill are sealed and stored.

        planes: per plane of the spec a tensor [s, T, *shape[1:]] of its dtype. landmarks: of the
        blocks sealed by this call, [s, sealed, landmark_dim], any float dtype; None if none is.
        The streams must have equally full open blocks. ValueError for other shapes or dtypes, or
        for numbers that are not finite; whatever is raised, nothing is appended.
        """
        self._check()
        rows = stream_numbers(streams, self.streams)
        tokens = self._check_planes(rows, planes)
        filled = self._filled_of(rows)
        size = self.store.spec.block_size
        sealed = (filled + tokens) // size
        shape = (len(rows), sealed, self.landmark_dim)
        if landmarks is None and sealed and rows:
            raise ValueError(f"{sealed} blocks are sealed: landmarks of shape {shape} are needed")
        if landmarks is not None and tuple(landmarks.shape) != shape:
            raise ValueError(f"landmarks have shape {tuple(landmarks.shape)}; expected {shape}")
        if not rows or not tokens:
            return
        # What the open block lacks comes first: until _filled says so, nobody reads it there.
        head = min(tokens, size - filled) if filled or not sealed else 0
        chosen = _together(rows)
        for kept, plane in zip(self._open, planes, strict=True):
            kept[chosen, filled : filled + head] = plane[:, :head].to(kept.device)
        if sealed:
            assert landmarks is not None
            self._seal(rows, planes, head, sealed, landmarks)
            rest = (filled + tokens) % size
            for kept, plane in zip(self._open, planes, strict=True):
                kept[chosen, :rest] = plane[:, tokens - rest :].to(kept.device)
        for row in rows:
            self._filled[row] = (filled + tokens) % size

    def _seal(
        self,
        rows: list[int],
        planes: Sequence[torch.Tensor],
        head: int,
        sealed: int,
        landmarks: torch.Tensor,
    ) -> None:
        """Store the open blocks, full by `head` tokens unless that is 0, and whole ones after."""
        size = self.store.spec.block_size
        whole = sealed - bool(head)
        ids: list[NDArray[np.int64]] = []
        mapped = False
        try:
            if head:
                ids.append(self.store.put([kept[_together(rows)] for kept in self._open])[:, None])
            if whole:
                parts = [
                    plane[:, head : head + whole * size].reshape(-1, size, *plane.shape[2:])
                    for plane in planes
                ]
                ids.append(self.store.put(parts).reshape(len(rows), whole))
            # The store before the index, so that a search never names a block that is not there.
            self._map.append(rows, np.concatenate(ids, axis=1))
            mapped = True
            self.index.add(rows, landmarks)
        except BaseException:
            if mapped:
                self._map.take_back(rows, sealed)
            if ids:
                self.store.delete(np.concatenate(ids, axis=1).ravel())
            raise

    def open_block(self, streams: slice | Sequence[int]) -> list[torch.Tensor]:
        """Return the tokens that are not sealed yet, per plane [s, filled, *shape[1:]].

        Views where the streams follow each other; they hold until the next append. ValueError
        unless the streams' open blocks are equally full.
        """
        self._check()
        rows = stream_numbers(streams, self.streams)
        filled = self._filled_of(rows)
        return [plane[_together(rows)][:, :filled] for plane in self._open]

    def sealed(self, stream: int) -> int:
        """Return the number of sealed blocks of a stream."""
        return int(self._map.counts[stream_numbers([stream], self.streams)[0]])

    def tokens(self, stream: int) -> int:
        """Return the number of tokens appended to a stream."""
        return self.sealed(stream) * self.store.spec.block_size + self._filled[stream]

    def ids(
        self, streams: slice | Sequence[int], blocks: NDArray[np.int64] | torch.Tensor
    ) -> NDArray[np.int64]:
        """Return the store's ids of blocks int64 [s, ...] of s streams, in the same shape.

        KeyError for a block that does not exist.
        """
        self._check()
        rows = stream_numbers(streams, self.streams)
        given = blocks.cpu().numpy() if isinstance(blocks, torch.Tensor) else np.asarray(blocks)
        if given.dtype.kind not in "iu" or not given.ndim or len(given) != len(rows):
            raise ValueError(
                f"blocks are {given.dtype} of shape {given.shape}; "
                f"expected int64 ({len(rows)}, ...)"
            )
        return self._map.lookup(rows, given)

    def search(
        self,
        streams: slice | Sequence[int],
        queries: torch.Tensor,
        k: int,
        before: torch.Tensor | NDArray[np.int64] | int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the k best blocks for each query; see `LandmarkIndex.search`."""
        self._check()
        return self.index.search(streams, queries, k, before)

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Keep copies of a model's named tensors, in place of those it had."""
        self._check()
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise TypeError(f"a state is named tensors, not {name!r}: {type(tensor).__name__}")
        self._state = {name: tensor.detach().clone() for name, tensor in state.items()}

    def get_state(self) -> dict[str, torch.Tensor]:
        """Return copies of the model's named tensors; empty if none were set."""
        self._check()
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def fork(self, name: str | None = None) -> Context:
        """Return a context with the same past, sharing its sealed blocks and its index.

        Either may go on; neither sees what the other appends. A block is freed with the last
        context that has it. With a name the fork is kept too, where this store keeps contexts.
        """
        self._check()
        return Context(
            self.store, name, streams=self.streams, landmark_dim=self.landmark_dim, origin=self
        )

    def save(self, *, snapshot: bool = False) -> None:
        """Write to disk what is needed to go on after a restart. ValueError if it is not kept.

        What was saved before and has not changed is not written again. snapshot: remember this
        place for good, so that `Store.kept.fork` can go back to it.
        """
        self._check()
        if not self._kept or self.name is None:
            raise ValueError(
                "only a context with a name, in a store with a directory that is not only read, "
                "is kept"
            )
        self.store.flush()
        counts = self._map.counts
        manifest: Manifest = {
            "streams": self.streams,
            "landmark_dim": self.landmark_dim,
            "block": describe_blocks(self.store.spec),
            "fingerprint": self.fingerprint,
            "info": dict(self.info),
            "index": asdict(self.index.config),
            "counts": counts.tolist(),
            "filled": list(self._filled),
            "on_device": [name for name, t in self._state.items() if t.device.type != "cpu"],
            "past": self._past,
            "snapshots": self._snapshots,
        }
        if self._created is not None:
            manifest["created"] = self._created
        ids = np.split(self._map.ids(), np.cumsum(counts)[:-1])
        past = Past(ids, [self.index.landmarks(stream) for stream in range(self.streams)])
        rest = {f"open.{i}": plane for i, plane in enumerate(self._open)}
        rest |= {f"state.{name}": tensor for name, tensor in self._state.items()}
        rest |= {f"index.{name}": tensor for name, tensor in self.index.progress().items()}
        self._note(self.store.kept.write(self.name, manifest, past, rest, snapshot))
        self._map.mark_saved()
        self.store.kept.tidy()

    def _note(self, manifest: Manifest) -> None:
        self._past, self._rest = manifest["past"], manifest["rest"]
        self._snapshots = manifest["snapshots"]
        self._created = manifest["created"]

    def _restore(self, manifest: Manifest, fingerprint: str | None) -> None:
        assert self.name is not None
        given: dict[str, int | str] = {"streams": self.streams, "landmark_dim": self.landmark_dim}
        if fingerprint is not None:
            given["fingerprint"] = fingerprint
        for key, value in given.items():
            if manifest[key] != value:
                raise ValueError(
                    f"context {self.name!r} was kept with {key} {brief(manifest[key])}, not {value}"
                )
        self.fingerprint, self.info = manifest["fingerprint"], manifest["info"]
        self._note(manifest)
        # Before anything is made as large as the manifest says: this is as large as it says.
        rest = self.store.kept.rest(self.name, manifest)
        kept, counts = self.store.kept, np.asarray(manifest["counts"], np.int64)
        ids: list[list[NDArray[np.int64]]] = [[] for _ in counts]
        landmarks: list[list[torch.Tensor]] = [[] for _ in counts]
        for piece in kept.past(self.name, manifest):
            for s in range(self.streams):
                if f"ids.{s}" in piece:
                    ids[s].append(piece[f"ids.{s}"].numpy())
                    landmarks[s].append(piece[f"landmarks.{s}"])
        for s, of_stream in enumerate(landmarks):
            if of_stream:
                self.index.add([s], torch.cat(of_stream)[None])
                of_stream.clear()
        parts = [part for numbers in ids for part in numbers]
        self._map = BlockMap.load(counts, np.concatenate([np.empty(0, np.int64), *parts]))
        device, planes = self.store.device, self.store.spec.planes
        self._open = [rest[f"open.{i}"].to(device) for i in range(len(planes))]
        self._filled = list(manifest["filled"])
        self._state = {
            name: tensor.to(device) if name in manifest["on_device"] else tensor
            for name, tensor in _named(rest, "state.").items()
        }
        self.index.resume(_named(rest, "index."))

    @property
    def pieces(self) -> list[int]:
        """The records that its last save, or that of what it was forked from, is made of."""
        own = {"past": self._past, "rest": self._rest, "snapshots": self._snapshots}
        return numbers_of(own)

    def block_ids(self) -> NDArray[np.int64]:
        """Return the store's ids of all its blocks, stream after stream."""
        return self._map.ids()

    def place_of(self, block: int) -> str | None:
        """Say in words which of its blocks has this id in the store; None if none has."""
        found = np.flatnonzero(self._map.ids() == block)
        if not len(found):
            return None
        ends = np.cumsum(self._map.counts)
        stream = int(np.searchsorted(ends, found[0], side="right"))
        number = int(found[0] - ends[stream] + self._map.counts[stream])
        name = "a fork" if self.name is None else f"context {self.name!r}"
        return f"{name}, stream {stream}, block {number}"

    def close(self, *, save: bool = True) -> None:
        """Save it if it is kept, and end it. Closing again does nothing; forks live on.

        save: False leaves a kept context as it was saved last.
        """
        if self._closed:
            return
        try:
            if self._kept and save:
                self.save()
                self._map.release()
            else:
                self._drop()
        except StoreClosedError:
            pass  # what there was to do the store has done
        self._end()
        if self.name is not None:  # a throwaway fork has little of its own
            give_back()

    def delete(self) -> None:
        """End it and forget it: its records, and its blocks that no other context has."""
        self._check()
        if self._kept and self.name is not None:
            self._past, self._rest, self._snapshots = [], [], []
            self.store.kept.forget(self.name)
        self._drop()

    def _drop(self) -> None:
        """End it without its blocks that nobody else has."""
        self._end()
        free, shared = self._map.release()
        if self.store.config.read_only:
            shared = shared[:0]  # they are its writer's
        elif len(shared):
            try:
                shared = shared[~np.isin(shared, self.store.kept.used_ids())]
            except CorruptBlockError:  # who else has them cannot be read: they stay
                shared = shared[:0]
        self.store.delete(np.concatenate((free, shared)))

    def _end(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.store.contexts.pop(self._key, None)
        self.index.close()

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
            return
        # An interrupt can leave a pin behind. What it holds goes with the store, or in a sweep.
        with contextlib.suppress(ValueError):
            self.close(save=False)

    def _check(self) -> None:
        if self._closed:
            raise StoreClosedError("the context is closed")

    def _filled_of(self, rows: list[int]) -> int:
        filled = {self._filled[row] for row in rows}
        if len(filled) > 1:
            raise ValueError(f"the open blocks of streams {rows} are not equally full")
        return filled.pop() if filled else 0

    def _check_planes(self, rows: list[int], planes: Sequence[torch.Tensor]) -> int:
        """Return the number of tokens after checking shapes, dtypes and numbers."""
        spec = self.store.spec
        if len(planes) != len(spec.planes):
            names = ", ".join(plane.name for plane in spec.planes)
            raise ValueError(f"{len(planes)} planes were given; a block has {names}")
        tokens = planes[0].shape[1] if planes[0].dim() > 1 else 0
        for plane, tensor in zip(spec.planes, planes, strict=True):
            shape = (len(rows), tokens, *plane.shape[1:])
            if tuple(tensor.shape) != shape or tensor.dtype != plane.dtype:
                raise ValueError(
                    f"{plane.name} are {tensor.dtype} of shape {tuple(tensor.shape)}; "
                    f"expected {plane.dtype} {shape}"
                )
            if tensor.is_floating_point() and not _finite(tensor):
                raise ValueError(f"{plane.name} hold numbers that are not finite")
        return tokens


def _together(rows: list[int]) -> slice | list[int]:
    """Return the streams as a slice where they follow each other: that views, a list copies."""
    consecutive = bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))
    return slice(rows[0], rows[0] + len(rows)) if consecutive else rows


def _finite(tensor: torch.Tensor) -> bool:
    # A sum takes a third of the time of isfinite, and is not finite if one number is not; else it
    # can only have overflowed.
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return math.isfinite(tensor.sum(dtype=wide)) or bool(tensor.isfinite().all())


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
