"""A model, a store and a stream put together for a measurement, and how sure a share is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt

import torch

from kvstore.block import BlockSpec
from kvstore.config import IndexConfig, StoreConfig
from kvstore.store import Store
from model.stream import Retrieval, Stream
from model.transformer import Transformer

SHARES = (1 / 32, 1 / 8)
"""Hot and warm tier as shares of the whole cache: 32 MiB and 128 MiB of 1 GiB."""


def cache_bytes(model: Transformer, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes that `tokens` tokens take in all streams, uncompressed."""
    config = model.config
    per_token = config.retrieving * config.heads * 2 * config.head_dim * dtype.itemsize
    return tokens * per_token


@contextmanager
def reading(
    model: Transformer,
    tokens: int,
    shares: tuple[float, float] = SHARES,
    retrieval: Retrieval | None = None,
    index: IndexConfig | None = None,
    device: str = "cpu",
    precision: str = "exact",
) -> Iterator[Stream]:
    """Open a stream on a temporary store whose memory tiers are shares of `tokens`' cache."""
    config = model.config
    spec = BlockSpec.kv(config.block_size, config.head_dim, torch.bfloat16)
    total = cache_bytes(model, tokens)
    # Hot must hold what one selection asks for.
    wanted = retrieval or config
    least = config.heads * max(1, wanted.near + wanted.top_k) * spec.nbytes
    store_config = StoreConfig(
        hot=max(int(total * shares[0]), least),
        warm=max(1, int(total * shares[1])),
        device=device,
        index=index or IndexConfig(),
        precision=precision,
    )
    with Store(spec, store_config) as store:
        context = store.context(
            None, streams=config.retrieving * config.heads, landmark_dim=config.head_dim
        )
        yield Stream(model, context, retrieval)


def interval(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share (Wilson 1927)."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    middle = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
