"""What stands around moves: if one is cut short, the store is put together again."""

from __future__ import annotations

from kvstore.errors import KVStoreError
from kvstore.mover import Mover
from kvstore.prefetch import Prefetch
from kvstore.writer import Writer


class Guard:
    """`with guard:` around calls that move blocks.

    The store's own errors and those of bad input are raised where everything is in order. At any
    other, Ctrl-C above all, everything is derived anew from the tables that say where blocks lie.
    """

    def __init__(self, mover: Mover, writer: Writer | None, prefetch: Prefetch | None) -> None:
        self._mover = mover
        self._writer = writer
        self._prefetch = prefetch

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, (KVStoreError, ValueError, KeyError)):
            self.rebuild()

    def rebuild(self) -> None:
        """Derive everything anew."""
        self._mover.rebuild(self._writer.writing() if self._writer is not None else [])
        if self._writer is not None:
            self._writer.rebuild()
        if self._prefetch is not None:
            self._prefetch.rebuild()
