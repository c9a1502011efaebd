"""A text read through a store: the streaming form of a model, piece by piece.

The retrieving layers keep their past in a kvstore context, the local layers a short window in the
context's state. Owns the order of things within a step; the arithmetic is in attention.py and
layers.py, the bytes are the store's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.config import format_size
from kvstore.context import Context
from kvstore.errors import HotTierTooSmallError
from kvstore.store import Store
from model.attention import block_attention, window_attention
from model.landmark import LandmarkAttention
from model.layers import Frame, LocalAttention, merge_heads, rotate
from model.transformer import Transformer


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


@dataclass(frozen=True)
class Rows:
    """The positions one piece brings: the places start to stop of each of N consecutive blocks.

    first: number of the first block. Place block_size is the landmark's; a piece of several blocks
    has all places of each.
    """

    first: int
    blocks: int
    start: int
    stop: int
    block_size: int

    @property
    def places(self) -> slice:
        """The places in a block."""
        return slice(self.start, self.stop)

    @property
    def closes(self) -> bool:
        """Whether the last place is the landmark's: the block is full."""
        return self.stop > self.block_size

    @property
    def tokens(self) -> int:
        """How many of the places are tokens, not the landmark."""
        return min(self.stop, self.block_size) - self.start

    @property
    def whole(self) -> bool:
        """Whether the piece is whole blocks with their landmarks."""
        return self.tokens == self.block_size


