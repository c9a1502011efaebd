"""Attention over retrieved blocks: merged with a window by a gate, or weighed by a search.

Owns the arithmetic and nothing else: which blocks, at which places and with which gate is the
caller's business.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model import _native
from model.layers import rotate

FEW = 8
"""Rows a block up to which the compiled kernel is the faster one (bench/decode.py)."""

_TILE_BYTES = 1 << 21
"""The most that one intermediate of a few groups takes on a CPU: the C library keeps so much for
the next one. Those of a whole piece of text would come from the system anew each time."""

_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the compiled kernel reads from a slab, and how it is told."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def block_attention(
    q: Tensor,  # [S, G, M or 1, R, D] queries, placed for each pair, times 1 / sqrt(D)
    keys: Tensor,  # [slots, B, D] slab, any float dtype
    values: Tensor,  # [slots, B, Dv] slab
    slots: Tensor,  # [S, G, M] int64, -1: no block
    gate: Tensor | None,  # [S, G, M, R] log weight of each block; None: its log-sum-exp
    local: tuple[Tensor, Tensor]
    | None,  # output [S, G, R, Dv], log-sum-exp [S, G, R] of the window
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend R queries of each of S streams and G groups over M blocks and the local window.

    Inside block b: O_b = softmax(q k) v and L_b = log sum exp(q k). Blocks and window are merged
    by their log weights a_b: out = (e^L_local O_local + sum_b e^a_b O_b) / (e^L_local + sum e^a_b).
    With a_b = L_b (gate None) and every block given this is full attention. Without a window
    each group needs a block.

    Returns the output [S, G, R, Dv], its log-sum-exp [S, G, R] and the blocks' weights
    [S, G, M, R], which with the window's weight sum to one; all have the queries' dtype.
    IndexError for a slot that is not in the slab.
    """
    if _compiled(q, keys, values, slots, gate, *(local or ())):
        return _attend_in_place(q, None, keys, values, slots, gate, None, local)
    return _attend(q, None, keys, values, slots, gate, local)


