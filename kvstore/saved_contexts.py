"""How kept contexts lie in a store's records: a manifest each, and pieces that they share.

Owns the keys and the order of writing. Never looks at what a model means by anything.

Keys are `context/NAME` and `piece/NUMBER`. A save writes new pieces, then the manifest that names
them, then forgets the pieces that nobody names any more: what is read is always one whole save, the
last that ended. Pieces of blocks never change, so forks name the same ones. A snapshot is an
earlier save of the same context, to go back to: it names the same pieces, and a rest of its own.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from kvstore.errors import CorruptBlockError, OtherFormatError, brief
from kvstore.manifest import FORMAT, OF_A_SAVE, Manifest, check_manifest, gone_back, numbers_of

if TYPE_CHECKING:
    from kvstore.store import Store

PIECE = 4 * 2**20
"""Bytes of a piece at most, and about where pieces of blocks are left alone."""

LONGEST_NAME = 300
"""Bytes of a name in its key; LMDB's keys have at most 511."""

_CONTEXT = b"context/"
_PIECE = b"piece/"


@dataclass(frozen=True)
class KeptContext:
    """What is known of a kept context without opening it.

    tokens: of the longest stream. blocks: sealed ones, of all streams, shared ones included;
    nbytes: theirs, uncompressed; disk_bytes: of their frames. fingerprint, info: as given when it
    was made. created, saved: seconds since 1970, when it was first and last saved. snapshots: how
    many earlier saves can be gone back to.
    """

    name: str
    tokens: int
    blocks: int
    nbytes: int
    disk_bytes: int
    fingerprint: str
    info: dict[str, Any]
    created: float
    saved: float
    snapshots: int


class Past:
    """The sealed blocks of a context, to be saved: which ids and landmarks, stream after stream.

    ids: one int64 [blocks] a stream. landmarks: one float32 [blocks, dim] a stream.
    """

    def __init__(self, ids: Sequence[NDArray[np.int64]], landmarks: Sequence[torch.Tensor]) -> None:
        self.ids = ids
        self.landmarks = landmarks
        self.counts = [len(of_stream) for of_stream in ids]

    def piece(self, first: Sequence[int], last: Sequence[int]) -> bytes:
        """Return the blocks first..last of each stream."""
        tensors = {}
        for s, (a, b) in enumerate(zip(first, last, strict=True)):
            if a < b:
                tensors[f"ids.{s}"] = torch.from_numpy(self.ids[s][a:b].copy())
                tensors[f"landmarks.{s}"] = self.landmarks[s][a:b].cpu().contiguous()
        return save_tensors(tensors)


