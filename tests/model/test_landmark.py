"""Landmark Attention against a dense float64 reading of its formulas that shares no code with it.

`formula` follows the paper's text row by row: one exponential a key, one sum, one quotient.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import LandmarkConfig
from model.landmark import LandmarkAttention, grouped_softmax_attention
from model.landmark_transformer import LandmarkTransformer
from model.layers import Rotary
from model.train_landmark import loss_of

NEAR = 1e-9


def turned(x: Tensor, place: int, base: float = 10000.0) -> Tensor:
    """Rotate one vector [D] to a place: its halves are real and imaginary parts."""
    half = len(x) // 2
    angle = place * base ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    z = torch.complex(x[:half], x[half:]) * torch.complex(angle.cos(), angle.sin())
    return torch.cat((z.real, z.imag))


def formula(
    q: Tensor,  # [N, P, D] at their places
    k: Tensor,  # [N, P, D] at their places
    others: list[list[tuple[list[Tensor], Tensor, Tensor, Tensor]]] | None = None,
    gating: float = 1.0,
) -> Tensor:  # [N, P, N * (P - 1) + X] weights of the tokens, then of other blocks' tokens
    """Z_i = sum of e^s over the own block + sum of e^(s landmark) over the past blocks.

    others: for each block of queries, further past blocks as ([query of each row], keys [P - 1, D],
    landmark [D], their first column). gating: a past block weighs e^(gating s landmark) times the
    sum of its own e^s to the rest of the power.
    """
    blocks, stride, dim = q.shape
    tokens = stride - 1
    columns = blocks * tokens + max(sum(len(o[1]) for o in own) for own in others or [[]])
    rows = []
    for own in range(blocks):
        for i in range(stride):
            weight: list[Tensor] = [q.new_zeros(())] * columns
            total = q.new_zeros(())
            for j in range(tokens):
                if j <= i:
                    weight[own * tokens + j] = torch.exp(q[own, i] @ k[own, j] / math.sqrt(dim))
                    total = total + weight[own * tokens + j]
            past = [(q[own, i], k[b, :tokens], k[b, tokens], b * tokens) for b in range(own)]
            if others:
                past += [(at[i], keys, mark, int(c)) for at, keys, mark, c in others[own]]
            for query, keys, mark, column in past:
                inside = [torch.exp(query @ key / math.sqrt(dim)) for key in keys]
                gate = torch.exp(gating * (query @ mark) / math.sqrt(dim))
                gate = gate * sum(inside) ** (1 - gating)
                for j in range(tokens):
                    weight[column + j] = gate * inside[j] / sum(inside)
                total = total + gate
            rows.append(torch.stack(weight) / total)
    return torch.stack(rows).view(blocks, stride, columns)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [..., N, P, D] each
    lead = q.shape[:-3]
    out = [
        formula(a, b) @ c[:, :-1].flatten(0, 1)
        for a, b, c in zip(q.flatten(0, -4), k.flatten(0, -4), v.flatten(0, -4), strict=True)
    ]
    return torch.stack(out).view(*lead, *q.shape[-3:-1], v.shape[-1])


def layer_by_formula(
    layer: LandmarkAttention,
    x: Tensor,
    distractors: int = 0,
    near: int = 4,
    gating: float = 1.0,
    passage: list[int] | None = None,
    apart: Tensor | None = None,
    asking: Tensor | None = None,
) -> Tensor:
    """The whole layer, from its two weight matrices."""
    passage = list(range(len(x))) if passage is None else passage
    batch, blocks, stride, width = x.shape
    heads, dim, tokens = layer.heads, width // layer.heads, stride - 1
    parts = [
        (x @ w.T).view(batch, blocks, stride, heads, dim).permute(0, 3, 1, 2, 4)
        for w in layer.qkv.weight.split(width)
    ]
    q, k, v = parts

    def placed(t: Tensor) -> Tensor:
        return torch.stack(
            [torch.stack([turned(t[n, p], n * stride + p) for p in range(stride)])
             for n in range(blocks)]
        )  # fmt: skip

    def in_block(t: Tensor) -> Tensor:
        return torch.stack([turned(t[p], p) for p in range(stride)])

    out = torch.zeros(batch, blocks, stride, width, dtype=x.dtype)
    for b in range(batch):
        for h in range(heads):
            others: list[list[tuple[list[Tensor], Tensor, Tensor, Tensor]]] = []
            values = [v[b, h, :, :tokens].flatten(0, 1).expand(blocks, -1, -1)]
            extra = []
            for n in range(blocks) if distractors else []:
                judges = [(n - 1, p) for p in range(stride)] if n else []
                if asking is not None:
                    judges += [(n, p) for p in range(tokens) if asking[b, n, p]]
                far = [turned(q[b, h, m, p], p + (near + 1) * stride) for m, p in judges]
                allowed = [o for o in range(batch) if o < b or passage[o] != passage[b]]
                pool = [(o, m) for o in allowed if o != b for m in range(blocks)]
                pool = [om for om in pool if judges and (apart is None or not apart[om])]
                score = {
                    om: max((row @ turned(k[om[0], h, om[1], -1], tokens)).item() for row in far)
                    for om in pool
                }
                best = sorted(sorted(pool, key=lambda om: -score[om])[:distractors])
                mine = []
                for rank, (o, m) in enumerate(best):
                    back = near + len(best) - rank
                    at = [turned(q[b, h, n, p], p + back * stride) for p in range(stride)]
                    keys = in_block(k[o, h, m])
                    column = torch.tensor((blocks + rank) * tokens)
                    mine.append((at, keys[:tokens], keys[tokens], column))
                others.append(mine)
                empty = torch.zeros((distractors - len(best)) * tokens, dim, dtype=x.dtype)
                extra.append(torch.cat([*(v[o, h, m, :tokens] for o, m in best), empty]))
            if distractors:
                values.append(torch.stack(extra))
            weight = formula(placed(q[b, h]), placed(k[b, h]), others or None, gating)
            given = weight.shape[-1]  # the rest are places for distractors that nobody took
            out[b, :, :, h * dim : (h + 1) * dim] = weight @ torch.cat(values, dim=1)[:, :given]
    return out @ layer.out.weight.T


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def gap(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).detach().abs().max())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lead=st.sampled_from([(1,), (2,), (1, 2)]),
    blocks=st.integers(1, 4),
    stride=st.integers(2, 5),
    half=st.integers(1, 4),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
)
def test_output_and_gradients_follow_the_formula(
    seed: int, lead: tuple[int, ...], blocks: int, stride: int, half: int, scale: float
) -> None:
    shape = (*lead, blocks, stride, 2 * half)
    q, k, v = (random(seed + i, *shape, scale=scale).requires_grad_() for i in range(3))
    up = random(seed + 3, *shape)
    mine, theirs = attended(q, k, v), grouped_softmax_attention(q, k, v)
    assert gap(theirs, mine) < NEAR
    expected = torch.autograd.grad((mine * up).sum(), (q, k, v))
    got = torch.autograd.grad((theirs * up).sum(), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        assert gap(a, b) < NEAR


def token_weights(q: Tensor, k: Tensor) -> Tensor:
    """Read the weights out of the attention: the values are the tokens' unit vectors."""
    blocks, stride, _ = q.shape
    units = torch.eye(blocks * (stride - 1), dtype=q.dtype).unflatten(0, (blocks, stride - 1))
    poison = torch.full((blocks, 1, units.shape[-1]), 1e6, dtype=q.dtype)
    return grouped_softmax_attention(q, k, torch.cat((units, poison), dim=1))


