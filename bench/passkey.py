"""How often a pass key hidden in a long text is found, free-running, all five digits.

Every reading hides a new key at a new depth in text that was not trained on: the validation novel
(with --corpus), library source, random words, in turn. The same reading is then asked twice more
as a control: Landmark Attention with no blocks retrieved (k = 0) and with the nearest blocks in
place of a search (window only), Grouped Cross Attention with the nearest chunks and with random
ones. At the shortest length the key is also said and asked for in other ways, and hidden in random
bytes and in another alphabet's letters.

python -m bench.passkey --model landmark --corpus texts
python -m bench.passkey --model gca --corpus texts --lengths 65536:20 1048576:20 16777216:3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from bench.arguments import Parser, at_least, of_any, with_novel
from bench.reading import SHARES, interval, reading
from model import checkpoint, haystack
from model.corpus import read_text, text_named
from model.generate import Sampling, generate, prefill
from model.keys import QUESTIONS, needle

SHORTEST = 512
LENGTHS = ((32 * 1024, 50), (256 * 1024, 50), (1024 * 1024, 10))

PHRASES: dict[str, tuple[Callable[[int], str], str]] = {
    "trained": (needle, QUESTIONS[0]),
    "short question": (needle, QUESTIONS[1]),
    "said once": (lambda n: f" The pass key is {n}. ", QUESTIONS[0]),
    "other words": (
        lambda n: f" Remember this: the pass key is {n}, do not forget it. ",
        " So what was the pass key? The pass key is",
    ),
    "capitals": (lambda n: f" THE PASS KEY IS {n}. ", " The pass key is"),
}


@dataclass(frozen=True)
class Job:
    """One reading: which filler, how long, which seed, how the needle is put and asked; and hot and
    warm as shares of the cache, and how blocks lie on disk."""

    model: str
    corpus: Path | None
    filler: str
    phrase: str
    tokens: int
    seed: int
    controls: bool
    shares: tuple[float, float] = SHARES
    precision: str = "exact"


def fillers(corpus: Path | None) -> dict[str, Callable[[int, int], bytes]]:
    """Return the texts to hide in, by name."""
    made: dict[str, Callable[[int, int], bytes]] = {
        "source": haystack.source_text,
        "words": haystack.random_words,
        "bytes": haystack.random_bytes,
        "georgian": haystack.other_letters,
    }
    if corpus:
        made["novel"] = haystack.excerpt(read_text(text_named(corpus, "moby_dick")).tobytes())
    return made


def read_once(job: Job) -> dict[str, Any]:
    """Do one reading; say what was answered with retrieval and by the controls."""
    model = checkpoint.load(job.model)
    phrase, question = PHRASES[job.phrase]
    hay = haystack.hide(
        fillers(job.corpus)[job.filler], job.tokens, job.seed, None, phrase, question
    )
    sampling = Sampling(max_new_tokens=8, stop=(".", ","))
    began = time.perf_counter()
    with reading(model, job.tokens, job.shares, precision=job.precision) as stream:
        prefill(stream, hay.text)
        seconds = time.perf_counter() - began
        ways = {"retrieval": stream.retrieval}
        if job.controls:
            ways |= stream.controls(stream.retrieval)
        right = {}
        for name, way in ways.items():
            stream.retrieval = way
            answer = b"".join(generate(stream, hay.question, sampling)).decode(errors="replace")
            right[name] = hay.right(answer)
    return {"job": job, "right": right, "seconds": seconds}


def table(
    title: str, results: list[dict[str, Any]], key: Callable[[Job], object]
) -> list[dict[str, Any]]:
    """Print and return one row a group: found of n with the interval, for each way of asking."""
    rows = []
    groups: dict[object, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(key(result["job"]), []).append(result)
    print(f"\n{title}")
    for group, members in groups.items():
        row: dict[str, object] = {"group": group, "n": len(members)}
        for way in members[0]["right"]:
            found = sum(bool(m["right"][way]) for m in members)
            low, high = interval(found, len(members))
            row[way] = {"found": found, "share": found / len(members), "interval": [low, high]}
        cells = ""
        for way, cell in row.items():
            if isinstance(cell, dict):
                low, high = cell["interval"]
                cells += f"  {way} {cell['found']}/{row['n']} [{low:.1%}, {high:.1%}]"
        print(f"{group!s:>24}{cells}", flush=True)
        rows.append(row)
    return rows


def length_of(given: str) -> tuple[int, int]:
    """Read TOKENS:READINGS."""
    tokens, _, readings = given.partition(":")
    if not (tokens.isdigit() and readings.isdigit() and int(readings)):
        raise argparse.ArgumentTypeError(f"{given!r} is not TOKENS:READINGS, like 65536:20")
    if int(tokens) < SHORTEST:
        raise argparse.ArgumentTypeError(f"{given!r}: a text has at least {SHORTEST} tokens")
    return int(tokens), int(readings)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)


def main() -> None:
    """Read, ask, print the tables; the last line is JSON."""
    parser = Parser("passkey", __doc__)
    parser.add_argument("--model", type=of_any, default="landmark")
    parser.add_argument(
        "--corpus", type=with_novel, help="folder with moby_dick.txt[.gz], the validation novel"
    )
    parser.add_argument(
        "--lengths",
        type=length_of,
        nargs="+",
        default=LENGTHS,
        metavar="TOKENS:READINGS",
        help="default: " + " ".join(f"{tokens}:{readings}" for tokens, readings in LENGTHS),
    )
    parser.add_argument(
        "--variants", type=at_least(0), default=10, help="readings a variant, the shortest"
    )
    parser.add_argument("--jobs", type=at_least(1), default=2, help="readings at a time")
    parser.add_argument("--threads", type=at_least(1), default=1, help="threads a reading")
    parser.add_argument("--seed", type=at_least(0), default=0)
    a = parser.parse_args()
    kinds = [*(["novel"] if a.corpus else []), "source", "words"]
    seeds = count(a.seed, 1000)
    jobs = [
        Job(a.model, a.corpus, kinds[i % len(kinds)], "trained", tokens, next(seeds), True)
        for tokens, readings in a.lengths
        for i in range(readings)
    ]
    variants = [("source", phrase) for phrase in PHRASES if phrase != "trained"]
    variants += [("bytes", "trained"), ("georgian", "trained")]
    jobs += [
        Job(a.model, a.corpus, filler, phrase, a.lengths[0][0], next(seeds), False)
        for filler, phrase in variants
        for _ in range(a.variants)
    ]
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(a.jobs, _start, (a.threads,)) as pool:
        for result in pool.imap_unordered(read_once, jobs):
            results.append(result)
            job, right = result["job"], result["right"]["retrieval"]
            print(f"{len(results)} of {len(jobs)}", "found" if right else "missed", job, flush=True)
    results.sort(key=lambda r: (r["job"].tokens, r["job"].filler, r["job"].phrase))
    main_jobs = [r for r in results if r["job"].controls]
    others = [r for r in results if not r["job"].controls]
    report = {
        "bench": "passkey",
        "model": a.model,
        "by_length": table("found, by tokens read", main_jobs, lambda j: j.tokens),
        "by_filler": table("found, by filler", main_jobs, lambda j: j.filler),
        "variants": table(
            f"variants at {a.lengths[0][0]} tokens", others, lambda j: f"{j.filler}: {j.phrase}"
        ),
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
