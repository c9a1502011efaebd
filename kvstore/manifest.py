"""A kept context's manifest: what it says, and whether it makes sense (docs/format.md).

Owns the fields. Never reads or writes anything.
"""

from __future__ import annotations

from reprlib import repr as short
from typing import Any

from kvstore.block import BlockSpec
from kvstore.config import IndexConfig

FORMAT = 2
MOST_STREAMS = 2**20
MOST_BLOCKS = 2**48

Manifest = dict[str, Any]

OF_A_SAVE = ("counts", "filled", "on_device", "info", "rest", "saved")
"""What a snapshot has of its own; everything else is the context's."""


def numbers_of(manifest: Manifest) -> list[int]:
    """Return the numbers of the pieces that a manifest names."""
    rests = [manifest["rest"], *(snapshot["rest"] for snapshot in manifest["snapshots"])]
    return [piece["number"] for piece in manifest["past"]] + [n for rest in rests for n in rest]


def gone_back(manifest: Manifest, snapshot: int) -> Manifest:
    """Return the manifest as it was when this snapshot was made."""
    earlier = manifest["snapshots"][snapshot]
    counts = earlier["counts"]
    past, first = [], [0] * len(counts)
    for piece in manifest["past"]:
        stops = [min(stop, count) for stop, count in zip(piece["stops"], counts, strict=True)]
        if stops != first:
            past.append(piece | {"stops": stops})
        first = stops
    back: Manifest = {**manifest, **earlier, "past": past}
    return back | {"snapshots": manifest["snapshots"][: snapshot + 1]}


def describe_blocks(spec: BlockSpec) -> list[list[Any]]:
    """Return a specification as a manifest has it."""
    return [[plane.name, list(plane.shape), str(plane.dtype)] for plane in spec.planes]


def check_manifest(manifest: Manifest, spec: BlockSpec) -> None:
    """Raise ValueError, KeyError or TypeError where a manifest makes no sense.

    Before anything is read or allocated by what it says: it may come from anywhere.
    """
    streams, dim = manifest["streams"], manifest["landmark_dim"]
    if not (_whole(streams, 1, MOST_STREAMS) and _whole(dim, 1, MOST_STREAMS)):
        raise ValueError(f"{streams!r} streams with landmarks of {dim!r} numbers")
    IndexConfig(**manifest["index"])
    if not isinstance(manifest["fingerprint"], str):
        raise ValueError("what made it is not said")
    if manifest["block"] != describe_blocks(spec):
        raise ValueError(f"its blocks are {short(manifest['block'])}")
    for save in (manifest, *manifest["snapshots"]):
        counts, filled = save["counts"], save["filled"]
        if not _stops(counts, streams) or not _stops(filled, streams):
            raise ValueError("its counts are not one for each stream")
        if max(filled) >= spec.block_size:
            raise ValueError("an open block has more tokens than a block")
        if not all(isinstance(each, str) for each in save["on_device"]):
            raise ValueError("a state has no name")
        if not isinstance(save["info"], dict) or not isinstance(save["saved"], float):
            raise ValueError("what its owner keeps is not there")
        if not all(_whole(number, 0, MOST_BLOCKS) for number in save["rest"]):
            raise ValueError("its rest is not numbers")
        if len(set(save["rest"])) < len(save["rest"]):
            raise ValueError("its rest names a piece twice")
    if not isinstance(manifest["created"], float):
        raise ValueError("it does not say when it was made")
    last = [0] * streams
    for piece in manifest["past"]:
        stops = piece["stops"]
        if not all(_whole(piece[key], 0, MOST_BLOCKS) for key in ("number", "bytes")):
            raise ValueError("a piece has no number")
        if not _stops(stops, streams) or any(a > b for a, b in zip(last, stops, strict=True)):
            raise ValueError("its pieces are out of order")
        last = stops
    if last != manifest["counts"]:
        raise ValueError(f"its pieces hold {last} blocks, it says {manifest['counts']}")
    for save in manifest["snapshots"]:
        if any(a > b for a, b in zip(save["counts"], last, strict=True)):
            raise ValueError("a snapshot has more blocks than the context")


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _stops(values: Any, streams: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == streams
        and all(_whole(value, 0, MOST_BLOCKS) for value in values)
    )
