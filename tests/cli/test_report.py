"""Figures as JSON and as tables."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvstore.cli.report import Index, Report, Tier, bar

MIB = 2**20
REPORT = Report(
    tokens=65536,
    reused_tokens=0,
    answer=" 12345",
    expected="12345",
    correct=True,
    prefill_seconds=4.0,
    prefill_tokens_per_s=16384.0,
    first_token_seconds=0.25,
    decode_ms_per_token=12.5,
    peak_memory_bytes=700 * MIB,
    cache_bytes=64 * MIB,
    tiers={
        "hot": Tier(2 * MIB, 2 * MIB, 256, 600, 0.6, 300, 250, 50, 5 * MIB, 6 * MIB),
        "warm": Tier(8 * MIB, 4 * MIB, 512, 100, 0.25, 0, 7168, 7000, 9 * MIB, 8 * MIB),
        "cold": Tier(2**36, 40 * MIB, 7168, 300, 1.0, 0, 0, 0, 56 * MIB, 3 * MIB),
    },
    lookups=1000,
    not_found=0,
    prefetch={"issued": 40, "used": 30, "wasted": 5},
    index=Index("hnsw", 8192, 3 * MIB, 2000, 41.0, 0.9987),
    compression_ratio=1.4,
)


def shown(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    report.show(Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_json_is_one_line_with_every_key() -> None:
    line = REPORT.to_json()
    assert "\n" not in line
    figures = json.loads(line)
    assert figures.keys() >= {
        "tokens",
        "answer",
        "expected",
        "correct",
        "prefill_seconds",
        "prefill_tokens_per_s",
        "decode_ms_per_token",
        "peak_memory_bytes",
        "cache_bytes",
        "tiers",
        "lookups",
        "not_found",
        "index",
        "compression_ratio",
    }
    tier_keys = {"capacity_bytes", "used_bytes", "blocks", "hits", "hit_rate"}
    for name in ("hot", "warm", "cold"):
        assert figures["tiers"][name].keys() >= tier_keys | {"bytes_in", "bytes_out"}
    assert figures["index"].keys() >= {
        "kind",
        "landmarks",
        "bytes",
        "queries",
        "mean_query_us",
        "recall",
    }


def test_what_is_not_known_is_null() -> None:
    run = dataclasses.replace(
        REPORT, expected=None, correct=None, decode_ms_per_token=None, compression_ratio=None
    )
    figures = json.loads(run.to_json())
    for key in ("expected", "correct", "decode_ms_per_token", "compression_ratio"):
        assert figures[key] is None


def test_no_figure_may_be_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(REPORT, prefill_seconds=float("nan")).to_json()


def test_the_table_says_every_figure_in_80_columns() -> None:
    lines = shown(REPORT).splitlines()
    assert max(map(len, lines)) <= 80
    cells = {line.split("  ")[0].strip(): line.split() for line in lines if line.strip()}
    assert cells["capacity"][1:] == ["2MiB", "8MiB", "64GiB"]
    assert cells["used"][1:] == ["2MiB", "4MiB", "40MiB"]
    assert cells["blocks"][1:] == ["256", "512", "7,168"]
    assert cells["hits"][1:] == ["600", "100", "300"]
    assert cells["fill"][2::2] == ["100%", "50%", "0.1%"]
    assert cells["share of lookups"][4::2] == ["60%", "10%", "30%"]
    assert cells["hit rate"][2:] == ["60.0%", "25.0%", "100.0%"]
    assert cells["promotions"][1:] == ["300", "0", "0"]
    assert cells["demotions"][1:] == ["250", "7,168", "0"]
    assert cells["evictions"][1:] == ["50", "7,000", "0"]
    assert cells["bytes in"][2:] == ["5MiB", "9MiB", "56MiB"]
    assert cells["bytes out"][2:] == ["6MiB", "8MiB", "3MiB"]
    text = " ".join(shown(REPORT, 200).split())
    assert "64MiB uncompressed; on disk 1.40 times smaller" in text
    assert "1,000, 0 not found" in text
    assert "40, 30 used, 5 wasted" in text
    assert "hnsw, 8,192 landmarks in 3MiB, 2,000 queries of 41 µs, sampled recall 0.999" in text
    assert "65,536 tokens in 4.0 s, 16,384 tokens/s" in text
    assert "12.5 ms a token, the first after 0.25 s" in text
    assert "700MiB at most" in text


def test_a_tier_that_is_off_or_was_never_reached_shows_so() -> None:
    off = Tier(0, 0, 0, 0, None, 0, 0, 0, 0, 0)
    text = shown(dataclasses.replace(REPORT, tiers=REPORT.tiers | {"cold": off}, lookups=0))
    assert "off" in text
    assert "nan" not in text


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 20))
def test_a_bar_has_its_width_and_grows_with_its_part(part: int, whole: int, width: int) -> None:
    drawn = bar(part, whole, width)
    assert len(drawn) == width
    eighths = sum(" ▏▎▍▌▋▊▉█".index(c) for c in drawn)
    if not whole or not part:
        assert eighths == 0
    elif part >= whole:
        assert eighths == 8 * width
    else:
        assert eighths >= 1
        assert abs(eighths - 8 * width * part / whole) <= 1
