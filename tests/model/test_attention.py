"""block_attention against plain full attention and against its own definition, pair by pair."""

from __future__ import annotations

import copy
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model import attention
from model.attention import (
    FEW,
    block_attention,
    landmark_attention,
    weighed_attention,
    window_attention,
)
from model.layers import Rotary, rotate

shapes = st.fixed_dictionaries(
    {
        "streams": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "pairs": st.integers(1, 5),
        "rows": st.integers(1, FEW + 2),
        "size": st.integers(1, 5),
        "dim": st.integers(1, 6),
        "out": st.integers(0, 6),  # 0: as many as dim
        "tail": st.integers(1, 4),
        "seed": st.integers(0, 2**31),
    }
)
tiles = st.sampled_from([1, attention._TILE_BYTES])  # a group, or all of such a few


class Case:
    """Random inputs, float64: every group's blocks lie at random slots of one slab."""

    def __init__(
        self,
        streams: int = 2,
        groups: int = 3,
        pairs: int = 4,
        rows: int = 2,
        size: int = 3,
        dim: int = 4,
        out: int = 0,
        tail: int = 3,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.q = normal(streams, groups, rows, dim)
        self.keys = normal(streams * groups * pairs + 3, size, dim)
        out = out or dim
        self.values = normal(streams * groups * pairs + 3, size, out)
        order = torch.randperm(len(self.keys), generator=generator)
        self.slots = order[: streams * groups * pairs].view(streams, groups, pairs)
        self.gate = normal(streams, groups, pairs, rows)
        self.k, self.v = normal(streams, groups, tail, dim), normal(streams, groups, tail, out)
        self.seen = torch.rand(groups, rows, tail, generator=generator) < 0.6
        self.seen[..., 0] = True
        self.local = window_attention(self.scaled, self.k, self.v, self.seen)

    @property
    def scaled(self) -> Tensor:
        return self.q * self.q.shape[-1] ** -0.5

    def run(self, gate: Tensor | None, slots: Tensor | None = None) -> tuple[Tensor, ...]:
        slots = self.slots if slots is None else slots
        q = self.scaled[:, :, None]
        return block_attention(q, self.keys, self.values, slots, gate, self.local)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max()) if a.numel() else 0.0


