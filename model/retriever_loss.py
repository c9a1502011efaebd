"""What teaches the search of Grouped Cross Attention beside the language model's loss.

N chunks of S tokens in each of B sequences; Q segments that each have k chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import wide


def clue_loss(
    queries: Tensor,  # [B, N, S, dim]
    landmarks: Tensor,  # [B, N, dim]
    allowed: Tensor,  # bool [B * N, B * N]
    meant: Tensor,  # bool [B, N, S, N]
) -> Tensor:  # []
    """Return the mean of -log of the weight that the chunks meant have among all that are allowed.

    As if each token asked for itself; 0 where none are meant.
    """
    shape = landmarks.shape[:2]
    older = torch.ones(shape[1], shape[1], dtype=torch.bool, device=meant.device).tril(-1)
    meant = meant & older[:, None]
    none = ~meant.any(dim=-1)  # [B, N, S]
    scores = wide(queries.flatten(0, 2) @ landmarks.flatten(0, 1).T).unflatten(0, none.shape)
    seen = allowed.unflatten(0, shape)[:, :, None]
    own = wide(torch.einsum("bnsd,bmd->bnsm", queries, landmarks))
    # A row without any must not become NaN, nor its gradient.
    every = scores.masked_fill(~seen, float("-inf")).masked_fill(none[..., None], 0.0)
    right = own.masked_fill(~meant, float("-inf")).masked_fill(none[..., None], 0.0)
    lost = every.logsumexp(dim=-1) - right.logsumexp(dim=-1)
    return lost.masked_fill(none, 0.0).sum() / (~none).sum().clamp(min=1)


def judging_loss(
    weights: Tensor,  # [Q, k]
    taken: Tensor,  # [Q, heads, rows, k]
) -> Tensor:  # []
    """Return the mean KL divergence of the weights from what is taken of each chunk.

    The attention teaches the search (as in Izacard & Grave 2020, arXiv 2012.04584): without a
    gradient into it. A segment counts by how much it takes: who heeds no chunk has nothing to say
    of them.
    """
    taken = taken.detach().mean(dim=(1, 2))  # [Q, k]
    total = taken.sum(dim=-1, keepdim=True)
    least = torch.finfo(taken.dtype).tiny
    share = taken / total.clamp(min=least)
    lost = torch.xlogy(taken, share) - taken * weights.clamp(min=least).log()
    return lost.sum() / total.sum().clamp(min=least)
