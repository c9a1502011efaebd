"""Exact search against HNSW: time, recall, build time and memory as the landmarks grow.

Each size is searched by single queries and by batches, through the index exactly, by plain matmul
and topk, and through HNSW segments, in turn in one run; medians are reported, in microseconds a
query. Before each search other memory is gone through, as a model does between two of its layers'
searches, so that nothing is found in the core's own caches. The constants in
kvstore/index/cost.py come from here.

python -m bench.index --data landmarks.safetensors --plot docs/index.png
python -m bench.index --synthetic --most 262144

The data are arrays landmarks [n, D] and queries [m, D], as a trained model has them, in an .npz or
.safetensors file. The synthetic ones lie around 256 centres, which real ones do not.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from bench.arguments import Parser, at_least, duration, file, picture
from kvstore.config import IndexConfig
from kvstore.index import LandmarkIndex, cost

Search = Callable[[torch.Tensor], torch.Tensor]
WAYS = ("exact", "plain", "hnsw")
SWEPT = 8 * 2**20
"""Bytes gone through between two searches: four times the second cache of the core measured."""


def main() -> None:
    """Measure each size, print a row for it; the last line is JSON."""
    parser = Parser("index", __doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--synthetic", action="store_true", help="clustered random data")
    source.add_argument("--data", type=file, help="file with landmarks [n, D], queries [m, D]")
    parser.add_argument(
        "--least", type=at_least(1), default=4096, help="smallest number of landmarks"
    )
    parser.add_argument(
        "--most", type=at_least(1), default=2**20, help="largest number of landmarks"
    )
    parser.add_argument("--dim", type=at_least(1), default=64, help="of synthetic landmarks")
    parser.add_argument("--k", type=at_least(1), default=8, help="blocks to find for each query")
    parser.add_argument(
        "--batch", type=at_least(1), nargs="+", default=[1, 16, 64], help="queries at once"
    )
    parser.add_argument("--seconds", type=duration, default=1.0, help="for each size and batch")
    parser.add_argument(
        "--m", type=at_least(2), default=IndexConfig.m, help="links of a graph's node"
    )
    parser.add_argument("--ef-construction", type=at_least(1), default=IndexConfig.ef_construction)
    parser.add_argument("--ef-search", type=at_least(1), default=IndexConfig.ef_search)
    parser.add_argument("--plot", type=picture, help="write the crossover as a picture")
    a = parser.parse_args()
    landmarks, queries = synthetic(a.most, a.dim) if a.synthetic else read(a.data)
    most = min(a.most, len(landmarks))
    sizes = [n for n in (a.least * 2**i for i in range(0, 40, 2)) if n < most] + [most]
    config = IndexConfig(
        kind="hnsw", m=a.m, ef_construction=a.ef_construction, ef_search=a.ef_search, sample=0
    )

    print("landmarks batch   exact us   plain us    hnsw us recall  chosen  (a query)")
    rows = []
    for n in sizes:
        exact = LandmarkIndex(IndexConfig(kind="exact"), 1, landmarks.shape[1])
        graph = LandmarkIndex(config, 1, landmarks.shape[1])
        exact.add([0], landmarks[None, :n])
        plain_bytes = exact.nbytes
        graph.add([0], landmarks[None, :n])
        began = time.perf_counter()
        graph.wait()
        build = time.perf_counter() - began
        for batch in a.batch:
            row = measure(exact, graph, landmarks[:n], queries, a.k, batch, a.seconds)
            row |= {
                "landmarks": n,
                "build_seconds": build,
                "exact_bytes": plain_bytes,
                "hnsw_bytes": graph.nbytes - plain_bytes,
                "chosen": chosen(n, batch, landmarks.shape[1], max(a.ef_search, a.k)),
            }
            rows.append(row)
            times = " ".join(f"{row[f'{way}_us']:10.1f}" for way in WAYS)
            print(f"{n:9d} {batch:5d} {times} {row['recall']:6.3f}  {row['chosen']}", flush=True)
        print(
            f"{n:9d} built in {build:.2f} s, {1e6 * build / n:.1f} us each; "
            f"{plain_bytes / n:.0f} B a landmark, {(graph.nbytes - plain_bytes) / n:.0f} B more "
            "for HNSW",
            flush=True,
        )
        exact.close()
        graph.close()
    if a.plot:
        plot(rows, a.plot)
    report = {
        "bench": "index",
        "data": "synthetic" if a.synthetic else a.data.name,
        "dim": landmarks.shape[1],
        "k": a.k,
        "m": a.m,
        "ef_construction": a.ef_construction,
        "ef_search": a.ef_search,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    print(json.dumps(report))


def synthetic(n: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return n landmarks and 4096 queries around the same 256 centres."""
    generator = np.random.default_rng(0)
    centres = 1.5 * generator.normal(size=(256, dim))

    def points(count: int) -> torch.Tensor:
        near = centres[generator.integers(0, len(centres), count)]
        noise = generator.normal(size=(count, dim))
        return torch.from_numpy((near + noise).astype(np.float32))

    return points(n), points(4096)


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read landmarks [n, D] and queries [m, D] as float32."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name]) for name in ("landmarks", "queries")}
    else:
        found = load_file(path)
    return found["landmarks"].float(), found["queries"].float()


