"""A small model with random weights, and a way to run command lines within the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from kvstore.cli.main import main
from model import checkpoint
from model.config import GCAConfig, LandmarkConfig
from model.families import family_of

BLOCK_BYTES = 32 * 16 * 2 * 2
"""Keys and values of a block of the model below, bfloat16."""


class Ran(NamedTuple):
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def figures(self) -> dict[str, Any]:
        """The JSON on the last line."""
        figures: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return figures


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of models that have learned nothing; their blocks are equally large."""
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    configs = (
        LandmarkConfig(
            width=32, heads=2, layers="lr", mlp_width=32, block_size=32, near=1, top_k=1
        ),
        GCAConfig(
            width=16,
            heads=1,
            lower=1,
            mlp_width=32,
            block_size=32,
            landmark_dim=8,
            top_k=2,
            buckets=64,
        ),
    )
    paths = {}
    for config in configs:
        paths[config.family] = place / f"{config.family}.safetensors"
        checkpoint.save(family_of(config).network(config), paths[config.family], {})
    return paths


@pytest.fixture(scope="session")
def weights(families: dict[str, Path]) -> Path:
    """A checkpoint of a model that has learned nothing."""
    return families["landmark"]


@pytest.fixture
def kvstore(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `kvstore` with these arguments in this process."""

    def run(*argv: object) -> Ran:
        code = main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary stores go; it must be empty in the end."""
    import tempfile

    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place
