"""Bytes to vectors: what every family's residual stream begins with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import VOCABULARY

_PRIME = 2**31 - 1
_FACTOR = 1_103_515_245  # times less than the prime, it stays an int64


class Embedding(nn.Module):
    """Embeds a byte together with the bytes before it, a vector for each of them, summed.

    So every key says what came before its byte, and looking for "where was this said before?" needs
    a single layer. Learning that from bytes embedded alone takes two layers that are of no use
    without each other, which is where a short training gets stuck (Olsson et al. 2022, arXiv
    2209.11895, on smeared keys).

    grams: lengths of strings that end in the byte and are embedded whole, too: each has one of
    `buckets` vectors, by its hash (as in Pagnoni et al. 2024, arXiv 2412.09871). A sum of such
    vectors over a chunk says which strings are in it; one of the bytes' says how often each is.
    """

    def __init__(
        self, width: int, reach: int, grams: tuple[int, ...] = (), buckets: int = 0
    ) -> None:
        super().__init__()
        self.reach = reach
        self.sizes, self.buckets = grams, buckets
        self.span = max((reach, *grams))
        # A table a distance; the last row is the landmark token or, before a byte, no byte.
        self.weight = nn.Parameter(torch.empty(reach * (VOCABULARY + 1), width))
        self.grams = nn.Parameter(torch.empty(len(grams) * buckets, width)) if grams else None

    def nothing(self) -> Tensor:
        """Return what comes before a text, int64 [span - 1]."""
        return torch.full((self.span - 1,), VOCABULARY, device=self.weight.device)

    def forward(
        self,
        tokens: Tensor,  # int64 [..., N, R], consecutive but for landmarks
        before: Tensor,  # int64 [..., span - 1]
        landmarks: bool,  # close each row by the landmark token
    ) -> Tensor:  # [..., N, R or R + 1, width]
        recent = torch.cat((before, tokens.flatten(-2)), dim=-1).unfold(-1, self.span, 1)
        tables = torch.arange(self.reach - 1, -1, -1, device=tokens.device) * (VOCABULARY + 1)
        rows = recent[..., self.span - self.reach :] + tables
        x = F.embedding_bag(rows.flatten(0, -2), self.weight, mode="sum")
        if self.grams is not None:
            rows = torch.stack(
                [
                    _hash(recent[..., -n:]) % self.buckets + i * self.buckets
                    for i, n in enumerate(self.sizes)
                ],
                dim=-1,
            )
            x = x + F.embedding_bag(rows.flatten(0, -2), self.grams, mode="sum")
        x = x.view(*tokens.shape, -1)
        if not landmarks:
            return x
        landmark = self.weight[VOCABULARY].expand(*x.shape[:-2], 1, -1)
        return torch.cat((x, landmark), dim=-2)


def _hash(strings: Tensor) -> Tensor:
    """int64 [..., n] -> [...]: the polynomial with these coefficients, modulo a prime."""
    h = strings[..., 0]
    for i in range(1, strings.shape[-1]):
        h = (h * _FACTOR + strings[..., i]) % _PRIME
    return h