class SavedContexts:
    """The kept contexts of one store, by name: `store.kept`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __contains__(self, name: str) -> bool:
        return self._store.get_record(_key(name)) is not None

    def names(self) -> list[str]:
        """Return the names, sorted as their keys are."""
        keys = self._store.record_keys(_CONTEXT)
        return [name for key in keys if (name := _name(key)) is not None]

    def strange_keys(self) -> list[bytes]:
        """Return keys of our kinds that no save has written: a damaged page can have some."""
        store = self._store
        contexts = [key for key in store.record_keys(_CONTEXT) if _name(key) is None]
        return contexts + [key for key in store.record_keys(_PIECE) if _number(key) is None]

    def manifest(self, name: str) -> Manifest | None:
        """Return the manifest; None if there is none.

        OtherFormatError if it is of another version, CorruptBlockError if it makes no sense.
        """
        key = _key(name)
        try:
            value = self._store.get_record(key)
            if value is None:
                return None
            manifest: Manifest = json.loads(value)
            version = manifest["format"]
            if type(version) is not int:
                raise ValueError(f"its format is {version!r}")
            if version == FORMAT:
                check_manifest(manifest, self._store.spec)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            said = f"its manifest makes no sense: {brief(error)}"
            raise CorruptBlockError(f"context {name!r}: {said}") from None
        if version != FORMAT:
            raise OtherFormatError(
                f"context {name!r} was saved in format {brief(version)}, this version "
                f"reads format {FORMAT}: remove it, or use the version that wrote it"
            )
        return manifest

    def require(self, name: str) -> Manifest:
        """Return the manifest; KeyError naming those there are if there is none."""
        manifest = self.manifest(name)
        if manifest is None:
            there = brief(", ".join(self.names())) or "none"
            raise KeyError(f"no context {name!r} is kept; there are: {there}")
        return manifest

    def require_version(self) -> None:
        """Raise OtherFormatError if a context is of another version of the format."""
        for name in self.names():
            with contextlib.suppress(CorruptBlockError):
                self.manifest(name)

    def describe(self, name: str) -> KeptContext:
        """Return what is known of a context.

        KeyError if there is none, CorruptBlockError if it is damaged, OtherFormatError if it is of
        another version.
        """
        manifest = self.require(name)
        try:
            disk_bytes = self._store.disk_bytes(self.ids(name, manifest))
        except KeyError as error:
            raise CorruptBlockError(f"context {name!r}: {error.args[0]}") from None
        spec, counts, filled = self._store.spec, manifest["counts"], manifest["filled"]
        blocks = sum(counts)
        return KeptContext(
            name=name,
            tokens=max(n * spec.block_size + f for n, f in zip(counts, filled, strict=True)),
            blocks=blocks,
            nbytes=blocks * spec.nbytes,
            disk_bytes=disk_bytes,
            fingerprint=manifest["fingerprint"],
            info=manifest["info"],
            created=manifest["created"],
            saved=manifest["saved"],
            snapshots=len(manifest["snapshots"]),
        )

    def past(self, name: str, manifest: Manifest) -> Iterator[dict[str, torch.Tensor]]:
        """Yield pieces of the sealed blocks, in order: `ids.S` and `landmarks.S` of streams S."""
        first = [0] * len(manifest["counts"])
        for piece in manifest["past"]:
            tensors = self._tensors(name, [piece["number"]])
            found: dict[str, torch.Tensor] = {}
            for s, (a, b) in enumerate(zip(first, piece["stops"], strict=True)):
                if a == b:
                    continue
                # One that was gone back from may hold more.
                ids, landmarks = (
                    _first(tensors.get(f"{kind}.{s}", torch.empty(0)), b - a)
                    for kind in ("ids", "landmarks")
                )
                right = ids.dtype == torch.int64 and landmarks.dtype == torch.float32
                shapes = (b - a,), (b - a, manifest["landmark_dim"])
                right = right and (tuple(ids.shape), tuple(landmarks.shape)) == shapes
                if not right or ids.min() < 0 or not landmarks.isfinite().all():
                    raise CorruptBlockError(
                        f"context {name!r}: piece {piece['number']} is not blocks {a} to {b} of "
                        f"stream {s}"
                    )
                found |= {f"ids.{s}": ids, f"landmarks.{s}": landmarks}
            first = piece["stops"]
            yield found

    def ids(self, name: str, manifest: Manifest) -> NDArray[np.int64]:
        """Return the ids of all its blocks, stream after stream."""
        streams: list[list[NDArray[np.int64]]] = [[] for _ in manifest["counts"]]
        for piece in self.past(name, manifest):
            for s, parts in enumerate(streams):
                if f"ids.{s}" in piece:
                    parts.append(piece[f"ids.{s}"].numpy())
        return np.concatenate([np.empty(0, np.int64), *(p for parts in streams for p in parts)])

    def rest(self, name: str, manifest: Manifest) -> dict[str, torch.Tensor]:
        """Return the tensors that were saved beside the blocks."""
        rest = self._tensors(name, manifest["rest"])
        streams = manifest["streams"]
        needed = {
            f"open.{i}": ((streams, *plane.shape), plane.dtype)
            for i, plane in enumerate(self._store.spec.planes)
        }
        needed["index.settled"] = (streams,), torch.int64
        needed["index.lost_us"] = (streams,), torch.float64
        for part, (shape, dtype) in needed.items():
            tensor = rest.get(part, torch.empty(0))
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CorruptBlockError(
                    f"context {name!r}: its {part} is not {dtype} {list(shape)}"
                )
        settled = rest["index.settled"].tolist()
        if any(not 0 <= a <= b for a, b in zip(settled, manifest["counts"], strict=True)):
            raise CorruptBlockError(f"context {name!r}: its index has more than the context")
        return rest

    def write(
        self,
        name: str,
        manifest: Manifest,
        past: Past,
        rest: dict[str, torch.Tensor],
        snapshot: bool = False,
    ) -> Manifest:
        """Save a context; return its manifest.

        manifest: all but what this adds; its `past` are pieces that a save before left, of the
        same blocks. Small ones at their end are joined with what is new, so that their number
        grows like a logarithm until they are large. snapshot: make it one to be gone back to.
        """
        number = self._next_number()
        pieces: list[dict[str, Any]] = list(manifest["past"])
        total = sum(past.counts)
        while pieces:
            first = pieces[-2]["stops"] if len(pieces) > 1 else [0] * len(past.counts)
            size = sum(pieces[-1]["stops"]) - sum(first)
            new = total - sum(pieces[-1]["stops"])
            if not new or size > new or pieces[-1]["bytes"] > PIECE // 2:
                break
            pieces.pop()
        stops = pieces[-1]["stops"] if pieces else [0] * len(past.counts)
        width = 8 + 4 * past.landmarks[0].shape[1]
        step = max(1, PIECE // (width * len(past.counts)))
        while stops != past.counts:
            last = [min(a + step, n) for a, n in zip(stops, past.counts, strict=True)]
            value = past.piece(stops, last)
            self._store.put_record(_piece_key(number), value)
            pieces.append({"number": number, "stops": last, "bytes": len(value)})
            stops, number = last, number + 1
        value = save_tensors({k: t.detach().cpu().contiguous() for k, t in rest.items()})
        numbers = []
        for start in range(0, len(value), PIECE):
            self._store.put_record(_piece_key(number), value[start : start + PIECE])
            numbers.append(number)
            number += 1
        now = time.time()
        done: Manifest = {"created": now, **manifest, "format": FORMAT, "saved": now}
        done |= {"past": pieces, "rest": numbers}
        if snapshot:
            done["snapshots"] = [*done["snapshots"], {key: done[key] for key in OF_A_SAVE}]
        self._put(name, done)
        return done

    def fork(self, name: str, new: str, snapshot: int | None = None) -> None:
        """Keep the same past, as it was saved last, under another name too; nothing is copied.

        snapshot: which of its snapshots to take instead, -1 the last. KeyError if there is no such
        context, IndexError if it has no such snapshot, ValueError if the new name is taken.
        """
        manifest = self.require(name)
        self._require_free(new)
        if snapshot is not None:
            n = len(manifest["snapshots"])
            if not -n <= snapshot < n:
                raise IndexError(f"context {name!r} has no snapshot {snapshot}")
            manifest = gone_back(manifest, snapshot % n)
        self._put(new, manifest | {"created": time.time()})

    def note(self, name: str, **info: Any) -> None:
        """Add plain values to what a context's owner keeps with it. Errors as for `rename`."""
        manifest = self.require(name)
        self._require_closed(name)
        self._put(name, manifest | {"info": manifest["info"] | info})

    def rename(self, name: str, new: str) -> None:
        """Give a context another name; errors as for `fork`, and ValueError if it is open."""
        manifest = self.require(name)
        self._require_closed(name)
        self._require_free(new)
        self._store.put_records({_key(new): _encode(manifest), _key(name): None})

    def replace(self, name: str, manifest: Manifest | None) -> None:
        """Make this the manifest of a context that is not open; None: it has none any more.

        What only the old one named stays, until `sweep`.
        """
        self._require_closed(name)
        self._store.put_record(_key(name), None if manifest is None else _encode(manifest))

    def delete(self, name: str) -> None:
        """Forget a context, and the blocks that no other has.

        Where it or another one is damaged, or of another version, so that it cannot be said which
        blocks these are, they stay, to be swept once that is mended. KeyError if there is no such
        context, ValueError if it is open.
        """
        with contextlib.suppress(CorruptBlockError, OtherFormatError):
            self.require(name)
        self._require_closed(name)
        doomed = np.empty(0, np.int64)
        with contextlib.suppress(CorruptBlockError, OtherFormatError):
            ids = self.ids(name, self.require(name))
            doomed = ids[~np.isin(ids, self.used_ids(but=name))]
        self.forget(name)
        self._store.delete(doomed)

    def forget(self, name: str) -> None:
        """Remove a manifest, then the pieces that only it named, if that can be said."""
        self._store.put_record(_key(name), None)
        self.tidy()

    def used_ids(self, but: str | None = None) -> NDArray[np.int64]:
        """Return the ids that contexts have, open ones and those that are only kept.

        but: the name of one that does not count.
        """
        used = [context.block_ids() for context in self._store.contexts.values()]
        for name in self.names():
            if name != but:
                used.append(self.ids(name, self.require(name)))
        return np.concatenate([np.empty(0, np.int64), *used])

    def sweep(self) -> None:
        """Forget the pieces that no manifest and no open context names."""
        named = {_piece_key(n) for c in self._store.contexts.values() for n in c.pieces}
        for name in self.names():
            named |= {_piece_key(n) for n in numbers_of(self.require(name))}
        keys = self._store.record_keys(_PIECE)
        self._store.put_records({key: None for key in keys if key not in named})

    def tidy(self) -> None:
        """Sweep, unless a context that cannot be read keeps it unknown what is needed."""
        with contextlib.suppress(CorruptBlockError, OtherFormatError):
            self.sweep()

    def _put(self, name: str, manifest: Manifest) -> None:
        self._store.put_record(_key(name), _encode(manifest))

    def _require_free(self, name: str) -> None:
        if name in self or name in self._store.contexts:
            raise ValueError(f"context {name!r} is kept already")

    def _require_closed(self, name: str) -> None:
        if name in self._store.contexts:
            raise ValueError(f"context {name!r} is open: close it first")

    def _tensors(self, name: str, numbers: list[int]) -> dict[str, torch.Tensor]:
        """Read pieces, which joined are tensors."""
        pieces = [self._piece(name, number) for number in numbers]
        value = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        try:
            return load_tensors(value)
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            said = f"pieces {brief(numbers)}: {brief(error)}"
            raise CorruptBlockError(f"context {name!r}: {said}") from None

    def _piece(self, name: str, number: int) -> bytes:
        try:
            piece = self._store.get_record(_piece_key(number))
        except CorruptBlockError as error:
            raise CorruptBlockError(f"context {name!r}: {error}") from None
        if piece is None:
            raise CorruptBlockError(f"context {name!r} lacks its piece {number}")
        return piece

    def _next_number(self) -> int:
        numbers = [_number(key) for key in self._store.record_keys(_PIECE)]
        return max((number for number in numbers if number is not None), default=-1) + 1


def check_name(name: str) -> None:
    """Raise ValueError where no context can have this name."""
    nbytes = len(quote(name, safe=""))
    if not 1 <= nbytes <= LONGEST_NAME:
        raise ValueError(f"a context's name has 1 to {LONGEST_NAME} bytes, not {nbytes}")


def _key(name: str) -> bytes:
    check_name(name)
    return _CONTEXT + quote(name, safe="").encode()


def _name(key: bytes) -> str | None:
    """Return whose manifest a key is of; None if it is no key that `_key` makes."""
    try:
        name = unquote(key[len(_CONTEXT) :].decode())
        return name if _key(name) == key else None
    except ValueError:
        return None


def _number(key: bytes) -> int | None:
    """Return which piece a key is of; None if it is no key that `_piece_key` makes."""
    digits = key[len(_PIECE) :]
    return int(digits) if digits.isdigit() and _piece_key(int(digits)) == key else None


def _first(tensor: torch.Tensor, n: int) -> torch.Tensor:
    return tensor[:n] if tensor.dim() else tensor


def _piece_key(number: int) -> bytes:
    return b"%s%012d" % (_PIECE, number)


def _encode(manifest: Manifest) -> bytes:
    return json.dumps(manifest).encode()