def test_weights_of_a_row_sum_to_one_and_keep_to_the_past() -> None:
    q, k = random(0, 4, 5, 6, scale=2.0), random(1, 4, 5, 6, scale=2.0)
    weights = token_weights(q, k)  # [N, P, N * tokens]
    assert gap(weights, formula(q, k)) < NEAR
    assert gap(weights.sum(-1), torch.ones(4, 5, dtype=torch.float64)) < 1e-12
    assert (weights >= 0).all()
    for block in range(4):
        for row in range(5):
            seen = block * 4 + min(row + 1, 4)
            assert (weights[block, row, :seen] > 0).all()
            assert (weights[block, row, seen:] == 0).all()


def test_a_block_weighs_what_its_landmark_says() -> None:
    q, k = random(2, 3, 4, 6), random(3, 3, 4, 6)
    before = token_weights(q, k).unflatten(-1, (3, 3))
    k[0, -1] += 3 * q[2, 1]
    after = token_weights(q, k).unflatten(-1, (3, 3))
    assert after[2, 1, 0].sum() > 1.5 * before[2, 1, 0].sum()
    inside = [w[2, 1, 0] / w[2, 1, 0].sum() for w in (before, after)]
    assert gap(*inside) < 1e-12  # inside the block nothing changes


def test_landmark_values_are_never_used() -> None:
    q, k, v = (random(i, 2, 3, 5, 4) for i in range(3))
    v.requires_grad_()
    out = grouped_softmax_attention(q, k, v)
    other = v.detach().clone()
    other[..., -1, :] = float("nan")
    assert torch.equal(out, grouped_softmax_attention(q, k, other))
    (slope,) = torch.autograd.grad(out.square().sum(), v)
    assert (slope[..., -1, :] == 0).all()
    assert (slope[..., :-1, :] != 0).all()


