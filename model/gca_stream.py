"""Grouped Cross Attention read through a store: the streaming form of model/gca_transformer.py.

The chunks' keys, values and landmarks are one stream of a kvstore context, whatever the number of
layers. The upper layers keep nothing of a chunk, and see back no further than their windows add up
to: while a text is read they wait, and run over its last chunks when a prediction is wanted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import gcd

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvstore.block import BlockSpec, Plane
from model.attention import weighed_attention
from model.config import GCAConfig
from model.gca import Group, UpperLayer
from model.gca_segments import Segments
from model.stream import Layout, Rows, Stream

HOW = ("search", "recent", "random")

ANSWERING = 4
"""Tokens of a question and its answer that use what the first of them finds: the shortest segments
of the training."""

AT_ONCE = 256
"""Searches whose chunks are copied out together; each takes near + top_k blocks, thrice."""


@dataclass(frozen=True)
class ChunkRetrieval:
    """How the past is searched.

    top_k: older chunks that each group of layers finds, 0: none. segment: tokens that use what the
    first of them finds; 0: a chunk uses what the landmark before it finds, as published. how:
    "search" finds the best; "recent" takes the nearest and "random" any, as controls. near: recent
    chunks that are always attended to.
    """

    top_k: int
    segment: int
    how: str = "search"
    near: int = 0

    def __post_init__(self) -> None:
        if min(self.top_k, self.near) < 0:
            raise ValueError(f"top_k and near must be at least 0, not {self.top_k} and {self.near}")
        if self.segment < 0:
            raise ValueError(f"segment must be at least 0, not {self.segment}")
        if self.how not in HOW:
            raise ValueError(f"how is {self.how!r}: use {', '.join(HOW)}")


class GCAStream(Stream):
    """A model with Grouped Cross Attention reading one text. See `Stream`.

    Places are counted with the landmarks': a chunk has block_size + 1.
    """

    way = ChunkRetrieval

    @staticmethod
    def layout(config: GCAConfig) -> Layout:
        """Return the layout: one stream for the whole model."""
        shape = (config.block_size, config.heads, config.head_dim)
        planes = tuple(Plane(name, shape, torch.bfloat16) for name in ("keys", "values"))
        return Layout(BlockSpec(planes), 1, config.landmark_dim)

    @staticmethod
    def retrieval_of(config: GCAConfig, top_k: int | None = None) -> ChunkRetrieval:
        """Return how a model searches, if nobody wants it otherwise."""
        k = config.top_k if top_k is None else top_k
        return ChunkRetrieval(k, config.segment, near=config.near)

    @staticmethod
    def most_blocks(config: GCAConfig, retrieval: ChunkRetrieval) -> int:
        """Return how many blocks one selection has at most."""
        return retrieval.near + retrieval.top_k

    @staticmethod
    def controls(retrieval: ChunkRetrieval) -> dict[str, ChunkRetrieval]:
        """Return ways to do without the search that is measured, by name."""
        return {how: replace(retrieval, how=how) for how in ("recent", "random")}

    def answering(self) -> ChunkRetrieval:
        """See `Stream.answering`."""
        way: ChunkRetrieval = self.retrieval
        return replace(way, segment=gcd(ANSWERING, way.segment or self.model.config.block_size))

    @property
    def _local_layers(self) -> int:
        config: GCAConfig = self.model.config
        return config.lower + self._upper_layers

    @property
    def _upper_layers(self) -> int:
        config: GCAConfig = self.model.config
        return config.groups * config.group_layers

    def _check_retrieval(self, retrieval: ChunkRetrieval) -> None:
        size = self.model.config.block_size
        if retrieval.segment and size % retrieval.segment:
            raise ValueError(f"segment {retrieval.segment} must divide the block size {size}")

    def _resume(self, state: dict[str, Tensor]) -> None:
        config: GCAConfig = self.model.config
        if state:
            self._open, self._waiting = state["open"], state["waiting"]
            self._found, self._weights = state["found"], state["weights"]
            self._asked = state["asked"]
            self._read_to = int(state["read_to"])
            return
        empty = torch.zeros(0, config.width, device=self.device)
        # What the lower layers say of the chunk that is not full, and of the places from _read_to
        # on, which the upper layers have not seen.
        self._open, self._waiting = empty, empty
        self._read_to = 0
        # For each group what its last query was, and what that has found.
        self._asked = torch.zeros(config.groups, config.landmark_dim, device=self.device)
        self._found = torch.full((config.groups, 1), -1, device=self.device)
        self._weights = torch.zeros(config.groups, 1, device=self.device)

    def _state(self) -> dict[str, Tensor]:
        return {
            "open": self._open,
            "waiting": self._waiting,
            "found": self._found,
            "weights": self._weights,
            "asked": self._asked,
            "read_to": torch.tensor(self._read_to),
        }

    def _kept_tokens(self) -> int:
        size: int = self.model.config.block_size
        return self.position - self.position % size

    def _step(self, x: Tensor, rows: Rows, wanted: int) -> Tensor:
        """See `Stream._step`."""
        if wanted and not rows.whole:
            self._prefetch()
        for i, layer in enumerate(self.model.below):
            x = x + self._local(layer.attention, layer.attention_norm(x), rows, i)
            x = x + layer.mlp(layer.mlp_norm(x))
        self._keep(x, rows)
        self._waiting = torch.cat((self._waiting, x.flatten(0, 1)))
        self._forget(rows, wanted)
        return self._catch_up()[-rows.blocks * rows.tokens :] if wanted else x[:0, 0]

    def _keep(self, x: Tensor, rows: Rows) -> None:
        """Encode the chunks that are full, and append them to the context. x: [N, R, width]."""
        if not rows.closes:
            self._open = torch.cat((self._open, x[0]))
            return
        if not rows.whole:
            x = torch.cat((self._open, x[0]))[None]
            self._open = self._open[:0]
        config: GCAConfig = self.model.config
        keys, values, landmarks = self.model.encoder(x, self.model.rotary)
        planes = [
            plane.flatten(0, 1).unflatten(-1, (config.heads, -1))[None].to(held.dtype)
            for plane, held in zip((keys, values), self.store.spec.planes, strict=True)
        ]
        self.context.append(slice(0, 1), planes, landmarks[None].float())

    def _forget(self, rows: Rows, wanted: int) -> None:
        """Drop what waits of chunks so far back that nothing which is wanted depends on them.

        A place's state depends on as many chunks before its own as the windows of the upper layers
        add up to. What the windows hold of before reaches no further.
        """
        config: GCAConfig = self.model.config
        stride = config.block_size + 1
        back = self._upper_layers * config.window_blocks
        last = rows.first + rows.blocks - 1
        if rows.closes and not wanted:
            last += 1  # what comes next is of another chunk
        first = last - back
        if wanted:
            first -= (wanted - 1) // config.block_size
        drop = first * stride - self._read_to
        if drop > 0:
            self._waiting = self._waiting[drop:]
            self._read_to += drop

    def _catch_up(self) -> Tensor:
        """Run the upper layers over all that waits; return the states [t, width] of the tokens."""
        config: GCAConfig = self.model.config
        stride = config.block_size + 1
        searches = config.block_size // (self.retrieval.segment or config.block_size)
        at_once = max(1, AT_ONCE // searches)
        done: list[Tensor] = []
        while len(self._waiting):
            first, start = divmod(self._read_to, stride)
            if start or len(self._waiting) < stride:
                take, blocks = min(stride - start, len(self._waiting)), 1
            else:
                blocks = min(len(self._waiting) // stride, at_once)
                take = blocks * stride
            stop = start + take // blocks
            piece = Rows(first, blocks, start, stop, config.block_size)
            x = self._waiting[:take].view(blocks, -1, config.width)
            x = self._upper(x, piece)
            self._waiting = self._waiting[take:]
            self._read_to += take
            done.append(x[:, : piece.tokens].flatten(0, 1))
        return torch.cat(done)

    def _upper(self, x: Tensor, rows: Rows) -> Tensor:
        """Run the upper layers over x [N, R, width]."""
        self._last_ids = []
        found = []
        segments = Segments(rows, self.retrieval.segment, self.device)
        window: int = self.model.config.lower
        for g, group in enumerate(self.model.stacks):
            chunks, weights = self._select(group, x, segments, g)
            found.append((chunks[-1], weights[-1]))
            held = self._fetch(chunks, weights)
            for layer in group.stack:
                inner = layer.attention_norm(x)
                x = x + self._local(layer.attention, inner, rows, window)
                said = self._cross(layer, x, segments, held, weights) if held else 0.0
                x = x + layer.mlp(layer.mlp_norm(x + said))
                window += 1
        self._found, self._weights = (torch.stack(each) for each in zip(*found, strict=True))
        if rows.whole:
            self._last_ids = []
        return x

    def _select(self, group: Group, x: Tensor, segments: Segments, g: int) -> tuple[Tensor, Tensor]:
        """Choose the chunks [Q, k] of each segment of the rows, -1: none, and their weights."""
        if segments.by_chunk:
            last = group.ask(x[:, -1])  # [N, dim], the landmarks if these are whole chunks
            queries = torch.cat((self._asked[g][None], last[:-1]))[: segments.asking]
        else:
            queries = group.ask(segments.askers(x))
        if segments.rows.closes:  # it may be searched by chunk from here on
            self._asked[g] = group.ask(x[-1, -1])
        chunks, weights = self._find(queries, segments.limits, g)
        if segments.goes_on:  # the first rows use what was found before
            chunks = _stacked(self._found[g], chunks, -1)
            weights = _stacked(self._weights[g], weights, 0)
        return chunks[segments.of_row], weights[segments.of_row]

    def _find(self, queries: Tensor, limits: Tensor, g: int) -> tuple[Tensor, Tensor]:
        """Find chunks below the limits [Q] for queries [Q, dim]: [Q, k], and their weights."""
        r, index = self.retrieval, self.context.index
        nearest = limits[:, None] - 1 - torch.arange(r.near, device=self.device)
        limits = (limits - r.near).clamp(min=0)
        if r.how == "search" and r.top_k:
            most = max(1, min(r.top_k, self.context.sealed(0)))  # there are no more
            chunks = index.search(slice(0, 1), queries[None].float(), most, before=limits)[0][0]
        elif r.how == "recent" or not r.top_k:
            chunks = limits[:, None] - 1 - torch.arange(r.top_k, device=self.device)
        else:
            draw = random.Random(self._read_to << 8 | g).sample
            drawn = [draw(range(limit), min(limit, r.top_k)) for limit in limits.tolist()]
            filled = [some + [-1] * (r.top_k - len(some)) for some in drawn]
            chunks = torch.tensor(filled, dtype=torch.int64).view(-1, r.top_k).to(self.device)
        chunks = torch.cat((nearest, chunks), dim=-1)
        absent = chunks < 0
        if absent.all():
            return chunks.clamp(min=-1), torch.zeros(chunks.shape, device=self.device)
        landmarks = index.gather(slice(0, 1), chunks.clamp(min=-1)[None])[0]  # [Q, k, dim]
        scores = (landmarks @ queries.float()[..., None])[..., 0].masked_fill(absent, -torch.inf)
        scores = scores.masked_fill(absent.all(dim=-1, keepdim=True), 0.0)
        weights = scores.softmax(dim=-1).masked_fill(absent, 0.0)
        return chunks.clamp(min=-1), weights

    def _fetch(self, chunks: Tensor, weights: Tensor) -> list[Tensor] | None:
        """Copy out keys and values [Q * heads, k * S, D] of chunks [Q, k]; None if there are none.

        Once for all layers of a group. Where there is no chunk its place holds another one.
        """
        absent = chunks < 0
        if absent.all():
            return None
        numbers = chunks.cpu().numpy()
        numbers = np.where(numbers < 0, numbers.max(), numbers)
        ids = self.context.ids(slice(0, 1), numbers[None])[0]  # [Q, k]
        self._last_ids.append(ids)
        parts: list[list[Tensor]] = []
        for part in self.store.waves(ids):
            with self.store.pinned(ids[part]) as pin:
                slots = torch.from_numpy(pin.slots).to(self.device)
                parts.append([_by_head(slab[slots]) for slab in self.store.hot_planes])
                pin.weigh(weights[part])
        return [torch.cat(planes) for planes in zip(*parts, strict=True)]

    def _cross(
        self,
        layer: UpperLayer,
        x: Tensor,  # [N, R, width]
        segments: Segments,
        held: list[Tensor],
        weights: Tensor,
    ) -> Tensor:  # [N, R, width]
        config: GCAConfig = self.model.config
        q = layer.cross.query(layer.cross_norm(x)) * config.head_dim**-0.5
        q = segments.gather(q).unflatten(-1, (config.heads, -1)).transpose(1, 2)  # [Q, H, R', D]
        keys, values = (plane.to(q.dtype) for plane in held)
        out, _ = weighed_attention(q, keys, values, weights, config.softmax == "found")
        return layer.cross.out(segments.scatter(out.transpose(1, 2).flatten(-2)))


def _stacked(first: Tensor, others: Tensor, nothing: int) -> Tensor:
    """[k], [Q, l] -> [1 + Q, max(k, l)]: what was found before may be more or fewer."""
    most = max(len(first), others.shape[-1])
    parts = (F.pad(t, (0, most - t.shape[-1]), value=nothing) for t in (first[None], others))
    return torch.cat(list(parts))


def _by_head(blocks: Tensor) -> Tensor:
    """[Q, k, S, heads, D] -> [Q * heads, k * S, D]."""
    return blocks.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)
