"""What a block looks like: its planes, their shapes and dtypes. Owns no bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvstore.errors import brief

_LONGEST_NAME = 100
_MOST_SIZES = 16
_LARGEST = 2**31 - 1  # bytes of a block: what a frame says of it has 4 bytes


@dataclass(frozen=True)
class Plane:
    """One tensor of a block, for example its keys.

    shape: (block_size, ...), the whole block's shape in one stream.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        sizes = self.shape
        if (
            not 1 <= len(self.name) <= _LONGEST_NAME
            or not 1 <= len(sizes) <= _MOST_SIZES
            or not 1 <= min(sizes) <= max(sizes) <= _LARGEST
        ):
            raise ValueError(
                f"plane {brief(repr(self.name))} has shape {brief(sizes)}: it needs a name of at "
                f"most {_LONGEST_NAME} characters and at most {_MOST_SIZES} sizes of at least 1"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of one block's plane."""
        size = self.dtype.itemsize
        for n in self.shape:
            size *= n
        return size


@dataclass(frozen=True)
class BlockSpec:
    """The planes that every block of a store has; their first size is the block's tokens."""

    planes: tuple[Plane, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "planes", tuple(self.planes))
        if not self.planes:
            raise ValueError("a block needs at least one plane")
        if len({plane.shape[0] for plane in self.planes}) > 1:
            raise ValueError(
                "the planes of a block differ in tokens: "
                + brief(", ".join(f"{p.name} {p.shape[0]}" for p in self.planes))
            )
        if len({plane.name for plane in self.planes}) < len(self.planes):
            raise ValueError("two planes of a block have the same name")
        if self.nbytes > _LARGEST:
            raise ValueError("a block has 2 GiB or more; give it fewer tokens")

    @classmethod
    def kv(cls, block_size: int, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> BlockSpec:
        """Keys and values [block_size, head_dim] of one head."""
        shape = (block_size, head_dim)
        return cls((Plane("keys", shape, dtype), Plane("values", shape, dtype)))

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.planes[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Uncompressed bytes of one block over all its planes."""
        return sum(plane.nbytes for plane in self.planes)
