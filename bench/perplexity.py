"""Bits per byte on a novel at growing context: retrieval, k = 0, and the nearest blocks only.

The same target bytes are scored behind longer and longer contexts: for each of --targets places
in the text, the --score bytes there, after the context - score bytes before them. The context is
read as any text is, a selection a segment; the bytes that are scored are read with a selection a
byte, as an answer is written. (A segment's shared selection knows its later bytes: it finds where
they stood before, and the bits it saves so are not saved by predicting.) "window" attends as many
of the nearest blocks as retrieval may fetch.

python -m bench.perplexity --corpus texts
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from bench.reading import reading
from model import checkpoint
from model.data import read_text
from model.generate import PIECE
from model.stream import Retrieval


def main() -> None:
    """Score, print a row a context length; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="landmark")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--text", default="great_expectations", help="the text's name")
    parser.add_argument("--targets", type=int, default=24)
    parser.add_argument("--score", type=int, default=256, help="bytes scored a target")
    parser.add_argument("--longest", type=int, default=64 * 1024)
    parser.add_argument("--top-k", type=int, help="blocks a head fetches (default: the model's)")
    a = parser.parse_args()
    model = checkpoint.load(a.model)
    path = next(p for p in a.corpus.iterdir() if p.name.split(".")[0] == a.text)
    text = torch.from_numpy(read_text(path).copy())
    k = a.top_k or model.config.top_k
    base = Retrieval(k, model.config.near, model.config.segment)
    ways = {
        "retrieval": base,
        "window": replace(base, search=False),
        "k=0": replace(base, top_k=0, near=0),
    }
    places = np.linspace(a.longest, len(text) - a.score, a.targets).astype(int)
    began = time.perf_counter()
    rows: list[dict[str, object]] = []
    lengths = [512 * 2**i for i in range(20) if 512 * 2**i <= a.longest]
    print(f"{'context':>8} " + " ".join(f"{name:>10}" for name in ways) + "   bits per byte")
    for length in lengths:
        row: dict[str, object] = {"context": length, "n": a.targets}
        for name, way in ways.items():
            if name != "retrieval" and length > 4096:
                row[name] = rows[-1][name]  # these see nothing so far back
                continue
            nats = []
            for place in places:
                start = place + a.score - length
                with reading(model, length, (0.5, 1.0), way) as stream:
                    for at in range(start, place - 1, PIECE):
                        stream.read(text[at : min(at + PIECE, place - 1)])
                    stream.retrieval = replace(way, segment=1)
                    target = text[place - 1 : place + a.score]
                    logits = stream.score(target[:-1])
                    nats.append(float(F.cross_entropy(logits, target[1:].long())))
            row[name] = round(float(np.mean(nats)) / math.log(2), 4)
            row[f"{name} deviation"] = round(float(np.std(nats)) / math.log(2), 4)
        rows.append(row)
        print(f"{length:>8} " + " ".join(f"{row[name]:>10.4f}" for name in ways), flush=True)
    report = {
        "bench": "perplexity",
        "model": a.model,
        "text": a.text,
        "top_k": k,
        "rows": rows,
        "minutes": round((time.perf_counter() - began) / 60, 1),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
