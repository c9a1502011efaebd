"""A family's layers put together: embedding, pre-norm blocks, output head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import VOCABULARY, ModelConfig
from model.landmark import LandmarkAttention
from model.layers import MLP, LocalAttention, RMSNorm, Rotary


class Layer(nn.Module):
    """Attention, then the MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width)
        self.attention: LocalAttention | LandmarkAttention
        if kind == "l":
            self.attention = LocalAttention(config.width, config.heads, config.window_blocks)
        else:
            self.attention = LandmarkAttention(config.width, config.heads)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_width)


class Transformer(nn.Module):
    """A byte-level language model whose retrieving layers reach past blocks by landmarks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY + 1, config.width)  # the last one: the landmark
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.rotary = Rotary(config.head_dim, config.rope_base)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                std = 0.02 if "embedding" in name else weight.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std /= (2 * len(config.layers)) ** 0.5
                nn.init.normal_(weight, std=std)

    @property
    def stack(self) -> list[Layer]:
        """The layers, from the input up."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def embed(self, tokens: Tensor) -> Tensor:  # [..., N, block_size] int64 -> [..., N, P, width]
        """Embed whole blocks, each closed by the landmark token."""
        landmark = tokens.new_full((*tokens.shape[:-1], 1), VOCABULARY)
        return self.embedding(torch.cat((tokens, landmark), dim=-1))

    def hidden(self, tokens: Tensor, distractors: int = 0) -> Tensor:
        """Run whole sequences densely: [B, N, block_size] int64 -> [B, N, P, width]."""
        x = self.embed(tokens)
        for layer in self.stack:
            inner = layer.attention_norm(x)
            if isinstance(layer.attention, LandmarkAttention):
                near = self.config.top_k
                x = x + layer.attention(inner, self.rotary, distractors, near)
            else:
                x = x + layer.attention(inner, self.rotary)
            x = x + layer.mlp(layer.mlp_norm(x))
        return x

    def forward(self, tokens: Tensor, distractors: int = 0) -> Tensor:
        """Return next-byte logits [B, N, block_size, 256]; landmark rows predict nothing."""
        x = self.hidden(tokens, distractors)[..., :-1, :]
        return self.head(self.norm(x))
