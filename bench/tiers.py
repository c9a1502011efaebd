"""What the store costs over the bare copies, reads and writes that it cannot do without.

Each row is a pair measured in turns within one run on the same bytes; rates are GB/s of
uncompressed blocks (1e9 B), medians over the turns, and `ratio` is the median of the turns' ratios,
store over baseline. What runs on one thread is measured in that thread's CPU time, since nothing is
waited for: the files are in the page cache. Ingest is timed by the clock.

- warm to hot: a fetch whose blocks all lie in warm, against `index_select` of the same blocks into
  the next part of a tensor as large as the hot tier. Once where the fetch before had all its blocks
  anew, so that the slots it leaves lie in a row, and once where they are scattered.
- cold to hot: a fetch whose blocks all lie on disk only, against reading the same frames from an
  LMDB file and decompressing them with zstd, without verifying or merging anything. Once with the
  victims going down to warm, once without a warm tier.
- ingest: put and flush, with the worker's help, against committing the frames that come out of it,
  compressed before, to LMDB in batches of the same size, and syncing.
- lookups: microseconds of a fetch that finds all its blocks in hot: 8 heads x 16 blocks.
- few from disk: microseconds of a fetch of three blocks that lie on disk only, where hot is full,
  as a decoded token's, beside reading and decompressing the same frames. Before each other memory
  is gone through, as a model does, so that nothing is found in the core's own caches.

python -m bench.tiers
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lmdb
import numpy as np
import torch
import zstandard

from bench.arguments import Parser, at_least, folder
from kvstore.block import BlockSpec
from kvstore.codec import Codec
from kvstore.config import StoreConfig
from kvstore.store import Store
from kvstore.tiers.slots import rows_of

HEAD_DIM = 64
BATCH = 128
FEW = 3
MIB = 2**20
SWEPT = 8 * MIB
DECOMPRESSOR = zstandard.ZstdDecompressor()


def keys_and_values(n: int, spec: BlockSpec, seed: int = 0) -> list[torch.Tensor]:
    """Blocks as a cache has them: normal, smooth over tokens, channels of different scale."""
    rng = np.random.default_rng(seed)
    planes = []
    for plane in spec.planes:
        noise = rng.standard_normal((n, *plane.shape), np.float32)
        noise[:, 1:] += 0.7 * noise[:, :-1]
        scale = np.exp(rng.normal(0, 1, plane.shape[-1])).astype(np.float32)
        planes.append(torch.from_numpy(noise * scale).to(plane.dtype))
    return planes


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.thread_time) -> float:
    start = clock()
    call()
    return clock() - start


def pair(
    name: str, nbytes: int, store: list[float], base: list[float], least: float, **more: Any
) -> dict[str, Any]:
    """A row from the seconds of each turn."""
    return {
        "name": name,
        "store_gb_per_s": nbytes / statistics.median(store) / 1e9,
        "base_gb_per_s": nbytes / statistics.median(base) / 1e9,
        "ratio": statistics.median(b / s for s, b in zip(store, base, strict=True)),
        "least": least,
        "turns": len(store),
        **more,
    }


def warm_to_hot(spec: BlockSpec, batch: int, turns: int, scattered: bool) -> dict[str, Any]:
    """Fetches of blocks in warm, into a hot tier of four batches."""
    blocks = 64 * MIB // spec.nbytes + 8 * batch
    config = StoreConfig(
        hot=4 * batch * spec.nbytes, warm=(blocks + batch) * spec.nbytes, cold=None, device="cpu"
    )
    rng = np.random.default_rng(1)
    with Store(spec, config) as store:
        ids = store.put(keys_and_values(blocks, spec))
        source = keys_and_values(blocks, spec)
        out = [torch.zeros_like(plane[: 4 * batch]) for plane in source]
        times: tuple[list[float], list[float]] = ([], [])
        # In turn each block once, so that none is in hot when it is asked for again.
        order = rng.permutation(blocks)[: blocks // batch * batch].reshape(-1, batch)
        for turn in range(-len(order), turns):
            chosen = order[turn % len(order)]
            if scattered and turn < 0:
                # Hits in any order, so that the policy's order is not that of the slots.
                lately = order[[(turn - 1 - back) % len(order) for back in range(3)]].ravel()
                in_hot = store._mover.residency.hot[ids[lately]] >= 0
                with store.pinned(rng.permutation(ids[lately][in_hot])):
                    pass
            hits = store.stats.warm.hits
            part = slice(turn % 4 * batch, turn % 4 * batch + batch)

            def fetch(wanted: np.ndarray = ids[chosen]) -> None:
                with store.pinned(wanted):
                    pass

            def copy(chosen: np.ndarray = chosen, part: slice = part) -> None:
                index = torch.from_numpy(chosen)
                for plane, target in zip(source, out, strict=True):
                    torch.index_select(plane, 0, index, out=target[part])

            spent = seconds(fetch), seconds(copy)
            if turn >= 0:
                assert store.stats.warm.hits - hits == batch
                times[0].append(spent[0])
                times[1].append(spent[1])
    name = "warm to hot, scattered" if scattered else "warm to hot"
    return pair(name, batch * spec.nbytes, *times, least=0.8, blocks=batch)


@contextmanager
def frames_in_lmdb(frames: list[bytes]) -> Iterator[lmdb.Environment]:
    """An LMDB file with one value a frame."""
    directory = tempfile.mkdtemp(prefix="bench-")
    size = 2 * sum(map(len, frames)) + 8192 * len(frames) + 64 * MIB
    try:
        with lmdb.open(directory, map_size=size, sync=False) as env:
            with env.begin(write=True) as transaction:
                for i, frame in enumerate(frames):
                    transaction.put(i.to_bytes(8, "big"), frame, append=True)
            yield env
    finally:
        shutil.rmtree(directory)


def both_ways(
    store: Store, ids: np.ndarray, env: lmdb.Environment, codec: Codec, numbers: np.ndarray
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A fetch of blocks, and reading their frames, which have these numbers in the bare file."""

    def fetch() -> None:
        with store.pinned(ids):
            pass

    def read() -> None:
        with env.begin(buffers=True) as transaction:
            payloads = [
                (transaction.get(i.to_bytes(8, "big")) or b"")[codec.header_nbytes :]
                for i in numbers.tolist()
            ]
            for payload in payloads:
                DECOMPRESSOR.decompress(payload)

    return fetch, read


