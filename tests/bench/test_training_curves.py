"""What bench.training draws of a log, and what it refuses to read as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.training import curves, load


def test_both_families_logs_become_curves(tmp_path: Path) -> None:
    margin = {"layer0.head0": {"mean": [3.0, 2.0], "least": [1.0, 0.5]}}
    lines = [
        {"step": 50, "length": 512, "loss": 2.0},
        {"step": 100, "length": 512, "loss": 1.5, "bits_per_byte_512": 2.5, "found_512": 0.5},
        {"step": 150, "length": 1024, "loss": 1.0, "found_two_hops": 0.25, "margin": margin},
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)))
    assert curves(load(log)) == {
        "training loss, weighted, nats": {"": [(50, 2.0), (100, 1.5), (150, 1.0)]},
        "validation, bits a byte": {"512 bytes": [(100, 2.5)]},
        "share found": {"pass key, 512 bytes": [(100, 0.5)], "two hops": [(150, 0.25)]},
        "mean margin against 4,096 blocks": {"layer0.head0": [(150, 2.0)]},
    }
    assert list(curves(lines[:1])) == ["training loss, weighted, nats"]


@pytest.mark.parametrize("text", ["", "no json", "3", "[]", '{"step": 1}', "\xff"])
def test_what_is_no_log_is_refused(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is not the log of a training"):
        load(log)


def test_a_log_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*: No such file"):
        load(tmp_path / "none.jsonl")
