"""Blocks in fewer bits: off by half a step at most, verified like the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import BlockSpec, Plane
from kvstore.codec import Codec
from kvstore.config import StoreConfig
from kvstore.errors import CorruptBlockError
from kvstore.mixed_codec import MixedCodec
from kvstore.quantize import Quantizer
from kvstore.store import Store

FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def raw_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1).numpy()


def back(raw: np.ndarray, plane: Plane) -> torch.Tensor:
    return torch.from_numpy(raw.copy()).view(plane.dtype).view(len(raw), *plane.shape)


def restored(spec: BlockSpec, bits: int, planes: list[torch.Tensor]) -> list[torch.Tensor]:
    quantizer = Quantizer(spec, bits)
    made = quantizer.quantize([raw_of(plane) for plane in planes])
    for plane, raw in zip(quantizer.spec.planes, made, strict=True):
        assert raw.shape == (len(planes[0]), plane.nbytes)
        assert raw.dtype == np.uint8
    out = [np.zeros((len(planes[0]), plane.nbytes), np.uint8) for plane in spec.planes]
    quantizer.restore(made, out, slice(None))
    return [back(raw, plane) for raw, plane in zip(out, spec.planes, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(FLOATS),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 7)),
    scale=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 300.0, 6e4, 1e37]),
    shift=st.sampled_from([0.0, 1.0, -1000.0]),
    seed=st.integers(0, 2**31),
)
def test_a_number_is_off_by_half_a_step(bits, dtype, shape, scale, shift, seed):
    spec = BlockSpec((Plane("keys", shape, dtype), Plane("values", shape, dtype)))
    generator = torch.Generator().manual_seed(seed)
    most = min(torch.finfo(dtype).max, torch.finfo(torch.bfloat16).max) / 4
    planes = [
        (torch.randn(3, *shape, generator=generator, dtype=torch.float64) * scale + shift)
        .clamp(-most, most)
        .to(dtype)
        for _ in range(2)
    ]
    for axis, before, after in zip((1, 3), planes, restored(spec, bits, planes), strict=True):
        assert after.isfinite().all()
        x, y = before.double(), after.double()
        span = x.amax(axis, keepdim=True) - x.amin(axis, keepdim=True)
        # The low end and the step are bfloat16, rounded outwards.
        ends = x.abs().amax(axis, keepdim=True) / 128
        step = (span + 2 * ends) / (2**bits - 1) * (1 + 2**-6)
        rounding = y.abs() * max(torch.finfo(dtype).eps, 2**-23) + 1e-37
        assert ((x - y).abs() <= step / 2 + rounding + ends * 1e-3).all()


def test_what_shares_a_range():
    """A channel of keys over the tokens, a token of values over its channels."""
    spec = BlockSpec.kv(16, 8, torch.float32)
    x = torch.rand(1, 16, 8)
    keys, values = x.clone(), x.clone()
    keys[..., 3] *= 1000
    values[:, 5] *= 1000
    for axis, before, after in zip(
        (2, 1), (keys, values), restored(spec, 8, [keys, values]), strict=True
    ):
        error = (before - after).abs().amax(dim=[d for d in (1, 2) if d != axis])[0]
        assert (error < 0.01).sum() == len(error) - 1
    one, two = Quantizer(spec, 8).spec, Quantizer(spec, 4).spec
    assert [p.nbytes for p in one.planes] == [128, 16, 16, 128, 32, 32]
    assert [p.nbytes for p in two.planes] == [64, 16, 16, 64, 32, 32]


def test_other_planes_stay_as_they_are():
    spec = BlockSpec((Plane("keys", (3, 5), torch.bfloat16), Plane("marks", (3,), torch.int64)))
    planes = [torch.randn(4, 3, 5).bfloat16(), torch.randint(-(2**60), 2**60, (4, 3))]
    keys, marks = restored(spec, 4, planes)
    assert torch.equal(marks, planes[1])
    assert not torch.equal(keys, planes[0])


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_frames_of_every_precision_in_one_batch(precision):
    spec = BlockSpec.kv(8, 16)
    ids = np.arange(40)
    planes = [torch.randn(40, 8, 16).bfloat16() for _ in range(2)]
    planes[0][7, 3, 3] = torch.nan
    planes[1][9, 0, 0] = torch.inf
    raw = [raw_of(plane) for plane in planes]
    lossy, exact = MixedCodec(spec, precision), MixedCodec(spec)
    frames = lossy.encode(ids, raw)
    frames[20:30] = exact.encode(ids[20:30], [plane[20:30] for plane in raw])
    same = np.zeros(40, bool)
    same[[7, 9, *range(20, 30)]] = True  # what is not finite is kept exactly
    rows = np.random.default_rng(0).permutation(50)[:40]
    out = [np.zeros((50, plane.nbytes), np.uint8) for plane in spec.planes]
    exact.decode(ids, frames, out, rows)
    exact.verify(ids, frames)
    found = np.all([(o[rows] == r).all(axis=1) for o, r in zip(out, raw, strict=True)], axis=0)
    assert found.tolist() == same.tolist()
    want = restored(spec, int(precision[3:]), [plane[:5] for plane in planes])
    for o, plane, tensor in zip(out, spec.planes, want, strict=True):
        assert torch.equal(back(o[rows[:5]], plane), tensor)
    # A lossy frame is bound to its block and its bytes as others are.
    for damage in (lambda f: f[:-1], lambda f: f[:60] + bytes([f[60] ^ 1]) + f[61:]):
        with pytest.raises(CorruptBlockError, match="block 3 is damaged") as caught:
            exact.decode(ids, [*frames[:3], damage(frames[3]), *frames[4:]], out, rows)
        assert caught.value.block == 3
        with pytest.raises(CorruptBlockError, match="block 3 is damaged"):
            exact.verify(ids, [*frames[:3], damage(frames[3]), *frames[4:]])
    with pytest.raises(CorruptBlockError, match="holds the frame of block 4"):
        exact.decode(ids[:5], [*frames[:3], frames[4], frames[4]], out, rows[:5])
    other = Codec(BlockSpec.kv(8, 8)).encode(ids[:1], [r[:1, :128] for r in raw])
    with pytest.raises(CorruptBlockError, match="not of the planes"):
        exact.decode(ids[:1], other, out, rows[:1])


def test_a_lossy_store_is_read_by_any(tmp_path):
    spec = BlockSpec.kv(32, 64)
    planes = [torch.randn(300, 32, 64).bfloat16() for _ in range(2)]
    config = {"hot": "128KiB", "warm": "256KiB", "cold": "64MiB", "device": "cpu"}
    used = {}
    for precision in ("exact", "int8", "int4"):
        directory = tmp_path / precision
        with Store(spec, StoreConfig(directory=directory, precision=precision, **config)) as store:
            ids = store.put(planes)
            store.flush()
            used[precision] = store.usage()["cold"].used_bytes
        with Store(spec, StoreConfig(directory=directory, **config)) as store:
            assert store.verify() == {}
            for before, after in zip(planes, store.fetch(ids), strict=True):
                error = ((before - after).float().norm() / before.float().norm()).item()
                assert error <= {"exact": 0, "int8": 0.012, "int4": 0.2}[precision]
                assert (error > 0) == (precision != "exact")
            store.check()
    assert used["int8"] < 0.85 * used["exact"]
    assert used["int4"] < 0.6 * used["exact"]
    with pytest.raises(ValueError, match="precision: 'int2' is not known"):
        StoreConfig(precision="int2")