def cold_to_hot(spec: BlockSpec, batch: int, turns: int, warm: bool) -> dict[str, Any]:
    """Fetches of blocks on disk only, into a hot tier of two batches."""
    blocks = max(64 * MIB // spec.nbytes, 8 * batch)
    planes = keys_and_values(blocks, spec)
    codec = Codec(spec)
    frames = codec.encode(np.arange(blocks), rows_of(spec, planes))
    config = StoreConfig(
        hot=2 * batch * spec.nbytes,
        warm=2 * batch * spec.nbytes if warm else 1,
        device="cpu",
    )
    rng = np.random.default_rng(1)
    times: tuple[list[float], list[float]] = ([], [])
    with Store(spec, config) as store, frames_in_lmdb(frames) as env:
        ids = store.put(planes)
        store.flush()
        # The last batches are still in memory.
        order = rng.permutation(blocks - 5 * batch)
        while len(times[0]) < turns:
            if len(order) < batch:
                order = rng.permutation(blocks)
            chosen, order = np.sort(order[:batch]), order[batch:]
            hits = store.stats.cold.hits
            fetch, read = both_ways(store, ids[chosen], env, codec, chosen)
            spent = seconds(fetch)
            if store.stats.cold.hits - hits == batch:
                times[0].append(spent)
                times[1].append(seconds(read))
    least = 0.7 if spec.nbytes >= 32768 else 0.5
    name = "cold to hot" if warm else "cold to hot, no warm tier"
    return pair(name, batch * spec.nbytes, *times, least=least, blocks=batch)


def ingest(spec: BlockSpec, turns: int) -> dict[str, Any]:
    """Put 64 MiB in batches of 2 MiB and flush."""
    blocks, batch = 64 * MIB // spec.nbytes, 2 * MIB // spec.nbytes
    planes = keys_and_values(blocks, spec)
    frames = Codec(spec).encode(np.arange(blocks), rows_of(spec, planes))
    config = StoreConfig(hot="8MiB", warm="16MiB", device="cpu")
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        with Store(spec, config) as store:

            def put(store: Store = store) -> None:
                for start in range(0, blocks, batch):
                    store.put([plane[start : start + batch] for plane in planes])
                store.flush()

            times[0].append(seconds(put, time.perf_counter))
        with frames_in_lmdb([]) as env:
            env.set_mapsize(4 * sum(map(len, frames)))

            def write(env: lmdb.Environment = env) -> None:
                for start in range(0, blocks, batch):
                    with env.begin(write=True) as transaction:
                        for i in range(start, min(start + batch, blocks)):
                            transaction.put(i.to_bytes(8, "big"), frames[i], append=True)
                env.sync(True)

            times[1].append(seconds(write, time.perf_counter))
    compression = blocks * spec.nbytes / sum(map(len, frames))
    return pair(
        "ingest", blocks * spec.nbytes, *times, least=0.5, blocks=blocks, compression=compression
    )


def lookups(policy: str, turns: int) -> dict[str, Any]:
    """Fetches of 8 heads x 16 blocks that are all in hot."""
    spec = BlockSpec.kv(32, HEAD_DIM)
    rng = np.random.default_rng(1)
    config = StoreConfig(hot="64MiB", warm="64MiB", device="cpu", policy=policy)
    with Store(spec, config) as store:
        count = store.hot_slots
        ids = store.put(keys_and_values(count, spec))
        times = []
        for _ in range(turns):
            wanted = rng.choice(ids, (8, 16))
            start = time.perf_counter()
            with store.pinned(wanted):
                pass
            times.append(time.perf_counter() - start)
        assert store.stats.hot.hits == store.stats.lookups
    return {
        "name": f"lookups, {policy}",
        "microseconds": 1e6 * statistics.median(times),
        "most": 150,
        "turns": turns,
    }


def few_from_disk(turns: int) -> dict[str, Any]:
    """Fetches of three blocks on disk only, into a hot tier that is full."""
    spec = BlockSpec.kv(32, HEAD_DIM)
    blocks = 128 * MIB // spec.nbytes
    planes = keys_and_values(blocks, spec)
    codec = Codec(spec)
    frames = codec.encode(np.arange(blocks), rows_of(spec, planes))
    config = StoreConfig(hot="32MiB", warm="32MiB", device="cpu")
    swept = np.zeros(SWEPT, np.uint8)
    rng = np.random.default_rng(1)
    times: tuple[list[float], list[float]] = ([], [])
    with Store(spec, config) as store, frames_in_lmdb(frames) as env:
        ids = store.put(planes)
        store.flush()
        while len(times[0]) < turns:
            # Nearly half are in memory; those fetches are not counted.
            chosen = np.sort(rng.choice(blocks, FEW, replace=False))
            fetch, read = both_ways(store, ids[chosen], env, codec, chosen)
            hits = store.stats.cold.hits
            np.add(swept, 1, out=swept)
            spent = seconds(fetch)
            if store.stats.cold.hits - hits == FEW:
                times[0].append(spent)
                np.add(swept, 1, out=swept)
                times[1].append(seconds(read))
    ours, bare = (1e6 * statistics.median(some) for some in times)
    return {"name": "few from disk", "microseconds": ours, "bare": bare, "turns": turns}


def main() -> None:
    parser = Parser("tiers", __doc__)
    parser.add_argument(
        "--turns", type=at_least(2), default=60, help="how often each pair is measured"
    )
    parser.add_argument(
        "--directory", type=folder, help="where the files go (default: the system's)"
    )
    args = parser.parse_args()
    if args.directory:
        tempfile.tempdir = str(args.directory)
    torch.set_num_threads(1)
    rows = []
    for kib in (8, 32):
        spec = BlockSpec.kv(kib * 1024 // (4 * HEAD_DIM), HEAD_DIM)
        for batch in (BATCH, 1024):
            for scattered in (False, True):
                row = warm_to_hot(spec, batch, args.turns, scattered)
                rows.append(row | {"block_kib": kib})
        for warm in (True, False):
            rows.append(cold_to_hot(spec, BATCH, args.turns, warm) | {"block_kib": kib})
        rows.append(ingest(spec, max(3, args.turns // 10)) | {"block_kib": kib})
    print(
        f"{'':28}{'block':>8}{'blocks':>8}{'store':>8}{'base':>8}{'ratio':>8}{'least':>7}{'n':>5}"
    )
    for row in rows:
        print(
            f"{row['name']:28}{row['block_kib']:>4} KiB{row['blocks']:>8}"
            f"{row['store_gb_per_s']:>8.2f}{row['base_gb_per_s']:>8.2f}"
            f"{row['ratio']:>8.2f}{row['least']:>7}{row['turns']:>5}"
        )
    hits = [lookups(policy, 50 * args.turns) for policy in ("lru", "sieve")]
    for row in hits:
        print(f"{row['name']:28}{row['microseconds']:>8.1f} µs, at most {row['most']}")
    few = few_from_disk(5 * args.turns)
    print(f"{few['name']:28}{few['microseconds']:>8.1f} µs, bare {few['bare']:.1f}")
    report = {"bench": "tiers", "threads": 1, "rows": rows, "lookups": hits, "few_from_disk": few}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
