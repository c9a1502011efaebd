"""Norm, MLP, rotary positions far out, and local attention against a dense masked one."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.layers import MLP, LocalAttention, RMSNorm, Rotary, merge_heads, rotate, split_heads

FAR = [0, 1, 2**20 - 1, 2**20, 2**20 + 7, 2**24 - 1, 2**24, 2**24 + 1]
TURN = Fraction(Decimal("6.283185307179586476925286766559005768394338798750211641949889"))


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


# --- rotary positions ---------------------------------------------------------------------------


@pytest.mark.parametrize("position", FAR)
def test_angles_are_right_far_out(position: int) -> None:
    """Against angles reduced in exact rational arithmetic; float32 angles would be off by 0.09."""
    getcontext().prec = 60
    rotary = Rotary(16, 10000.0)
    cos, sin = rotary.table(torch.tensor(position), torch.float64)
    for i in range(8):
        frequency = Decimal(10000) ** (Decimal(-2 * i) / Decimal(16))
        angle = float(Fraction(frequency) * position % TURN)
        assert abs(float(cos[i]) - math.cos(angle)) < 2e-8
        assert abs(float(sin[8 + i]) - math.sin(angle)) < 2e-8
    assert torch.equal(cos[8:], cos[:8])
    assert torch.equal(sin[8:], -sin[:8])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_the_table_is_cast_only_at_the_end(dtype: torch.dtype) -> None:
    rotary = Rotary(32, 10000.0)
    places = torch.tensor(FAR, dtype=dtype)
    exact = rotary.table(places, torch.float64)
    assert exact[0].shape == (len(FAR), 32)
    for narrow, wide in zip(rotary.table(places, torch.float32), exact, strict=True):
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, wide.float())


@pytest.mark.parametrize("start", [2**20, 2**24])
def test_scores_depend_on_the_distance_alone(start: int) -> None:
    """In float32, as the models run: a million places further on the scores are the same."""
    rotary = Rotary(64, 10000.0)
    q, k = normal(0, 40, 64, dtype=torch.float32), normal(1, 40, 64, dtype=torch.float32)
    places = torch.arange(40)

    def scores(first: int) -> Tensor:
        table = rotary.table(places + first, torch.float32)
        return rotate(q, table) @ rotate(k, table).T / 8

    assert gap(scores(start), scores(0)) < 3e-6
    apart = rotate(q, rotary.table(places + start, torch.float32)) @ rotate(
        k, rotary.table(torch.zeros(40, dtype=torch.int64), torch.float32)
    ).T  # fmt: skip
    dense = rotate(q.double(), rotary.table(places + start, torch.float64)) @ k.double().T
    assert gap(apart.double(), dense) < 3e-5


@settings(max_examples=50, deadline=None)
@given(
    first=st.integers(-(2**24), 2**24),
    second=st.integers(-(2**24), 2**24),
    half=st.integers(1, 16),
    seed=st.integers(0, 2**31),
)
def test_rotations_compose(first: int, second: int, half: int, seed: int) -> None:
    rotary = Rotary(2 * half, 10000.0)
    x = normal(seed, 3, 2 * half)
    tables = [rotary.table(torch.tensor(p), torch.float64) for p in (first, second, first + second)]
    assert gap(rotate(rotate(x, tables[0]), tables[1]), rotate(x, tables[2])) < 1e-7
    assert gap(rotate(x, tables[0]).norm(dim=-1), x.norm(dim=-1)) < 1e-12


def test_rotation_is_by_complex_numbers_and_rests_at_zero() -> None:
    x = normal(0, 5, 8)
    rotary = Rotary(8, 100.0)
    angle = 3.0 * 100.0 ** -(torch.arange(4, dtype=torch.float64) / 4)
    z = torch.complex(x[:, :4], x[:, 4:]) * torch.polar(torch.ones_like(angle), angle)
    turned = rotate(x, rotary.table(torch.tensor(3), torch.float64))
    assert gap(turned, torch.cat((z.real, z.imag), dim=-1)) < 1e-12
    assert torch.equal(rotate(x, rotary.table(torch.tensor(0), torch.float64)), x)


# --- local attention ----------------------------------------------------------------------------


def dense_local(layer: LocalAttention, x: Tensor, rotary: Rotary) -> Tensor:
    """One masked softmax over absolute places; landmark places are masked as keys."""
    batch, blocks, stride, width = x.shape
    length, dim, heads = blocks * stride, width // layer.heads, layer.heads
    place = torch.arange(length)
    q, k, v = (
        (x.reshape(batch, length, width) @ w.T).view(batch, length, heads, dim).transpose(1, 2)
        for w in layer.qkv.weight.split(width)
    )
    angle = place[:, None] * rotary.frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(t[..., : dim // 2], t[..., dim // 2 :]) * turn for t in (q, k))
    scores = (q @ k.conj().transpose(2, 3)).real / math.sqrt(dim)
    back = place[:, None] - place
    seen = (back >= 0) & (back < layer.window_blocks * stride) & (place % stride != stride - 1)
    weights = torch.where(seen, scores, -math.inf).softmax(dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, blocks, stride, width)
    return out @ layer.out.weight.T


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 2),
    blocks=st.integers(1, 6),
    size=st.integers(1, 5),
    window=st.integers(1, 4),
    heads=st.integers(1, 2),
)
def test_local_attention_is_a_dense_one_behind_a_mask(
    seed: int, batch: int, blocks: int, size: int, window: int, heads: int
) -> None:
    torch.manual_seed(seed)
    layer = LocalAttention(4 * heads, heads, window).double()
    rotary = Rotary(4, 10000.0)
    x = normal(seed, batch, blocks, size + 1, 4 * heads).requires_grad_()
    mine, theirs = dense_local(layer, x, rotary), layer(x, rotary)
    assert gap(theirs, mine) < 1e-9
    inputs = (x, *layer.parameters())
    expected = torch.autograd.grad(mine.square().sum(), inputs)
    for a, b in zip(torch.autograd.grad(theirs.square().sum(), inputs), expected, strict=True):
        assert gap(a, b) < 1e-9


def test_local_attention_reaches_as_far_from_every_place() -> None:
    """A byte is seen by exactly those that are less than window_blocks * P places behind it."""
    torch.manual_seed(0)
    layer = LocalAttention(8, 2, 2).double()
    rotary = Rotary(4, 10000.0)
    x = normal(0, 1, 6, 5, 8)
    before = layer(x, rotary).flatten(1, 2)
    for place in range(30):
        changed = x.clone()
        changed[0, place // 5, place % 5] += 1.0
        moved = (layer(changed, rotary).flatten(1, 2) - before).abs().amax(-1)[0] > 1e-12
        last = place + 1 if place % 5 == 4 else min(30, place + 10)  # a landmark is seen by none
        expected = set(range(place, last))
        assert set(moved.nonzero().flatten().tolist()) == expected


# --- the rest -----------------------------------------------------------------------------------


def test_heads_split_and_merge() -> None:
    x = normal(0, 2, 3, 5, 12)
    split = split_heads(x, 3)
    assert split.shape == (2, 3, 3, 5, 4)
    assert torch.equal(split[:, 1], x[..., 4:8])
    assert torch.equal(merge_heads(split), x)


def test_norm_and_mlp() -> None:
    x = 5 * normal(0, 2, 6)
    norm = RMSNorm(6).double()
    torch.nn.init.normal_(norm.gain)
    root = (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert gap(norm(x), x / root * norm.gain) < 1e-12
    mlp = MLP(6, 10).double()
    up = x @ mlp.up.weight.T
    gelu = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    assert gap(mlp(x), gelu @ mlp.down.weight.T) < 1e-12


@pytest.mark.slow
def test_compiled_by_two_threads_the_gradient_is_the_same() -> None:
    """Of unfold's gradient torch 2.13 compiles stores outside its memory."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    attention = LocalAttention(128, 2, 2)
    rotary = Rotary(64, 10_000.0)
    x = torch.randn(8, 8, 33, 128)

    def gradient(module: Callable[..., Tensor]) -> Tensor:
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            module(x, rotary).float().square().sum().backward()
        assert attention.qkv.weight.grad is not None
        return attention.qkv.weight.grad.clone()

    torch.set_num_threads(2)
    try:
        wanted = gradient(attention)
        found = gradient(torch.compile(attention, dynamic=False))
    finally:
        torch.set_num_threads(threads)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
