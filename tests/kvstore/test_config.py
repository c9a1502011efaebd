"""Settings: what is accepted, what it becomes, and that each mistake is named in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.config import IndexConfig, StoreConfig, format_size, parse_size
from kvstore.policy import LRU


@pytest.mark.parametrize(
    ("given_size", "nbytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("64MiB", 64 * 2**20),
        ("64 mib", 64 * 2**20),
        (" 1.5GiB ", 3 * 2**29),
        ("10MB", 10_000_000),
        ("0.1KiB", 102),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("9007199254740993KB", 9007199254740993000),  # more than a float holds
    ],
)
def test_sizes_are_read(given_size: int | str, nbytes: int) -> None:
    assert parse_size(given_size) == nbytes


@pytest.mark.parametrize(
    "size",
    [
        *("", "MiB", "64M", "64 M iB", "-1", "1e6", "1,5GiB", ".5GiB", "1.", "64PiB", "٣MiB"),
        *("nan", -1, 2**63, "9999999TiB", 1.5, None, True, b"64MiB"),
    ],
)
def test_what_is_no_size_is_named(size: object) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+ is not a size: [^\n]+$") as caught:
        parse_size(size)  # type: ignore[arg-type]
    assert repr(size) in str(caught.value)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1KiB"),
        (1536, "1.5KiB"),
        (2**20 - 1, "1MiB"),
        (64 * 2**20, "64MiB"),
        (2**60, "1048576TiB"),
    ],
)
def test_sizes_are_written(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text


@settings(deadline=None)
@given(st.integers(0, 2**62))
def test_a_written_size_reads_back_nearly(nbytes: int) -> None:
    # One decimal of a value of at least 1 is off by at most 0.05, and the fraction is cut.
    assert abs(parse_size(format_size(nbytes)) - nbytes) <= 0.05 * nbytes + 1


def test_defaults_are_whole_bytes_and_auto() -> None:
    config = StoreConfig()
    assert (config.hot, config.warm, config.cold) == (64 * 2**20, 256 * 2**20, 64 * 2**30)
    assert config.staging == 16 * 2**20
    assert (config.directory, config.trace) == (None, None)
    assert (config.device, config.policy, config.workers) == ("auto", "lru", 2)
    assert config.index == IndexConfig()


def test_given_values_are_converted_once(tmp_path: Path) -> None:
    config = StoreConfig(hot="1MiB", warm=5, cold=None, trace=str(tmp_path / "t"), policy=LRU)
    assert (config.hot, config.warm, config.cold) == (2**20, 5, None)
    assert config.trace == tmp_path / "t"
    assert StoreConfig(directory=str(tmp_path)).directory == tmp_path
    assert "hot=1048576" in repr(config)


def test_settings_are_values() -> None:
    config = StoreConfig(hot="2MiB")
    assert config == StoreConfig(hot=2 * 2**20)
    assert hash(config) == hash(StoreConfig(hot=2 * 2**20))
    assert config != StoreConfig()
    changed = dataclasses.replace(config, warm="3MiB")
    assert (changed.hot, changed.warm) == (2 * 2**20, 3 * 2**20)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hot = 1  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.index.m = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hot", 0),
        ("hot", "64M"),
        ("hot", None),
        ("warm", "0MiB"),
        ("cold", "none"),
        ("cold", 0),
        ("staging", 0),
        ("directory", ""),
        ("directory", 3),
        ("trace", b"t"),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("device", "cuda:x"),
        ("device", None),
        ("policy", "fifo"),
        ("policy", None),
        ("policy", 3),
        ("workers", 0),
        ("workers", 65),
        ("workers", 1.0),
        ("workers", True),
        ("index", "hnsw"),
    ],
)
def test_each_wrong_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: [^\n]+$"):
        StoreConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "flat"),
        ("m", 1),
        ("m", "16"),
        ("ef_construction", 0),
        ("ef_search", 0),
        ("segment", 0),
        ("seed", -1),
        ("sample", -1),
        ("sample", False),
    ],
)
def test_each_wrong_index_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: [^\n]+$"):
        IndexConfig(**{field: value})  # type: ignore[arg-type]


def test_a_directory_without_a_cold_tier_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cold is None"):
        StoreConfig(directory=tmp_path, cold=None)


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch, devices: int, current: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)


def test_devices_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cuda(monkeypatch, 0)
    assert StoreConfig(device="auto").torch_device == torch.device("cpu")
    assert StoreConfig(device="cpu").torch_device == torch.device("cpu")
    for device in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=r"^device: .* sees 0 CUDA devices"):
            StoreConfig(device=device)


def test_devices_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_cuda(monkeypatch, devices=2, current=1)
    assert StoreConfig(device="cpu").torch_device == torch.device("cpu")
    assert StoreConfig(device="auto").torch_device == torch.device("cuda:1")
    assert StoreConfig(device="cuda").torch_device == torch.device("cuda:1")
    assert StoreConfig(device="cuda:0").torch_device == torch.device("cuda:0")
    with pytest.raises(ValueError, match=r"^device: 'cuda:2' .* sees 2 CUDA devices"):
        StoreConfig(device="cuda:2")
