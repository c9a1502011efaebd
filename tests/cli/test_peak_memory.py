"""The sampled peak: it sees what is taken, and not what is only mapped."""

from __future__ import annotations

import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvstore.cli.memory import PeakMemory, anonymous_bytes

MIB = 2**20


def test_a_peak_between_two_samples_of_the_thread_is_kept() -> None:
    values = iter([3, 9, *[4] * 10_000])
    seen = threading.Event()

    def measure() -> int:
        value = next(values)
        if value == 4:
            seen.set()
        return value

    with PeakMemory(0.001, measure) as memory:
        assert seen.wait(10)
    assert memory.peak_bytes == 9
    assert not any(thread.name == "peak-memory" for thread in threading.enumerate())


def test_memory_that_was_given_back_counts() -> None:
    before = anonymous_bytes()
    with PeakMemory(60) as memory:
        taken = np.ones(256 * MIB, np.uint8)
        memory.sample()
        del taken
    assert memory.peak_bytes - before > 252 * MIB
    assert anonymous_bytes() - before < 32 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RssAnon")
def test_a_mapped_file_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * 64 * MIB)
    before = anonymous_bytes()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[i] for i in range(0, len(mapped), 4096)) > 0
        assert anonymous_bytes() - before < 16 * MIB
