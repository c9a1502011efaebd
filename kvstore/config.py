"""A store's settings: frozen, validated once, sizes resolved to bytes.

Owns the defaults and the words for what is wrong with a setting. Never opens, creates or
allocates anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import torch

from kvstore.policy import POLICIES, PolicyFactory
from kvstore.promises import DURABILITIES, PRECISIONS

Given = TypeVar("Given")
Kept = TypeVar("Kept")

_UNITS = {"B": 1}
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS[f"{_prefix}IB"] = 1024**_power
    _UNITS[f"{_prefix}B"] = 1000**_power
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", re.ASCII)
_MOST = 2**63 - 1


def parse_size(size: int | str) -> int:
    """Read a size in bytes: 67108864, "67108864", "64MiB", "1.5GiB", "10MB".

    KiB, MiB, GiB, TiB are powers of 1024; KB, MB, GB, TB of 1000; case does not matter. A fraction
    of a byte is dropped. Anything else raises ValueError.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        nbytes = size
    else:
        match = _SIZE.fullmatch(size.strip().upper()) if isinstance(size, str) else None
        unit = _UNITS.get(match[2] or "B") if match else None
        if match is None or unit is None:
            raise ValueError(
                f"{size!r} is not a size: give a number of bytes, or a number with a unit "
                'such as "64MiB", "1.5GiB" or "10MB"'
            )
        nbytes = int(Fraction(match[1]) * unit)
    if not 0 <= nbytes <= _MOST:
        raise ValueError(f"{size!r} is not a size: it must lie between 0 and 2**63 - 1 bytes")
    return nbytes


def format_size(nbytes: int) -> str:
    """Write bytes for people, with at most one decimal: 67108864 is "64MiB", 1536 is "1.5KiB"."""
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if round(abs(value), 1) < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + unit


class Converted(Generic[Given, Kept]):
    """A dataclass field that is given in one type and kept in another.

    So that `StoreConfig(hot="64MiB").hot` is an int for the reader, the type checker and `repr`,
    without a second name for the converted value.
    """

    def __init__(self, convert: Callable[[Given], Kept], default: Given) -> None:
        self.convert = convert
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Given: ...
    @overload
    def __get__(self, instance: object, owner: type) -> Kept: ...
    def __get__(self, instance: object | None, owner: type) -> Given | Kept:
        if instance is None:
            return self.default
        kept: Kept = instance.__dict__[self.name]
        return kept

    def __set__(self, instance: object, value: Given) -> None:
        try:
            instance.__dict__[self.name] = self.convert(value)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def _capacity(size: int | str) -> int:
    nbytes = parse_size(size)
    if nbytes < 1:
        raise ValueError("a size of 0 bytes holds nothing; give at least one block")
    return nbytes


def _optional_capacity(size: int | str | None) -> int | None:
    return None if size is None else _capacity(size)


def _optional_path(path: str | PathLike[str] | None) -> Path | None:
    if path is None:
        return None
    if not isinstance(path, (str, PathLike)) or not fspath(path):
        raise ValueError(f"{path!r} is not a path; give a path or None")
    return Path(path)


def _check_int(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name}: {value!r} is not a whole number between {least} and {most}")


@dataclass(frozen=True)
class IndexConfig:
    """How landmarks are searched.

    kind: "exact" scores every landmark; "hnsw" searches graphs over all but the newest landmarks;
        "auto" picks by count, batch and device.
    m, ef_construction, ef_search: the graph's links a node, and its beams when it is built and
        searched (Malkov & Yashunin, 2016).
    segment: landmarks in the smallest frozen HNSW segment; fewer are scored exactly.
    seed: of the graphs; the same landmarks and seed give the same graph.
    sample: one HNSW query in so many is also answered exactly, for recall; 0 never.
    """

    kind: str = "auto"
    m: int = 16
    ef_construction: int = 100
    ef_search: int = 128
    segment: int = 4096
    seed: int = 0
    sample: int = 64

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "exact", "hnsw"):
            raise ValueError(f"kind: {self.kind!r} is not an index; give 'auto', 'exact' or 'hnsw'")
        _check_int("m", self.m, 2, 256)
        _check_int("ef_construction", self.ef_construction, 1, 65536)
        _check_int("ef_search", self.ef_search, 1, 65536)
        _check_int("segment", self.segment, 1, 2**31 - 1)
        _check_int("seed", self.seed, 0, 2**31 - 1)
        _check_int("sample", self.sample, 0, 2**31 - 1)


