"""Bits per byte on a novel at growing context: retrieval, k = 0, and the nearest blocks only.

The same target bytes are scored behind longer and longer contexts: for each of --targets places
in the text, the --score bytes there, after the context - score bytes before them. The context is
read as any text is, a selection a segment; the bytes that are scored are read with a selection a
byte, as an answer is written. (A segment's shared selection knows its later bytes: it finds where
they stood before, and the bits it saves so are not saved by predicting.) "window" attends as many
of the nearest blocks as retrieval may fetch. What does not search sees no further than a thousand
bytes or two; its rows beyond that repeat the last one that was scored.

python -m bench.perplexity --corpus texts
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from bench.arguments import Parser, at_least, folder, of_landmark
from bench.reading import reading, standard_error
from model import checkpoint
from model.config import LandmarkConfig
from model.corpus import read_text, text_named
from model.generate import PIECE
from model.landmark_stream import Retrieval

SHORTEST = 512
"""Bytes of the first context; the others double it."""


@dataclass(frozen=True)
class Job:
    """One target: `score` bytes from `place` on, behind length - score others; and hot and warm as
    shares of the cache, and how blocks lie on disk."""

    model: str
    text: Path
    way: Any
    length: int
    place: int
    score: int
    shares: tuple[float, float] = (0.5, 1.0)
    precision: str = "exact"


def sight_of(config: LandmarkConfig, blocks: int) -> int:
    """Return how many bytes back a model reaches at most if it sees only the nearest blocks."""
    local = config.layers.count("l") * (config.window_blocks + 1)
    reach = max((config.reach, *config.grams))
    return (local + config.retrieving * (blocks + 1)) * config.block_size + reach


@cache
def load(name: str) -> Any:
    return checkpoint.load(name)


@cache
def load_text(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_text(path).copy())


def bits(job: Job) -> float:
    """Return the mean bits a byte of one target."""
    text, place = load_text(job.text), job.place
    model, shares = load(job.model), job.shares
    with reading(model, job.length, shares, job.way, precision=job.precision) as stream:
        for at in range(place + job.score - job.length, place - 1, PIECE):
            stream.skim(text[at : min(at + PIECE, place - 1)])
        stream.retrieval = stream.answering()
        target = text[place - 1 : place + job.score]
        logits = stream.score(target[:-1])
    return float(F.cross_entropy(logits, target[1:].long())) / math.log(2)


def main() -> None:
    """Score, print a row a context length; the last line is JSON."""
    parser = Parser("perplexity", __doc__)
    parser.add_argument("--model", type=of_landmark, default="landmark")
    parser.add_argument("--corpus", type=folder, required=True)
    parser.add_argument("--text", default="great_expectations", help="the text's name")
    parser.add_argument("--targets", type=at_least(2), default=96)
    parser.add_argument("--score", type=at_least(1), default=256, help="bytes scored a target")
    parser.add_argument("--longest", type=at_least(SHORTEST), default=64 * 1024)
    parser.add_argument("--near", type=int, help="blocks always attended to (default: the model's)")
    parser.add_argument(
        "--top-k", type=int, help="older blocks a head finds (default: the model's)"
    )
    parser.add_argument(
        "--jobs", type=at_least(1), default=2, help="targets at a time, a thread each"
    )
    a = parser.parse_args()
    config = load(a.model).config
    near = config.near if a.near is None else a.near
    k = config.top_k if a.top_k is None else a.top_k
    sight = sight_of(config, near + k)
    try:
        path = text_named(a.corpus, a.text)
        length = len(load_text(path))
        if a.score >= SHORTEST:
            raise ValueError(f"--score {a.score} leaves no context of {SHORTEST} bytes")
        if a.longest + a.score > length:
            raise ValueError(f"{a.text} has {length:,} bytes: too few for --longest {a.longest:,}")
        base = Retrieval(k, near, config.segment)
    except ValueError as reason:
        parser.error(str(reason))
    ways = {
        "retrieval": base,
        "window": replace(base, search=False),
        "k=0": replace(base, top_k=0, near=0),
    }
    places = np.linspace(a.longest, length - a.score, a.targets).astype(int)
    began = time.perf_counter()
    lengths = [SHORTEST * 2**i for i in range(20) if SHORTEST * 2**i <= a.longest]
    jobs = [
        Job(a.model, path, way, length, int(place), a.score)
        for length in lengths
        for name, way in ways.items()
        if name == "retrieval" or length < 2 * sight
        for place in places
    ]
    print(f"{'context':>8} " + " ".join(f"{name:>10}" for name in ways), end="")
    print(f"   bits per byte, n = {a.targets}; retrieval against window")
    rows: list[dict[str, Any]] = []
    scores: dict[str, np.ndarray] = {}
    with multiprocessing.get_context("spawn").Pool(a.jobs, torch.set_num_threads, (1,)) as pool:
        results = pool.imap(bits, jobs)
        for length in lengths:
            for name in ways:
                if name == "retrieval" or length < 2 * sight:
                    scores[name] = np.array([next(results) for _ in places])
            more = scores["retrieval"] - scores["window"]
            error = standard_error(more)
            row = {name: round(float(scores[name].mean()), 4) for name in ways}
            rows.append(
                {"context": length, "n": a.targets, **row}
                | {"difference": round(float(more.mean()), 4), "standard_error": round(error, 4)}
            )
            print(f"{length:>8} " + " ".join(f"{row[name]:>10.4f}" for name in ways), end="")
            print(f"   {more.mean():+.4f}, standard error {error:.4f}", flush=True)
    report = {"bench": "perplexity", "model": a.model, "text": a.text, "near": near, "top_k": k}
    minutes = round((time.perf_counter() - began) / 60, 1)
    print(json.dumps(report | {"rows": rows, "minutes": minutes}))


if __name__ == "__main__":
    main()
