"""What keeping a context costs: asking again, forks, verifying, checksums, waits for the disk.

Asking is measured as a person has it: `kvstore ask` in a process of its own, from before the store
is opened to the first byte of the answer. The rest are pairs measured in turn; medians are
reported.

python -m bench.kept
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lmdb
import numpy as np
import torch
import xxhash
import zstandard

from bench.arguments import Parser, at_least
from bench.tiers import keys_and_values
from kvstore import codec
from kvstore.block import BlockSpec
from kvstore.codec import Codec
from kvstore.config import StoreConfig
from kvstore.promises import DURABILITIES
from kvstore.store import Store
from model import haystack

MIB = 2**20


def kvstore(*argv: object) -> dict[str, Any]:
    """Run a command; return the JSON of its last line."""
    ran = subprocess.run(
        [sys.executable, "-m", "kvstore.cli.main", *map(str, argv), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return figures


def asking(tokens: int, n: int, place: Path) -> dict[str, Any]:
    """Keep a context of library source, then ask it in processes of their own, and fork it."""
    text, store = place / "text", place / f"store-{tokens}"
    text.write_bytes(haystack.source_text(tokens, seed=1))
    answer = ("--prompt", "def ", "--max-new-tokens", 8)
    run = kvstore("run", "--store", store, "--context", "a", "--text", text, *answer)
    asked = [kvstore("ask", store, "a", *answer) for _ in range(n)]
    forks = []
    with Store.open(store, StoreConfig(device="cpu")) as opened:
        for i in range(20):
            began = time.perf_counter()
            opened.kept.fork("a", f"fork {i}")
            forks.append(time.perf_counter() - began)
    return {
        "tokens": tokens,
        "read_seconds": run["prefill_seconds"],
        "first_token_seconds": statistics.median(a["first_token_seconds"] for a in asked),
        "decode_ms_per_token": statistics.median(a["decode_ms_per_token"] for a in asked),
        "same_answer": all(a["answer"] == run["answer"] for a in asked),
        "fork_ms": 1e3 * statistics.median(forks),
        "n": n,
    }


def verifying(spec: BlockSpec, n: int, place: Path) -> dict[str, Any]:
    """`Store.verify` against reading the same values from LMDB and decompressing their frames."""
    blocks = 128 * MIB // spec.nbytes
    directory = place / f"verify-{spec.nbytes}"
    header = Codec(spec).header_nbytes
    times: tuple[list[float], list[float]] = ([], [])
    with Store(spec, StoreConfig(hot="8MiB", warm="16MiB", directory=directory)) as store:
        for start in range(0, blocks, 256):
            store.put(keys_and_values(min(256, blocks - start), spec))
        store.flush()
        frames = [frame for _, frame in store._disk.frames()] if store._disk else []
        other = place / f"bare-{spec.nbytes}"
        with lmdb.open(str(other), map_size=1 << 32, sync=False) as env:
            with env.begin(write=True) as transaction:
                for i, frame in enumerate(frames):
                    transaction.put(i.to_bytes(8, "big"), frame, append=True)
            decompressor = zstandard.ZstdDecompressor()
            for _ in range(n):
                began = time.perf_counter()
                assert store.verify() == {}
                times[0].append(time.perf_counter() - began)
                began = time.perf_counter()
                with env.begin(buffers=True) as transaction:
                    for _, value in transaction.cursor():
                        decompressor.decompress(value[header:])
                times[1].append(time.perf_counter() - began)
    size = blocks * spec.nbytes
    verify, bare = (statistics.median(each) for each in times)
    return {
        "block_bytes": spec.nbytes,
        "verify_gb_s": size / verify / 1e9,
        "bare_gb_s": size / bare / 1e9,
        "ratio": statistics.median(b / a for a, b in zip(*times, strict=True)),
        "n": n,
    }


def checksum_share(spec: BlockSpec, n: int) -> float:
    """What share of a fetch of 128 blocks from disk goes into checksums.

    The same blocks are fetched from two stores, now the one first, now the other. In one of them
    every checksum is 0, and costs a call.
    """
    free = SimpleNamespace(xxh3_64_intdigest=lambda _: 0)
    blocks = 128 * MIB // spec.nbytes
    rng = np.random.default_rng(0)
    config = StoreConfig(hot="8MiB", warm="16MiB", device="cpu")
    shares = []
    with ExitStack() as stack:
        stores = []
        for hasher in (xxhash, free):
            with patch.object(codec, "xxhash", hasher):
                store = stack.enter_context(Store(spec, config))
                for _ in range(blocks // 256):
                    store.put(keys_and_values(256, spec))
                store.flush()
                stores.append((store, hasher))
        for _ in range(n):
            for chosen in rng.permutation(blocks).reshape(-1, 128):
                stores.reverse()
                spent = {}
                for store, hasher in stores:
                    with patch.object(codec, "xxhash", hasher):
                        before = store.stats.cold.hits
                        began = time.thread_time()
                        with store.pinned(chosen):
                            spent[hasher is free] = time.thread_time() - began
                        from_disk = store.stats.cold.hits - before
                if from_disk == 128:
                    shares.append(1 - spent[True] / spent[False])
    return statistics.median(shares)


def durabilities(spec: BlockSpec, n: int, place: Path) -> dict[str, Any]:
    """Ingest of a kept store by its durability: half a GiB, the same 128 MiB over and over."""
    blocks, batch, repeats = 128 * MIB // spec.nbytes, 2 * MIB // spec.nbytes, 4
    planes = keys_and_values(blocks, spec)
    times: dict[str, list[float]] = {durability: [] for durability in DURABILITIES}
    rng = np.random.default_rng(0)
    for turn in range(n):
        # In another order each time: a file that is removed goes from the disk a little later.
        for durability in rng.permutation(list(DURABILITIES)).tolist():
            directory = place / f"{durability}-{spec.nbytes}-{turn}"
            config = StoreConfig(
                hot="8MiB", warm="64MiB", directory=directory, durability=durability
            )
            with Store(spec, config) as store:
                began = time.perf_counter()
                for start in [*range(0, blocks, batch)] * repeats:
                    store.put([plane[start : start + batch] for plane in planes])
                store.flush()
                times[durability].append(time.perf_counter() - began)
            shutil.rmtree(directory)
    size = repeats * blocks * spec.nbytes
    row: dict[str, Any] = {"block_bytes": spec.nbytes, "n": n}
    for durability, spent in times.items():
        row[f"{durability}_gb_s"] = size / statistics.median(spent) / 1e9
        ratios = [b / a for a, b in zip(spent, times["none"], strict=True)]
        row[f"{durability}_of_none"] = statistics.median(ratios)
    return row


def main() -> None:
    parser = Parser("kept", __doc__)
    parser.add_argument("--tokens", type=at_least(2048), nargs="+", default=[2**16, 2**20])
    parser.add_argument(
        "--n",
        type=at_least(1),
        default=5,
        help="how often each is measured (the waits for the disk: six times as often)",
    )
    args = parser.parse_args()
    report: dict[str, Any] = {"bench": "kept", "asking": [], "verifying": [], "durabilities": []}
    place = Path(tempfile.mkdtemp(prefix="kept-"))
    try:
        for tokens in args.tokens:
            row = asking(tokens, args.n, place)
            report["asking"].append(row)
            print(
                f"{tokens:>10,} tokens: read in {row['read_seconds']:.1f} s; first token after "
                f"{row['first_token_seconds']:.2f} s, then {row['decode_ms_per_token']:.1f} ms "
                f"each, the same answer: {row['same_answer']}; fork {row['fork_ms']:.1f} ms"
            )
        torch.set_num_threads(1)
        for kib in (8, 32):
            spec = BlockSpec.kv(kib * 1024 // 256, 64)
            row = verifying(spec, args.n, place)
            row["checksum_share_of_a_cold_fetch"] = checksum_share(spec, args.n)
            report["verifying"].append(row)
            print(
                f"{kib:>3} KiB: verify {row['verify_gb_s']:.2f} GB/s, LMDB and zstd "
                f"{row['bare_gb_s']:.2f}, ratio {row['ratio']:.2f}; checksums are "
                f"{row['checksum_share_of_a_cold_fetch']:.1%} of a cold fetch"
            )
            # Two durabilities differ by less than two runs of one.
            row = durabilities(spec, 6 * args.n, place)
            report["durabilities"].append(row)
            figures = (f"{d} {row[f'{d}_gb_s']:.2f} GB/s" for d in DURABILITIES)
            print(
                f"{kib:>3} KiB: ingest {', '.join(figures)}; of none: "
                f"sync {row['sync_of_none']:.2f}, async {row['async_of_none']:.2f}"
            )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