@dataclass(frozen=True)
class StoreConfig:
    """The settings of one store. Sizes are given as bytes or as "64MiB" and kept as bytes.

    hot: bytes of blocks in device memory.
    warm: bytes of blocks in host memory.
    cold: bytes of the file on disk; None: no disk tier.
    directory: of the disk tier; None: a temporary one, removed when the store closes.
    device: of the hot tier: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:0".
    policy: the eviction order of hot and of warm: "lru", "sieve", or a callable that makes one for
        a number of slots (see kvstore.policy).
    workers: background threads that compress and write; one more reads ahead.
    staging: bytes of host buffers for blocks on their way between disk and memory.
    trace: file that records every access (see docs/trace.md); None: none.
    index: how landmarks are searched.
    durability: what a loss of power may take of a store that is kept: "sync", "async" or "none"
        (see kvstore.promises); a temporary one is always "none".
    precision: of blocks on disk: "exact", "int8" or "int4" (see kvstore.promises). In fewer bits a
        number is off by up to half of one of the 255 or 15 steps of its channel of keys, or of its
        token in other planes: what comes back from disk differs from what memory had.
    read_only: open a store that is kept in `directory` beside the process that writes to it, if
        there is one. What is put stays in memory, and nothing is kept.

    A setting that makes no sense raises ValueError here; that a tier holds at least one block is
    known, and checked, when the store is made.
    """

    hot: Converted[int | str, int] = Converted(_capacity, "64MiB")
    warm: Converted[int | str, int] = Converted(_capacity, "256MiB")
    cold: Converted[int | str | None, int | None] = Converted(_optional_capacity, "64GiB")
    directory: Converted[str | PathLike[str] | None, Path | None] = Converted(_optional_path, None)
    device: str = "auto"
    policy: str | PolicyFactory = "lru"
    workers: int = 2
    staging: Converted[int | str, int] = Converted(_capacity, "16MiB")
    trace: Converted[str | PathLike[str] | None, Path | None] = Converted(_optional_path, None)
    index: IndexConfig = IndexConfig()
    durability: str = "sync"
    precision: str = "exact"
    read_only: bool = False

    def __post_init__(self) -> None:
        if self.cold is None and self.directory is not None:
            raise ValueError(
                f"directory: {str(self.directory)!r} would stay empty, because cold is None; "
                "give cold a size, or leave directory out"
            )
        _check_device(self.device)
        if not callable(self.policy) and self.policy not in POLICIES:
            raise ValueError(
                f"policy: {self.policy!r} is not known; give "
                + " or ".join(repr(name) for name in POLICIES)
                + ", or a callable that makes a policy for a number of slots"
            )
        for name, known in (("durability", DURABILITIES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is not known; give "
                    + " or ".join(repr(each) for each in known)
                )
        _check_int("workers", self.workers, 1, 64)
        if not isinstance(self.index, IndexConfig):
            raise ValueError(f"index: {self.index!r} is not an IndexConfig")

    @property
    def torch_device(self) -> torch.device:
        """The hot tier's device, with its number where it is CUDA, as tensors report it."""
        if self.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        name = "cuda" if self.device == "auto" else self.device
        device = torch.device(name)
        return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _check_device(device: Any) -> None:
    if device in ("auto", "cpu"):
        return
    match = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if match is None:
        raise ValueError(
            f"device: {device!r} is not a device; give 'auto', 'cpu', 'cuda' or 'cuda:0'"
        )
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= found:
        raise ValueError(
            f"device: {device!r} was asked for, but torch sees {found} CUDA devices; "
            "give 'auto' or 'cpu'"
        )
