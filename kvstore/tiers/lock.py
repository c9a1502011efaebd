"""Who has a store's directory: one process that writes, and says its number.

Owns the lock and the file `owner`. The lock is the system's (flock), so it goes with its process
however that ends; the file only tells those who are refused by whom.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path

_held: set[int] = set()
"""What this process has locked: a forked child has a copy of each handle, with which it would keep
a store locked whose process was killed."""


def _let_go_in_child() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


def hold(directory: Path) -> int:
    """Make the directory, for its owner alone, and lock it against other processes.

    Returns what `let_go` takes. ValueError where it cannot be used, or is in use.
    """
    try:
        directory.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileExistsError:
        raise ValueError(f"{directory} is a file: a store needs a directory") from None
    except OSError as error:
        raise ValueError(f"cannot use {directory} as a store: {error.strerror}") from None
    try:
        if not os.access(directory, os.W_OK | os.X_OK):
            raise ValueError(f"cannot use {directory} as a store: it is not writable")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _write_owner(directory)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"the store in {directory} is in use{_owner(directory)}") from None
    except BaseException:
        os.close(handle)
        raise
    _held.add(handle)
    return handle


def _write_owner(directory: Path) -> None:
    """Note who has the store open, for those who find it locked; the lock is not this file."""
    path = directory / "owner"
    with contextlib.suppress(OSError):  # such as on a full disk
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, stat.S_IRUSR | stat.S_IWUSR)
        with os.fdopen(handle, "w") as file:
            file.write(f"{os.getpid()}\n")


def _owner(directory: Path) -> str:
    try:
        return f" by process {int((directory / 'owner').read_text())}"
    except (OSError, ValueError):
        return ""


def let_go(handle: int) -> None:
    """Unlock the directory; in a forked child nothing is held."""
    if handle in _held:
        _held.remove(handle)
        # Unlocked, not only closed: a child that Python did not fork may hold the lock too.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
