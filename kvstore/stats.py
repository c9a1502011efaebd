"""What a store counted. Owns plain numbers and their names; never looks at a tier itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class TierStats:
    """One tier's counters. Blocks, except the bytes, which are of uncompressed blocks.

    hits: lookups of a block that lay here when it was asked for.
    promotions: blocks copied into this tier from one below it.
    demotions: blocks copied from this tier to one below it, because they had to leave.
    evictions: blocks dropped from this tier because another copy of them exists.
    bytes_in, bytes_out: of blocks written to and read from this tier.
    """

    hits: int = 0
    promotions: int = 0
    demotions: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(slots=True)
class PrefetchStats:
    """Blocks that were brought up before they were asked for.

    issued: prefetches of a block that did not lie in hot yet.
    used: those whose block was looked up while it still lay there.
    wasted: those whose block left hot unused, or found no room there. Issued, but neither yet: it
        still waits there.
    """

    issued: int = 0
    used: int = 0
    wasted: int = 0


@dataclass(slots=True)
class StoreStats:
    """A store's counters since it was opened; the store adds to them directly.

    lookups: distinct blocks asked for by a fetch, summed over the fetches. Prefetches do not count.
    not_found: lookups of an id that no tier has.
    writes_behind: blocks that workers compressed and wrote.
    write_waits: times that the caller had to wait because the workers were behind.

    A lookup is the hit of one tier or not found, so the hits over the tiers and `not_found` make
    `lookups`; `check` says so.
    """

    lookups: int = 0
    not_found: int = 0
    hot: TierStats = field(default_factory=TierStats)
    warm: TierStats = field(default_factory=TierStats)
    cold: TierStats = field(default_factory=TierStats)
    prefetch: PrefetchStats = field(default_factory=PrefetchStats)
    writes_behind: int = 0
    write_waits: int = 0

    def check(self) -> None:
        """Raise AssertionError where the counters contradict one another."""
        hits = self.hot.hits + self.warm.hits + self.cold.hits
        assert hits + self.not_found == self.lookups, (
            f"{hits} hits and {self.not_found} not found are not {self.lookups} lookups"
        )
        prefetch = self.prefetch
        assert prefetch.used + prefetch.wasted <= prefetch.issued, (
            f"{prefetch.used} used and {prefetch.wasted} wasted of {prefetch.issued} prefetches"
        )

    def snapshot(self) -> dict[str, Any]:
        """The counters as they are now, in plain dicts that `json.dumps` takes.

        `tiers` has hot, warm and cold. A tier's `hit_rate` is its hits over the lookups that
        reached it, those that no tier above it answered; None where none did.
        """
        reached = self.lookups
        tiers: dict[str, dict[str, int | float | None]] = {}
        for name, tier in (("hot", self.hot), ("warm", self.warm), ("cold", self.cold)):
            tiers[name] = {
                "hits": tier.hits,
                "hit_rate": tier.hits / reached if reached else None,
                "promotions": tier.promotions,
                "demotions": tier.demotions,
                "evictions": tier.evictions,
                "bytes_in": tier.bytes_in,
                "bytes_out": tier.bytes_out,
            }
            reached -= tier.hits
        return {
            "lookups": self.lookups,
            "not_found": self.not_found,
            "tiers": tiers,
            "prefetch": {
                "issued": self.prefetch.issued,
                "used": self.prefetch.used,
                "wasted": self.prefetch.wasted,
            },
            "writes_behind": self.writes_behind,
            "write_waits": self.write_waits,
        }