def landmark_attention(
    q: Tensor,  # [S, G, R, D] queries as in their own block, times 1 / sqrt(D)
    places: tuple[Tensor, Tensor],  # cosines and sines [M, D]: the rotation to each block's place
    landmarks: Tensor,  # [S, G, M, D] of the blocks; anything where there is none
    keys: Tensor,  # [slots, B, D]
    values: Tensor,  # [slots, B, Dv]
    slots: Tensor,  # [S, G, M] int64, -1: no block
    local: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do `block_attention` with queries rotated to each block's place, their landmarks the gates.

    A block's log weight is the product of the rotated query and its landmark.
    """
    if _compiled(q, keys, values, slots, landmarks, *places, *(local or ())):
        return _attend_in_place(q, places, keys, values, slots, None, landmarks, local)
    cos, sin = places
    q = q.to(torch.promote_types(q.dtype, cos.dtype))
    # A landmark turned back meets the queries as they are: there are fewer of them.
    gate = rotate(landmarks.to(q.dtype), (cos, -sin)) @ q.mT  # [S, G, M, R]
    return _attend(q[:, :, None], places, keys, values, slots, gate, local)


def _attend(
    q: Tensor,  # [S, G, M or 1, R, D]
    places: tuple[Tensor, Tensor] | None,  # [M, D] each: block m sees the queries rotated so
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    local: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend by PyTorch, on a CPU to a few groups at a time."""
    streams, groups, blocks = slots.shape
    each, rows = q.shape[2], q.shape[-2]
    _shaped(q, (streams, groups, each if each == 1 else blocks, rows, keys.shape[2]))
    _shaped(gate, (streams, groups, blocks, rows))
    if local is not None:
        _shaped(local[0], (streams, groups, rows, values.shape[2]))
        _shaped(local[1], (streams, groups, rows))
    step = groups
    if q.is_cpu:
        wide = max(rows, keys.shape[1]) * max(rows, *keys.shape[1:], values.shape[2])
        step = max(1, _TILE_BYTES // max(1, streams * blocks * wide * q.itemsize))
    parts = []
    for start in range(0, max(1, groups), max(1, step)):  # once where there are no groups
        part = slice(start, start + step)
        some_q = q[:, part]
        if places is not None:
            cos, sin = places
            some_q = rotate(some_q, (cos[:, None], sin[:, None]))  # [S, g, M, R, D]
        given = (
            None if gate is None else gate[:, part],
            local and tuple(t[:, part] for t in local),
        )
        parts.append(_attend_part(some_q, keys, values, slots[:, part], *given))
    if len(parts) == 1:
        return parts[0]
    out, lse, weights = (torch.cat(of_parts, dim=1) for of_parts in zip(*parts, strict=True))
    return out, lse, weights


def _attend_part(
    q: Tensor,  # [S, G, M or 1, R, D]
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    local: tuple[Tensor, ...] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = slots.shape
    some_absent = slots.numel() > 0 and int(slots.min()) < 0
    flat = (slots.clamp(min=0) if some_absent else slots).reshape(-1)
    k = keys.index_select(0, flat).to(q.dtype)  # [S * G * M, B, D]
    v = values.index_select(0, flat).to(q.dtype)
    rows, dim = q.shape[-2:]
    scores = torch.bmm(
        q.expand(*shape, rows, dim).reshape(len(flat), rows, dim), k.transpose(1, 2)
    )  # [S * G * M, R, B]
    if gate is None:
        gate = scores.logsumexp(dim=-1).view(*shape, rows)
    if some_absent:
        absent = slots < 0
        gate = gate.masked_fill(absent[..., None], float("-inf"))
        nowhere = absent.reshape(-1, 1, 1)  # an unfilled slot may hold NaN
        scores, v = scores.masked_fill(nowhere, 0.0), v.masked_fill(nowhere, 0.0)
    if local is not None:
        gate = torch.cat((gate, local[1][:, :, None]), dim=2)  # [S, G, M + 1, R]
    weights = gate.softmax(dim=2)
    of_blocks = weights[:, :, : shape[2]]
    shares = (scores.softmax(dim=-1) * of_blocks.reshape(len(flat), rows, 1)).to(v.dtype)
    merged = torch.bmm(shares, v).view(*shape, rows, v.shape[-1]).sum(dim=2)
    if local is not None:
        merged = merged + weights[:, :, shape[2], :, None] * local[0]
    return merged, gate.logsumexp(dim=2), of_blocks


def _compiled(q: Tensor, keys: Tensor, values: Tensor, *others: Tensor | None) -> bool:
    """Say whether the compiled kernel does this, and sooner than PyTorch would."""
    if q.shape[-2] > FEW or q.dtype not in _ELEMENTS or keys.dtype not in _ELEMENTS:
        return False
    given = [t for t in (q, keys, values, *others) if t is not None]
    return (
        values.dtype is keys.dtype
        and keys.is_contiguous()
        and values.is_contiguous()
        and all(t.is_cpu for t in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
    )


def _attend_in_place(
    q: Tensor,  # [S, G, M, R, D], or one for all blocks [S, G, 1, R, D] or [S, G, R, D]
    places: tuple[Tensor, Tensor] | None,  # [M, D] each: block m sees the queries rotated so
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    gate: Tensor | None,
    landmarks: Tensor | None,  # [S, G, M, D]: the gates are their products with the queries
    local: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend by the compiled kernel: in float32, reading the blocks where they lie."""
    streams, groups, blocks = slots.shape
    count, size, dim = keys.shape
    rows, width = q.shape[-2], values.shape[-1]
    each = q.shape[2:-2]  # [M], [1] or []
    if values.shape[:2] != (count, size) or each not in ((), (1,), (blocks,)):
        raise ValueError(f"queries {q.shape}, keys {keys.shape}, values {values.shape}")
    cos, sin = places or (None, None)
    out, lse = local or (None, None)
    exact = slots.is_cpu and slots.dtype is torch.int64
    # No call of PyTorch's without need: while a token is decoded each takes longer than a block.
    given = (
        _floats(q, (streams, groups, *each, rows, dim)),
        _floats(cos, (blocks, dim)),
        _floats(sin, (blocks, dim)),
        keys,
        values,
        (slots if exact else slots.to("cpu", torch.int64)).contiguous(),
        _floats(gate, (streams, groups, blocks, rows)),
        _floats(landmarks, (streams, groups, blocks, dim)),
        _floats(out, (streams, groups, rows, width)),
        _floats(lse, (streams, groups, rows)),
    )
    results = _native.attend(
        (streams, groups, blocks, rows),
        (count, size, dim, width),
        _ELEMENTS[keys.dtype],
        each == (blocks,),
        torch.get_num_threads(),
        *[0 if t is None else t.data_ptr() for t in given],
    )
    out, lse, weights = (torch.from_numpy(array) for array in results)
    if q.dtype is not torch.float32:
        out, lse, weights = (t.to(q.dtype) for t in (out, lse, weights))
    return out, lse, weights


def _floats(x: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Return x as the kernel reads it; ValueError if it has another shape."""
    _shaped(x, shape)
    if x is None:
        return None
    return (x if x.dtype is torch.float32 else x.to(torch.float32)).contiguous()


def _shaped(x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is not None and x.shape != shape:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} where {shape} belongs")


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
