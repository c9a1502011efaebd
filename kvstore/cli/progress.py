"""How far the reading is: a line on stderr that is drawn over and over.

Draws only on a terminal. Never asks the store anything itself: its refresh thread must not.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from kvstore.cli.report import COLORS, bar


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} tokens/s", style="dim")


class _Reading(Progress):
    """The tiers' fills stand on a line of their own: beside the rest they need 120 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield _fills(task.fields["fills"])


def _fills(shares: dict[str, float]) -> Text:
    line = Text()
    for name, share in shares.items():
        line.append(f"{name} ", style="dim")
        line.append(bar(share, 1, 12), style=f"{COLORS[name]} on grey23")
        line.append(f" {share:4.0%}   ", style="dim")
    return line


class ReadingProgress:
    """A bar of tokens read, their rate and, below, each tier's fill."""

    def __init__(self, tokens: int, console: Console, quiet: bool) -> None:
        self._progress = _Reading(
            TextColumn("reading"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _Speed(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("reading", total=tokens, fills={})

    def update(self, tokens: int, fills: dict[str, float]) -> None:
        """Say how many tokens are read and how full each tier is, 0 to 1."""
        self._progress.update(self._task, completed=tokens, fills=fills)

    def __enter__(self) -> ReadingProgress:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.stop()
