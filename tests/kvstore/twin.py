"""A context beside what it should hold, for tests."""

from __future__ import annotations

import numpy as np
import torch

from kvstore.block import BlockSpec, Plane
from kvstore.config import IndexConfig, StoreConfig
from kvstore.context import Context
from kvstore.store import Store

SIZE, DIM, LANDMARK = 4, 3, 5
SPEC = BlockSpec(
    (
        Plane("keys", (SIZE, DIM), torch.bfloat16),
        Plane("values", (SIZE, 2, DIM), torch.float32),
        Plane("marks", (SIZE,), torch.int16),
    )
)


EXACT = IndexConfig(kind="exact")


def open_store(directory=None, index=EXACT, hot=1000, cold="64MiB") -> Store:
    config = StoreConfig(
        hot=hot * SPEC.nbytes,
        warm=500 * SPEC.nbytes if cold else 1,
        cold=cold,
        directory=directory,
        device="cpu",
        index=index,
    )
    return Store(SPEC, config)


def reopened(make_store, store: Store) -> Store:
    store.check()
    store.close()
    return make_store(store.config.directory, store.config.index)


def tokens(s: int, t: int, seed: int = 0) -> list[torch.Tensor]:
    """Planes of t tokens for s streams; no two tokens are alike."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, t, DIM, generator=generator).bfloat16(),
        torch.randn(s, t, 2, DIM, generator=generator),
        torch.randint(-999, 999, (s, t), generator=generator, dtype=torch.int16),
    ]


def marks_of(s: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(s, n, LANDMARK, generator=torch.Generator().manual_seed(seed))


def past(context: Context, stream: int) -> list[torch.Tensor]:
    """All tokens of a stream, from the store and the open block."""
    n = context.sealed(stream)
    ids = context.ids([stream], np.arange(n)[None])[0]
    return [
        torch.cat((blocks.flatten(0, 1), rest[0]))
        for blocks, rest in zip(context.store.fetch(ids), context.open_block([stream]), strict=True)
    ]


def assert_past(context: Context, stream: int, want: list[torch.Tensor], landmarks) -> None:
    assert context.tokens(stream) == len(want[0])
    assert context.sealed(stream) == len(want[0]) // SIZE == context.index.length(stream)
    for got, plane in zip(past(context, stream), want, strict=True):
        assert torch.equal(got, plane)
    assert torch.equal(context.index.landmarks(stream), landmarks)


class Twin:
    """A context beside what it should hold: lists that are never shared."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.planes = [tokens(1, 0) for _ in range(context.streams)]
        self.marks = [marks_of(1, 0)[0] for _ in range(context.streams)]
        self.planes = [[p[0] for p in planes] for planes in self.planes]

    def append(self, streams, t: int, seed: int) -> None:
        context = self.context
        planes = tokens(len(streams), t, seed)
        sealed = (context.tokens(streams[0]) % SIZE + t) // SIZE
        marks = marks_of(len(streams), sealed, seed)
        context.append(streams, planes, marks if sealed or seed % 2 else None)
        for i, s in enumerate(streams):
            self.planes[s] = [
                torch.cat((old, new[i])) for old, new in zip(self.planes[s], planes, strict=True)
            ]
            self.marks[s] = torch.cat((self.marks[s], marks[i]))

    def fork(self) -> Twin:
        twin = Twin(self.context.fork())
        twin.planes = [list(p) for p in self.planes]
        twin.marks = list(self.marks)
        return twin

    def check(self) -> None:
        for s in range(self.context.streams):
            assert_past(self.context, s, self.planes[s], self.marks[s])
