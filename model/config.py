"""What a model of ours is made of: a frozen, validated configuration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

VOCABULARY = 256
"""Tokens are bytes; the landmark token has an embedding of its own, outside the vocabulary."""


def _whole(name: str, value: object, least: int = 1) -> None:
    if type(value) is not int:
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def _check_shared(config: LandmarkConfig | GCAConfig) -> None:
    """Refuse what no family can be made of."""
    grams = config.grams
    if not isinstance(grams, list | tuple) or any(type(size) is not int for size in grams):
        raise ValueError(f"grams must be a list of whole numbers, not {grams!r}")
    for size in grams:
        _whole("each of grams", size)
    object.__setattr__(config, "grams", tuple(grams))  # a list in a checkpoint's header
    base = config.rope_base
    if type(base) not in (int, float) or not 0 < base < math.inf:
        raise ValueError(f"rope_base must be a number above 0, not {base!r}")
    for name in ("width", "heads", "mlp_width", "block_size", "window_blocks", "reach", "buckets"):
        _whole(name, getattr(config, name))
    if config.width % config.heads or (config.width // config.heads) % 2:
        raise ValueError(
            f"width {config.width} must be a multiple of twice the heads ({config.heads})"
        )


@dataclass(frozen=True)
class LandmarkConfig:
    """Sizes of a byte-level transformer whose upper layers retrieve.

    family: which attention the retrieving layers use.
    width: size of the residual stream; heads * head_dim. mlp_width: of the MLPs' hidden layers.
    layers: one letter a layer, from the input up: "l" local attention, "r" retrieving.
    reach: bytes that each place's embedding knows of: its own and those right before it. grams:
    lengths of the strings that end there and are embedded whole, by one of `buckets` vectors each.
    block_size: tokens of a block; the landmark token takes one position more.
    window_blocks: in a local layer a token sees window_blocks * block_size tokens, itself included.
    near: recent blocks that are always attended to.
    top_k: older blocks that each retrieving head finds.
    segment: tokens that share one selection while a text is read; divides block_size.
    """

    family: str = "landmark"
    width: int = 128
    heads: int = 2
    layers: str = "llrr"
    mlp_width: int = 512
    block_size: int = 32
    window_blocks: int = 2
    reach: int = 4
    grams: tuple[int, ...] = ()
    buckets: int = 8192
    rope_base: float = 1e6
    near: int = 8
    top_k: int = 4
    segment: int = 32

    def __post_init__(self) -> None:
        if self.family not in ("landmark",):
            raise ValueError(f"model family {self.family!r} is unknown: use 'landmark'")
        _check_shared(self)
        for name in ("near", "top_k", "segment"):
            _whole(name, getattr(self, name))
        if not isinstance(self.layers, str) or not self.layers or set(self.layers) - {"l", "r"}:
            raise ValueError(f"layers {self.layers!r} must be letters l (local) and r (retrieving)")
        if self.block_size % self.segment:
            raise ValueError(f"segment {self.segment} must divide the block size {self.block_size}")

    @property
    def head_dim(self) -> int:
        """Size of one head's queries, keys and values."""
        return self.width // self.heads

    @property
    def retrieving(self) -> int:
        """How many layers retrieve."""
        return self.layers.count("r")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


@dataclass(frozen=True)
class GCAConfig:
    """Sizes of a byte-level transformer whose upper layers retrieve chunks (model/gca.py).

    width: size of the residual stream; heads * head_dim. mlp_width: of the MLPs' hidden layers.
    lower, encoder: layers below the chunk encoder, and of it. groups, group_layers: how often the
    upper layers search, and how many share what was found.
    reach: bytes that each place's embedding knows of: its own and those right before it. grams:
    lengths of the strings that end there and are embedded whole, by one of `buckets` vectors each.
    block_size: tokens of a chunk; the landmark token takes one position more.
    window_blocks: directly a token sees window_blocks * block_size tokens, itself included.
    landmark_dim: size of landmarks and of the queries that find them.
    near: recent chunks that are always attended to.
    top_k: older chunks that each group finds; 0: none.
    segment: tokens that use what the first of them finds while a text is read; divides block_size;
    0: a chunk uses what the landmark before it finds.
    lag: how many places of a chunk lie between a key and its value; 0: none, as published; 1: what
    is looked for is what came right before.
    softmax: "chunk": over the tokens of each chunk found, as published; "found": of them all.
    """

    family: str = "gca"
    width: int = 128
    heads: int = 2
    lower: int = 2
    encoder: int = 1
    groups: int = 2
    group_layers: int = 1
    mlp_width: int = 512
    block_size: int = 64
    window_blocks: int = 1
    reach: int = 4
    grams: tuple[int, ...] = (3, 6)
    buckets: int = 8192
    rope_base: float = 1e4
    landmark_dim: int = 64
    near: int = 4
    top_k: int = 4
    segment: int = 16
    lag: int = 1
    softmax: str = "found"

    def __post_init__(self) -> None:
        if self.family != "gca":
            raise ValueError(f"model family {self.family!r} is not 'gca'")
        _check_shared(self)
        for name in ("encoder", "groups", "group_layers", "landmark_dim"):
            _whole(name, getattr(self, name))
        for name in ("lower", "near", "top_k", "segment", "lag"):
            _whole(name, getattr(self, name), least=0)
        if not self.lag and self.reach < 2:
            raise ValueError("reach must be at least 2 where lag is 0: keys are of bytes before")
        if self.lag >= self.block_size:
            raise ValueError(f"lag {self.lag} must be below the block size {self.block_size}")
        if self.softmax not in ("chunk", "found"):
            raise ValueError(f"softmax is {self.softmax!r}: use 'chunk' or 'found'")
        if self.segment and self.block_size % self.segment:
            raise ValueError(f"segment {self.segment} must divide the block size {self.block_size}")

    @property
    def head_dim(self) -> int:
        """Size of one head's queries, keys and values."""
        return self.width // self.heads

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)
