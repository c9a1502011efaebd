"""Blocks in fewer bits: floating planes as small integers with a low end and a step.

Asymmetric, as KIVI does it for KV caches (Liu et al. 2024, arXiv 2402.02750): a plane called `keys`
a channel, over the block's tokens, because some channels of keys are far larger than others; every
other floating plane a token. Other dtypes stay as they are. Pure: knows nothing of frames or disks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.block import BlockSpec, Plane
from kvstore.codec import Bytes2D

Floats = NDArray[np.float32]

_NUMPY: dict[torch.dtype, type[np.floating[Any]]] = {
    torch.float16: np.float16,
    torch.float32: np.float32,
    torch.float64: np.float64,
}


class Quantizer:
    """Blocks of one specification in `bits` bits a number, 8 or 4.

    spec: what it makes of them: for each floating plane the integers, and bfloat16 low ends and
    steps; x is about low + integer * step. Low ends are rounded down and steps up, so that the
    range holds all that was in it and no number is off by more than half a step, and its own
    rounding.
    """

    def __init__(self, spec: BlockSpec, bits: int) -> None:
        self._planes = spec.planes
        self._bits = bits
        self._levels = 2**bits - 1
        made = []
        for plane in spec.planes:
            count = math.prod(plane.shape)
            if not _is_lossy(plane):
                made.append(Plane(plane.name, (1, count), plane.dtype))
                continue
            kept = math.prod(self._range_shape(plane))
            made += [
                Plane(f"{plane.name}.int{bits}", (1, -(-count * bits // 8)), torch.uint8),
                Plane(f"{plane.name}.low", (1, kept), torch.bfloat16),
                Plane(f"{plane.name}.step", (1, kept), torch.bfloat16),
            ]
        self.spec = BlockSpec(tuple(made))

    def finite(self, planes: Sequence[Bytes2D]) -> NDArray[np.bool_]:
        """Return which blocks can be written so: bool [n]. planes: uint8 [n, nbytes] each."""
        fine = np.ones(len(planes[0]), bool)
        for plane, raw in zip(self._planes, planes, strict=True):
            if _is_lossy(plane):
                with np.errstate(over="ignore"):  # a float64 that float32 does not hold
                    fine &= np.isfinite(_widen(raw, plane.dtype)).all(axis=1)
        return fine

    def quantize(self, planes: Sequence[Bytes2D]) -> list[Bytes2D]:
        """Return n finite blocks as planes of `spec`. planes: uint8 [n, nbytes] each."""
        made: list[Bytes2D] = []
        for plane, raw in zip(self._planes, planes, strict=True):
            if not _is_lossy(plane):
                made.append(raw)
                continue
            x = _widen(raw, plane.dtype).reshape(len(raw), *plane.shape)
            axis = self._axis(plane)
            low = _round_down(x.min(axis=axis, keepdims=True))
            step = _round_up((x.max(axis=axis, keepdims=True) - low) / self._levels)
            x = ((x - low) / np.where(step > 0, step, 1)).astype(np.float32)
            q = np.clip(np.rint(x), 0, self._levels).astype(np.uint8).reshape(len(raw), -1)
            if self._bits == 4:
                q = np.pad(q, ((0, 0), (0, q.shape[1] % 2)))
                q = q[:, 0::2] | (q[:, 1::2] << 4).astype(np.uint8)
            made += [np.ascontiguousarray(q), _narrow(low, len(raw)), _narrow(step, len(raw))]
        return made

    def restore(
        self, made: Sequence[Bytes2D], out: Sequence[Bytes2D], rows: NDArray[np.int64] | slice
    ) -> None:
        """Write blocks, as near to what they were as they are kept, to rows of `out`.

        made: planes of `spec`, uint8 [n, nbytes] each. out: uint8 [m, nbytes] each.
        """
        parts = iter(made)
        for plane, raw in zip(self._planes, out, strict=True):
            q = next(parts)
            if not _is_lossy(plane):
                raw[rows] = q
                continue
            count = math.prod(plane.shape)
            if self._bits == 4:
                q = np.stack((q & 15, q >> 4), axis=2).reshape(len(q), -1)[:, :count]
            low, step = (
                _widen(next(parts), torch.bfloat16).reshape(len(q), *self._range_shape(plane))
                for _ in range(2)
            )
            x = q.reshape(len(q), *plane.shape) * step + low
            raw[rows] = _narrow(x, len(q), plane.dtype)

    def _axis(self, plane: Plane) -> int:
        """Over what numbers share a range: a key's channel over tokens, a value's token."""
        return 1 if plane.name == "keys" else len(plane.shape)

    def _range_shape(self, plane: Plane) -> tuple[int, ...]:
        shape = list(plane.shape)
        shape[self._axis(plane) - 1] = 1
        return tuple(shape)


def _is_lossy(plane: Plane) -> bool:
    return plane.dtype in _NUMPY or plane.dtype == torch.bfloat16


def _widen(raw: Bytes2D, dtype: torch.dtype) -> Floats:
    """uint8 [n, nbytes] of a dtype -> float32 [n, numbers]."""
    if dtype == torch.bfloat16:
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(_NUMPY[dtype]).astype(np.float32)


def _narrow(x: Floats, n: int, dtype: torch.dtype = torch.bfloat16) -> Bytes2D:
    """float32 [n, ...] -> uint8 [n, nbytes] of a dtype, rounded to the nearest."""
    x = np.ascontiguousarray(x, np.float32).reshape(n, -1)
    if dtype != torch.bfloat16:
        most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        return x.clip(-most, most).astype(_NUMPY[dtype]).view(np.uint8)
    bits = x.view(np.uint32)
    # Half to even; what overflows so would be infinite, and was finite before.
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where((rounded & 0x7FFF) == 0x7F80, rounded - 1, rounded).astype("<u2").view(np.uint8)


def _round_down(x: Floats) -> Floats:
    """To the next bfloat16 that is not larger."""
    bits = x.view(np.uint32)
    cut = bits & 0xFFFF0000
    # Cutting brings a negative number nearer to zero: one unit further is below it.
    lower = np.where((x < 0) & (bits != cut), cut + 0x10000, cut).astype(np.uint32)
    rounded: Floats = np.maximum(lower.view(np.float32), -_MOST)
    return rounded


def _round_up(x: Floats) -> Floats:
    """To the next bfloat16 that is not smaller; x is not negative."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    cut = bits & 0xFFFF0000
    upper = np.where(bits != cut, cut + 0x10000, cut).astype(np.uint32)
    rounded: Floats = np.minimum(upper.view(np.float32), _MOST)
    return rounded


_MOST = np.float32(torch.finfo(torch.bfloat16).max)
