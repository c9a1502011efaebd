"""Bytes to vectors: what every family's residual stream begins with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import VOCABULARY


class Embedding(nn.Module):
    """Embeds a byte together with the bytes before it, a vector for each of them, summed.

    So every key says what came before its byte, and looking for "where was this said before?" needs
    a single layer. Learning that from bytes embedded alone takes two layers that are of no use
    without each other, which is where a short training gets stuck (Olsson et al. 2022, arXiv
    2209.11895, on smeared keys).
    """

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        # A table a distance; the last row is the landmark token or, before a byte, no byte.
        self.weight = nn.Parameter(torch.empty(reach * (VOCABULARY + 1), width))

    def nothing(self) -> Tensor:
        """Return what comes before a text, int64 [reach - 1]."""
        return torch.full((self.reach - 1,), VOCABULARY, device=self.weight.device)

    def forward(
        self,
        tokens: Tensor,  # int64 [..., N, R], consecutive but for landmarks
        before: Tensor,  # int64 [..., reach - 1]
        landmarks: bool,  # close each row by the landmark token
    ) -> Tensor:  # [..., N, R or R + 1, width]
        recent = torch.cat((before, tokens.flatten(-2)), dim=-1).unfold(-1, self.reach, 1)
        tables = torch.arange(self.reach - 1, -1, -1, device=tokens.device) * (VOCABULARY + 1)
        x = F.embedding_bag((recent + tables).flatten(0, -2), self.weight, mode="sum")
        x = x.view(*tokens.shape, -1)
        if not landmarks:
            return x
        landmark = self.weight[VOCABULARY].expand(*x.shape[:-2], 1, -1)
        return torch.cat((x, landmark), dim=-2)
