"""Grouped Cross Attention's layers put together, and their form for training: whole texts at once.

In this file S is the tokens of a chunk, P = S + 1 its places, the last one the landmark's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import weighed_attention, wide
from model.config import VOCABULARY, GCAConfig
from model.embedding import Embedding
from model.gca import Encoder, EncoderLayer, Group, LowerLayer, UpperLayer
from model.layers import RMSNorm, Rotary, draw_weights, split_heads
from model.retriever_loss import clue_loss, judging_loss


class Selection:
    """The chunks that the segments of a batch attend to, the nearest first, and their weights.

    chunks: int64 [Q, near + k], of all chunks of the batch; weights: [Q, near + k], the softmax of
    the scores without noise, 0 where there is none. Q segments of rows: [B, N, G].
    """

    def __init__(self, chunks: Tensor, weights: Tensor) -> None:
        self.chunks = chunks
        self.weights = weights


class Reading(NamedTuple):
    """What comes of whole sequences in training.

    logits: [B, N, S, 256], of the next byte. missed: [], of the chunks that were meant to be found,
    the mean of -log of their weight among all that may be found, as if each token asked for itself,
    summed over the groups; 0 where none are meant. misjudged: [], how far the weights of the chunks
    found are from what the attention takes of each, summed over the layers (see retriever_loss.py).
    """

    logits: Tensor
    missed: Tensor
    misjudged: Tensor


class GroupedCrossTransformer(nn.Module):
    """A byte-level language model whose upper layers retrieve chunks."""

    def __init__(self, config: GCAConfig, *, initialize: bool = True) -> None:
        """Make a model; initialize: False where the weights are about to be loaded."""
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.width, config.reach, config.grams, config.buckets)
        self.lower = nn.ModuleList(LowerLayer(config) for _ in range(config.lower))
        self.encoder = Encoder(config)
        self.groups = nn.ModuleList(Group(config) for _ in range(config.groups))
        self.norm = RMSNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.rotary = Rotary(config.head_dim, config.rope_base)
        if initialize:
            self._initialize()

    def _initialize(self) -> None:
        layers = self.config.lower + self.config.groups * self.config.group_layers
        draw_weights(self, layers)
        self._look_back()

    @torch.no_grad()
    def _look_back(self) -> None:
        """Start out as a model that looks up where the bytes right before were said, and what came
        next there: see LandmarkTransformer._look_back. Here it takes a search, too: a landmark
        begins as the mean of what its chunk says, and a query as what was said right before.
        """
        config = self.config
        width, dim, reach = config.width, config.head_dim, config.reach
        letters = torch.randn(VOCABULARY + 1, width) * reach**-0.5  # a byte's vector, anywhere
        turns = [torch.linalg.qr(torch.randn(width, width))[0] for _ in range(reach + 1)]
        self.embedding.weight.copy_(torch.cat([letters @ turn for turn in turns[:reach]]))
        self.head.weight.copy_(letters[:VOCABULARY] @ turns[reach] * width**-0.5)
        # The landmark's place takes the mean of its chunk.
        for layer in self.encoder.layers:
            assert isinstance(layer, EncoderLayer)
            turn = torch.linalg.qr(torch.randn(width, width))[0]
            layer.attention.qkv.weight[: 2 * width] *= 0.1
            layer.attention.qkv.weight[2 * width :] = turn
            layer.attention.out.weight.copy_(turn.T)
        keys, values = self.encoder.keys_values.weight.view(2, config.heads, dim, width)
        if config.lag:  # the key is of the place before: alike is what looks alike, strings too
            about = torch.nn.init.orthogonal_(torch.empty(config.landmark_dim, width))
            for head in keys:
                torch.nn.init.orthogonal_(head)
            queries, sharp = 2.0 * keys, 4.0
        else:
            looks = torch.randn(reach, config.landmark_dim, width) * width**-0.5
            about, sharp = torch.einsum("sdw,swv->dv", looks, torch.stack(turns[:reach])), 1.0
            looks = torch.randn(config.heads, reach - 1, dim, width) * 0.5 * dim**-0.25
            keys.copy_(torch.einsum("hsdw,swv->hdv", looks, torch.stack(turns[1:reach])))
            queries = torch.einsum("hsdw,swv->hdv", looks, torch.stack(turns[: reach - 1]))
        self.encoder.landmark.weight.copy_(about)
        says = torch.linalg.qr(torch.randn(width, width))[0]
        values.copy_((says @ turns[0]).view_as(values))
        for group in self.stacks:
            group.query.weight.copy_(sharp * about)
            for layer in group.stack:
                layer.cross.query.weight.copy_(queries.flatten(0, 1))
                layer.cross.out.weight.copy_((says @ turns[reach]).T)
                # gelu(z) - gelu(-z) = z: half of the MLP lets through what was found.
                size = min(width, config.mlp_width // 2)
                through = torch.linalg.qr(torch.randn(width, width))[0][:size]
                up, down = layer.mlp.up.weight, layer.mlp.down.weight
                up[:size], up[size : 2 * size] = through, -through
                down[:, :size], down[:, size : 2 * size] = 0.5 * through.T, -0.5 * through.T

    @property
    def below(self) -> list[LowerLayer]:
        """The lower layers, from the input up."""
        return [layer for layer in self.lower if isinstance(layer, LowerLayer)]

    @property
    def stacks(self) -> list[Group]:
        """The groups, from the lower layers up."""
        return [group for group in self.groups if isinstance(group, Group)]

    def forward(
        self,
        tokens: Tensor,  # int64 [B, N, S]
        segment: int | None = None,
        noise: bool = False,
        foreign: bool = False,
        passage: Tensor | None = None,  # int64 [B]
        apart: Tensor | None = None,  # bool [B, N]
        meant: Tensor | None = None,  # bool [B, N, S, N]
    ) -> Reading:
        """Read whole sequences, for training.

        segment: tokens that use what the first of them finds; 0: a chunk uses what the landmark of
        the chunk before finds, as published; None: the configuration's. noise: add Gumbel noise
        to the scores that select. foreign: the chunks of other sequences may be found too, but
        those set apart, because nothing tells them from what a text has itself: a short text has
        few chunks to be confused by, a million tokens have many. passage: of foreign chunks,
        sequences with the same number are one text, in order, of which each finds what those before
        it have. meant: chunks of its own sequence that each group should find for a token, where
        that is known.
        """
        segment = self.config.segment if segment is None else segment
        before = self.embedding.nothing().expand(len(tokens), -1)
        x = self.embedding(tokens, before, landmarks=True)
        for layer in self.below:
            x = x + layer.attention(layer.attention_norm(x), self.rotary)
            x = x + layer.mlp(layer.mlp_norm(x))
        keys, values, landmarks = self.encoder(x, self.rotary)
        allowed = _allowed(tokens, foreign, passage, apart)
        retrieves = self.config.near + self.config.top_k > 0
        missed, misjudged = x.new_zeros(()), x.new_zeros(())
        for group in self.stacks:
            if retrieves:
                if meant is not None:
                    asked = group.ask(x[:, :, :-1])
                    missed = missed + clue_loss(asked, landmarks, allowed, meant)
                found = self._select(group, x, landmarks, allowed, segment, noise)
                held = [_gather(t, found.chunks, self.config.heads) for t in (keys, values)]
            for layer in group.stack:
                x = x + layer.attention(layer.attention_norm(x), self.rotary)
                inner = x
                if retrieves:
                    said, taken = self._cross(layer, x, held, found.weights, segment)
                    misjudged = misjudged + judging_loss(found.weights, taken)
                    inner = x + said
                x = x + layer.mlp(layer.mlp_norm(inner))
        return Reading(self.head(self.norm(x[..., :-1, :])), missed, misjudged)

    def _select(
        self,
        group: Group,
        x: Tensor,  # [B, N, P, width]
        landmarks: Tensor,  # [B, N, dim]
        allowed: Tensor,  # bool [B * N, B * N]
        segment: int,
        noise: bool,
    ) -> Selection:
        before = F.pad(x[:, :-1, -1:], (0, 0, 0, 0, 1, 0))  # the landmark's of the chunk before
        queries = group.ask(x[:, :, :-1:segment] if segment else before)  # [B, N, G, dim]
        scores = wide(queries.flatten(0, 2) @ landmarks.flatten(0, 1).T)  # [Q, M]
        nearest = _nearest(len(x), x.shape[1], self.config.near, x.device)
        with torch.no_grad():
            noisy = scores
            if noise:
                noisy = noisy - torch.empty_like(noisy).exponential_().log()
            # The nearest are taken anyway; those that are not there go into a column more.
            older = F.pad(allowed, (0, 1)).scatter(-1, nearest, value=False)[:, :-1]
            older = older.repeat_interleave(queries.shape[2], dim=0)
            count = min(self.config.top_k, scores.shape[-1])
            best, chunks = noisy.masked_fill(~older, float("-inf")).topk(count, dim=-1)
            nearest = nearest.repeat_interleave(queries.shape[2], dim=0)
            missing = nearest == scores.shape[-1]
            chunks = torch.cat((nearest.masked_fill(missing, 0), chunks), dim=-1)
        absent = torch.cat((missing, best.isneginf()), dim=-1)
        chosen = scores.gather(-1, chunks).masked_fill(absent, float("-inf"))
        # A row without any must not become NaN, nor its gradient.
        chosen = chosen.masked_fill(absent.all(dim=-1, keepdim=True), 0.0)
        return Selection(chunks, chosen.softmax(dim=-1).masked_fill(absent, 0.0))

    def _cross(
        self,
        layer: UpperLayer,
        x: Tensor,  # [B, N, P, width]
        held: list[Tensor],  # keys, values [Q * heads, k * S, D]
        weights: Tensor,  # [Q, k]
        segment: int,
    ) -> tuple[Tensor, Tensor]:  # [B, N, P, width], [Q, heads, rows, k]
        """What the chunks say to each place, and what the tokens take of each chunk."""
        config = self.config
        q = split_heads(layer.cross.query(layer.cross_norm(x)), config.heads)  # [B, H, N, P, D]
        q = q * config.head_dim**-0.5
        rows = segment or config.block_size
        # Each segment has a row more: the landmark's, which is of the last one.
        tokens = q[..., :-1, :].unflatten(-2, (-1, rows))  # [B, H, N, G, rows, D]
        landmark = q[..., None, -1:, :].expand(*tokens.shape[:-2], 1, -1)
        q = torch.cat((tokens, landmark), dim=-2).permute(0, 2, 3, 1, 4, 5)  # [B, N, G, H, R, D]
        out, taken = weighed_attention(
            q.reshape(-1, config.heads, rows + 1, config.head_dim),
            held[0],
            held[1],
            weights,
            config.softmax == "found",
        )
        out = out.unflatten(0, (*x.shape[:2], -1)).permute(0, 1, 2, 4, 3, 5).flatten(-2)
        out = torch.cat((out[..., :-1, :].flatten(2, 3), out[:, :, -1, -1:]), dim=2)
        return layer.cross.out(out), taken[:, :, :rows]


def _nearest(sequences: int, chunks: int, near: int, device: torch.device) -> Tensor:
    """The `near` chunks before each, int64 [B * N, near]; where there is none, B * N."""
    number = torch.arange(sequences * chunks, device=device)[:, None]
    back = torch.arange(1, near + 1, device=device)
    return torch.where(number % chunks >= back, number - back, sequences * chunks)


def _allowed(
    tokens: Tensor,  # [B, N, S]
    foreign: bool,
    passage: Tensor | None,
    apart: Tensor | None,
) -> Tensor:  # bool [B * N, B * N]
    """Which chunks the tokens of a chunk may find: those before it, and of other sequences."""
    sequences, chunks = tokens.shape[:2]
    sequence = torch.arange(sequences, device=tokens.device).repeat_interleave(chunks)
    number = torch.arange(chunks, device=tokens.device).repeat(sequences)
    own = sequence[:, None] == sequence
    seen = own & (number[:, None] > number)
    if not foreign:
        return seen
    other = ~own
    if passage is not None:
        passage = passage.repeat_interleave(chunks)
        same = passage[:, None] == passage
        other = other & (~same | (sequence[:, None] > sequence))
    if apart is not None:
        other = other & ~apart.flatten()
    return seen | other


def _gather(x: Tensor, chunks: Tensor, heads: int) -> Tensor:
    """[B, N, S, width], int64 [Q, k] -> [Q * heads, k * S, D]."""
    x = x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2)  # [B * N, H, S, D]
    size, dim = x.shape[-2:]
    rows = chunks[:, None] * heads + torch.arange(heads, device=x.device)[:, None]  # [Q, H, k]
    found = x.reshape(-1, size, dim).index_select(0, rows.flatten())
    return found.view(rows.shape[0] * heads, -1, dim)
