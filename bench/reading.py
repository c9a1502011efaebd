"""A model, a store and a stream put together for a measurement, and how sure a share is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import sqrt
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvstore.config import IndexConfig, StoreConfig
from kvstore.store import Store
from model.families import family_of
from model.stream import Stream

SHARES = (1 / 32, 1 / 8)
"""Hot and warm tier as shares of the whole cache: 32 MiB and 128 MiB of 1 GiB."""


TURN = 16
"""Tokens that one stream reads before it is the next one's turn."""

S = TypeVar("S", bound=Stream)


def cache_bytes(model: Any, tokens: int) -> int:
    """Bytes that `tokens` tokens take in all streams, uncompressed."""
    return family_of(model).stream.layout(model.config).cache_bytes(tokens)


@contextmanager
def reading(
    model: Any,
    tokens: int,
    shares: tuple[float, float] = SHARES,
    retrieval: Any = None,
    index: IndexConfig | None = None,
    device: str = "cpu",
    precision: str = "exact",
) -> Iterator[Stream]:
    """Open a stream on a temporary store whose memory tiers are shares of `tokens`' cache."""
    read_with = family_of(model).stream
    retrieval = retrieval or read_with.retrieval_of(model.config)
    layout = read_with.layout(model.config)
    total = layout.cache_bytes(tokens)
    # Hot must hold what one selection asks for.
    least = max(1, read_with.most_blocks(model.config, retrieval)) * layout.spec.nbytes
    store_config = StoreConfig(
        hot=max(int(total * shares[0]), least),
        warm=max(1, int(total * shares[1])),
        device=device,
        index=index or IndexConfig(),
        precision=precision,
    )
    with Store(layout.spec, store_config) as store:
        context = store.context(None, streams=layout.streams, landmark_dim=layout.landmark_dim)
        yield read_with(model, context, retrieval)


def in_turns(streams: Sequence[S], texts: Sequence[Tensor]) -> Iterator[tuple[S, Tensor]]:
    """Yield each stream with the next TURN tokens of its text, in turn, until no text is left."""
    for start in range(0, max(map(len, texts)), TURN):
        for stream, text in zip(streams, texts, strict=True):
            yield stream, text[start : start + TURN]


def standard_error(values: NDArray[np.floating[Any]]) -> float:
    """Return that of the mean; of a single value 0."""
    return float(values.std(ddof=1) / sqrt(len(values))) if len(values) > 1 else 0.0


def interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
