"""Landmark Attention read through a store: the streaming form of model/landmark.py.

The retrieving layers keep their past in a kvstore context, the local layers a short window in the
context's state. Owns the order of things within a step; the arithmetic is in attention.py and
layers.py, the bytes are the store's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.block import BlockSpec
from model.attention import landmark_attention, window_attention
from model.config import LandmarkConfig
from model.landmark import LandmarkAttention
from model.layers import LocalAttention, merge_heads, rotate
from model.stream import Layout, Rows, Stream


@dataclass(frozen=True)
class Retrieval:
    """How the past is searched.

    top_k: older blocks that each head (or all heads together) finds for each selection.
    near: recent blocks that are always attended to, at their exact places. Older ones share one
        place while they are searched, and those found then take the places behind the near ones in
        age order (the paper's "stingy" positions), so that no place exceeds what training has seen.
    segment: tokens that share one selection in whole blocks; single tokens select alone.
    share_heads: one selection for all heads of a layer, by a block's best score in any of them.
    search: False takes as many more of the nearest blocks instead of searching (the control).
    """

    top_k: int
    near: int
    segment: int
    share_heads: bool = False
    search: bool = True

    def __post_init__(self) -> None:
        for name, least in (("top_k", 0), ("near", 0), ("segment", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")


class LandmarkStream(Stream):
    """A model with landmark tokens reading one text. See `Stream`."""

    way = Retrieval

    @staticmethod
    def layout(config: LandmarkConfig) -> Layout:
        """Return the layout: a stream for each head of each retrieving layer."""
        spec = BlockSpec.kv(config.block_size, config.head_dim, torch.bfloat16)
        return Layout(spec, config.retrieving * config.heads, config.head_dim)

    @staticmethod
    def retrieval_of(config: LandmarkConfig, top_k: int | None = None) -> Retrieval:
        """Return how a model searches, if nobody wants it otherwise."""
        k = config.top_k if top_k is None else top_k
        return Retrieval(k, config.near, config.segment)

    @staticmethod
    def most_blocks(config: LandmarkConfig, retrieval: Retrieval) -> int:
        """Return how many blocks one selection has at most: each head its own."""
        return config.heads * (retrieval.near + retrieval.top_k)

    @staticmethod
    def controls(retrieval: Retrieval) -> dict[str, Retrieval]:
        """Return ways to do without the search that is measured, by name."""
        return {
            "k=0": replace(retrieval, top_k=0, near=0),
            "window only": replace(retrieval, search=False),
        }

    @property
    def _local_layers(self) -> int:
        layers: str = self.model.config.layers
        return layers.count("l")

    def _check_retrieval(self, retrieval: Retrieval) -> None:
        config = self.model.config
        if config.block_size % retrieval.segment:
            raise ValueError(
                f"segment {retrieval.segment} must divide the block size {config.block_size}"
            )
        table, stride = self.model.rotary.table, config.block_size + 1
        back = stride * torch.arange(1, retrieval.near + retrieval.top_k + 1, device=self.device)
        self._shifts = table(back, torch.float32)  # [near + top_k, D]
        # What turns a block's P places: queries, keys, and the queries of the search, to which all
        # older blocks lie where the first behind the near ones does.
        own = torch.arange(stride, device=self.device)
        turns = [table(p, torch.float32) for p in (own, own, own + stride * (retrieval.near + 1))]
        scale = torch.tensor([config.head_dim**-0.5, 1.0, config.head_dim**-0.5])
        scale = scale.to(self.device).view(3, 1, 1, 1, 1)
        self._turns = tuple(scale * torch.stack(t)[:, None, None] for t in zip(*turns, strict=True))

    def _resume(self, state: dict[str, Tensor]) -> None:
        pass

    def _state(self) -> dict[str, Tensor]:
        return {}

    def _kept_tokens(self) -> int:
        return self.position

    def _step(self, x: Tensor, rows: Rows, wanted: int) -> Tensor:
        if not rows.whole:
            self._prefetch()
        self._last_ids = []
        groups = Groups(rows, self.retrieval, self.device)
        local = retrieving = 0
        for layer in self.model.stack:
            inner = layer.attention_norm(x)
            if isinstance(layer.attention, LocalAttention):
                out = self._local(layer.attention, inner, rows, local)
                local += 1
            else:
                out = self._retrieving(layer.attention, inner, groups, retrieving)
                retrieving += 1
            x = x + out
            x = x + layer.mlp(layer.mlp_norm(x))
        if rows.whole:
            self._last_ids = []
        return x[:, : rows.tokens].flatten(0, 1)

    def _retrieving(
        self, attention: LandmarkAttention, x: Tensor, groups: Groups, layer: int
    ) -> Tensor:
        config, rows = self.model.config, groups.rows
        heads = config.heads
        streams = slice(layer * heads, (layer + 1) * heads)
        q, k, v = (t.float() for t in attention.project(x))  # [H, N, R, D]
        cos, sin = (t[..., rows.places, :] for t in self._turns)
        q, k, asking = rotate(torch.stack((q, k, q)), (cos, sin))  # from the own block's start
        own_k, own_v = k[..., : rows.tokens, :], v[..., : rows.tokens, :]
        planes = [
            t.flatten(1, 2).to(plane.dtype)
            for t, plane in zip((own_k, own_v), self.store.spec.planes, strict=True)
        ]
        if rows.start:  # the open block's earlier tokens are seen too
            open_k, open_v = (t.to(q.dtype) for t in self.context.open_block(streams))
            own_k = torch.cat((open_k[:, None], own_k), dim=2)
            own_v = torch.cat((open_v[:, None], own_v), dim=2)
        landmarks = k[..., -1, :] if rows.closes else None  # [H, N, D]
        self.context.append(streams, planes, landmarks)
        q = groups.gather(q)  # [H, G, R', D]
        local = window_attention(q, groups.of_block(own_k), groups.of_block(own_v), groups.seen)
        out = self._fetch(q, groups.gather(asking), groups, streams, local)
        return attention.out(merge_heads(groups.scatter(out)))

    def _fetch(
        self,
        q: Tensor,  # [H, G, R', D]
        asking: Tensor,  # [H, G, R', D] the same, placed for the search
        groups: Groups,
        streams: slice,
        local: tuple[Tensor, Tensor],
    ) -> Tensor:  # [H, G, R', D]
        """Merge what the past says to the queries into the local output."""
        blocks = self._select(asking, groups, streams)  # [H, G, M]
        some_absent = groups.rows.first < blocks.shape[-1]
        if some_absent and (blocks < 0).all():
            return local[0]
        landmarks = self.context.index.gather(streams, torch.from_numpy(blocks))  # [H, G, M, D]
        turns = self._shifts  # most often all
        if blocks.shape[-1] < len(turns[0]):
            turns = (turns[0][: blocks.shape[-1]], turns[1][: blocks.shape[-1]])
        ids = self.context.ids(streams, blocks.clip(min=0) if some_absent else blocks)
        if some_absent:
            # There the kernel looks at none; ask for one that is asked for anyway.
            ids = np.where(blocks < 0, ids.flat[blocks.argmax()], ids)
        self._last_ids.append(ids)
        keys, values = self.store.hot_planes
        waves = [slice(None)]  # one group's blocks must fit together
        if ids.shape[1] > 1:
            by_group = ids.swapaxes(0, 1).reshape(ids.shape[1], -1)  # [G, H * M]
            waves = list(self.store.waves(by_group))
        parts: list[Tensor] = []
        for part in waves:
            given = [q, landmarks, *local]
            if len(waves) > 1:
                given = [t[:, part] for t in given]
            some_q, some_landmarks, *some_local = given
            with self.store.pinned(ids[:, part]) as pin:
                slots = np.where(blocks[:, part] < 0, -1, pin.slots) if some_absent else pin.slots
                out, _, weights = landmark_attention(
                    some_q,
                    turns,
                    some_landmarks,
                    keys,
                    values,
                    torch.from_numpy(slots).to(self.device),
                    (some_local[0], some_local[1]),
                )
                pin.weigh(weights.mean(dim=-1) if weights.shape[-1] > 1 else weights[..., 0])
                parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _select(
        self,
        asking: Tensor,  # [H, G, R', D]
        groups: Groups,
        streams: slice,
    ) -> NDArray[np.int64]:  # [H, G, M]
        """Choose each group's blocks by number, the m-th to be placed m blocks back.

        The near ones come first, then those found, each kind youngest first. -1: none.
        """
        r = self.retrieval
        recent = groups.recent[None].repeat(len(asking), axis=0)
        if not r.search or r.top_k == 0 or groups.last <= r.near:
            return recent
        query = asking[:, :, : groups.shared].mean(dim=2) if groups.shared > 1 else asking[:, :, 0]
        most = min(r.top_k, groups.last - r.near)  # there are no more
        found, scores = self.context.index.search(streams, query, most, before=groups.limit)
        if r.share_heads:
            found = _best_of_heads(found, scores)
        youngest_first = np.sort(found.cpu().numpy(), axis=-1)[..., ::-1]
        return np.concatenate((recent, youngest_first), axis=-1)


def _best_of_heads(blocks: Tensor, scores: Tensor) -> Tensor:
    """Return the best k blocks of all heads, for each of them: [H, G, k] -> [H, G, k].

    Of a block's several scores the best counts. The best k by their best score in any head are
    among the heads' own best k, so pooling these is exact.
    """
    heads, _, k = blocks.shape
    best, order = scores.transpose(0, 1).flatten(1).sort(dim=-1, descending=True, stable=True)
    pooled = blocks.transpose(0, 1).flatten(1).gather(-1, order)  # [G, H * k]
    earlier = torch.ones(2 * pooled.shape[-1:], dtype=torch.bool, device=blocks.device).tril(-1)
    again = ((pooled[:, :, None] == pooled[:, None, :]) & earlier).any(dim=-1)
    best, at = best.masked_fill(again, float("-inf")).topk(k, dim=-1)
    chosen = pooled.gather(-1, at).masked_fill(best == float("-inf"), -1)
    return chosen.expand(heads, *chosen.shape)


class Groups:
    """Rows regrouped by who shares a selection: G groups of R' rows.

    A piece of whole blocks has block_size / segment groups a block, each with its segment's
    tokens and the landmark's row, which counts only in the block's last group. A piece inside
    one block has a group a row.

    last: the greatest number of a block; recent: int64 [G, near] (or [G, near + top_k] where
    nothing is searched), the numbers of the blocks before each group's own, -1: none; limit:
    [G], or one for all, blocks below it are older; seen: bool [G, R', T], tokens of the own block
    that a row sees, None: all; shared: rows whose mean query selects.
    """

    def __init__(self, rows: Rows, retrieval: Retrieval, device: torch.device) -> None:
        self.rows = rows
        place = torch.arange(rows.start, rows.stop, device=device)
        if rows.whole:
            segment = retrieval.segment
            per_block = rows.block_size // segment
            tokens = place[:-1].view(per_block, segment)
            landmark = place[-1:].expand(per_block, 1)
            self._take = torch.cat((tokens, landmark), dim=1)  # [per_block, segment + 1]
            places = self._take.repeat(rows.blocks, 1)
            block = np.arange(rows.blocks).repeat(per_block)
            self._block = torch.from_numpy(block).to(device)
            number = block + rows.first
            self.shared = segment
        else:
            places = place[:, None]
            number = np.full(len(place), rows.first)
            self.shared = 1
        self.last = rows.first + rows.blocks - 1
        known = torch.arange(min(rows.stop, rows.block_size), device=device)
        # The only row of a piece comes last and sees all.
        self.seen = known <= places[:, :, None] if rows.stop - rows.start > 1 else None
        near = retrieval.near + (0 if retrieval.search else retrieval.top_k)
        self.recent = (number[:, None] - np.arange(1, near + 1)).clip(min=-1)
        limit = (number - near).clip(min=0)
        self.limit = limit if rows.whole else int(limit[0])

    def of_block(self, x: Tensor) -> Tensor:
        """[H, N, T, D] -> [H, G, T, D], or what broadcasts to it."""
        return x[:, self._block] if self.rows.whole else x

    def gather(self, x: Tensor) -> Tensor:
        """[H, N, R, D] -> [H, G, R', D]."""
        if self.rows.whole:
            return x[:, :, self._take].flatten(1, 2)
        return x[:, 0, :, None]

    def scatter(self, x: Tensor) -> Tensor:
        """[H, G, R', D] -> [H, N, R, D]."""
        if not self.rows.whole:
            return x.transpose(1, 2)
        x = x.unflatten(1, (self.rows.blocks, -1))  # [H, N, per_block, segment + 1, D]
        return torch.cat((x[..., :-1, :].flatten(2, 3), x[:, :, -1, -1:]), dim=2)
