"""Frames of a store whose blocks lie on disk exactly or in fewer bits, as each frame says itself.

Owns the choice of how a block is written. Frames of quantized blocks are frames like others, of
another specification; so they are bound to their block and verified in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore.block import BlockSpec
from kvstore.codec import Bytes2D, Codec, Frame, Ids
from kvstore.errors import CorruptBlockError
from kvstore.quantize import Quantizer

_GROUP = 32  # blocks taken apart at a time, in memory of several times theirs
_BITS = {"int8": 8, "int4": 4}


class MixedCodec:
    """Blocks of one specification <-> frames.

    precision: how blocks are written, one of PRECISIONS; all are read. A block with numbers that
    are not finite is written exactly.
    """

    def __init__(self, spec: BlockSpec, precision: str = "exact") -> None:
        self.spec = spec
        self.exact = Codec(spec)
        self._lossy: dict[bytes, tuple[Codec, Quantizer]] = {}
        self._writes: tuple[Codec, Quantizer] | None = None
        for name, bits in _BITS.items():
            quantizer = Quantizer(spec, bits)
            codec = Codec(quantizer.spec)
            self._lossy[codec.kind] = codec, quantizer
            if name == precision:
                self._writes = codec, quantizer

    def encode(
        self,
        ids: Ids,
        planes: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> list[bytes]:
        """Return one frame a block; as Codec.encode."""
        if self._writes is None:
            return self.exact.encode(ids, planes, rows)
        codec, quantizer = self._writes
        places = np.arange(len(ids)) if rows is None else rows
        frames: list[bytes] = []
        for start in range(0, len(ids), _GROUP):
            some, chosen = ids[start : start + _GROUP], places[start : start + _GROUP]
            blocks = [p[chosen] for p in planes]
            fine = quantizer.finite(blocks)
            parts = iter(codec.encode(some[fine], quantizer.quantize([p[fine] for p in blocks])))
            rest = iter(self.exact.encode(some[~fine], planes, chosen[~fine]))
            frames += [next(parts if each else rest) for each in fine.tolist()]
        return frames

    def decode(
        self,
        ids: Ids,
        frames: Sequence[Frame],
        out: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Verify every frame and write its block's planes into `out`; as Codec.decode."""
        try:
            self.exact.decode(ids, frames, out, rows)
            return
        except CorruptBlockError:
            # Most stores are exact, and pay nothing for those that are not.
            kinds = self._kinds(frames)
            if self._lossy.keys().isdisjoint(kinds):
                raise
        places = np.arange(len(ids)) if rows is None else rows
        for kind, chosen in kinds.items():
            some = [frames[i] for i in chosen]
            if kind not in self._lossy:
                self.exact.decode(ids[chosen], some, out, places[chosen])
                continue
            codec, quantizer = self._lossy[kind]
            for start in range(0, len(chosen), _GROUP):
                part = chosen[start : start + _GROUP]
                made = [np.empty((len(part), p.nbytes), np.uint8) for p in quantizer.spec.planes]
                codec.decode(ids[part], some[start : start + _GROUP], made)
                quantizer.restore(made, out, places[part])

    def verify(self, ids: Ids, frames: Sequence[Frame]) -> None:
        """Raise what `decode` would, without making the planes."""
        for kind, chosen in self._kinds(frames).items():
            codec = self._lossy[kind][0] if kind in self._lossy else self.exact
            codec.verify(ids[chosen], [frames[i] for i in chosen])

    def _kinds(self, frames: Sequence[Frame]) -> dict[bytes, npt.NDArray[np.int64]]:
        """Return the places of the frames of each kind, by what they say themselves."""
        places: dict[bytes, list[int]] = {}
        for place, frame in enumerate(frames):
            places.setdefault(self.exact.kind_of(frame), []).append(place)
        return {kind: np.array(some) for kind, some in places.items()}
