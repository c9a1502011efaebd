"""What a text's length costs: reading, a written token, a query of the index, and memory.

Each length is read in one go with the memory tiers the same share of the cache; then the bytes that
follow it are read one by one in a fork, as an answer is written, all lengths in turn. Their queries
are asked again of that text's landmarks, exactly and through HNSW, in turn. Medians are reported.

python -m bench.scaling --model gca --plot docs/scaling.png
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from bench.arguments import Parser, at_least, of_any, picture
from bench.decode import matmul_rate
from bench.index import measure
from bench.reading import SHARES, cache_bytes, in_turns, reading
from bench.soak import anonymous_bytes
from kvstore.config import IndexConfig
from kvstore.index import LandmarkIndex
from model import checkpoint, haystack
from model.generate import prefill
from model.module_parser import device
from model.stream import Stream

LENGTHS = (64 * 1024, 1024 * 1024, 16 * 1024 * 1024)
SEGMENT = 1024
"""Landmarks of the smallest graph here, so that the shortest text has one, too."""


def listen(stream: Stream) -> list[Tensor]:
    """Note the queries [m, dim] that are asked of the first series of blocks from now on."""
    heard: list[Tensor] = []
    search = stream.context.index.search

    def heard_search(streams: Any, queries: Tensor, *args: Any, **kwargs: Any) -> Any:
        if streams.start == 0:  # every layer asks for a slice of its own
            heard.append(queries[0].clone())
        return search(streams, queries, *args, **kwargs)

    stream.context.index.search = heard_search  # type: ignore[method-assign]
    return heard


def write(streams: list[Stream], texts: list[Tensor]) -> tuple[np.ndarray, list[Tensor]]:
    """Read a text behind each stream byte by byte, as an answer, in turns.

    Return milliseconds a byte [streams, turns], medians, and each stream's queries [m, dim].
    """
    with ExitStack() as stack:
        askers, heard = [], []
        for stream in streams:
            asker = stream.fork()
            stack.callback(asker.context.close)
            asker.retrieval = asker.answering()
            askers.append(asker)
            heard.append(listen(asker))
        turns: list[float] = []
        for asker, text in in_turns(askers, texts):
            seconds = []
            for token in text:
                began = time.perf_counter()
                asker.read(token[None])
                seconds.append(time.perf_counter() - began)
            turns.append(1e3 * float(np.median(seconds)))
    return np.array(turns).reshape(-1, len(streams)).T, [torch.cat(each) for each in heard]


def query_times(landmarks: Tensor, queries: Tensor, k: int, seconds: float) -> dict[str, Any]:
    """Ask landmarks [n, dim], exactly and through HNSW; see bench.index."""
    config = IndexConfig(kind="hnsw", segment=SEGMENT, sample=0)
    indexes = [
        LandmarkIndex(each, 1, landmarks.shape[1]) for each in (IndexConfig(kind="exact"), config)
    ]
    began = time.perf_counter()
    for index in indexes:
        index.add([0], landmarks[None])
        index.wait()
    built = time.perf_counter() - began
    row = measure(indexes[0], indexes[1], landmarks, queries, k, 1, seconds)
    for index in indexes:
        index.close()
    return {"build_seconds": built, **row}


@contextmanager
def text_read(
    model: Any, tokens: int, kind: str, device: str, text: bytes
) -> Iterator[tuple[Stream, dict[str, Any]]]:
    """Read `text` of `tokens` tokens; yield the stream, still open, and what reading took."""
    before = most = anonymous_bytes()

    def note(done: int) -> None:
        nonlocal most
        most = max(most, anonymous_bytes())
        progress.update(task, completed=done)

    with reading(model, tokens, index=IndexConfig(kind=kind), device=device) as stream:
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"{tokens:,} tokens", total=tokens)
            began = time.perf_counter()
            prefill(stream, text, note)
            seconds = time.perf_counter() - began
        stream.context.index.wait()
        yield (
            stream,
            {
                "tokens": tokens,
                "prefill_seconds": seconds,
                "prefill_tokens_per_s": tokens / seconds,
                "cache_bytes": cache_bytes(model, tokens),
                "anonymous_bytes": max(most, anonymous_bytes()) - before,
            },
        )


def measured(
    name: str, lengths: list[int], steps: int, device: str, kind: str
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Read library source of each length, then write the `steps` bytes that follow, in turn.

    Return a row for each length and the milliseconds a written byte [lengths, turns].
    """
    model = checkpoint.load(name).to(device)
    streams, rows, after = [], [], []
    with ExitStack() as stack:
        for tokens in lengths:
            text = haystack.source_text(tokens + steps, seed=1)
            after.append(torch.frombuffer(bytearray(text[tokens:]), dtype=torch.uint8))
            opened = text_read(model, tokens, kind, device, text[:tokens])
            stream, row = stack.enter_context(opened)
            streams.append(stream)
            rows.append(row)
        # What they read the first time is on disk, and cold.
        write(streams, [text[: steps // 4] for text in after])
        turns, heard = write(streams, after)
        for stream, row, queries, times in zip(streams, rows, heard, turns, strict=True):
            index, stats = stream.context.index, stream.store.stats.snapshot()
            usage = stream.store.usage()
            row |= {
                "write_ms_per_token": float(np.median(times)),
                "used_bytes": {tier: each.used_bytes for tier, each in usage.items()},
                "index_bytes": index.nbytes,
                "kind": index.stats.kind,
                "hits": {tier: each["hits"] for tier, each in stats["tiers"].items()},
                "lookups": stats["lookups"],
                "landmarks": index.length(0),
            }
            landmarks = index.landmarks(0).float().cpu()
            row |= query_times(landmarks, queries.cpu(), model.config.top_k, 2.0)
    return rows, turns


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw memory, tokens a second and time a query over the length."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (size, speed, query) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    lengths = [row["tokens"] for row in rows]
    for tier in ("hot", "warm", "cold"):
        size.loglog(lengths, [r["used_bytes"][tier] / 2**20 for r in rows], "o-", label=tier)
    size.loglog(lengths, [r["index_bytes"] / 2**20 for r in rows], "o--", label="index")
    size.loglog(lengths, [r["cache_bytes"] / 2**20 for r in rows], ":", label="whole cache")
    size.set_ylabel("MiB")
    speed.semilogx(lengths, [r["prefill_tokens_per_s"] for r in rows], "o-", label="read")
    written = [1e3 / r["write_ms_per_token"] for r in rows]
    speed.semilogx(lengths, written, "o-", label="written")
    speed.set_yscale("log")
    speed.set_ylabel("tokens a second")
    for way in ("exact", "hnsw"):
        query.loglog(lengths, [r[f"{way}_us"] for r in rows], "o-", label=way)
    query.set_ylabel("microseconds a query")
    for axes in (size, speed, query):
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure each length, print a row for it; the last line is JSON."""
    parser = Parser("scaling", __doc__)
    parser.add_argument("--model", type=of_any, default="gca")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--lengths", type=at_least(2048), nargs="+", default=list(LENGTHS))
    parser.add_argument(
        "--steps", type=at_least(16), default=256, help="tokens written at each length"
    )
    parser.add_argument("--index", choices=("auto", "exact", "hnsw"), default="hnsw")
    parser.add_argument("--plot", type=picture, help="write the figures as a picture")
    a = parser.parse_args()
    report: dict[str, Any] = {"bench": "scaling", "model": a.model, "shares": SHARES}
    report["index"] = a.index
    report |= {"threads": torch.get_num_threads(), "matmul_gflop_s": round(matmul_rate())}
    rows, turns = measured(a.model, a.lengths, a.steps, a.device, a.index)
    for row in rows:
        print(
            f"{row['tokens']:>9} tokens: read {row['prefill_tokens_per_s']:.0f} tokens/s,"
            f" written {row['write_ms_per_token']:.2f} ms a token ({row['kind']});"
            f" {row['landmarks']} landmarks, a query {row['hnsw_us']:.0f} us by HNSW"
            f" (recall {row['recall']:.3f}), {row['exact_us']:.0f} us exactly;"
            f" {row['anonymous_bytes'] / 2**20:.0f} MiB anonymous of a cache of"
            f" {row['cache_bytes'] / 2**20:.0f}"
        )
    first, last = rows[0], rows[-1]
    report |= {
        "rows": rows,
        "write_ratio": float(np.median(turns[-1] / turns[0])),
        "query_ratio": last["hnsw_us"] / first["hnsw_us"],
        "prefill_ratio": last["prefill_tokens_per_s"] / first["prefill_tokens_per_s"],
    }
    print(
        f"longest to shortest: a written token {report['write_ratio']:.2f}, an HNSW query"
        f" {report['query_ratio']:.2f}, read tokens/s {report['prefill_ratio']:.2f}"
    )
    if a.plot:
        plot(rows, a.plot)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
