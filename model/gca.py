"""Grouped Cross Attention (Hu et al., arXiv 2410.01651): chunks are encoded once, and retrieved.

Lower layers see a sliding window. A chunk encoder reads their output, both ways within a chunk: the
landmark's place becomes the chunk's landmark, the others its keys and values, which all upper
layers share. The upper layers form groups; each group asks once by a query of its own, and its
layers attend to the chunks that were found, weighed by the softmax of their scores, so that the
loss of the language model trains the search. Owns the layers; gca_transformer.py has them put
together, and gca_stream.py the form that reads from a store.

In this file S is the tokens of a chunk, P = S + 1 its places, the last one the landmark's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import GCAConfig
from model.layers import (
    MLP,
    LocalAttention,
    RMSNorm,
    Rotary,
    merge_heads,
    rotate,
    split_heads,
)


class ChunkAttention(nn.Module):
    """Attention of all places of a chunk to all of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:  # [..., N, P, width]
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, dim=-1))
        table = rotary.table(torch.arange(x.shape[-2], device=x.device), q.dtype)
        q, k = rotate(q, table), rotate(k, table)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class EncoderLayer(nn.Module):
    """One layer of the chunk encoder."""

    def __init__(self, config: GCAConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = ChunkAttention(config.width, config.heads)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:  # [..., N, P, width]
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nn.Module):
    """Makes of a chunk what the store keeps of it: keys, values and a landmark."""

    def __init__(self, config: GCAConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.lag = config.lag
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder))
        self.norm = RMSNorm(config.width)
        self.keys_values = nn.Linear(config.width, 2 * config.width, bias=False)
        self.landmark = nn.Linear(config.width, config.landmark_dim, bias=False)

    def forward(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """[..., N, P, width] -> keys, values [..., N, S, width], landmarks [..., N, dim]."""
        for layer in self.layers:
            x = layer(x, rotary)
        x = self.norm(x)
        keys, values = self.keys_values(x[..., :-1, :]).chunk(2, dim=-1)
        if self.lag:  # the first places have a key that every query scores by 0
            keys = F.pad(keys[..., : -self.lag, :], (0, 0, self.lag, 0))
        return keys, values, self.landmark(x[..., -1, :])


class CrossAttention(nn.Module):
    """What an upper layer asks the chunks that its group has found; without positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)


class LowerLayer(nn.Module):
    """Local attention, then the MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GCAConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention = LocalAttention(config.width, config.heads, config.window_blocks)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width)


class UpperLayer(LowerLayer):
    """Local attention, then cross attention, whose output goes into the MLP alone.

    It does not join the residual stream; the authors found that decisive.
    """

    def __init__(self, config: GCAConfig) -> None:
        super().__init__(config)
        self.cross_norm = RMSNorm(config.width)
        self.cross = CrossAttention(config.width, config.heads)


class Group(nn.Module):
    """Upper layers that share what they found, by the query of the state that comes into them."""

    def __init__(self, config: GCAConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.width)
        self.query = nn.Linear(config.width, config.landmark_dim, bias=False)
        self.layers = nn.ModuleList(UpperLayer(config) for _ in range(config.group_layers))

    def ask(self, x: Tensor) -> Tensor:  # [..., width] -> [..., landmark_dim]
        """Return the queries of states, times 1 / sqrt(landmark_dim)."""
        return self.query(self.norm(x)) * self.query.out_features**-0.5

    @property
    def stack(self) -> list[UpperLayer]:
        """The layers, from the input up."""
        return [layer for layer in self.layers if isinstance(layer, UpperLayer)]
