"""What a reading and its answer came to: one line of JSON, or tables for people.

Owns the names of the figures and how they look. Never measures anything itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

BAR = 8
COLORS = {"hot": "red", "warm": "yellow", "cold": "blue"}


@dataclass(frozen=True)
class Tier:
    """One tier's figures; bytes unless said otherwise.

    capacity_bytes: 0 for a tier that is off. used_bytes: of the blocks in memory, of the file's
    pages in use on disk. hit_rate: hits over the lookups that no tier above answered; None where
    there were none. bytes_in, bytes_out: uncompressed bytes of the blocks written and read here.
    """

    capacity_bytes: int
    used_bytes: int
    blocks: int
    hits: int
    hit_rate: float | None
    promotions: int
    demotions: int
    evictions: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True)
class Index:
    """The index's figures; recall is None where no HNSW query was compared with an exact one."""

    kind: str
    landmarks: int
    bytes: int
    queries: int
    mean_query_us: float
    recall: float | None


@dataclass(frozen=True)
class Report:
    """All figures of one command.

    tokens: bytes of text read, the prompt not counted; reused_tokens: those of them that a kept
    context had read before. answer: None where nothing was asked; expected, correct: None where
    nobody knows it. prefill_tokens_per_s: None where nothing was read. first_token_seconds: from
    the question, or where a kept context is asked from before it is opened, to the answer's first
    byte. decode_ms_per_token: None where no token was read back. peak_memory_bytes: anonymous.
    cache_bytes: all sealed blocks of the text, uncompressed. compression_ratio: raw bytes of the
    blocks on disk over bytes of the file; None where none are there.
    """

    tokens: int
    reused_tokens: int
    answer: str | None
    expected: str | None
    correct: bool | None
    prefill_seconds: float
    prefill_tokens_per_s: float | None
    first_token_seconds: float | None
    decode_ms_per_token: float | None
    peak_memory_bytes: int
    cache_bytes: int
    tiers: dict[str, Tier]
    lookups: int
    not_found: int
    prefetch: dict[str, int]
    index: Index
    compression_ratio: float | None

    def to_json(self) -> str:
        """Return one line."""
        return json.dumps(asdict(self), allow_nan=False)

    def show(self, console: Console) -> None:
        """Draw the tables."""
        console.print()
        console.print(self._tier_table())
        console.print(self._summary())

    def _tier_table(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("tier", style="dim")
        for name in self.tiers:
            table.add_column(Text(name, style=f"bold {COLORS[name]}"), justify="right")

        def row(label: str, *cells: str | Text) -> None:
            table.add_row(label, *(Text(c) if isinstance(c, str) else c for c in cells))

        tiers = self.tiers.items()
        row(
            "capacity", *(_bytes(t.capacity_bytes) if t.capacity_bytes else "off" for _, t in tiers)
        )
        row("used", *(_bytes(t.used_bytes) for _, t in tiers))
        row("fill", *(_filled(name, t.used_bytes, t.capacity_bytes) for name, t in tiers))
        row("blocks", *(f"{t.blocks:,}" for _, t in tiers))
        row("hits", *(f"{t.hits:,}" for _, t in tiers))
        row("share of lookups", *(_filled(name, t.hits, self.lookups) for name, t in tiers))
        row("hit rate", *(_percent(t.hit_rate) for _, t in tiers))
        row("promotions", *(f"{t.promotions:,}" for _, t in tiers))
        row("demotions", *(f"{t.demotions:,}" for _, t in tiers))
        row("evictions", *(f"{t.evictions:,}" for _, t in tiers))
        row("bytes in", *(_bytes(t.bytes_in) for _, t in tiers))
        row("bytes out", *(_bytes(t.bytes_out) for _, t in tiers))
        return table

    def _summary(self) -> Table:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim")
        table.add_column()

        def row(label: str, value: str) -> None:
            table.add_row(label, Text(value))

        ratio = self.compression_ratio
        on_disk = "" if ratio is None else f"; on disk {ratio:.2f} times smaller"
        row("cache", f"{_bytes(self.cache_bytes)} uncompressed{on_disk}")
        row("lookups", f"{self.lookups:,}, {self.not_found:,} not found")
        if self.prefetch["issued"]:
            issued, used, wasted = (self.prefetch[k] for k in ("issued", "used", "wasted"))
            row("prefetches", f"{issued:,}, {used:,} used, {wasted:,} wasted")
        index = self.index
        recall = "" if index.recall is None else f", sampled recall {index.recall:.3f}"
        row(
            "index",
            f"{index.kind}, {index.landmarks:,} landmarks in {_bytes(index.bytes)}, "
            f"{index.queries:,} queries of {index.mean_query_us:,.0f} µs{recall}",
        )
        if self.prefill_tokens_per_s is not None:
            row(
                "read",
                f"{self.tokens - self.reused_tokens:,} tokens in {self.prefill_seconds:,.1f} s, "
                f"{self.prefill_tokens_per_s:,.0f} tokens/s",
            )
        else:
            row("read before", f"{self.tokens:,} tokens")
        if self.decode_ms_per_token is not None:
            row(
                "answered",
                f"{self.decode_ms_per_token:.1f} ms a token, "
                f"the first after {self.first_token_seconds:.2f} s",
            )
        row("memory", f"{_bytes(self.peak_memory_bytes)} at most (anonymous)")
        return table


def bar(part: float, whole: float, width: int = BAR) -> str:
    """Draw part of whole as a bar of `width` characters, in eighths of a character."""
    share = min(max(part / whole, 0.0), 1.0) if whole else 0.0
    eighths = round(share * width * 8)
    if share and not eighths:
        eighths = 1  # a little is not nothing
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(width)


def _filled(name: str, part: int, whole: int) -> Text:
    if not whole:
        return Text("-", style="dim")
    drawn = Text(bar(part, whole), style=f"{COLORS[name]} on grey23")
    share = part / whole
    said = f"{share:.1%}" if 0 < share < 0.095 else f"{share:.0%}"
    return drawn + Text(f" {said:>4}", style="default on default")


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1%}"


def _bytes(nbytes: int) -> str:
    from kvstore.config import format_size

    return format_size(nbytes)
