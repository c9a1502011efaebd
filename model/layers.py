"""The parts every family shares: RMSNorm, rotary positions, the MLP, local attention.

Tensors of a text are laid out in blocks: [B, N, P, ...] is B sequences of N blocks of
P = block_size + 1 positions, the last one being the landmark token's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Scale to unit root mean square, then by a learned gain (Zhang & Sennrich 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # [..., width]
        return F.rms_norm(x, self.gain.shape, self.gain, 1e-6)


class MLP(nn.Module):
    """Two linear maps around a GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., width]
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Rotary:
    """Rotary position embedding (Su et al. 2021) in the half-split form.

    Angles are formed in float64 from integer positions and only then cast: float32 angles are
    off by 0.09 an element at position one million.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        steps = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        self.frequency = base**-steps  # [head_dim / 2]

    def table(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [*positions.shape, head_dim / 2] for integer positions."""
        frequency = self.frequency.to(positions.device)
        angles = positions.to(torch.float64)[..., None] * frequency
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [..., head_dim] by a table whose shapes broadcast against [..., head_dim / 2]."""
    cos, sin = table
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., N, P, heads * D] -> [..., heads, N, P, D]."""
    return x.unflatten(-1, (heads, -1)).movedim(-2, -4)


def merge_heads(x: Tensor) -> Tensor:
    """[..., heads, N, P, D] -> [..., N, P, heads * D]."""
    return x.movedim(-4, -2).flatten(-2)


class LocalAttention(nn.Module):
    """Attention to the own block and the `window_blocks` before it; landmark tokens are not seen.

    Keys are rotated from their own block's start, so they never move; the query is rotated once
    for each distance in blocks.
    """

    def __init__(self, width: int, heads: int, window_blocks: int) -> None:
        super().__init__()
        self.heads = heads
        self.window_blocks = window_blocks
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., N, P, width] -> queries, keys, values [..., heads, N, P, D], not rotated."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return tuple(split_heads(t, self.heads) for t in (q, k, v))  # type: ignore[return-value]

    def attend(
        self,
        q: Tensor,  # [..., N, R, D] not rotated
        k: Tensor,  # [..., N + window_blocks, K, D] rotated from each block's start
        v: Tensor,  # [..., N + window_blocks, K, D]
        rotary: Rotary,
        offsets: Tensor,  # [R] places of the queries in their block
        present: Tensor,  # [N + window_blocks] bool: false where a block lies before the text
    ) -> Tensor:  # [..., N, R, D]
        """Attend from R positions of each of the last N blocks; K <= block_size keys a block.

        The window reaches window_blocks * P positions back, so every query sees as far.
        """
        blocks, w, tokens = q.shape[-3], self.window_blocks, k.shape[-2]
        stride = tokens + 1
        scale = q.shape[-1] ** -0.5
        scores = []
        place = torch.arange(tokens, device=q.device)
        for back in range(w, -1, -1):
            shifted = rotate(q * scale, rotary.table(offsets + back * stride, q.dtype))
            first = w - back
            s = shifted @ k[..., first : first + blocks, :, :].transpose(-1, -2)
            distance = offsets[:, None] + back * stride - place  # [R, K]
            seen = (distance >= 0) & (distance < w * stride)
            seen = seen & present[first : first + blocks, None, None]
            scores.append(s.masked_fill(~seen, float("-inf")))
        weights = torch.cat(scores, dim=-1).softmax(dim=-1)
        out = 0.0
        for back in range(w, -1, -1):
            first = w - back
            part = weights[..., first * tokens : (first + 1) * tokens]
            out = out + part @ v[..., first : first + blocks, :, :]
        return out  # type: ignore[return-value]

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:  # [B, N, P, width]
        """Attend over whole sequences, for training."""
        q, k, v = self.project(x)
        tokens = x.shape[-2] - 1
        offsets = torch.arange(tokens + 1, device=x.device)
        k = rotate(k, rotary.table(offsets, k.dtype))
        pad = (0, 0, 0, 0, self.window_blocks, 0)
        k = F.pad(k[..., :tokens, :], pad)
        v = F.pad(v[..., :tokens, :], pad)
        present = torch.arange(k.shape[-3], device=x.device) >= self.window_blocks
        return self.out(merge_heads(self.attend(q, k, v, rotary, offsets, present)))
