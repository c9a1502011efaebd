"""Checkpoints: what was saved comes back bit for bit; anything else is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model import checkpoint
from model.config import GCAConfig, LandmarkConfig
from model.gca_transformer import GroupedCrossTransformer
from model.landmark_transformer import LandmarkTransformer

SMALL = {"width": 16, "heads": 2, "layers": "lr", "mlp_width": 16, "block_size": 4, "segment": 2}


@pytest.fixture
def model() -> LandmarkTransformer:
    torch.manual_seed(0)
    return LandmarkTransformer(LandmarkConfig(**SMALL))  # type: ignore[arg-type]


@pytest.fixture
def path(model: LandmarkTransformer, tmp_path: Path) -> Path:
    path = tmp_path / "new" / "mine.safetensors"
    checkpoint.save(model, path, {"seed": 0, "corpus": ["a.txt"]})
    return path


def test_round_trip(model: LandmarkTransformer, path: Path) -> None:
    again = checkpoint.load(str(path))
    assert again.config == model.config
    assert not again.training
    for (name, a), (other, b) in zip(
        model.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
        assert not b.requires_grad
    text = torch.randint(0, 256, (1, 3, 4))
    assert torch.equal(model(text), again(text))


def test_weights_written_small_are_float32_when_loaded(
    model: LandmarkTransformer, tmp_path: Path
) -> None:
    path = tmp_path / "half.safetensors"
    checkpoint.save(model, path, {}, torch.float16)
    again = checkpoint.load(str(path))
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.half().float(), b)


def test_how_it_was_made_stands_in_the_header(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert json.loads(header["info"]) == {"seed": 0, "corpus": ["a.txt"]}
    assert json.loads(header["config"])["block_size"] == 4


def test_saving_leaves_nothing_else_behind_and_replaces(
    model: LandmarkTransformer, path: Path
) -> None:
    torch.nn.init.ones_(model.norm.gain)
    checkpoint.save(model, path, {})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert torch.equal(checkpoint.load(str(path)).norm.gain, model.norm.gain)


def test_a_shipped_name_is_found(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkpoint, "SHIPPED", path.parent)
    assert checkpoint.load("mine").config.width == 16
    with pytest.raises(ValueError, match=r"no model 'thine'.*\(mine\)"):
        checkpoint.load("thine")
    with pytest.raises(ValueError, match="no model"):
        checkpoint.load(str(tmp_path))


def test_unknown_names_say_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    with pytest.raises(ValueError, match=r"no model 'landmark'.*\(none\)"):
        checkpoint.load("landmark")


@pytest.mark.parametrize(
    "config", [LandmarkConfig(), GCAConfig()], ids=lambda config: config.family
)
def test_the_shipped_models_are_small_and_say_how_they_were_made(
    config: LandmarkConfig | GCAConfig,
) -> None:
    path = checkpoint.SHIPPED / f"{config.family}.safetensors"
    assert path.stat().st_size < 8_000_000
    assert checkpoint.load(config.family).config == config
    with safe_open(path, framework="pt") as file:
        info = json.loads(file.metadata()["info"])
    assert {"seed", "steps"} <= info.keys()
    assert not {"moby_dick.txt.gz", "great_expectations.txt.gz"} & set(info.get("corpus", ()))


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_truncated_files_are_refused(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    refuse(path)


def test_files_of_other_kinds_are_refused(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 not a checkpoint at all " * 9)
    refuse(path)
    save_file({"a": torch.zeros(2)}, path)  # safetensors of someone else
    refuse(path)


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        "null",
        "[]",
        "{}",
        json.dumps(SMALL | {"heads": 0}),
        json.dumps(SMALL | {"family": "mamba"}),
        json.dumps(SMALL | {"width": 32}),
        json.dumps(SMALL | {"width": "wide"}),
        json.dumps(SMALL | {"colour": 1}),
    ],
)
def test_configurations_that_do_not_fit_are_refused(path: Path, config: str) -> None:
    with safe_open(path, framework="pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(weights, path, metadata={"config": config, "info": "{}"})
    refuse(path)


def test_a_file_from_before_a_size_was_there_means_what_it_meant(tmp_path: Path) -> None:
    published = {"near": 0, "lag": 0, "softmax": "chunk"}
    config = GCAConfig(width=16, mlp_width=16, buckets=8, **published)  # type: ignore[arg-type]
    model = GroupedCrossTransformer(config)
    said = {name: size for name, size in config.to_dict().items() if name not in published}
    header = {"config": json.dumps(said), "info": "{}"}
    save_file(model.state_dict(), tmp_path / "old.safetensors", metadata=header)
    assert checkpoint.load(str(tmp_path / "old.safetensors")).config == config


def test_missing_weights_are_refused(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        weights = {key: file.get_tensor(key) for key in list(file.keys())[1:]}
    save_file(weights, path, metadata=header)
    refuse(path)


def refuse(path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint of a model of ours") as caught:
        checkpoint.load(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(model: LandmarkTransformer, path: Path) -> None:
    torch.nn.init.constant_(model.norm.gain, float("nan"))
    checkpoint.save(model, path, {})
    with pytest.raises(ValueError, match="it has weights that are not finite"):
        checkpoint.load(str(path))
