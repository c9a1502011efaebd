"""Landmark Attention (Mohtashami & Jaggi 2023, arXiv 2305.16300): the retrieving layer.

A landmark token closes each block. A query reaches a past block only through its landmark: the
grouped softmax weighs the landmark against the query's own block, and that weight is spread over
the block by a softmax inside it. Owns the layer and its dense training form; the form that reads
from a store is in landmark_stream.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.layers import Rotary, merge_heads, rotate, split_heads


class LandmarkAttention(nn.Module):
    """One retrieving layer's projections; its past is blocks of keys, values and landmarks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., N, P, width] -> queries, keys, values [..., heads, N, P, D], not rotated."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return tuple(split_heads(t, self.heads) for t in (q, k, v))  # type: ignore[return-value]

    def forward(
        self,
        x: Tensor,  # [B, N, P, width]
        rotary: Rotary,
        distractors: int = 0,
        near: int = 4,
        gating: float | Tensor = 1.0,
        passage: Tensor | None = None,  # int64 [B]
        apart: Tensor | None = None,  # bool [B, N]
        asking: Tensor | None = None,  # bool [B, N, P - 1]
    ) -> Tensor:  # [B, N, P, width]
        """Attend over whole sequences with every past block, for training.

        distractors: at most that many blocks of *other* sequences of the batch join each block's
        past, placed where inference places far blocks (behind the `near` recent ones): those with
        the highest score at any query of the block before. Its own queries would choose with
        knowledge of the bytes that the first of them have to predict. A short training text has
        few blocks to be confused by; a million tokens have many, and these stand for them (the idea
        is the cross-batch training of Tworkowski et al. 2023, arXiv 2307.03170). The loss stays the
        language model's.
        passage: sequences with the same number are one text, in order; of these, each may have the
        blocks of those before it and so learns what far blocks are good for.
        apart: blocks that are not to be distractors, because nothing tells them from what a text
        has itself. asking: bytes that ask for what only their own text says; these may choose for
        the block they are in. gating: see grouped_softmax_attention.
        """
        q, k, v = self.project(x)
        others = None
        if distractors:
            others = _foreign_blocks(
                q, k, v, rotary, distractors, near, gating, passage, apart, asking
            )
        blocks, stride = x.shape[-3], x.shape[-2]
        place = torch.arange(blocks * stride, device=x.device).view(blocks, stride)
        table = rotary.table(place, q.dtype)
        out = grouped_softmax_attention(rotate(q, table), rotate(k, table), v, others, gating)
        return self.out(merge_heads(out))


def grouped_softmax_attention(
    q: Tensor,  # [..., N, P, D] rotated to their places
    k: Tensor,  # [..., N, P, D] rotated to their places; [..., P - 1, :] are the landmarks
    v: Tensor,  # [..., N, P, D]; the landmarks' values are not used
    others: tuple[Tensor, Tensor] | None = None,
    gating: float | Tensor = 1.0,
) -> Tensor:  # [..., N, P, D]
    """Attend over N blocks in the closed form of the grouped softmax.

    With s_ij = q_i k_j / sqrt(D), query i of block B and L_b = log sum_{j in b} exp(s_ij): a token
    j of its own block (j <= i) has the logit s_ij, a token j of a past block b has
    s_ij - L_b + s_i,landmark(b), and one softmax over all tokens gives the weights, which
    therefore sum to one.

    others: further tokens as (logits [..., N, P, X], values [..., N, X, D]).
    gating: what share of s_i,landmark(b) - L_b is added; at 0 the landmarks have no say and this is
    plain attention over all tokens.
    """
    blocks, stride, dim = q.shape[-3:]
    tokens = stride - 1
    scores = (q * dim**-0.5).flatten(-3, -2) @ k.flatten(-3, -2).transpose(-1, -2)
    scores = scores.unflatten(-1, (blocks, stride)).unflatten(-3, (blocks, stride))
    inside, landmark = scores[..., :tokens], scores[..., tokens]  # [..., N, P, N, tokens], [.., N]
    index = torch.arange(blocks, device=q.device)
    past = index[:, None] > index  # [N, N]
    gate = gating * (landmark - inside.logsumexp(dim=-1))  # [..., N, P, N]
    gate = gate.masked_fill(~past[:, None, :], 0.0)
    place = torch.arange(tokens, device=q.device)
    row = torch.arange(stride, device=q.device)
    seen = past[:, None, :, None] | (
        (index[:, None] == index)[:, None, :, None] & (place <= row[:, None])[None, :, None, :]
    )  # [N, P, N, tokens]
    logits = (inside + gate[..., None]).masked_fill(~seen, float("-inf")).flatten(-2)
    values = v[..., :tokens, :].flatten(-3, -2)  # [..., N * tokens, D]
    if others is None:
        weights = logits.softmax(dim=-1)
        return (weights.flatten(-3, -2) @ values).unflatten(-2, (blocks, stride))
    extra, extra_values = others
    weights = torch.cat((logits, extra), dim=-1).softmax(dim=-1)
    own, rest = weights.split((logits.shape[-1], extra.shape[-1]), dim=-1)
    out = (own.flatten(-3, -2) @ values).unflatten(-2, (blocks, stride))
    return out + rest @ extra_values