def measure(
    exact: LandmarkIndex,
    graph: LandmarkIndex,
    landmarks: torch.Tensor,
    queries: torch.Tensor,
    k: int,
    batch: int,
    seconds: float,
) -> dict[str, Any]:
    """Time the three ways in turn over different queries; return microseconds a query, recall."""
    ways: dict[str, Search] = {
        "exact": lambda q: exact.search([0], q[None], k)[0][0],
        "plain": lambda q: (q @ landmarks.T).topk(k).indices,
        "hnsw": lambda q: graph.search([0], q[None], k)[0][0],
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    swept = torch.zeros(SWEPT, dtype=torch.uint8)
    found = wanted = 0
    parts = [part for part in torch.split(queries, batch) if len(part) == batch]
    began = time.perf_counter()
    turn = 0
    while time.perf_counter() - began < seconds or turn < 5:
        part = parts[turn % len(parts)]
        answers = {}
        for way, search in ways.items():
            swept.add_(1)
            start = time.perf_counter()
            answers[way] = search(part)
            # The first turn fills buffers and caches.
            if turn:
                times[way].append(1e6 * (time.perf_counter() - start) / batch)
        for got, want in zip(answers["hnsw"].tolist(), answers["exact"].tolist(), strict=True):
            found += len(set(got).intersection(want))
            wanted += len(want)
        turn += 1
    medians = {f"{way}_us": statistics.median(t) for way, t in times.items()}
    return {"batch": batch, **medians, "recall": found / wanted}


def chosen(n: int, batch: int, dim: int, beam: int) -> str:
    """Return what "auto" takes where segments are built."""
    segment = IndexConfig.segment
    graphs = bin(n // segment).count("1")
    graph = cost.graph_us(graphs, n % segment, batch, dim, beam)
    return "hnsw" if graphs and graph < cost.exact_us(n, batch, dim) else "exact"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw time a query over landmarks, a curve for each way and batch."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for colour, batch in enumerate(sorted({row["batch"] for row in rows})):
        some = [row for row in rows if row["batch"] == batch]
        for way, style in (("exact", "-"), ("hnsw", "--")):
            # Fewer landmarks than a segment has are searched exactly either way.
            least = 0 if way == "exact" else IndexConfig.segment
            shown = [row for row in some if row["landmarks"] >= least]
            axes.loglog(
                [row["landmarks"] for row in shown],
                [row[f"{way}_us"] for row in shown],
                style,
                marker="o",
                color=f"C{colour}",
                label=f"{way}, {batch} at once",
            )
    axes.set(xlabel="landmarks of a stream", ylabel="microseconds a query")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