def by_definition(
    case: Case, q: Tensor, slots: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """One pair at a time, with plain exponentials; q [S, G, M, R, D] not scaled."""
    streams, groups, rows, dim = case.q.shape
    pairs = slots.shape[-1]
    out = torch.zeros(streams, groups, rows, case.values.shape[-1], dtype=torch.float64)
    lse = torch.zeros(streams, groups, rows, dtype=torch.float64)
    weights = torch.zeros(streams, groups, pairs, rows, dtype=torch.float64)
    for s, g, r in torch.cartesian_prod(*(torch.arange(n) for n in case.q.shape[:3])).tolist():
        total, sum_ = 0.0, torch.zeros(case.values.shape[-1], dtype=torch.float64)
        for j in range(case.k.shape[2]):
            if case.seen[g, r, j]:
                e = math.exp(float(case.q[s, g, r] @ case.k[s, g, j]) / math.sqrt(dim))
                total, sum_ = total + e, sum_ + e * case.v[s, g, j]
        for m in range(pairs):
            slot = int(slots[s, g, m])
            if slot < 0:
                continue
            inside = torch.exp(case.keys[slot] @ q[s, g, m, r] / math.sqrt(dim))
            e = float(inside.sum()) if gate is None else math.exp(float(gate[s, g, m, r]))
            weights[s, g, m, r] = e
            total, sum_ = total + e, sum_ + e * (inside / inside.sum()) @ case.values[slot]
        out[s, g, r], lse[s, g, r] = sum_ / total, math.log(total)
        weights[s, g, :, r] /= total
    return out, lse, weights


@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_with_every_block_and_no_gate_it_is_full_attention(shape: dict[str, int]) -> None:
    case = Case(**shape)
    _, groups, pairs = case.slots.shape
    out, lse, _ = case.run(None)
    k = torch.cat((case.keys[case.slots].flatten(2, 3), case.k), dim=2)
    v = torch.cat((case.values[case.slots].flatten(2, 3), case.v), dim=2)
    past = torch.ones(groups, shape["rows"], pairs * shape["size"], dtype=torch.bool)
    mask = torch.cat((past, case.seen), dim=-1)
    assert gap(out, scaled_dot_product_attention(case.q, k, v, mask)) < 1e-12
    scores = (case.scaled @ k.transpose(2, 3)).masked_fill(~mask, -math.inf)
    assert gap(lse, scores.exp().sum(-1).log()) < 1e-12


@settings(max_examples=40, deadline=None)
@given(shape=shapes, gated=st.booleans(), holes=st.floats(0, 1), tile=tiles)
def test_it_follows_its_definition(
    shape: dict[str, int], gated: bool, holes: float, tile: int
) -> None:
    """With a gate or none, queries placed apart for each pair, and absent blocks anywhere."""
    case = Case(**shape)
    generator = torch.Generator().manual_seed(shape["seed"])
    gone = torch.rand(case.slots.shape, generator=generator) < holes
    slots = case.slots.masked_fill(gone, -1)
    placed = torch.randn(*slots.shape, *case.q.shape[-2:], generator=generator).double()
    gate = case.gate if gated else None
    scaled = placed * case.q.shape[-1] ** -0.5
    with patch.object(attention, "_TILE_BYTES", tile):
        got = block_attention(scaled, case.keys, case.values, slots, gate, case.local)
    for mine, theirs in zip(by_definition(case, placed, slots, gate), got, strict=True):
        assert gap(mine, theirs) < 1e-12


def test_many_groups_are_attended_to_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(groups=7)
    whole = case.run(case.gate)
    seen = []
    attend = attention._attend_part

    def spy(q: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(q.shape[1])
        return attend(q, *others)

    monkeypatch.setattr(attention, "_attend_part", spy)
    one = 2 * 4 * 3 * 4 * 8  # streams, blocks, tokens, numbers of a token, bytes of a number
    for groups, parts in ((1, [1] * 7), (3, [3, 3, 1]), (7, [7])):
        monkeypatch.setattr(attention, "_TILE_BYTES", groups * one)
        seen.clear()
        for mine, theirs in zip(case.run(case.gate), whole, strict=True):
            assert gap(mine, theirs) < 1e-12
        assert seen == parts


def test_slots_may_lie_in_any_order_in_memory() -> None:
    case = Case()
    slots = case.slots.clone()
    slots[:, 1, 2] = -1
    turned = slots.transpose(0, 2).contiguous().transpose(0, 2)
    assert not turned.is_contiguous()
    for mine, theirs in zip(case.run(None, turned), case.run(None, slots), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("wrong", ["q", "gate", "out", "lse"])
def test_more_groups_than_there_are_slots_for_are_refused(wrong: str) -> None:
    case, large = Case(groups=2), Case(groups=3)
    given = {"q": case.scaled[:, :, None], "gate": case.gate}
    given |= {"out": case.local[0], "lse": case.local[1]}
    given[wrong] = {
        "q": large.scaled[:, :, None],
        "gate": large.gate,
        "out": large.local[0],
        "lse": large.local[1],
    }[wrong]
    with pytest.raises(ValueError, match=r"a tensor of shape \(2, 3, .* belongs"):
        block_attention(
            given["q"],
            case.keys,
            case.values,
            case.slots,
            given["gate"],
            (given["out"], given["lse"]),
        )


def test_dtypes_may_differ() -> None:
    case = Case(rows=FEW + 1, dim=4)
    places = Rotary(4, 100.0).table(7 * torch.arange(4), torch.float32)
    marks = torch.randn(*case.slots.shape, 4, generator=torch.Generator().manual_seed(1))

    def attend(q: Tensor, landmarks: Tensor) -> tuple[Tensor, ...]:
        return landmark_attention(
            q, places, landmarks, case.keys.float(), case.values.float(), case.slots, case.local
        )

    low = case.scaled.bfloat16()
    truth = attend(low.double(), marks.double())
    for got in (attend(low, marks.double()), attend(low.double(), marks)):
        for mine, theirs in zip(got, truth, strict=True):
            assert gap(mine.double(), theirs) < 1e-6


def test_landmark_gate_gives_the_grouped_softmax() -> None:
    """o = [sum_L e^s v + sum_b e^(q landmark) softmax_b(s) V_b] / [sum_L e^s + sum_b e^(...)]."""
    case = Case()
    marks = torch.randn(len(case.keys), 4, generator=torch.Generator().manual_seed(3)).double()
    gate = torch.einsum("sgrd,sgmd->sgmr", case.scaled, marks[case.slots])
    out, lse, weights = case.run(gate)
    s = (case.scaled @ case.k.transpose(2, 3)).exp() * case.seen
    inner = torch.einsum("sgrd,sgmjd->sgmrj", case.scaled, case.keys[case.slots]).exp()
    inner = inner / inner.sum(-1, keepdim=True)
    z = s.sum(-1) + gate.exp().sum(2)
    over = s @ case.v + torch.einsum(
        "sgmr,sgmrj,sgmjd->sgrd", gate.exp(), inner, case.values[case.slots]
    )
    assert gap(out, over / z[..., None]) < 1e-12
    assert gap(lse, z.log()) < 1e-12
    assert gap(weights, gate.exp() / z[:, :, None]) < 1e-12


@pytest.mark.parametrize("gated", [False, True])
def test_weights_and_the_windows_weight_sum_to_one(gated: bool) -> None:
    case = Case()
    _, lse, weights = case.run(case.gate if gated else None)
    window = (case.local[1] - lse).exp()
    assert gap(weights.sum(2) + window, torch.ones_like(window)) < 1e-12
    assert (weights > 0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_absent_slots_are_ignored_whatever_the_slab_holds(gated: bool, junk: float) -> None:
    """A slot that was never filled may hold anything, also what is not a number."""
    case = Case()
    case.slots = torch.where(case.slots == 0, len(case.keys) - 1, case.slots)
    gate = case.gate if gated else None
    slots = case.slots.clone()
    slots[:, :, 1] = -1
    slots[0, 1] = -1
    expected = case.run(gate, slots)
    case.keys[0], case.values[0] = junk, junk
    got = case.run(gate, slots)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    assert (got[2][:, :, 1] == 0).all()
    assert torch.equal(got[0][0, 1], case.local[0][0, 1])
    assert gap(got[1][0, 1], case.local[1][0, 1]) < 1e-12


@pytest.mark.parametrize("gated", [False, True])
def test_without_blocks_the_window_is_left(gated: bool) -> None:
    case = Case()
    slots = case.slots[..., :0]
    out, lse, weights = case.run(case.gate[:, :, :0] if gated else None, slots)
    assert gap(out, case.local[0]) == 0
    assert gap(lse, case.local[1]) == 0
    assert weights.shape == (2, 3, 0, 2)


def test_parts_merge_by_their_log_sum_exp() -> None:
    """Attending to some blocks, and then to the rest with that as the window, is attending once."""
    case = Case(pairs=5)
    out, lse, _ = case.run(case.gate)
    q = case.scaled[:, :, None]
    some = case.run(case.gate[:, :, :2], case.slots[..., :2])
    again = block_attention(
        q, case.keys, case.values, case.slots[..., 2:], case.gate[:, :, 2:], some[:2]
    )
    assert gap(again[0], out) < 1e-12
    assert gap(again[1], lse) < 1e-12


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


class Compiled:
    """A case as the compiled kernel takes it, and the same numbers in float64."""

    def __init__(self, case: Case, dtype: torch.dtype, holes: float, window: bool, loud: float):
        generator = torch.Generator().manual_seed(case.q.shape[-1])
        gone = torch.rand(case.slots.shape, generator=generator) < holes
        if not window:  # each group needs a block then
            gone[..., 0] = False
        self.slots = case.slots.masked_fill(gone, -1)
        self.slab = case.keys.to(dtype), case.values.to(dtype)
        self.q, self.gate = case.scaled.float() * loud, case.gate.float() * loud
        self.window = window
        self.local = case.local[0].float(), case.local[1].float()
        dim = self.q.shape[-1]
        self.places = Rotary(dim, 100.0).table(7 * torch.arange(gone.shape[-1]), torch.float32)
        marks = torch.randn(*gone.shape, dim, generator=generator)
        self.landmarks = marks.masked_fill(gone[..., None], math.nan)  # there is none

    def in_float64(self) -> Compiled:
        twin = copy.copy(self)
        for name, held in vars(self).items():
            if isinstance(held, tuple):
                setattr(twin, name, tuple(t.double() for t in held))
            elif isinstance(held, Tensor) and held.is_floating_point():
                setattr(twin, name, held.double())
        return twin

    @property
    def placed(self) -> Tensor:
        """The queries at each block's place, [S, G, M, R, D]."""
        cos, sin = self.places
        return torch.stack([rotate(self.q, (cos[m], sin[m])) for m in range(len(cos))], dim=2)

    def attend(self, q: Tensor, gate: Tensor | None) -> tuple[Tensor, ...]:
        local = self.local if self.window else None
        return block_attention(q, *self.slab, self.slots, gate, local)

    def attend_by_landmarks(self) -> tuple[Tensor, ...]:
        local = self.local if self.window else None
        return landmark_attention(
            self.q, self.places, self.landmarks, *self.slab, self.slots, local
        )


def check(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], loudest: float) -> None:
    """Compare to float64 what float32 says of scores and gates as large as `loudest`."""
    largest = float(truth[0].abs().max())
    for mine, theirs, size in zip(got, truth, (1 + largest, 1 + loudest, 1), strict=True):
        assert mine.dtype == torch.float32
        assert theirs.dtype == torch.float64
        assert gap(mine.double(), theirs) < 1e-6 * (4 + loudest) * size


def loudest(*scores: Tensor | None) -> float:
    return max(float(s.nan_to_num().abs().max()) for s in scores if s is not None and s.numel())


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    rows=st.integers(1, FEW),
    wide=st.booleans(),
    dtype=dtypes,
    gated=st.booleans(),
    placed=st.booleans(),
    window=st.booleans(),
    holes=st.sampled_from([0.0, 0.4]),
    loud=st.sampled_from([1.0, 30.0, 1e4]),
)
def test_the_compiled_kernel_says_what_the_reference_says_in_float64(
    shape: dict[str, int],
    rows: int,
    wide: bool,
    dtype: torch.dtype,
    gated: bool,
    placed: bool,
    window: bool,
    holes: float,
    loud: float,
) -> None:
    """It keeps the queries in float32, whatever the blocks have."""
    shape = shape | {"rows": rows, "dim": 2 * shape["dim"]}
    if wide:  # more than a vector, and no whole number of them
        shape |= {"size": 13 * shape["size"], "dim": 14 * shape["dim"], "out": 17 * shape["out"]}
    mine = Compiled(Case(**shape), dtype, holes, window, loud)
    truly = mine.in_float64()
    truth = truly.attend(
        mine.placed.double() if placed else truly.q[:, :, None], truly.gate if gated else None
    )
    got = mine.attend(mine.placed if placed else mine.q[:, :, None], mine.gate if gated else None)
    scores = torch.einsum("sgrd,nbd->sgrnb", truly.q.abs(), truly.slab[0].abs())
    check(got, truth, loudest(scores, mine.gate if gated else None))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    rows=st.integers(1, FEW + 2),
    dtype=dtypes,
    window=st.booleans(),
    holes=st.sampled_from([0.0, 0.4]),
    tile=tiles,
)
def test_landmark_attention_places_the_queries_and_gates_by_the_landmarks(
    shape: dict[str, int], rows: int, dtype: torch.dtype, window: bool, holes: float, tile: int
) -> None:
    """Compiled, or not where there are many rows."""
    case = Case(**shape | {"rows": rows, "dim": 2 * shape["dim"]})
    mine = Compiled(case, dtype, holes, window, 1.0)
    truly = mine.in_float64()
    gate = torch.einsum("sgmrd,sgmd->sgmr", truly.placed, truly.landmarks)
    scores = torch.einsum("sgrd,nbd->sgrnb", truly.q.abs(), truly.slab[0].abs())
    truth = truly.attend(truly.placed, gate)
    with patch.object(attention, "_TILE_BYTES", tile):
        got = mine.attend_by_landmarks()
    check(got, truth, loudest(scores, gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
def test_the_compiled_kernel_ignores_what_lies_where_no_block_is(
    dtype: torch.dtype, gated: bool
) -> None:
    case = Case()
    case.slots = torch.where(case.slots == 0, len(case.keys) - 1, case.slots)
    case.slots[:, :, 1] = -1
    case.slots[0, 1] = -1
    mine = Compiled(case, dtype, 0.0, True, 1.0)
    gate = mine.gate if gated else None
    expected = mine.attend(mine.q[:, :, None], gate)
    for plane in mine.slab:
        plane[0] = math.nan
    got = mine.attend(mine.q[:, :, None], gate)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
    assert (got[2][:, :, 1] == 0).all()
    assert torch.equal(got[0][0, 1], mine.local[0][0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_number_of_a_dtype_is_read_right(dtype: torch.dtype) -> None:
    """A single token's value is the output: subnormal, infinite and huge ones too."""
    count = 2**16 if dtype.itemsize == 2 else 1
    bits = torch.arange(count).to(torch.int32).to(torch.int16)
    values = bits.view(dtype) if dtype.itemsize == 2 else torch.tensor([1e-40, math.inf, -3.5])
    values = values[values.isfinite()].view(1, 1, -1)
    slots, q = torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1, 1, 1)
    keys = torch.zeros(1, 1, 1, dtype=dtype)
    out, _, _ = block_attention(q, keys, values, slots, None, None)
    assert torch.equal(out.flatten(), values.float().flatten())
    loud = keys + 1
    out, lse, _ = block_attention(q, loud, loud * math.nan, slots, None, None)
    assert out.isnan().all()
    assert float(lse) == 1


def test_exponentials_are_as_good_as_float32() -> None:
    """The second of two tokens has the weight e^-x / (1 + e^-x), and its value is one."""
    x = torch.cat((torch.linspace(0, 2, 5000), torch.linspace(2, 80, 5000)))
    keys = torch.stack((torch.zeros_like(x), -x), dim=1)[..., None]  # [n, 2, 1]
    values = torch.tensor([0.0, 1.0]).expand(len(x), 2)[..., None].contiguous()
    slots = torch.arange(len(x)).view(-1, 1, 1)
    out, _, _ = block_attention(torch.ones(len(x), 1, 1, 1, 1), keys, values, slots, None, None)
    truth = torch.sigmoid(-x.double())
    assert (((out.flatten() - truth) / truth).abs() < (4 + x) * 2**-23).all()


@pytest.mark.parametrize("beyond", [23, 24, 2**62])
@pytest.mark.parametrize("rows", [1, FEW + 1])
def test_a_slot_beyond_the_slab_is_an_error(beyond: int, rows: int) -> None:
    case = Case(rows=rows)
    mine = Compiled(case, torch.bfloat16, 0.0, True, 1.0)
    mine.slots[1, 1, 1] = max(beyond, len(case.keys))
    with pytest.raises(IndexError):
        mine.attend(mine.q[:, :, None], None)


def test_tensors_that_do_not_belong_together_are_an_error() -> None:
    mine = Compiled(Case(), torch.bfloat16, 0.0, True, 1.0)
    q = mine.q[:, :, None]
    keys, values = mine.slab
    for wrong in (
        (q[:1], keys, values, mine.slots, None, None),
        (q[..., :2], keys, values, mine.slots, None, None),
        (mine.placed[:, :, :2], keys, values, mine.slots, None, None),
        (q, keys[:-1], values, mine.slots, None, None),
        (q, keys, values, mine.slots, mine.gate[:, :, :1], None),
        (q, keys, values, mine.slots, None, (mine.local[0][..., :1], mine.local[1])),
        (q, keys, values, mine.slots, None, (mine.local[0], mine.local[1][:1])),
    ):
        with pytest.raises(ValueError, match=r"shape|queries"):
            block_attention(*wrong)


def test_gradients_and_wide_numbers_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is asked where it is faster, and where it is right."""

    def refuse(*_: object) -> None:
        raise RuntimeError("asked")

    monkeypatch.setattr("model._native.attend", refuse)
    mine = Compiled(Case(), torch.bfloat16, 0.0, True, 1.0)
    q = mine.q[:, :, None]
    with pytest.raises(RuntimeError, match="asked"):
        mine.attend(q, None)
    with pytest.raises(RuntimeError, match="asked"):
        mine.attend_by_landmarks()
    mine.attend(q.double(), None)
    mine.attend(q.clone().requires_grad_(), None)[0].sum().backward()  # type: ignore[no-untyped-call]
    mine.gate.requires_grad_()
    mine.attend(q, mine.gate)[0].sum().backward()  # type: ignore[no-untyped-call]
    assert mine.gate.grad is not None
    with torch.no_grad(), pytest.raises(RuntimeError, match="asked"):
        mine.attend(q, mine.gate)


def test_infinite_gates_are_as_in_the_reference() -> None:
    """A block gated away says nothing; where all are and there is no window, nothing is known."""
    mine = Compiled(Case(), torch.bfloat16, 0.0, False, 1.0)
    mine.gate[:, :, 1] = -math.inf
    mine.gate[0, 0] = -math.inf
    got = mine.attend(mine.q[:, :, None], mine.gate)
    truly = mine.in_float64()
    truth = truly.attend(truly.q[:, :, None], truly.gate)
    for a, b in zip(got, truth, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())
        assert torch.allclose(a.double(), b, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("out", [4, 5])
@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_slab_may_be_narrower_than_the_queries(dtype: torch.dtype, rows: int, out: int) -> None:
    """The answer has the queries' dtype, and the precision of the blocks'."""
    case = Case(rows=rows, out=out)
    case.keys, case.values = case.keys.to(dtype), case.values.to(dtype)
    narrow = case.run(case.gate)
    case.keys, case.values = case.keys.double(), case.values.double()
    for a, b in zip(narrow, case.run(case.gate), strict=True):
        assert a.dtype == torch.float64
        assert gap(a, b) < 3 * torch.finfo(dtype).eps


def test_large_scores_do_not_overflow() -> None:
    case = Case()
    case.q, case.gate = case.q * 1e4, case.gate * 1e4
    case.local = window_attention(case.scaled, case.k, case.v, case.seen)
    for gate in (None, case.gate):
        for part in case.run(gate):
            assert part.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(shape=shapes)
def test_window_is_masked_attention(shape: dict[str, int]) -> None:
    case = Case(**shape)
    out, lse = window_attention(case.scaled, case.k, case.v, case.seen)
    mask = case.seen.expand(shape["streams"], -1, -1, -1)
    assert gap(out, scaled_dot_product_attention(case.q, case.k, case.v, mask)) < 1e-12
    scores = torch.einsum("sgrd,sgtd->sgrt", case.scaled, case.k)
    assert gap(lse, (scores.exp() * mask).sum(-1).log()) < 1e-12


@pytest.mark.parametrize("together", [False, True])
def test_a_chunk_without_weight_leaves_the_others_alone(together: bool) -> None:
    """However loud what lies in its place is."""
    torch.manual_seed(0)
    q, keys, values = torch.randn(1, 2, 3, 4), torch.randn(2, 10, 4), torch.randn(2, 10, 4)
    weights = torch.tensor([[1.0, 0.0]])
    alone, _ = weighed_attention(q, keys[:, :5], values[:, :5], weights[:, :1], together)
    keys[:, 5:] *= 1e4
    keys.requires_grad_()
    both, taken = weighed_attention(q, keys, values, weights, together)
    assert (both - alone).abs().max() < 1e-6
    assert (taken[..., 1] == 0).all()
    both.sum().backward()  # type: ignore[no-untyped-call]
    assert keys.grad is not None
    assert keys.grad.isfinite().all()
    assert keys.grad[:, :5].abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_give_the_same_bit_for_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, gate = normal(3, 5, 1, 2, 64) / 8, normal(3, 5, 6, 2)
    keys, values = (normal(90, 32, 64).to(dtype) for _ in "kv")
    slots = torch.randperm(90, generator=generator).view(3, 5, 6)
    slots[1, 2] = -1  # a group without blocks
    local = normal(3, 5, 2, 64), normal(3, 5, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = block_attention(q, keys, values, slots, gate, local)
        for count in (2, 4, 7, 40):
            torch.set_num_threads(count)
            for mine, theirs in zip(
                alone, block_attention(q, keys, values, slots, gate, local), strict=True
            ):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(threads)
