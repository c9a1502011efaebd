"""These models are tiny: one thread is fastest, and never waits for a busy core."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.corpus import Corpus

torch.set_num_threads(1)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "one.txt").write_bytes(b"Call me Ishmael. " * 400)
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(b"It was the best of times. " * 900))
    (tmp_path / "kept.out.txt").write_bytes(b"never")
    (tmp_path / "notes.md").write_bytes(b"not a text")
    return Corpus(tmp_path, leave_out=("kept",))


@pytest.fixture
def corpus_of(tmp_path: Path) -> Callable[..., Corpus]:
    """Make a corpus of these texts."""

    def made(*texts: bytes) -> Corpus:
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_bytes(text)
        return Corpus(tmp_path)

    return made
