"""Which commit of a store's file is the last: each has a record with the number it was made with.

Owns that record. LMDB takes the larger of two numbers, and has no checksum on either. Never writes.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from kvstore.errors import CorruptBlockError
from kvstore.tiers.sealed import seal, unseal
from kvstore.tiers.tree import commits

COUNTERS_KEY = b"counters"


def sealed_counters(next_pack: int, blocks: int, commit: int) -> bytes:
    """Return the record: the next number of a pack, the blocks, the number of the commit."""
    return seal(COUNTERS_KEY, struct.pack("<QQQ", next_pack, blocks, commit))


def counted(value: bytes) -> tuple[int, int, int]:
    """Return what a record says, in the same order; CorruptBlockError where it is damaged."""
    payload = unseal(COUNTERS_KEY, value, "the record of its counters")
    if len(payload) != 24:
        raise CorruptBlockError(f"the record of its counters is damaged: it has {len(payload)} B")
    next_pack, blocks, commit = struct.unpack("<QQQ", payload)
    return next_pack, blocks, commit


def newest_first(data: mmap.mmap) -> list[int]:
    """Return the numbers that the commits of a file bear, the one first that was made last.

    Damage may have changed the numbers: the counters of a commit have the one it was made with.
    """
    made: dict[int, int] = {}
    for commit in filter(None, commits(data, COUNTERS_KEY)):
        try:
            made[commit.number] = counted(commit.value or b"")[2]
        except CorruptBlockError:
            made[commit.number] = -1
    return sorted(made, key=made.__getitem__, reverse=True)


def fault_of_commits(path: Path) -> str | None:
    """Return what is wrong with the numbers of a file's last two commits; None if nothing is."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = commits(data, COUNTERS_KEY)
    last = max((commit.number for commit in found if commit), default=0)
    for place, commit in enumerate(found):
        if commit is None:
            continue
        try:
            made = counted(commit.value or b"")[2]
        except CorruptBlockError as error:
            if commit.number == last:
                return str(error)
            continue  # what was before may be overwritten in part
        if commit.number == last and (made != last or last % 2 != place):
            return f"its last commit has the number {last}, and was made as {made}"
        # After a loss of power there may be a page of a later commit yet, but not of the next one.
        if commit.number < last and made == last + 1:
            return f"commit {made} has the number {commit.number}"
    return None
