"""The store's side of a trace. Owns what failed in recording, so that it never stops a move."""

from __future__ import annotations

from typing import Any, Literal

from kvstore.errors import WriteFailedError
from kvstore.trace import TraceWriter

EventName = Literal["put", "fetch", "prefetch", "weigh", "evict", "delete"]


class Recorder:
    """Hands events to a trace, if there is one.

    active: whether there is one. failure: why recording stopped, if that was not raised yet.
    """

    def __init__(self, trace: TraceWriter | None) -> None:
        self._trace = trace
        self.active = trace is not None
        self.failure: WriteFailedError | None = None

    def note(self, event: EventName, *said: Any) -> None:
        """Record an event; what is said are the arguments of TraceWriter's method of that name."""
        if self._trace is not None:
            try:
                getattr(self._trace, event)(*said)
            except WriteFailedError as error:
                self.failure = error

    def raise_failure(self) -> None:
        """Raise why recording stopped, if it did, once."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
