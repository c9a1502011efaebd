"""Attention over retrieved blocks: one kernel for every family, told apart by the gate.

Owns the arithmetic and nothing else: which blocks, at which places and with which gate is the
caller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    k = keys.index_select(0, flat).to(q.dtype)  # [S * G * M, B, D]
    v = values.index_select(0, flat).to(q.dtype)
    q = q.expand(*shape, *q.shape[-2:]).reshape(len(flat), *q.shape[-2:])
    scores = torch.bmm(q, k.transpose(1, 2))  # [S * G * M, R, B]
    if gate is None:
        gate = scores.logsumexp(dim=-1).view(*shape, -1)
    inner = torch.bmm(scores.softmax(dim=-1), v).view(*shape, *q.shape[-2:-1], -1)
    gate = gate.masked_fill(absent[..., None], float("-inf"))
    out, lse = local
    total = torch.logaddexp(lse, gate.logsumexp(dim=-2))  # [S, G, R]
    weights = (gate - total[..., None, :]).exp()  # [S, G, M, R]
    merged = out * (lse - total).exp()[..., None] + (inner * weights[..., None]).sum(dim=-3)
    return merged, total, weights


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
