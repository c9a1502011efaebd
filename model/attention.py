"""Attention over retrieved blocks: merged with a window by a gate, or weighed by a search.

Owns the arithmetic and nothing else: which blocks, at which places and with which gate is the
caller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 4
"""Rows a block up to which the one-pass CPU kernel is the faster one (bench/decode.py)."""


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def block_attention(
    q: Tensor,  # [S, G, M or 1, R, D] queries, placed for each pair, times 1 / sqrt(D)
    keys: Tensor,  # [slots, B, D] slab, any float dtype
    values: Tensor,  # [slots, B, Dv] slab
    slots: Tensor,  # [S, G, M] int64, -1: no block
    gate: Tensor | None,  # [S, G, M, R] log weight of each block; None: its log-sum-exp
    local: tuple[Tensor, Tensor]
    | None,  # output [S, G, R, Dv], log-sum-exp [S, G, R] of the window
    weighed: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attend R queries of each of S streams and G groups over M blocks and the local window.

    Inside block b: O_b = softmax(q k) v and L_b = log sum exp(q k). Blocks and window are merged
    by their log weights a_b: out = (e^L_local O_local + sum_b e^a_b O_b) / (e^L_local + sum e^a_b).
    With a_b = L_b (gate None) and every block given this is full attention. Without a window
    each group needs a block.

    Returns the output [S, G, R, Dv], its log-sum-exp [S, G, R] and the blocks' weights
    [S, G, M, R], which with the window's weight sum to one; unless they are wanted (weighed), None:
    where the gate is None and one placed query serves all blocks, doing without them is faster.
    """
    streams, groups, blocks = shape = slots.shape
    some_absent = slots.numel() > 0 and int(slots.min()) < 0
    flat = (slots.clamp(min=0) if some_absent else slots).reshape(-1)
    k = keys.index_select(0, flat)  # [S * G * M, B, D]
    v = values.index_select(0, flat)
    rows, dim = q.shape[-2:]
    few = rows <= FEW and k.device.type == "cpu" and k.shape == v.shape and blocks > 0
    if few and gate is None and q.shape[2] == 1 and not (weighed or some_absent):
        # All blocks of a group as one: the softmax over them is the merge.
        together = (streams * groups, blocks * keys.shape[1], dim)
        queries = q.reshape(-1, rows, dim)
        out, lse = _attend_few(queries, k.view(together), v.view(together))
        whole = out.view(streams, groups, rows, dim), lse.view(streams, groups, rows)
        return (*(whole if local is None else _merge(whole, local)), None)
    queries = q.expand(*shape, rows, dim).reshape(len(flat), rows, dim)
    inner, inner_lse = (_attend_few if few else _attend)(queries, k, v)
    inner = inner.view(*shape, rows, v.shape[-1])
    if gate is None:
        gate = inner_lse.view(*shape, rows)
    if some_absent:
        absent = slots < 0
        gate = gate.masked_fill(absent[..., None], float("-inf"))
        inner = inner.masked_fill(absent[..., None, None], 0.0)  # an unfilled slot may hold NaN
    if local is not None:
        gate = torch.cat((gate, local[1][:, :, None]), dim=2)  # [S, G, M + 1, R]
        inner = torch.cat((inner, local[0][:, :, None]), dim=2)
    weights = gate.softmax(dim=2)
    merged = (inner * weights[..., None]).sum(dim=2)
    return merged, gate.logsumexp(dim=2), weights[:, :, :blocks] if weighed else None


def _merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge two outputs [..., Dv] by their log-sum-exps [...]."""
    total = torch.logaddexp(a[1], b[1])
    parts = (out * (lse - total).exp()[..., None] for out, lse in (a, b))
    return sum(parts), total  # type: ignore[return-value]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend q [n, R, D] over k [n, B, D], v [n, B, Dv]: output [n, R, Dv], lse [n, R]."""
    scores = torch.bmm(q, k.to(q.dtype).transpose(1, 2))
    return torch.bmm(scores.softmax(dim=-1), v.to(q.dtype)), scores.logsumexp(dim=-1)


def _attend_few(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `_attend` does, in one pass and in the blocks' own dtype.

    PyTorch's CPU kernel behind scaled_dot_product_attention, asked for its log-sum-exp too: for a
    few rows a block it is twice as fast as two bmm, for many rows it is slower.
    """
    narrow = q.to(k.dtype).unsqueeze(1)
    out, lse = _flash(narrow, k.unsqueeze(1), v.unsqueeze(1), scale=1.0)
    return out.squeeze(1).to(q.dtype), lse.squeeze(1)


def window_attention(
    q: Tensor,  # [S, G, R, D] times 1 / sqrt(D)
    k: Tensor,  # [S, G, T, D]
    v: Tensor,  # [S, G, T, Dv]
    seen: Tensor
    | None,  # bool, broadcasts to [S, G, R, T]; each query sees a token. None: all see all
) -> tuple[Tensor, Tensor]:
    """Attend to the tokens a query sees directly: output [S, G, R, Dv], log-sum-exp [S, G, R]."""
    if seen is None and q.device.type == "cpu" and k.shape == v.shape:
        return _flash(q, k, v, scale=1.0)
    scores = q @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp() @ v, lse


def wide(x: Tensor) -> Tensor:
    """What is exponentiated has at least float32, whatever the matrices are multiplied in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def weighed_attention(
    q: Tensor,  # [Q, H, R, D] times 1 / sqrt(D)
    keys: Tensor,  # [Q * H, k * S, D]
    values: Tensor,  # [Q * H, k * S, D]
    weights: Tensor,  # [Q, k]
    together: bool = False,
) -> tuple[Tensor, Tensor]:  # [Q, H, R, D], [Q, H, R, k]
    """Attend to k chunks by a softmax with one more place that says nothing (softmax-plus-one).

    In each chunk: out = sum_b w_b sum_j e^s_bj / (1 + sum_i e^s_bi) v_bj, as published; the weights
    w are the same for all heads and layers of a group. together: in all of them at once,
    out = sum_b w_b sum_j e^s_bj v_bj / (1 + sum_c w_c sum_i e^s_ci): what is said in one chunk
    takes from what the others say. What all tokens of a chunk have together is returned, too.
    """
    segments, heads, rows, dim = q.shape
    count = weights.shape[-1]
    scores = q.reshape(-1, rows, dim) @ keys.transpose(-1, -2)  # [Q * H, R, k * S]
    scores = wide(scores.unflatten(-1, (count, -1)))
    weight = weights[:, None].expand(-1, heads, -1).reshape(-1, 1, count, 1)
    if together:  # what lies in the place of a chunk that is not there may score more than all else
        scores = scores.masked_fill(weight == 0, float("-inf"))
    of = (-2, -1) if together else -1
    top = scores.detach().amax(dim=of, keepdim=True).clamp(min=0.0)
    shares = (scores - top).exp()
    if together:
        shares = shares * weight
    total = shares.sum(dim=of, keepdim=True) + (-top).exp()
    shares = shares / total if together else shares / total * weight
    out = shares.flatten(-2).to(values.dtype) @ values
    of_chunks = shares.sum(dim=-1).view(segments, heads, rows, count)
    return out.view(segments, heads, rows, dim), of_chunks
