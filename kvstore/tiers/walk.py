"""Walks the tree of an LMDB file in a process of its own: `python -m kvstore.tiers.walk DIR`.

LMDB trusts its pages: a damaged one can kill whoever reads it. So before a store is opened a child
looks at every key and both ends of every value, and the parent sees whether it lives. Never writes,
and imports nothing that takes time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import lmdb

_TABLES = (None, b"packs", b"directory", b"records")


def walk(directory: Path) -> str | None:
    """Walk the file in a child; return what is wrong with its tree, None if nothing is."""
    argv = [sys.executable, "-m", "kvstore.tiers.walk", str(directory)]
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    child = subprocess.run(
        argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    if child.returncode < 0:
        return f"a process that read it was killed by {signal.Signals(-child.returncode).name}"
    if child.returncode:
        return (child.stderr.strip().splitlines() or ["it cannot be read"])[-1]
    return None


def _walk_here(directory: str) -> None:
    """Read every key and both ends of every value; raise lmdb.Error where that makes no sense."""
    size = os.path.getsize(os.path.join(directory, "data.mdb"))
    with lmdb.open(directory, readonly=True, max_dbs=len(_TABLES), map_size=size) as env:
        for name in _TABLES:
            try:
                table = env.open_db(name, create=False) if name else None
            except lmdb.NotFoundError:
                continue
            with env.begin(buffers=True) as transaction:
                entries = (transaction.stat(table) if table else transaction.stat())["entries"]
                before, found = b"", 0
                with transaction.cursor(db=table) as cursor:
                    for key, value in cursor:
                        if bytes(key) <= before:
                            raise lmdb.CorruptedError("keys are out of order")
                        before, found = bytes(key), found + 1
                        bytes(value[:1]), bytes(value[-1:])
                if found != entries:
                    raise lmdb.CorruptedError(f"{found} entries of {entries} are there")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        try:
            _walk_here(sys.argv[1])
        except (lmdb.Error, OSError, ValueError) as error:
            sys.exit(f"{error}")
