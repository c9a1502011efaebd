"""Collect a trained model's real landmarks and queries, for bench.index.

They are those of one head of the first retrieving layer, scored as a search scores them: landmarks
from their block's start, queries (one a segment) at the place shared by older blocks. They depend
on nothing beyond the local layers' windows, so independent windows of text give the same vectors as
one long text. Library source (and a corpus, with --corpus) is read at ever new offsets until there
are enough.

python -m bench.harvest --out runs/landmarks.safetensors --count 1048576
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from bench.arguments import Parser, at_least, folder, of_landmark
from model import checkpoint, haystack
from model.corpus import read_text
from model.landmark import LandmarkAttention
from model.layers import rotate

WINDOW, LEAD = 64, 8
"""Blocks read at once, and how many of them only warm up the local layers' windows."""


def main() -> None:
    """Read windows, write the file; the last line is JSON."""
    parser = Parser("harvest", __doc__)
    parser.add_argument("--model", type=of_landmark, default="landmark")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--corpus", type=folder)
    parser.add_argument("--count", type=at_least(1), default=2**20, help="landmarks")
    parser.add_argument("--queries", type=at_least(1), default=4096)
    parser.add_argument("--head", type=at_least(0), default=0)
    a = parser.parse_args()
    model = checkpoint.load(a.model)
    config = model.config
    first = config.layers.index("r")
    below, layer = model.stack[:first], model.stack[first]
    attention = layer.attention
    if a.head >= config.heads:
        parser.error(f"--head {a.head}: the model has {config.heads}, from 0 on")
    assert isinstance(attention, LandmarkAttention)
    stride = config.block_size + 1
    offsets = torch.arange(stride)
    here = model.rotary.table(offsets, torch.float32)
    shared = model.rotary.table(offsets + (config.near + 1) * stride, torch.float32)
    texts = [np.frombuffer(haystack.source_text(12 << 20, 0), np.uint8)]
    if a.corpus:
        texts += [read_text(p) for p in sorted(a.corpus.glob("*.txt*"))]
    text = np.concatenate(texts)
    rng = np.random.default_rng(0)
    size = WINDOW * config.block_size
    kept: list[torch.Tensor] = []
    asked: list[torch.Tensor] = []
    began = time.perf_counter()
    per_batch = 16 * (WINDOW - LEAD)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        while len(kept) * per_batch < a.count:
            starts = rng.integers(0, len(text) - size, 16)
            tokens = np.stack([text[s : s + size] for s in starts]).astype(np.int64)
            x = model.embed(torch.from_numpy(tokens).view(16, WINDOW, config.block_size))
            for part in below:
                x = x + part.attention(part.attention_norm(x), model.rotary)
                x = x + part.mlp(part.mlp_norm(x))
            q, k, _ = attention.project(layer.attention_norm(x))
            q, k = q[:, a.head, LEAD:].float(), k[:, a.head, LEAD:].float()
            kept.append(rotate(k, here)[..., -1, :].flatten(0, 1))
            if len(asked) * per_batch < a.queries:
                means = rotate(q * config.head_dim**-0.5, shared)[..., :-1, :].mean(dim=-2)
                asked.append(means.flatten(0, 1))
    landmarks = torch.cat(kept)[: a.count].contiguous()
    queries = torch.cat(asked)[: a.queries].contiguous()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({"landmarks": landmarks, "queries": queries}, a.out)
    seconds = round(time.perf_counter() - began, 1)
    report = {"bench": "harvest", "landmarks": len(landmarks), "queries": len(queries)}
    print(json.dumps(report | {"seconds": seconds, "out": str(a.out)}))


if __name__ == "__main__":
    main()
