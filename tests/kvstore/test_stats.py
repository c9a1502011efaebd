"""Counters: rates over the lookups that reached a tier, and a snapshot that JSON takes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.stats import StoreStats


def _stats(hot: int, warm: int, cold: int, not_found: int) -> StoreStats:
    stats = StoreStats(lookups=hot + warm + cold + not_found, not_found=not_found)
    stats.hot.hits, stats.warm.hits, stats.cold.hits = hot, warm, cold
    return stats


def test_a_tier_answers_for_what_reaches_it() -> None:
    tiers = _stats(hot=90, warm=6, cold=3, not_found=1).snapshot()["tiers"]
    assert tiers["hot"]["hit_rate"] == 0.9
    assert tiers["warm"]["hit_rate"] == 0.6
    assert tiers["cold"]["hit_rate"] == 0.75


def test_what_nothing_reached_has_no_rate() -> None:
    tiers = StoreStats().snapshot()["tiers"]
    assert [tiers[name]["hit_rate"] for name in ("hot", "warm", "cold")] == [None, None, None]
    tiers = _stats(hot=5, warm=0, cold=0, not_found=0).snapshot()["tiers"]
    assert [tiers[name]["hit_rate"] for name in ("hot", "warm", "cold")] == [1.0, None, None]


@settings(deadline=None)
@given(*[st.integers(0, 1000)] * 4)
def test_misses_multiply_to_what_was_not_found(h: int, w: int, c: int, n: int) -> None:
    stats = _stats(h, w, c, n)
    stats.check()
    left = float(stats.lookups)
    for tier in stats.snapshot()["tiers"].values():
        if tier["hit_rate"] is not None:
            assert 0 <= tier["hit_rate"] <= 1
            left *= 1 - tier["hit_rate"]
    assert left == pytest.approx(n)


def test_the_snapshot_is_json_with_every_counter_in_its_place() -> None:
    stats = StoreStats(lookups=1, not_found=2, writes_behind=3, write_waits=4)
    for base, tier in ((10, stats.hot), (20, stats.warm), (30, stats.cold)):
        tier.hits, tier.promotions, tier.demotions = base + 1, base + 2, base + 3
        tier.evictions, tier.bytes_in, tier.bytes_out = base + 4, base + 5, base + 6
    stats.prefetch.issued, stats.prefetch.used, stats.prefetch.wasted = 41, 42, 43
    snapshot = json.loads(json.dumps(stats.snapshot(), allow_nan=False))
    for tier in snapshot["tiers"].values():
        del tier["hit_rate"]
    names = ("hits", "promotions", "demotions", "evictions", "bytes_in", "bytes_out")
    assert snapshot == {
        "lookups": 1,
        "not_found": 2,
        "tiers": {
            tier: {name: base + n for n, name in enumerate(names, start=1)}
            for tier, base in (("hot", 10), ("warm", 20), ("cold", 30))
        },
        "prefetch": {"issued": 41, "used": 42, "wasted": 43},
        "writes_behind": 3,
        "write_waits": 4,
    }


def test_a_snapshot_stays_as_it_was() -> None:
    stats = _stats(1, 0, 0, 0)
    snapshot = stats.snapshot()
    stats.hot.hits += 1
    stats.lookups += 1
    assert snapshot["lookups"] == snapshot["tiers"]["hot"]["hits"] == 1


def test_stores_do_not_share_counters() -> None:
    one, other = StoreStats(), StoreStats()
    one.hot.hits += 1
    one.prefetch.issued += 1
    assert (other.hot.hits, other.prefetch.issued) == (0, 0)


def test_a_miscounted_lookup_is_noticed() -> None:
    for wrong in (1, -1):
        stats = _stats(2, 3, 4, 5)
        stats.lookups += wrong
        with pytest.raises(AssertionError, match="9 hits and 5 not found are not"):
            stats.check()


def test_more_prefetches_used_than_issued_are_noticed() -> None:
    stats = StoreStats()
    stats.prefetch.issued, stats.prefetch.used, stats.prefetch.wasted = 3, 2, 1
    stats.check()
    stats.prefetch.wasted = 2
    with pytest.raises(AssertionError, match="2 used and 2 wasted of 3"):
        stats.check()
