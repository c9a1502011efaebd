"""Landmark Attention's layers put together: embedding, pre-norm blocks, output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import VOCABULARY, LandmarkConfig
from model.embedding import Embedding
from model.landmark import LandmarkAttention
from model.layers import MLP, LocalAttention, RMSNorm, Rotary, draw_weights


class Layer(nn.Module):
    """Attention, then the MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LandmarkConfig, kind: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention: LocalAttention | LandmarkAttention
        if kind == "l":
            self.attention = LocalAttention(config.width, config.heads, config.window_blocks)
        else:
            self.attention = LandmarkAttention(config.width, config.heads)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width)


class LandmarkTransformer(nn.Module):
    """A byte-level language model whose retrieving layers reach past blocks by landmarks."""

    def __init__(self, config: LandmarkConfig, *, initialize: bool = True) -> None:
        """Make a model; initialize: False where the weights are about to be loaded."""
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.width, config.reach, config.grams, config.buckets)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.rotary = Rotary(config.head_dim, config.rope_base)
        if initialize:
            self._initialize()

    def _initialize(self) -> None:
        draw_weights(self, len(self.config.layers))
        self._look_back()

    @torch.no_grad()
    def _look_back(self) -> None:
        """Start the retrieving layers as induction heads (Olsson et al. 2022).

        The bytes up to a place ask for a place where the same bytes came right before, and what
        stood there is what the output layer predicts. Training would find that too, after a long
        plateau, because no part of it is of use without the others (the idea is the mimetic
        initialization of Trockman & Kolter 2023, arXiv 2305.09828).
        """
        config, attentions = self.config, [layer.attention for layer in self.stack]
        width, dim, reach = config.width, config.head_dim, config.reach
        letters = torch.randn(VOCABULARY + 1, width) * reach**-0.5  # a byte's vector, anywhere
        turns = [torch.linalg.qr(torch.randn(width, width))[0] for _ in range(reach + 1)]
        self.embedding.weight.copy_(torch.cat([letters @ turn for turn in turns[:reach]]))
        self.head.weight.copy_(letters[:VOCABULARY] @ turns[reach] * width**-0.5)
        slow = torch.cat((torch.arange(dim // 4, dim // 2), torch.arange(dim * 3 // 4, dim)))
        for attention in attentions:
            if not isinstance(attention, LandmarkAttention):
                continue
            q, k, v = attention.qkv.weight.view(3, config.heads, dim, width)
            out = attention.out.weight.view(width, config.heads, dim)
            for head in range(config.heads):
                looks = torch.randn(reach - 1, len(slow), width) * 0.25 * dim**-0.25
                q[head, slow] = sum(look @ turns[s] for s, look in enumerate(looks))
                k[head, slow] = sum(look @ turns[s + 1] for s, look in enumerate(looks))
                says = torch.randn(dim, width) * width**-0.5
                v[head] = says @ turns[0]
                out[:, head] = (says @ turns[reach]).T

    @property
    def stack(self) -> list[Layer]:
        """The layers, from the input up."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def embed(self, tokens: Tensor) -> Tensor:  # int64 [B, N, block_size] -> [B, N, P, width]
        """Embed whole sequences, each block closed by the landmark token."""
        before = self.embedding.nothing().expand(len(tokens), -1)
        return self.embedding(tokens, before, landmarks=True)

    def hidden(
        self,
        tokens: Tensor,  # int64 [B, N, block_size]
        distractors: int = 0,
        gating: float | Tensor = 1.0,
        passage: Tensor | None = None,  # int64 [B]
        apart: Tensor | None = None,  # bool [B, N]
        asking: Tensor | None = None,  # bool [B, N, block_size]
    ) -> Tensor:  # [B, N, P, width]
        """Run whole sequences densely; for the options see LandmarkAttention.forward."""
        x = self.embed(tokens)
        for layer in self.stack:
            inner = layer.attention_norm(x)
            if isinstance(layer.attention, LandmarkAttention):
                near = self.config.near
                x = x + layer.attention(
                    inner, self.rotary, distractors, near, gating, passage, apart, asking
                )
            else:
                x = x + layer.attention(inner, self.rotary)
            x = x + layer.mlp(layer.mlp_norm(x))
        return x

    def forward(
        self,
        tokens: Tensor,  # int64 [B, N, block_size]
        distractors: int = 0,
        gating: float | Tensor = 1.0,
        passage: Tensor | None = None,  # int64 [B]
        apart: Tensor | None = None,  # bool [B, N]
        asking: Tensor | None = None,  # bool [B, N, block_size]
    ) -> Tensor:  # [B, N, block_size, 256]
        """Return next-byte logits; landmark rows predict nothing."""
        x = self.hidden(tokens, distractors, gating, passage, apart, asking)[..., :-1, :]
        return self.head(self.norm(x))
