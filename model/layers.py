"""The parts every family shares: RMSNorm, rotary positions, the MLP, local attention.

Tensors of a text are laid out in blocks: [B, N, P, ...] is B sequences of N blocks of
P = block_size + 1 positions, the last one being the landmark token's.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def draw_weights(model: nn.Module, layers: int) -> None:
    """Draw a model's matrices; what is added to the residual stream is smaller with more layers."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            std = 0.02 if "embedding" in name else weight.shape[1] ** -0.5
            if name.endswith(("out.weight", "down.weight")):
                std /= (2 * layers) ** 0.5
            nn.init.normal_(weight, std=std)


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
        """Return cosines and sines [*positions.shape, head_dim] for integer positions.

        The first half of the sines has its sign turned, as `rotate` wants it.
        """
        frequency = self.frequency.to(positions.device)
        angles = positions.to(torch.float64)[..., None] * frequency
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [..., head_dim] by a table whose shapes broadcast against x's."""
    cos, sin = table
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[..., N, P, heads * D] -> [..., heads, N, P, D]."""
    return x.unflatten(-1, (heads, -1)).movedim(-2, -4)


def merge_heads(x: Tensor) -> Tensor:
    """[..., heads, N, P, D] -> [..., N, P, heads * D]."""
    return x.movedim(-4, -2).flatten(-2)


@dataclass(frozen=True)
class Frame:
    """What a local layer knows of R places in a block, for each of the w + 1 blocks it looks at.

    cos, sin: [w + 1, R, D] turn a query towards a block, the oldest first; hidden: bool
    [w + 1, R, K], the tokens it does not see.
    """

    cos: Tensor
    sin: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, rotary: Rotary, window_blocks: int, stride: int, like: Tensor) -> Frame:
        """Return the frame of all places of a block of `stride` positions, the landmark's too."""
        offsets = torch.arange(stride, device=like.device)
        back = torch.arange(window_blocks, -1, -1, device=like.device)
        far = offsets + back[:, None] * stride  # [w + 1, P]
        distance = far[:, :, None] - offsets[:-1]  # [w + 1, P, K]
        cos, sin = rotary.table(far, like.dtype)
        return cls(cos, sin, (distance < 0) | (distance >= window_blocks * stride))

    def rows(self, places: slice) -> Frame:
        """Return the frame of some of the places."""
        return Frame(self.cos[:, places], self.sin[:, places], self.hidden[:, places])


def _runs(blocks: Tensor, length: int) -> Tensor:
    """Return every run of blocks: [..., N, K, D] -> [..., N + 1 - length, length, K, D]."""
    if not blocks.requires_grad:
        return blocks.unfold(-3, length, 1).movedim(-1, -3)  # a view
    # Of unfold's gradient torch 2.13 compiles wrong code for more than one thread.
    n = blocks.shape[-3] - length + 1
    return torch.stack([blocks[..., i : i + n, :, :] for i in range(length)], dim=-3)


class LocalAttention(nn.Module):
    """Attention to the last window_blocks * block_size tokens; landmark tokens are not seen.

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
        frame: Frame,  # of the R places
        first: int,  # number of the first of the N blocks; those before block 0 are not there
    ) -> Tensor:  # [..., N, R, D]
        """Attend from R positions of each of the last N blocks; K = block_size keys a block.

        The window reaches window_blocks * P positions back, so every query sees as far.
        """
        w = self.window_blocks
        blocks = q.shape[-3]
        near_k, near_v = _runs(k, w + 1), _runs(v, w + 1)  # [..., N, w + 1, K, D]
        q = rotate((q * q.shape[-1] ** -0.5)[..., None, :, :], (frame.cos, frame.sin))
        scores = q @ near_k.transpose(-1, -2)  # [..., N, w + 1, R, K]
        hidden = frame.hidden
        if first < w:
            number = torch.arange(first, first + blocks, device=q.device)[:, None]
            back = torch.arange(w, -1, -1, device=q.device)
            hidden = hidden | (number < back)[..., None, None]
        scores = scores.masked_fill(hidden, float("-inf")).movedim(-3, -2).flatten(-2)
        return scores.softmax(dim=-1) @ near_v.flatten(-3, -2)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:  # [B, N, P, width]
        """Attend over whole sequences, for training."""
        q, k, v = self.project(x)
        frame = Frame.of(rotary, self.window_blocks, x.shape[-2], q)
        k = rotate(k, (frame.cos[-1], frame.sin[-1]))
        pad = (0, 0, 0, 0, self.window_blocks, 0)
        k = F.pad(k[..., :-1, :], pad)
        v = F.pad(v[..., :-1, :], pad)
        return self.out(merge_heads(self.attend(q, k, v, frame, 0)))
