"""A text read through a store, piece by piece: what the streaming forms of all families share.

Owns the order in which a text is read, the state between two pieces, and forks. What is done with a
piece is a family's: landmark_stream.py, gca_stream.py.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvstore.block import BlockSpec
from kvstore.config import format_size
from kvstore.context import Context
from kvstore.errors import HotTierTooSmallError
from kvstore.store import Store
from model.layers import Frame, LocalAttention, merge_heads, rotate

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

Clock = Callable[[int, float], None]
"""Told of every `read` and `skim`: tokens and seconds."""


@dataclass(frozen=True)
class Layout:
    """What a model keeps of a text in a store: what a block looks like, series of blocks, size of
    their landmarks."""

    spec: BlockSpec
    streams: int
    landmark_dim: int

    def cache_bytes(self, tokens: int) -> int:
        """Bytes that so many tokens take, uncompressed."""
        return tokens // self.spec.block_size * self.streams * self.spec.nbytes


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


class Stream(ABC):
    """A model reading one text; not safe to use from two threads.

    The context must have the family's `layout`. A new stream goes on where the context's state
    ends; ValueError if the context holds more or less blocks than that. A read that fails midway
    leaves some layers with more of the text than others: what was read before can be had from a
    fork made before, from this stream no more (RuntimeError).
    """

    way: type[Any]
    """How the past is searched: a frozen dataclass, with a field `segment` at least."""

    @staticmethod
    @abstractmethod
    def layout(config: Any) -> Layout:
        """Return what a model of this configuration keeps in a store."""

    @staticmethod
    @abstractmethod
    def retrieval_of(config: Any, top_k: int | None = None) -> Any:
        """Return how a model searches, if nobody wants it otherwise."""

    @staticmethod
    @abstractmethod
    def most_blocks(config: Any, retrieval: Any) -> int:
        """Return how many blocks one selection has at most."""

    @staticmethod
    @abstractmethod
    def controls(retrieval: Any) -> dict[str, Any]:
        """Return ways to do without the search that is measured, by name."""

    def answering(self) -> Any:
        """Return how what is asked and answered searches: every token for itself."""
        return replace(self.retrieval, segment=1)

    def __init__(
        self,
        model: Any,
        context: Context,
        retrieval: Any = None,
        clock: Clock = lambda tokens, seconds: None,
    ) -> None:
        """clock: is told of the reads of this stream and of its forks."""
        self.model = model
        self.context = context
        self.store: Store = context.store
        self.device = next(model.parameters()).device
        self.clock = clock
        self.retrieval = retrieval or self.retrieval_of(model.config)
        self._last_ids: list[NDArray[np.int64]] = []
        config = model.config
        shape = (2, config.heads, config.window_blocks + 1, config.block_size, config.head_dim)
        state = {name: tensor.to(self.device) for name, tensor in context.get_state().items()}
        if state:
            self.position = int(state["position"])
            self._windows = [state[f"window.{i}"].clone() for i in range(self._local_layers)]
            self._recent = state["recent"]
        else:
            self.position = 0
            self._recent = model.embedding.nothing()
            self._windows = [
                torch.zeros(shape, device=self.device) for _ in range(self._local_layers)
            ]
        self._resume(state)
        held = {context.tokens(s) for s in range(context.streams)}
        if held != {self._kept_tokens()}:
            raise ValueError(
                f"the context holds {max(held)} tokens, its state is of {self._kept_tokens()}: "
                "save the state when reading is done"
            )
        self._torn = False
        like = torch.zeros(0, device=self.device)
        self._frame = Frame.of(model.rotary, config.window_blocks, config.block_size + 1, like)

    # What a family has of its own.

    @property
    @abstractmethod
    def _local_layers(self) -> int:
        """How many layers have a window."""

    @abstractmethod
    def _check_retrieval(self, retrieval: Any) -> None:
        """Raise ValueError for what this model cannot do, and prepare for the rest."""

    @abstractmethod
    def _resume(self, state: dict[str, Tensor]) -> None:
        """Take from the state what is the family's; it is empty at the beginning."""

    @abstractmethod
    def _state(self) -> dict[str, Tensor]:
        """Return what `_resume` takes."""

    @abstractmethod
    def _kept_tokens(self) -> int:
        """Return how many tokens the context has to hold."""

    @abstractmethod
    def _step(self, x: Tensor, rows: Rows, wanted: int) -> Tensor:
        """Run all layers over x [N, R, width]; return the states [t, width] of the last tokens.

        wanted: how many of them somebody will look at, t or fewer.
        """

    # What they share.

    @property
    def retrieval(self) -> Any:
        """How the past is searched; may be set between reads.

        HotTierTooSmallError where one selection might not fit into the hot tier.
        """
        return self._retrieval

    @retrieval.setter
    def retrieval(self, retrieval: Any) -> None:
        self._check_retrieval(retrieval)
        most = self.most_blocks(self.model.config, retrieval)
        if most > self.store.hot_slots:
            least = most * self.store.spec.nbytes
            raise HotTierTooSmallError(
                f"the hot tier holds {self.store.hot_slots} blocks and a selection has up to "
                f"{most}: give hot at least {least} bytes ({format_size(least)})"
            )
        self._retrieval = retrieval

    def save_state(self) -> None:
        """Hand windows, recent bytes and position to the context, which keeps them."""
        self._check()
        state = {f"window.{i}": w for i, w in enumerate(self._windows)}
        state |= {"recent": self._recent, "position": torch.tensor(self.position)}
        self.context.set_state(state | self._state())

    def fork(self) -> Self:
        """Return a stream on a fork of the context; what it reads leaves this one unchanged."""
        self.save_state()
        return type(self)(self.model, self.context.fork(), self.retrieval, self.clock)

    def _check(self) -> None:
        if self._torn:
            raise RuntimeError("an earlier read failed midway; go on from a fork made before it")

    @torch.inference_mode()
    def skim(self, tokens: Tensor) -> None:
        """Read bytes [T] (integer, T >= 1) and predict nothing."""
        began = time.perf_counter()
        for _ in self._pieces(tokens, 0):
            pass
        self.clock(len(tokens), time.perf_counter() - began)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        """Read bytes [T] (integer, T >= 1) and return the logits [256] of the byte that follows.

        Whole blocks are read at once, a selection a segment; what comes before the first and
        after the last whole block goes token by token, as the family has it.
        """
        began = time.perf_counter()
        for x in self._pieces(tokens, 1):
            last = x
        logits: Tensor = self.model.head(self.model.norm(last[-1]))
        self.clock(len(tokens), time.perf_counter() - began)
        return logits

    @torch.inference_mode()
    def score(self, tokens: Tensor) -> Tensor:
        """Read bytes [T] and return the logits [T, 256] of the byte that follows each of them."""
        x = torch.cat(list(self._pieces(tokens, len(tokens))))
        logits: Tensor = self.model.head(self.model.norm(x))
        return logits

    def _pieces(self, tokens: Tensor, wanted: int) -> Iterator[Tensor]:
        """Read tokens [T] piece by piece; yield the top hidden states [t, width] of each.

        wanted: how many of the last tokens' are looked at.
        """
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
            x = self.model.embedding(piece, self._recent, closes)
            # What is looked at that does not lie behind this piece.
            behind = left - piece.numel()
            x = self._step(x, rows, min(max(0, wanted - behind), piece.numel()))
            self._recent = torch.cat((self._recent, piece.flatten()))[len(piece.flatten()) :]
            self._torn = False
            start += take
            self.position += take
            yield x

    def _prefetch(self) -> None:
        """Ask for what the last step used, in time to come while the lower layers compute.

        Token by token the choice changes little; that of whole blocks, of which `_step` keeps no
        ids, says little of the next.
        """
        for ids in self._last_ids:
            self.store.prefetch(ids)

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
