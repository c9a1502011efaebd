"""Bits a byte of several models side by side: the same bytes behind longer and longer contexts.

The --score bytes at each of --excerpts places in the text are scored as an answer is written, by
every model behind the same context, which was read by the model's own search; of --controls also by
what its family has in place of a search. The differences are to the first model, paired by
excerpt. Excerpts that begin within a sixteenth of the context share a reading, so that the later
ones' contexts are longer by as much.

python -m bench.quality --corpus texts --models window.safetensors landmark gca --plot quality.png
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional as F

from bench.arguments import Parser, at_least, folder, of_any, picture
from bench.perplexity import load, load_text
from bench.reading import reading, standard_error
from model.corpus import text_named
from model.families import family_of
from model.generate import PIECE

LENGTHS = (1024, 4096, 16384, 65536, 262144)


@dataclass(frozen=True)
class Job:
    """One reading by one model, from `start` on; `score` bytes are scored at each of the places."""

    model: str
    ways: tuple[Any, ...]
    text: Path
    start: int
    places: tuple[int, ...]
    score: int


def together(places: list[int], length: int) -> list[tuple[int, ...]]:
    """Return the places, in order, in groups that share a reading."""
    groups: list[list[int]] = []
    for place in places:
        if groups and place - groups[-1][0] <= length // 16:
            groups[-1].append(place)
        else:
            groups.append([place])
    return [tuple(group) for group in groups]


def bits(job: Job) -> list[list[float]]:
    """Return each place's mean bits a byte by each of the ways."""
    text, at = load_text(job.text), job.start
    longest = job.places[-1] + job.score - job.start
    found: list[list[float]] = []
    with reading(load(job.model), longest, (0.5, 1.0)) as stream:
        for place in job.places:
            target = text[place - 1 : place + job.score]
            for begin in range(at, place - 1, PIECE):
                stream.skim(text[begin : min(begin + PIECE, place - 1)])
            at = place - 1
            found.append([])
            for way in job.ways:
                asked = stream.fork()
                try:
                    asked.retrieval = way
                    asked.retrieval = asked.answering()
                    logits = asked.score(target[:-1])
                finally:
                    asked.context.close()
                nats = float(F.cross_entropy(logits, target[1:].long()))
                found[-1].append(nats / math.log(2))
    return found


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


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw bits a byte over the context, a line a way."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for how in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == how]
        style = "--" if ", " in how else "-"  # what stands for a search
        axes.semilogx(
            [r["context"] for r in mine], [r["bits"] for r in mine], "o" + style, label=how
        )
    axes.set_xlabel("bytes of context")
    axes.set_ylabel("bits a byte")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    """Score, print a row a context length; the last line is JSON."""
    parser = Parser("quality", __doc__)
    parser.add_argument(
        "--models", type=of_any, nargs="+", required=True, help="shipped names or checkpoints"
    )
    parser.add_argument(
        "--controls", nargs="+", default=[], metavar="MODEL",
        help="models of which what stands for a search is scored, too",
    )  # fmt: skip
    parser.add_argument("--corpus", type=folder, required=True)
    parser.add_argument("--text", default="great_expectations", help="the text's name")
    parser.add_argument("--lengths", type=at_least(1), nargs="+", default=list(LENGTHS))
    parser.add_argument("--excerpts", type=at_least(1), default=32)
    parser.add_argument("--score", type=at_least(1), default=512, help="bytes scored of each")
    parser.add_argument(
        "--jobs", type=at_least(1), default=2, help="readings at a time, a thread each"
    )
    parser.add_argument("--plot", type=picture, help="write the figures as a picture")
    a = parser.parse_args()
    began = time.perf_counter()
    try:
        path = text_named(a.corpus, a.text)
        room = len(load_text(path)) - a.score
        for length in a.lengths:
            if not a.score <= length <= room:
                raise ValueError(f"length {length} must be between {a.score} and {room}")
        if len({Path(name).stem for name in a.models}) < len(a.models):
            raise ValueError("--models must be files of different names, which the rows are called")
        if others := set(a.controls) - set(a.models):
            raise ValueError(f"--controls: {min(others)} is not among --models")
        ways = {name: ways_of(name, name in a.controls) for name in a.models}
    except ValueError as wrong:
        parser.error(str(wrong))
    places = np.linspace(max(a.lengths), room, a.excerpts).astype(int).tolist()
    jobs = [
        Job(name, tuple(ways[name].values()), path, group[0] + a.score - length, group, a.score)
        for length in a.lengths
        for name in a.models
        for group in together(places, length)
    ]
    table: list[dict[str, Any]] = []
    print(
        f"bits a byte, n = {a.excerpts} of {a.score} bytes; against {next(iter(ways[a.models[0]]))}"
    )
    console = Console(stderr=True)
    with (
        multiprocessing.get_context("spawn").Pool(a.jobs, torch.set_num_threads, (1,)) as pool,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("readings", total=len(jobs))
        results = pool.imap(bits, jobs)
        for length in a.lengths:
            first = None
            for name in a.models:
                scores = []
                for _ in together(places, length):
                    scores.append(next(results))
                    progress.advance(task)
                columns = np.array(list(chain.from_iterable(scores))).T
                for how, found in zip(ways[name], columns, strict=True):
                    first = found if first is None else first
                    more = found - first
                    error = standard_error(more)
                    row = {"context": length, "model": how, "bits": float(found.mean())}
                    row |= {"difference": float(more.mean()), "standard_error": error}
                    table.append(row)
                    print(
                        f"{length:>8} {how:>24} {found.mean():.4f}"
                        f"  {more.mean():+.4f} ± {error:.4f}",
                        flush=True,
                    )
    if a.plot:
        plot(table, a.plot)
    report = {"bench": "quality", "text": a.text, "n": a.excerpts, "score": a.score, "rows": table}
    print(json.dumps(report | {"minutes": round((time.perf_counter() - began) / 60, 1)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
