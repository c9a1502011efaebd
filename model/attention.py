"""Attention over retrieved blocks: one kernel for every family, told apart by the gate.

Owns the arithmetic and nothing else: which blocks, at which places and with which gate is the
caller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 4
"""Rows a block up to which the one-pass CPU kernel is the faster one (bench/decode.py)."""


def block_attention(
    q: Tensor,  # [S, G, M or 1, R, D] queries, placed for each pair, times 1 / sqrt(D)
    keys: Tensor,  # [slots, B, D] slab, any float dtype
    values: Tensor,  # [slots, B, Dv] slab
    slots: Tensor,  # [S, G, M] int64, -1: no block
    gate: Tensor | None,  # [S, G, M, R] log weight of each block; None: its log-sum-exp
    local: tuple[Tensor, Tensor],  # output [S, G, R, Dv], log-sum-exp [S, G, R] of the own window
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend R queries of each of S streams and G groups over M blocks and the local window.

    Inside block b: O_b = softmax(q k) v and L_b = log sum exp(q k). Blocks and window are merged
    by their log weights a_b: out = (e^L_local O_local + sum_b e^a_b O_b) / (e^L_local + sum e^a_b).
    With a_b = L_b (gate None) and every block given this is full attention.

    Returns the output [S, G, R, Dv], its log-sum-exp [S, G, R] and the blocks' weights
    [S, G, M, R], which with the window's weight sum to one.
    """
    shape = slots.shape
    absent = slots < 0
    flat = slots.clamp(min=0).flatten()
    k = keys.index_select(0, flat)  # [S * G * M, B, D]
    v = values.index_select(0, flat)
    rows = q.expand(*shape, *q.shape[-2:]).reshape(len(flat), *q.shape[-2:])
    few = rows.shape[1] <= FEW and k.device.type == "cpu" and k.shape == v.shape and len(flat)
    inside = _attend_few if few else _attend
    inner, inner_lse = inside(rows, k, v)
    if gate is None:
        gate = inner_lse.view(*shape, q.shape[-2])
    gate = gate.masked_fill(absent[..., None], float("-inf"))
    logs = torch.cat((gate, local[1][:, :, None]), dim=2)  # [S, G, M + 1, R]
    inner = inner.view(*shape, *inner.shape[1:])
    inner = inner.masked_fill(absent[..., None, None], 0.0)  # an unfilled slot may hold NaN
    parts = torch.cat((inner, local[0][:, :, None]), dim=2)
    weights = logs.softmax(dim=2)
    merged = (parts * weights[..., None]).sum(dim=2)
    return merged, logs.logsumexp(dim=2), weights[:, :, :-1]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend q [n, R, D] over k [n, B, D], v [n, B, Dv]: output [n, R, Dv], lse [n, R]."""
    scores = torch.bmm(q, k.to(q.dtype).transpose(1, 2))
    return torch.bmm(scores.softmax(dim=-1), v.to(q.dtype)), scores.logsumexp(dim=-1)


def _attend_few(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `_attend` does, in one pass and in the blocks' own dtype.

    PyTorch's CPU kernel behind scaled_dot_product_attention, asked for its log-sum-exp too: for a
    few rows a block it is twice as fast as two bmm, for many rows it is slower.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q.to(k.dtype)[:, None], k[:, None], v[:, None], scale=1.0)
    return out[:, 0].to(q.dtype), lse[:, 0].to(q.dtype)


def window_attention(
    q: Tensor,  # [S, G, R, D] times 1 / sqrt(D)
    k: Tensor,  # [S, G, T, D]
    v: Tensor,  # [S, G, T, Dv]
    seen: Tensor,  # bool, broadcasts to [S, G, R, T]; every query sees at least one token
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens a query sees directly: output [S, G, R, Dv], log-sum-exp [S, G, R]."""
    scores = (q @ k.transpose(-1, -2)).masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp() @ v, lse
