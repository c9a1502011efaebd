"""How often named pass keys are found in a long text, in one hop and in two.

Every reading hides many keys at random places in text that was not trained on (library source,
random words, in turn; with --corpus the validation novel too), and each is asked for in a fork of
its own, free-running, all five digits. With --hops 2 a name's key is said to be another name's, and
the number is said elsewhere; the model answers in two steps, the other name and then the number.

python -m bench.keys --model gca --tokens 65536 --keys 16 --readings 3
python -m bench.keys --model gca --tokens 65536 --keys 16 --readings 3 --hops 2
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from bench.arguments import Parser, at_least, of_any, with_novel
from bench.passkey import fillers
from bench.reading import SHARES, interval, reading
from model import checkpoint, haystack
from model.families import family_of
from model.generate import Sampling, generate, prefill


def read_once(
    args: argparse.Namespace, kind: str, text: bytes, asked: list[haystack.Haystack]
) -> list[dict[str, Any]]:
    """Read one text; say of each key whether it was found, by the search and by its controls."""
    model = checkpoint.load(args.model)
    # An answer in two steps has a full stop after the first one.
    sampling = (
        Sampling(max_new_tokens=8, stop=(".", ","))
        if args.hops == 1
        else Sampling(max_new_tokens=64)
    )
    retrieval = family_of(model).stream.retrieval_of(model.config, args.top_k)
    rows = []
    with reading(model, args.tokens, SHARES, retrieval) as stream:
        prefill(stream, text)
        ways = {"search": retrieval, **stream.controls(retrieval)}
        for hay in asked:
            row: dict[str, Any] = {"filler": kind, "right": {}}
            for name, way in ways.items():
                stream.retrieval = way
                said = b"".join(generate(stream, hay.question, sampling)).decode(errors="replace")
                row["right"][name] = hay.right(said)
            rows.append(row)
    return rows


def main() -> int:
    """Read, ask, print the table; the last line is JSON."""
    parser = Parser("keys", __doc__)
    parser.add_argument("--model", type=of_any, default="gca")
    parser.add_argument(
        "--corpus", type=with_novel, help="folder with moby_dick.txt[.gz], the validation novel"
    )
    parser.add_argument("--tokens", type=at_least(1), default=65536)
    parser.add_argument("--keys", type=at_least(1), default=16, help="hidden in each text")
    parser.add_argument("--hops", type=int, choices=(1, 2), default=1)
    parser.add_argument("--readings", type=at_least(1), default=3)
    parser.add_argument("--top-k", type=at_least(1), help="blocks that each search finds")
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    kinds = ["source", "words", *(["novel"] if args.corpus else [])]
    console = Console(stderr=True)
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    filler = fillers(args.corpus)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("readings", total=args.readings)
        for i in range(args.readings):
            kind = kinds[i % len(kinds)]
            try:
                text, asked = haystack.hide_keys(
                    filler[kind], args.tokens, args.seed + i, args.keys, args.hops
                )
            except ValueError as error:
                parser.error(str(error))
            rows += read_once(args, kind, text, asked)
            progress.advance(task)
    report: dict[str, Any] = {"bench": "keys", **vars(args), "n": len(rows)}
    for way in rows[0]["right"]:
        found = sum(row["right"][way] for row in rows)
        low, high = interval(found, len(rows))
        print(f"{way:>12} {found}/{len(rows)} = {found / len(rows):.1%} [{low:.1%}, {high:.1%}]")
        report[way] = {"found": found, "share": found / len(rows), "interval": [low, high]}
    report["seconds"] = round(time.perf_counter() - began, 1)
    report["threads"] = torch.get_num_threads()
    print(json.dumps(report, default=str))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