def test_a_landmark_row_does_not_see_its_own_landmark() -> None:
    q, k, v = (random(i, 3, 5, 4) for i in range(3))
    out = grouped_softmax_attention(q, k, v)
    k[1, -1] += 1.0
    moved = (grouped_softmax_attention(q, k, v) - out).abs().amax(-1)
    assert (moved[:2] == 0).all()
    assert (moved[2] > 0).all()


@pytest.mark.parametrize("gating", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("distractors", [0, 1, 3])
def test_layer_and_its_gradients_follow_the_formula(distractors: int, gating: float) -> None:
    torch.manual_seed(distractors)
    layer = LandmarkAttention(8, heads=2).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.4)
    rotary = Rotary(4, 10000.0)
    x = random(7, 3, 2, 4, 8).requires_grad_()
    up = random(8, 3, 2, 4, 8)
    inputs = (x, layer.qkv.weight, layer.out.weight)
    mine = layer_by_formula(layer, x, distractors, near=2, gating=gating)
    theirs = layer(x, rotary, distractors, near=2, gating=gating)
    assert gap(theirs, mine) < NEAR
    expected = torch.autograd.grad((mine * up).sum(), inputs)
    got = torch.autograd.grad((theirs * up).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        assert gap(a, b) < NEAR


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.sampled_from([(2, 3, 2), (3, 1, 3), (4, 2, 4)]),
    distractors=st.integers(0, 2),
    near=st.integers(1, 5),
)
def test_layer_over_shapes(
    seed: int, sizes: tuple[int, int, int], distractors: int, near: int
) -> None:
    batch, blocks, stride = sizes
    torch.manual_seed(seed)
    layer = LandmarkAttention(4, heads=1).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    x = random(seed, batch, blocks, stride, 4)
    expected = layer_by_formula(layer, x, distractors, near)
    assert gap(layer(x, Rotary(4, 10000.0), distractors, near), expected) < NEAR


@pytest.mark.parametrize("passage", [None, [0, 0, 1], [4, 4, 4], [0, 1, 0]])
def test_who_may_have_which_blocks(passage: list[int] | None) -> None:
    """None of those set apart; of its own passage only what comes before."""
    torch.manual_seed(0)
    layer = LandmarkAttention(8, heads=2).double()
    x = random(7, 3, 3, 4, 8)
    apart = torch.tensor([[True, False, False], [False, True, False], [False, False, True]])
    expected = layer_by_formula(layer, x, 2, near=2, passage=passage, apart=apart)
    numbers = None if passage is None else torch.tensor(passage)
    found = layer(x, Rotary(4, 10000.0), 2, near=2, passage=numbers, apart=apart)
    assert gap(found, expected) < NEAR
    assert gap(layer(x, Rotary(4, 10000.0), 2, near=2), expected) > 1e-3


def test_bytes_that_ask_choose_for_their_own_block() -> None:
    torch.manual_seed(0)
    layer = LandmarkAttention(8, heads=2).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    x = random(7, 3, 3, 4, 8)
    asking = torch.zeros(3, 3, 3, dtype=torch.bool)
    asking[0, 0, 1] = asking[1, 2, 0] = asking[2, 1] = True
    plain = layer(x, Rotary(4, 10000.0), 2, near=2)
    found = layer(x, Rotary(4, 10000.0), 2, near=2, asking=asking)
    assert gap(found, layer_by_formula(layer, x, 2, near=2, asking=asking)) < NEAR
    moved = (found - plain).abs().amax((-1, -2)) > 1e-6
    assert not moved[~asking.any(-1)].any()
    assert moved[0, 0]
    nobody = layer(x, Rotary(4, 10000.0), 2, near=2, asking=torch.zeros_like(asking))
    assert torch.equal(nobody, plain)


def test_no_byte_knows_a_later_one_of_its_passage() -> None:
    """Neither by attention nor by which blocks were chosen, in its own or an earlier sequence."""
    torch.manual_seed(0)
    layer = LandmarkAttention(8, heads=2).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.7)
    rotary, passage = Rotary(4, 10000.0), torch.tensor([0, 0, 0])
    x = random(7, 3, 5, 4, 8)
    before = layer(x, rotary, 3, near=2, passage=passage)
    for row in range(1, 60, 7):
        changed = x.clone().flatten(0, 2)
        changed[row:] = random(8, 60 - row, 8)
        after = layer(changed.view_as(x), rotary, 3, near=2, passage=passage)
        assert gap(after.flatten(0, 2)[:row], before.flatten(0, 2)[:row]) < NEAR
        assert gap(after.flatten(0, 2)[row:], before.flatten(0, 2)[row:]) > 1e-3


