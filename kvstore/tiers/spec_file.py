"""The block specification of a kept store: a small checked file beside the disk tier's.

Owns its format, so that a store can be opened by its directory alone. The disk tier checks for
itself that what it holds is of the specification it is given.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import torch
import xxhash

from kvstore.block import BlockSpec, Plane
from kvstore.errors import CorruptStoreError, OtherFormatError, brief

FORMAT = 1
NAME = "spec.json"

_LONGEST = 2**20  # bytes; of a file that comes from anywhere

_SHORT = re.compile(r"(.+):(\w+)\[([\d,]+)\]")


def write_spec(directory: Path, spec: BlockSpec) -> None:
    """Write the specification of a directory that has none yet; its owner alone may read it."""
    path = directory / NAME
    if path.exists():
        return
    planes = [
        {"name": plane.name, "shape": list(plane.shape), "dtype": _name(plane.dtype)}
        for plane in spec.planes
    ]
    text = json.dumps({"format": FORMAT, "planes": planes})
    written = path.with_suffix(".new")
    with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(f"{_checksum(text)}\n{text}\n")
        file.flush()
        os.fsync(file.fileno())
    # Whole or not at all.
    written.replace(path)
    # Names are on the disk when their directories are: those of LMDB's files too.
    for place in (directory, directory.resolve().parent):
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_spec(directory: Path) -> BlockSpec:
    """Read it back. ValueError where there is no store, CorruptStoreError where it is damaged."""
    path = directory / NAME
    try:
        with path.open(encoding="utf-8") as file:
            checksum, text = file.read(_LONGEST).splitlines()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (directory / "data.mdb").exists():
            raise CorruptStoreError(f"{path} is missing") from None
        raise ValueError(f"{directory} holds no store: {NAME}: {error.strerror}") from None
    except ValueError:
        raise CorruptStoreError(f"{path} is damaged: it has not two lines") from None
    if checksum != _checksum(text):
        raise CorruptStoreError(f"{path} is damaged: its checksum does not match")
    try:
        found = json.loads(text)
        version = found["format"]
        if version == FORMAT:
            return BlockSpec(
                tuple(
                    Plane(plane["name"], tuple(plane["shape"]), _dtype(plane["dtype"]))
                    for plane in found["planes"]
                )
            )
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CorruptStoreError(f"{path} makes no sense: {brief(error)}") from None
    raise OtherFormatError(
        f"{path} is of format {brief(repr(version))}, this program reads {FORMAT}: use another "
        "directory, or the version that wrote it"
    )


def described(planes: str) -> BlockSpec:
    """Read the short form of a specification, as a frame's checksum has it (docs/format.md).

    CorruptStoreError where it is none.
    """
    found = []
    try:
        for plane in planes.split(" "):
            match = _SHORT.fullmatch(plane)
            if match is None:
                raise ValueError("a plane has another form")
            found.append(Plane(match[1], tuple(map(int, match[3].split(","))), _dtype(match[2])))
        return BlockSpec(tuple(found))
    except ValueError as error:
        raise CorruptStoreError(
            f"{brief(planes)!r} does not say what blocks look like: {brief(error)}"
        ) from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype of this version of torch")
    return dtype


def _checksum(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
