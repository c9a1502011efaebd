"""One token sequence's past: append, seal, find, fork, keep.

Owns the open blocks, which block has which id, and the model's state. Never moves a block between
tiers, and never looks at what a model means by its streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from kvstore.block_map import BlockMap
from kvstore.errors import StoreClosedError
from kvstore.index import LandmarkIndex
from kvstore.saved_context import SavedContext, saved_names
from kvstore.streams import stream_numbers

if TYPE_CHECKING:
    from kvstore.store import Store

_scratch = count()


class Context:
    """The past of one token sequence, in `streams` independent series of blocks.

    Made by `Store.context`. With a name and in a store with a directory it is kept: `close` saves
    it, and the same name finds it again. All others are gone when they are closed, and what blocks
    only they had with them. A context manager.

    `index` finds blocks by their landmarks, of landmark_dim numbers each.
    """

    def __init__(
        self,
        store: Store,
        name: str | None = None,
        *,
        streams: int,
        landmark_dim: int,
        origin: Context | None = None,
    ) -> None:
        """Reopen the context of this name if the store keeps one, otherwise begin an empty one.

        origin: begin with this one's past instead; see `fork`. ValueError if the name is in use,
        or what is kept has other streams, landmarks or blocks.
        """
        if name is not None and name in store.contexts:
            raise ValueError(f"context {name!r} is open already")
        self.store: Store = store
        self.name = name
        self.streams = streams
        self.landmark_dim = landmark_dim
        kept = name is not None and store.config.directory is not None
        self._saved = SavedContext(store, name) if kept and name is not None else None
        manifest = self._saved.manifest() if self._saved else None
        self._closed = False
        if origin is not None:
            if manifest is not None:
                raise ValueError(f"context {name!r} is kept already")
            self.index: LandmarkIndex = origin.index.fork()
            self._map: BlockMap = origin._map.fork()
            self._open: list[torch.Tensor] = [plane.clone() for plane in origin._open]
            self._filled: list[int] = list(origin._filled)
            self._state: dict[str, torch.Tensor] = dict(origin._state)
        else:
            self.index = LandmarkIndex(store.config.index, streams, landmark_dim, store.device)
            self._map = BlockMap(streams)
            self._open = [
                torch.zeros((streams, *plane.shape), dtype=plane.dtype, device=store.device)
                for plane in store.spec.planes
            ]
            self._filled = [0] * streams
            self._state = {}
            if manifest is not None:
                self._restore(manifest)
        self._key: str | int = next(_scratch) if name is None else name
        store.contexts[self._key] = self

    @classmethod
    def load(cls, store: Store, name: str) -> Context:
        """Reopen a kept context, with the streams it has. KeyError if there is none."""
        kept = store.config.directory is not None
        manifest = SavedContext(store, name).manifest() if kept else None
        if manifest is None:
            raise KeyError(f"no context {name!r} is kept")
        return cls(store, name, streams=manifest["streams"], landmark_dim=manifest["landmark_dim"])

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

    def save(self) -> None:
        """Write to disk what is needed to go on after a restart. ValueError if it is not kept."""
        self._check()
        if self._saved is None:
            raise ValueError("only a context with a name, in a store with a directory, is kept")
        self.store.flush()
        manifest = {
            "streams": self.streams,
            "landmark_dim": self.landmark_dim,
            "block": _describe(self.store),
            "counts": self._map.counts.tolist(),
            "filled": self._filled,
            "on_device": [name for name, t in self._state.items() if t.device.type != "cpu"],
        }
        self._saved.write(manifest, self._parts())
        self._map.mark_saved()

    def _parts(self) -> Iterator[tuple[str, bytes]]:
        yield "ids", save_tensors({"ids": torch.from_numpy(self._map.ids())})
        for stream in range(self.streams):
            rows = self.index.landmarks(stream).cpu().contiguous()
            yield f"landmarks.{stream}", save_tensors({"landmarks": rows})
        tensors = {f"open.{i}": plane for i, plane in enumerate(self._open)}
        tensors |= {f"state.{name}": tensor for name, tensor in self._state.items()}
        tensors |= {f"index.{name}": t for name, t in self.index.progress().items()}
        yield "rest", save_tensors({name: t.cpu().contiguous() for name, t in tensors.items()})

    def _restore(self, manifest: dict[str, Any]) -> None:
        assert self._saved is not None
        given = {
            "streams": self.streams,
            "landmark_dim": self.landmark_dim,
            "block": _describe(self.store),
        }
        for key, value in given.items():
            if manifest[key] != value:
                raise ValueError(
                    f"context {self.name!r} was kept with {key} {manifest[key]}, not {value}"
                )
        part = load_tensors(self._saved.part(manifest, "ids"))
        self._map = BlockMap.load(np.asarray(manifest["counts"], np.int64), part["ids"].numpy())
        for stream in range(self.streams):
            part = load_tensors(self._saved.part(manifest, f"landmarks.{stream}"))
            self.index.add([stream], part["landmarks"][None])
        device = self._open[0].device
        rest = load_tensors(self._saved.part(manifest, "rest"))
        self._open = [rest[f"open.{i}"].to(device) for i in range(len(self._open))]
        self._filled = manifest["filled"]
        self._state = {
            name: tensor.to(device) if name in manifest["on_device"] else tensor
            for name, tensor in _named(rest, "state.").items()
        }
        self.index.resume(_named(rest, "index."))

    def close(self) -> None:
        """Save it if it is kept, and end it. Closing again does nothing; forks live on."""
        if self._closed:
            return
        try:
            if self._saved is None:
                self.delete()
            else:
                self.save()
                self._map.release()
        except StoreClosedError:
            pass  # what there was to do the store has done
        self._end()

    def delete(self) -> None:
        """End it and forget it: its records, and its blocks that no other context has."""
        self._check()
        if self._saved is not None:
            self._saved.forget()
        self._end()
        free, shared = self._map.release()
        if len(shared):
            shared = shared[~np.isin(shared, self._kept_by_others())]
        self.store.delete(np.concatenate((free, shared)))

    def _kept_by_others(self) -> NDArray[np.int64]:
        """Return the ids that other contexts have, open ones and those that are only saved."""
        others = [context._map.ids() for context in self.store.contexts.values()]
        if self.store.config.directory is not None:
            for name in saved_names(self.store):
                saved = SavedContext(self.store, name)
                manifest = saved.manifest()
                if manifest is not None and name not in self.store.contexts:
                    others.append(load_tensors(saved.part(manifest, "ids"))["ids"].numpy())
        return np.concatenate([np.empty(0, np.int64), *others])

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
        self.close()

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


def _describe(store: Store) -> list[list[Any]]:
    return [[p.name, list(p.shape), str(p.dtype)] for p in store.spec.planes]
