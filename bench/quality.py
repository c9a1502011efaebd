"""Bits a byte of several models side by side: the same bytes behind longer and longer contexts.

Every model reads the same excerpts of the text, each by its own search (and, with --controls, by
what its family has in its place), and the bytes at their ends are scored as an answer is written.
The differences are to the first model, paired by excerpt.

python -m bench.quality --corpus texts --models window.safetensors landmark gca
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from bench.perplexity import Job, bits, load, load_text
from model.families import family_of

LENGTHS = (1024, 4096, 16384, 65536, 262144)


def ways_of(name: str, controls: bool) -> dict[str, Any]:
    """Return how a model searches, and the controls, by what their rows are called."""
    model = load(name)
    stream = family_of(model).stream
    retrieval = stream.retrieval_of(model.config)
    shown = Path(name).stem
    ways = {shown: retrieval}
    if controls:
        ways |= {f"{shown}, {how}": way for how, way in stream.controls(retrieval).items()}
    return ways


def main() -> int:
    """Score, print a row a context length; the last line is JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", required=True, help="shipped names or checkpoints")
    parser.add_argument(
        "--controls", action="store_true", help="score what stands for a search, too"
    )
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", default="great_expectations", help="the text's name")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--excerpts", type=int, default=32)
    parser.add_argument("--score", type=int, default=512, help="bytes scored of each")
    parser.add_argument("--jobs", type=int, default=2, help="excerpts at a time, a thread each")
    a = parser.parse_args()
    if min(a.excerpts, a.score, a.jobs) < 1:
        parser.error("--excerpts, --score and --jobs must be at least 1")
    began = time.perf_counter()
    try:
        paths = [p for p in a.corpus.iterdir() if p.name.split(".")[0] == a.text]
        if not paths:
            raise ValueError(f"no text named {a.text!r} in {a.corpus}")
        room = len(load_text(paths[0])) - a.score
        for length in a.lengths:
            if not a.score <= length <= room:
                raise ValueError(f"length {length} must be between {a.score} and {room}")
        rows = [
            (name, how, way) for name in a.models for how, way in ways_of(name, a.controls).items()
        ]
    except (ValueError, OSError) as error:
        parser.error(str(error))
    places = np.linspace(max(a.lengths), room, a.excerpts).astype(int).tolist()
    jobs = [
        Job(name, paths[0], way, length, place, a.score)
        for length in a.lengths
        for name, _, way in rows
        for place in places
    ]
    table: list[dict[str, Any]] = []
    print(f"bits a byte, n = {a.excerpts} of {a.score} bytes; against {rows[0][1]}")
    console = Console(stderr=True)
    with (
        multiprocessing.get_context("spawn").Pool(a.jobs, torch.set_num_threads, (1,)) as pool,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("excerpts", total=len(jobs))
        results = pool.imap(bits, jobs)
        for length in a.lengths:
            first = None
            for _, how, _ in rows:
                scores = []
                for _ in places:
                    scores.append(next(results))
                    progress.advance(task)
                found = np.array(scores)
                first = found if first is None else first
                gain = found - first
                spread = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
                row = {"context": length, "model": how, "bits": float(found.mean())}
                table.append(row | {"gain": float(gain.mean()), "gain_error": spread})
                print(
                    f"{length:>8} {how:>24} {found.mean():.4f}  {gain.mean():+.4f} ± {spread:.4f}",
                    flush=True,
                )
    report = {"bench": "quality", "text": a.text, "n": a.excerpts, "score": a.score, "rows": table}
    print(json.dumps(report | {"minutes": round((time.perf_counter() - began) / 60, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