def _foreign_blocks(
    q: Tensor,  # [B, H, N, P, D] not rotated
    k: Tensor,
    v: Tensor,
    rotary: Rotary,
    count: int,
    near: int,
    gating: float | Tensor,
    passage: Tensor | None,
    apart: Tensor | None,
    asking: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Choose for each block up to `count` others by the queries of the block before, or asking.

    Returns their tokens' logits [B, H, N, P, count * tokens] and values [B, H, N, X, D].
    """
    batch, heads, blocks, stride, dim = q.shape
    tokens = stride - 1
    offsets = torch.arange(stride, device=q.device)
    pool_k = rotate(k, rotary.table(offsets, k.dtype)).transpose(0, 1).flatten(1, 2)
    pool_v = v[..., :tokens, :].transpose(0, 1).flatten(1, 2)  # [H, B * N, tokens, D]
    q = q * dim**-0.5
    with torch.no_grad():
        shared = rotate(q, rotary.table(offsets + (near + 1) * stride, q.dtype))
        scores = torch.einsum("bhnpd,hmd->bhnpm", shared, pool_k[:, :, tokens])
        before = F.pad(scores.amax(dim=-2)[:, :, :-1], (0, 0, 1, 0), value=float("-inf"))
        if asking is not None:
            own = scores[..., :tokens, :].masked_fill(~asking[:, None, ..., None], float("-inf"))
            before = torch.maximum(before, own.amax(dim=-2))
        sequence = torch.arange(batch, device=q.device)
        passage = sequence if passage is None else passage
        same = passage[:, None] == passage  # [B, B]
        earlier = same & (sequence[:, None] > sequence)
        barred = (same & ~earlier).repeat_interleave(blocks, dim=1)
        if apart is not None:
            barred = barred | apart.flatten()
        best, chosen = before.masked_fill(barred[:, None, None], float("-inf")).topk(count, dim=-1)
        chosen = chosen.masked_fill(best.isneginf(), -1).sort(dim=-1).values  # [B, H, N, count]
        absent = chosen < 0
    head = torch.arange(heads, device=q.device)[:, None, None]
    keys, values = pool_k[head, chosen], pool_v[head, chosen]  # [B, H, N, count, P or tokens, D]
    back = near + count - torch.arange(count, device=q.device)  # in age order, nearest last
    table = rotary.table(offsets + (back * stride)[:, None], q.dtype)  # [count, P, D]
    placed = rotate(q[..., None, :, :], table)
    scores = placed @ keys.transpose(-1, -2)  # [B, H, N, count, P, P]
    inside = scores[..., :tokens]
    logits = inside + gating * (scores[..., tokens] - inside.logsumexp(dim=-1))[..., None]
    logits = logits.masked_fill(absent[..., None, None], float("-inf"))
    return logits.movedim(-3, -2).flatten(-2), values.flatten(-3, -2)
