"""A store whose file is damaged in its structure, made anew of what can be read of it.

Owns the order: what can be read goes into a store beside it, that one is verified and repaired, and
only then takes the place of the damaged file, which is kept.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from kvstore.block import BlockSpec
from kvstore.config import StoreConfig
from kvstore.errors import CorruptStoreError
from kvstore.store import Store
from kvstore.tiers import lock
from kvstore.tiers.commits import newest_first
from kvstore.tiers.disk import FORMAT_KEY, DiskTier, planes_of
from kvstore.tiers.spec_file import NAME, described, read_spec, write_spec
from kvstore.tiers.tree import readable
from kvstore.verify import repair, verify

DAMAGED = "data.damaged"
"""The name of the old file, beside the new one."""

_TOLD = 3  # of damaged pages, of which there may be thousands
_ASIDE = "salvaged"


def salvage(
    directory: Path, cold: int | str, progress: Callable[[int], None] = lambda blocks: None
) -> list[str]:
    """Make a store of what can be read of a damaged one, in its place; say in words what was lost.

    cold: its capacity; on disk as much room is needed again. Nobody has it open. Tells now and then
    how many blocks are read. CorruptStoreError, with nothing changed, where nothing can be read.
    """
    handle = lock.hold(directory)
    aside = directory / _ASIDE
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of one that was cut short
        spec, told = _spec(directory)
        config = StoreConfig(
            hot=spec.nbytes, warm=spec.nbytes, cold=cold, device="cpu", directory=aside
        )
        assert config.cold is not None
        tier = DiskTier(aside, spec, config.cold)
        try:
            with _mapped(directory) as data:
                tables, lost = readable(data, newest_first(data))
                if not tables:
                    raise CorruptStoreError(f"nothing can be read of {directory}: {lost[0]}")
                told += [f"in the file: {each}" for each in lost[:_TOLD]]
                if len(lost) > _TOLD:
                    told.append(f"in the file: {len(lost) - _TOLD:,} more of that kind")
                told += tier.adopt(tables, data)
        finally:
            tier.close()
        write_spec(aside, spec)
        with Store(spec, config) as store:
            told += repair(store, verify(store, progress))
            names = ", ".join(map(repr, store.kept.names()))
            told.append(f"contexts that are left: {names or 'none'}; there may have been others")
        with contextlib.suppress(OSError):  # where there are no hard links
            (directory / DAMAGED).unlink(missing_ok=True)
            os.link(directory / "data.mdb", directory / DAMAGED)
            told.append(f"the damaged file is kept as {directory / DAMAGED}")
        (aside / "data.mdb").replace(directory / "data.mdb")
        (aside / NAME).replace(directory / NAME)
        os.fsync(handle)
        return told
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        lock.let_go(handle)


def _spec(directory: Path) -> tuple[BlockSpec, list[str]]:
    """Return what the blocks look like, and what was damaged of that: two files say it."""
    try:
        return read_spec(directory), []
    except CorruptStoreError as error:
        with _mapped(directory) as data:
            tables, _ = readable(data, newest_first(data))
            for key, at, size in tables.get(b"", []):
                if key == FORMAT_KEY:
                    return described(planes_of(data[at : at + size])), [str(error)]
        raise


@contextlib.contextmanager
def _mapped(directory: Path) -> Iterator[mmap.mmap]:
    """Map the file of a store; one that is gone or empty is CorruptStoreError."""
    path = directory / "data.mdb"
    if not path.exists() or not path.stat().st_size:
        raise CorruptStoreError(f"nothing can be read of {directory}: it has no {path.name}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data