class Stream:
    """A model reading one text; not safe to use from two threads.

    The context must have `retrieving * heads` streams and landmarks of head_dim. A new stream
    goes on where the context's state ends; ValueError if the context holds more or less than that.
    A read that fails midway leaves some layers with more of the text than others: what was read
    before can be had from a fork made before, from this stream no more (RuntimeError).
    """

    def __init__(self, model: Transformer, context: Context, retrieval: Retrieval | None = None):
        config = model.config
        self.model = model
        self.context = context
        self.store: Store = context.store
        self.device = next(model.parameters()).device
        self.retrieval = retrieval or Retrieval(config.top_k, config.near, config.segment)
        self._last_ids: list[NDArray[np.int64]] = []
        state = context.get_state()
        if state:
            self.position = int(state["position"])
            self._windows = [state[f"window.{i}"].clone() for i in range(self._local_layers)]
            self._recent = state["recent"]
        else:
            self.position = 0
            self._recent = model.embedding.nothing()
            shape = (2, config.heads, config.window_blocks + 1, config.block_size, config.head_dim)
            self._windows = [
                torch.zeros(shape, device=self.device) for _ in range(self._local_layers)
            ]
        held = {context.tokens(s) for s in range(context.streams)}
        if held != {self.position}:
            raise ValueError(
                f"the context holds {max(held)} tokens, its state is of {self.position}: "
                "save the state when reading is done"
            )
        self._torn = False
        like = torch.zeros(0, device=self.device)
        self._frame = Frame.of(model.rotary, config.window_blocks, config.block_size + 1, like)

    @property
    def retrieval(self) -> Retrieval:
        """How the past is searched; may be set between reads.

        HotTierTooSmallError where one selection might not fit into the hot tier.
        """
        return self._retrieval

    @retrieval.setter
    def retrieval(self, retrieval: Retrieval) -> None:
        config = self.model.config
        if config.block_size % retrieval.segment:
            raise ValueError(
                f"segment {retrieval.segment} must divide the block size {config.block_size}"
            )
        most = config.heads * (retrieval.near + retrieval.top_k)
        if most > self.store.hot_slots:
            least = most * self.store.spec.nbytes
            raise HotTierTooSmallError(
                f"the hot tier holds {self.store.hot_slots} blocks and a selection has up to "
                f"{most} ({config.heads} heads, {retrieval.near} near, {retrieval.top_k} found): "
                f"give hot at least {least} bytes ({format_size(least)})"
            )
        self._retrieval = retrieval
        furthest = retrieval.near + retrieval.top_k + 1
        back = torch.arange(furthest + 1, device=self.device) * (config.block_size + 1)
        self._shifts = self.model.rotary.table(back, torch.float32)  # [furthest + 1, D]

    @property
    def _local_layers(self) -> int:
        return self.model.config.layers.count("l")

    def save_state(self) -> None:
        """Hand windows, recent bytes and position to the context, which keeps them."""
        self._check()
        state = {f"window.{i}": w for i, w in enumerate(self._windows)}
        state |= {"recent": self._recent, "position": torch.tensor(self.position)}
        self.context.set_state(state)

    def fork(self) -> Stream:
        """Return a stream on a fork of the context; what it reads leaves this one unchanged."""
        self.save_state()
        return Stream(self.model, self.context.fork(), self.retrieval)

    def _check(self) -> None:
        if self._torn:
            raise RuntimeError("an earlier read failed midway; go on from a fork made before it")

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Read bytes [T] (integer, T >= 1) and return the logits [256] of the byte that follows.

        Whole blocks are read at once, a selection a segment; what comes before the first and
        after the last whole block is read with a selection a token.
        """
        for x in self._pieces(tokens):
            last = x
        return self.model.head(self.model.norm(last[-1]))

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        """Read bytes [T] and return the logits [T, 256] of the byte that follows each of them."""
        return self.model.head(self.model.norm(torch.cat(list(self._pieces(tokens)))))

    def _pieces(self, tokens: Tensor) -> Iterator[Tensor]:
        """Read tokens [T] piece by piece; yield the top hidden states [t, width] of each."""
        if tokens.dim() != 1 or not len(tokens):
            raise ValueError(f"read takes bytes [T], T >= 1, not a tensor {list(tokens.shape)}")
        size = self.model.config.block_size
        tokens = tokens.to(self.device, torch.int64)
        start = 0
        while start < len(tokens):
            offset = self.position % size
            left = len(tokens) - start
            if offset or left < size:
                take = min(size - offset, left)
                piece = tokens[start : start + take][None]
            else:
                take = left - left % size
                piece = tokens[start : start + take].view(-1, size)
            stop = offset + piece.shape[1]
            closes = stop == size
            rows = Rows(self.position // size, len(piece), offset, stop + closes, size)
            self._check()
            self._torn = True
            x = self._step(self.model.embedding(piece, self._recent, closes), rows)
            self._recent = torch.cat((self._recent, piece.flatten()))[len(piece.flatten()) :]
            self._torn = False
            start += take
            self.position += take
            yield x[:, : rows.tokens].flatten(0, 1)

    def _step(self, x: Tensor, rows: Rows) -> Tensor:
        """Run all layers over x [N, R, width]."""
        if not rows.whole:
            # Token by token the choice changes little, so the last one is asked for in time to
            # come while the lower layers compute. A segment's choice says little of the next.
            for ids in self._last_ids:
                self.store.prefetch(ids)
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
        return x

    def _local(self, attention: LocalAttention, x: Tensor, rows: Rows, layer: int) -> Tensor:
        size, window = rows.block_size, attention.window_blocks
        q, k, v = (t.float() for t in attention.project(x))  # [H, N, R, D]
        k = rotate(k, self._in_block(rows))
        kept = self._windows[layer]  # [2, H, window + 1, block_size, D]
        new = torch.stack((k[..., : rows.tokens, :], v[..., : rows.tokens, :]))
        if rows.whole:
            kept = torch.cat((kept[:, :, :window], new), dim=2)
        else:
            kept[:, :, -1, rows.start : rows.start + rows.tokens] = new[:, :, 0]
        frame = self._frame.rows(rows.places)
        out = attention.attend(q, kept[0], kept[1], frame, rows.first)
        if rows.closes:  # the open block is full: the window moves on
            kept = torch.cat((kept[:, :, -window:], torch.zeros_like(kept[:, :, :1])), dim=2)
            assert kept.shape[3] == size
        self._windows[layer] = kept
        return attention.out(merge_heads(out))

    def _in_block(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Rotations from the own block's start, [R, D]."""
        return self._frame.cos[-1, rows.places], self._frame.sin[-1, rows.places]

    def _behind(self, blocks: slice) -> tuple[Tensor, Tensor]:
        """Rotations of a query by so many blocks back, [blocks, D]."""
        cos, sin = self._shifts
        return cos[blocks], sin[blocks]

    def _retrieving(
        self, attention: LandmarkAttention, x: Tensor, groups: Groups, layer: int
    ) -> Tensor:
        config, rows = self.model.config, groups.rows
        heads = config.heads
        streams = slice(layer * heads, (layer + 1) * heads)
        q, k, v = (t.float() for t in attention.project(x))  # [H, N, R, D]
        q = q * config.head_dim**-0.5
        q, k = rotate(torch.stack((q, k)), self._in_block(rows))  # from the own block's start
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
        out = self._fetch(q, groups, streams, local)
        return attention.out(merge_heads(groups.scatter(out)))

    def _fetch(
        self, q: Tensor, groups: Groups, streams: slice, local: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Merge what the past says to queries q [H, G, R, D] into the local output."""
        blocks = self._select(q, groups, streams)  # [H, G, M]
        some_absent = groups.rows.first < blocks.shape[-1]
        if some_absent and (blocks < 0).all():
            return local[0]
        landmarks = self.context.index.gather(streams, blocks)  # [H, G, M, D]
        cos, sin = self._behind(slice(1, blocks.shape[-1] + 1))
        placed = rotate(q[:, :, None], (cos[:, None], sin[:, None]))  # [H, G, M, R, D]
        gate = (placed @ landmarks[..., None])[..., 0]  # [H, G, M, R]
        numbers = blocks.cpu().numpy()
        ids = self.context.ids(streams, numbers.clip(min=0) if some_absent else numbers)
        if some_absent:
            # There the kernel looks at none; ask for one that is asked for anyway.
            ids = np.where(numbers < 0, ids.flat[numbers.argmax()], ids)
        self._last_ids.append(ids)
        keys, values = self.store.hot_planes
        waves: Iterable[slice] = [slice(None)]  # one group's blocks must fit together
        if ids.shape[1] > 1:
            waves = self.store.waves(ids.swapaxes(0, 1).reshape(ids.shape[1], -1))  # [G, H * M]
        parts: list[Tensor] = []
        for part in waves:
            with self.store.pinned(ids[:, part]) as pin:
                slots = torch.from_numpy(pin.slots).to(self.device)
                if some_absent:
                    slots = slots.masked_fill(blocks[:, part] < 0, -1)
                out, _, weights = block_attention(
                    placed[:, part],
                    keys,
                    values,
                    slots,
                    gate[:, part],
                    (local[0][:, part], local[1][:, part]),
                )
                assert weights is not None
                pin.weigh(weights.mean(dim=-1))
                parts.append(out)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _select(self, q: Tensor, groups: Groups, streams: slice) -> Tensor:
        """Choose each group's blocks: numbers [H, G, M], the m-th to be placed m blocks back.

        The near ones come first, then those found, each kind youngest first. -1: none.
        """
        r, (heads, count) = self.retrieval, q.shape[:2]
        recent = groups.recent.expand(heads, count, groups.recent.shape[-1])
        if not r.search or r.top_k == 0 or groups.last <= r.near:
            return recent
        query = q[:, :, 0]  # [H, G, D]
        if groups.shared > 1:
            query = q[:, :, : groups.shared].mean(dim=2)
        query = rotate(query, self._behind(slice(r.near + 1, r.near + 2)))
        found, scores = self.context.index.search(streams, query, r.top_k, before=groups.limit)
        if r.share_heads:
            found = _best_of_heads(found, scores)
        return torch.cat((recent, found.sort(dim=-1, descending=True).values), dim=-1)


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

    last: the greatest number of a block; recent: [G, near] (or [G, near + top_k] where nothing is
    searched), the numbers of the blocks before each group's own, -1: none; limit:
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
            self._block = torch.arange(rows.blocks, device=device).repeat_interleave(per_block)
            number = self._block + rows.first
            self.shared = segment
        else:
            places = place[:, None]
            number = torch.full_like(place, rows.first)
            self.shared = 1
        self.last = rows.first + rows.blocks - 1
        known = torch.arange(min(rows.stop, rows.block_size), device=device)
        # The only row of a piece comes last and sees all.
        self.seen = known <= places[:, :, None] if rows.stop - rows.start > 1 else None
        near = retrieval.near + (0 if retrieval.search else retrieval.top_k)
        back = torch.arange(1, near + 1, device=device)
        self.recent = (number[:, None] - back).clamp(min=-1)
        self.limit: Tensor | int = max(0, rows.first - near)
        if rows.whole:
            self.limit = (number - near).clamp(min=0)

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