def test_without_gating_it_is_attention_over_all_tokens() -> None:
    q, k, v = (random(seed, 3, 5, 6) for seed in range(3))
    rows = torch.arange(15).view(3, 5)
    tokens = rows[:, :4].flatten()
    seen = tokens <= rows.flatten()[:, None]
    whole = torch.nn.functional.scaled_dot_product_attention(
        q.flatten(0, 1), k[:, :4].flatten(0, 1), v[:, :4].flatten(0, 1), seen
    )
    assert gap(grouped_softmax_attention(q, k, v, gating=0.0).flatten(0, 1), whole) < 1e-12


def test_a_new_model_looks_for_where_the_same_was_said() -> None:
    """Before any training, what comes next is what came next where the same bytes stood before."""
    torch.manual_seed(0)
    model = LandmarkTransformer(LandmarkConfig())
    text = torch.randint(0, 256, (8, 256))
    text[:, 128:192] = text[:, 32:96]
    logits = model(text.unflatten(1, (-1, 32)), gating=0.0).flatten(1, 2)
    scores = logits.gather(-1, text.roll(-1, 1)[..., None])[..., 0] - logits.mean(-1)
    assert scores[:, 132:191].mean() > 5 * scores[:, 4:127].mean().abs()


def test_nothing_is_said_of_the_future() -> None:
    """A byte changes what is said from it on; with distractors, which are chosen a block, from the
    beginning of its block on."""
    model = small().double()
    text = torch.randint(0, 256, (3, 4, 4))
    changed = text.clone()
    changed[1, 2, 1] ^= 1
    for distractors, first in ((0, 2 * 4 + 1), (2, 2 * 4)):
        before, after = model(text, distractors), model(changed, distractors)
        moved = (before[1] - after[1]).abs().amax(-1).flatten()
        assert (moved[:first] < 1e-12).all()
        assert (moved[2 * 4 + 1 :] > 1e-9).all()
    assert gap(model(text), model(text, 2)) > 1e-6  # they do compete


# --- the model around the layer -----------------------------------------------------------------


def small(**fields: object) -> LandmarkTransformer:
    torch.manual_seed(1)
    sizes: dict[str, object] = {"width": 16, "heads": 2, "mlp_width": 32, "block_size": 4,
                                "segment": 4, "layers": "lr"}  # fmt: skip
    return LandmarkTransformer(LandmarkConfig(**(sizes | fields)))  # type: ignore[arg-type]


def test_labels_skip_landmarks() -> None:
    model = small()
    text = torch.randint(0, 256, (2, 12))
    weight = torch.rand(2, 12)
    rows: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    inner = model.layers[-1].mlp
    last: list[Tensor] = []

    def keep(_: object, __: object, out: Tensor) -> None:
        out.retain_grad()
        last.append(out)

    inner.register_forward_hook(keep)
    loss = loss_of(model, text, weight, 0)
    loss.backward()
    hook.remove()
    assert rows[0].shape == (2, 3, 4, 16)  # no landmark's row reaches the head
    slope = last[0].grad
    assert slope is not None
    assert slope.shape == (2, 3, 5, 16)
    assert (slope[..., -1, :] == 0).all()
    assert (slope[:, :, :-1].abs().amax(-1).flatten(1)[:, :-1] > 0).all()
    assert (slope[:, -1, -2] == 0).all()  # the last byte has no successor


def test_loss_is_the_weighted_surprise_of_each_next_byte() -> None:
    """The last byte of a block predicts the first of the next block."""
    model = small()
    text = torch.randint(0, 256, (2, 12))
    weight = torch.rand(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(text.view(2, 3, 4)).float()
    total = norm = 0.0
    for b in range(2):
        for t in range(11):
            row = logits[b, t // 4, t % 4].double()
            nats = float(row.exp().sum().log() - row[text[b, t + 1]])
            total += nats * float(weight[b, t + 1])
            norm += float(weight[b, t + 1])
    assert abs(loss_of(model, text, weight, 0).item() - total / norm) < 1e-5


def test_each_block_is_closed_by_the_landmark_token() -> None:
    model = small()
    text = torch.randint(0, 256, (2, 3, 4))
    x = model.embed(text)
    assert x.shape == (2, 3, 5, 16)
    table = model.embedding.weight.view(model.config.reach, 257, 16)
    at = table[0, text[1, 2, 0]] + table[1, text[1, 1, 3]] + table[2, text[1, 1, 2]]
    assert torch.allclose(x[1, 2, 0], at + table[3, text[1, 1, 1]], atol=1e-5)
    first = table[0, text[0, 0, 0]] + table[1:, 256].sum(0)
    assert torch.allclose(x[0, 0, 0], first, atol=1e-5)
    assert torch.equal(x[1, 2, -1], model.embedding.weight[256])
    assert model(text).shape == (2, 3, 4, 256)
