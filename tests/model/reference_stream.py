"""What a stream has to answer, worked out the long way: float64 numpy, no cache, no store.

Takes a model's weights and nothing else of its code. Vectors are complex numbers, a position is a
phase, and only the distance of a query and a key enters a score. Landmark Attention is written as
in the paper's formulas; a selection follows the rules that `landmark_stream.Retrieval` states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.landmark_stream import Retrieval
from model.landmark_transformer import LandmarkTransformer

Floats = NDArray[np.float64]
Complexes = NDArray[np.complex128]


@dataclass(frozen=True)
class Group:
    """Rows that share a selection, made by the mean query of the first `shared` of them."""

    block: int
    offsets: list[int]
    shared: int


class Reference:
    """A model's weights in float64."""

    def __init__(self, model: LandmarkTransformer) -> None:
        self.config = config = model.config
        self.weights = {n: t.detach().double().numpy() for n, t in model.state_dict().items()}
        self.size, self.stride = config.block_size, config.block_size + 1
        half = config.head_dim // 2
        self.shares: list[Floats] = []  # of each group and head, what its blocks weigh: [M]
        self.frequency = config.rope_base ** (-np.arange(half) / half)

    def embedding(self, text: bytes, at: int) -> Floats:  # [width]
        """Sum what the byte at a place and those before it say; 256 stands for none."""
        recent = [text[at - back] if back <= at else 256 for back in range(self.config.reach)]
        return sum(self.weights["embedding.weight"][257 * b + x] for b, x in enumerate(recent))

    def logits(
        self, text: bytes, retrieval: Retrieval | None = None, cuts: Sequence[int] = ()
    ) -> Floats:  # [len(text), 256]
        """Answer after every byte. retrieval None: every past block counts, in its place.

        cuts: lengths of the pieces in which the text is read; what they leave is the last piece.
        """
        ends = list(range(self.size - 1, len(text), self.size))
        x = np.array([self.embedding(text, i) for i in range(len(text))])
        landmark = self.weights["embedding.weight"][256]
        x = np.insert(x, [e + 1 for e in ends], landmark, axis=0)  # [rows, width]
        groups = list(self.groups(len(text), retrieval.segment, cuts)) if retrieval else []
        for i, kind in enumerate(self.config.layers):
            inner = self.norm(x, f"layers.{i}.attention_norm")
            q, k, v = self.project(inner, f"layers.{i}.attention")
            if kind == "l":
                out = self.local(q, k, v)
            elif retrieval is None:
                out = self.everything(q, k, v)
            else:
                out = self.selected(q, k, v, retrieval, groups)
            out = np.concatenate(list(out), axis=-1)  # [rows, heads * D]
            x = x + out @ self.weights[f"layers.{i}.attention.out.weight"].T
            up = self.norm(x, f"layers.{i}.mlp_norm") @ self.weights[f"layers.{i}.mlp.up.weight"].T
            up = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
            x = x + up @ self.weights[f"layers.{i}.mlp.down.weight"].T
        x = x[np.arange(len(x)) % self.stride != self.size]
        return self.norm(x, "norm") @ self.weights["head.weight"].T

    def norm(self, x: Floats, name: str) -> Floats:
        root = np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
        return x / root * self.weights[f"{name}.gain"]

    def project(self, x: Floats, name: str) -> tuple[Complexes, Complexes, Floats]:
        """[rows, width] -> complex queries times 1 / sqrt(D) and keys [H, rows, D / 2], values."""
        heads, dim = self.config.heads, self.config.head_dim
        qkv = (x @ self.weights[f"{name}.qkv.weight"].T).reshape(len(x), 3, heads, dim)
        q, k, v = qkv.transpose(1, 2, 0, 3)
        half = dim // 2
        q, k = (t[..., :half] + 1j * t[..., half:] for t in (q, k))
        return q / np.sqrt(dim), k, v

    def exps(self, q: Complexes, k: Complexes, at: range, start: int, stop: int) -> Floats:
        """e^score of the rows `at` of one head with the rows start to stop, in their places."""
        turn = np.exp(1j * np.arange(max(stop, at.stop))[:, None] * self.frequency)
        keys = k[start:stop] * turn[start:stop]
        return np.exp(((q[at] * turn[at]) @ keys.conj().T).real)

    def local(self, q: Complexes, k: Complexes, v: Floats, chunk: int = 512) -> Floats:
        """Attend to the last window_blocks blocks' length of tokens."""
        out = np.empty_like(v)
        reach = self.config.window_blocks * self.stride
        for first in range(0, v.shape[1], chunk):
            at = range(first, min(first + chunk, v.shape[1]))
            start = max(0, first - reach)
            key = np.arange(start, at.stop)
            back = np.asarray(at)[:, None] - key
            seen = (back >= 0) & (back < reach) & (key % self.stride != self.size)
            for h in range(len(v)):
                e = self.exps(q[h], k[h], at, start, at.stop) * seen
                out[h, at] = e @ v[h, start : at.stop] / e.sum(axis=-1, keepdims=True)
        return out

    def everything(self, q: Complexes, k: Complexes, v: Floats) -> Floats:
        """Attend to the own block and, through its landmark, to each past one; block by block."""
        out = np.empty_like(v)
        for first in range(0, v.shape[1], self.stride):
            at = range(first, min(first + self.stride, v.shape[1]))
            tokens = min(self.size, len(at))
            seen = np.tri(len(at), tokens)  # a landmark sees all of its block, not itself
            for h in range(len(v)):
                e = self.exps(q[h], k[h], at, 0, first + tokens)
                own = e[:, first:] * seen
                past = e[:, :first].reshape(len(at), -1, self.stride)
                inside, gate = past[..., : self.size], past[..., self.size]
                weight = inside / inside.sum(axis=-1, keepdims=True) * gate[..., None]
                total = own.sum(axis=-1) + gate.sum(axis=-1)
                values = v[h, :first].reshape(-1, self.stride, v.shape[-1])[:, : self.size]
                sum_ = own @ v[h, first : first + tokens]
                sum_ = sum_ + weight.reshape(len(at), -1) @ values.reshape(-1, v.shape[-1])
                out[h, at] = sum_ / total[:, None]
        return out

    def groups(self, length: int, segment: int, cuts: Sequence[int]) -> Iterator[Group]:
        """Say who shares a selection: segments where whole blocks are read, else every row."""
        size, place = self.size, 0
        for cut in [*cuts, length - sum(cuts)]:
            end = place + cut
            while place < end:
                block, offset = divmod(place, size)
                if offset == 0 and end - place >= size:
                    for start in range(0, size, segment):
                        inside = list(range(start, start + segment))
                        last = [size] if start + segment == size else []
                        yield Group(block, inside + last, segment)
                    place += size
                    continue
                taken = min(size - offset, end - place)
                for at in range(offset, offset + taken):
                    yield Group(block, [at], 1)
                if offset + taken == size:
                    yield Group(block, [size], 1)
                place += taken

    def selected(
        self, q: Complexes, k: Complexes, v: Floats, retrieval: Retrieval, groups: list[Group]
    ) -> Floats:
        out = np.full_like(v, np.nan)
        for group in groups:
            past = group.block * self.stride
            at = [past + offset for offset in group.offsets]
            keys = k[:, :past].reshape(len(k), group.block, self.stride, k.shape[-1])
            values = v[:, :past].reshape(len(v), group.block, self.stride, v.shape[-1])
            chosen = self.choose(q[:, at], keys[:, :, self.size], retrieval, group)
            for h in range(len(v)):
                numbers = [number for number, _ in chosen[h]]
                back = np.array([place for _, place in chosen[h]], int)
                e = self.scores(q[h, at], keys[h, numbers], group, back)
                inside, gate = e[..., : self.size], e[..., self.size]
                weight = inside / inside.sum(axis=-1, keepdims=True) * gate[..., None]
                own = self.scores(q[h, at], k[h, past:][None, : self.size], group, np.zeros(1, int))
                seen = np.arange(own.shape[-1]) <= np.array(group.offsets)[:, None]
                own = own[:, 0] * seen
                sum_ = own @ v[h, past : past + own.shape[-1]]
                sum_ = sum_ + np.einsum("rmp,mpd->rd", weight, values[h, numbers][:, : self.size])
                total = own.sum(axis=-1) + gate.sum(axis=-1)
                out[h, at] = sum_ / total[:, None]
                self.shares.append((gate / total[:, None]).mean(axis=0))
        return out

    def scores(self, q: Complexes, k: Complexes, group: Group, back: NDArray[np.int_]) -> Floats:
        """e^score of queries [R, F] with keys [M, P, F] of blocks so many places back."""
        offsets = np.array(group.offsets)
        distance = offsets[:, None, None] + back[:, None] * self.stride - np.arange(k.shape[1])
        turn = np.exp(1j * distance[..., None] * self.frequency)  # [R, M, P, F]
        return np.exp(np.einsum("rf,mpf,rmpf->rmp", q, k.conj(), turn).real)

    def choose(
        self, q: Complexes, landmarks: Complexes, retrieval: Retrieval, group: Group
    ) -> list[list[tuple[int, int]]]:
        """Return for each head the chosen blocks and how many places back each is put."""
        heads, number = len(q), group.block
        near, top_k = retrieval.near, retrieval.top_k
        if not retrieval.search:
            near, top_k = near + top_k, 0
        recent = [(number - back, back) for back in range(1, min(near, number) + 1)]
        older = max(0, number - near)
        score = np.empty((heads, older))
        for h in range(heads):
            for b in range(older):  # all at one place, right behind the near ones
                total = 0.0
                for row in range(group.shared):
                    distance = group.offsets[row] + (near + 1) * self.stride - self.size
                    turned = q[h, row] * np.exp(1j * distance * self.frequency)
                    total += (turned * landmarks[h, b].conj()).real.sum()
                score[h, b] = total / group.shared
        if retrieval.share_heads:
            score[:] = score.max(axis=0)
        chosen = []
        for h in range(heads):
            best = sorted(range(older), key=lambda b: -score[h, b])[:top_k]
            found = sorted(best, reverse=True)
            chosen.append(recent + [(b, near + 1 + i) for i, b in enumerate(found)])
        return chosen
