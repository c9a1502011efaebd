"""What a lossy cold tier costs and saves: its error, bytes and speed, and what a model makes of it.

The blocks are the trained model's own, of a text it was not trained on, or of library source. Error
is the root of the mean square over that of the numbers. For pass keys and bits per byte memory has
no block that a step does not need: every older one that is attended to comes from disk.

python -m bench.precision --corpus texts
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from typing import Any

import numpy as np
import torch

from bench import passkey, perplexity
from bench.arguments import Parser, at_least, folder, of_landmark
from bench.reading import interval, reading, standard_error
from kvstore.mixed_codec import MixedCodec
from kvstore.promises import PRECISIONS
from model import checkpoint
from model.corpus import read_text, text_named
from model.generate import prefill
from model.landmark_stream import Retrieval

FROM_DISK = (0.0, 0.0)
"""Shares of hot and warm: hot is as large as it must be, and warm is none."""


def codecs(model: str, text: bytes, n: int) -> list[dict[str, Any]]:
    """Write and read the blocks of a text in each precision."""
    loaded = checkpoint.load(model)
    with reading(loaded, len(text), (1.0, 1.0)) as stream:
        prefill(stream, text)
        store = stream.store
        planes = store.fetch(store.ids())
        spec = store.spec
    ids = np.arange(len(planes[0]))
    raw = [plane.view(torch.uint8).flatten(1).numpy() for plane in planes]
    rows = []
    for precision in PRECISIONS:
        codec = MixedCodec(spec, precision)
        out = [np.zeros_like(plane) for plane in raw]
        spent: tuple[list[float], list[float]] = ([], [])
        for _ in range(n):
            began = time.perf_counter()
            frames = codec.encode(ids, raw)
            spent[0].append(time.perf_counter() - began)
            began = time.perf_counter()
            codec.decode(ids, frames, out)
            spent[1].append(time.perf_counter() - began)
        nbytes = len(ids) * spec.nbytes
        row: dict[str, Any] = {"precision": precision, "blocks": len(ids), "n": n}
        for plane, made, before in zip(spec.planes, out, planes, strict=True):
            after = torch.from_numpy(made).view(plane.dtype).view(before.shape).float()
            row[f"error_{plane.name}"] = float((after - before).norm() / before.float().norm())
        row["ratio"] = nbytes / sum(len(frame) for frame in frames)
        row["encode_gb_s"], row["decode_gb_s"] = (
            nbytes / statistics.median(each) / 1e9 for each in spent
        )
        rows.append(row)
        print(
            f"{precision:>6}: error of keys {row['error_keys']:.4f}, values "
            f"{row['error_values']:.4f}; {row['ratio']:.2f} times smaller; encoding "
            f"{row['encode_gb_s']:.2f} GB/s, decoding {row['decode_gb_s']:.2f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure, print a row a precision; the last line is JSON."""
    parser = Parser("precision", __doc__)
    parser.add_argument("--model", type=of_landmark, default="landmark")
    parser.add_argument("--corpus", type=folder, required=True, help="folder with the novels")
    parser.add_argument("--tokens", type=at_least(512), default=2**16, help="read for pass keys")
    parser.add_argument("--keys", type=at_least(1), default=10, help="pass keys a precision")
    parser.add_argument(
        "--context", type=at_least(512), default=2**14, help="read for bits per byte"
    )
    parser.add_argument(
        "--targets", type=at_least(2), default=32, help="of bits per byte a precision"
    )
    parser.add_argument(
        "--jobs", type=at_least(1), default=2, help="readings at a time, a thread each"
    )
    parser.add_argument("--n", type=at_least(1), default=5, help="how often coding is timed")
    a = parser.parse_args()
    torch.set_num_threads(1)
    try:
        path = text_named(a.corpus, "great_expectations")
        text = read_text(path)
    except ValueError as error:
        parser.error(str(error))
    report: dict[str, Any] = {"bench": "precision", "model": a.model}
    report["codecs"] = codecs(a.model, text[: 2**16].tobytes(), a.n)
    config = checkpoint.load(a.model).config
    way = Retrieval(config.top_k, config.near, config.segment)
    places = np.linspace(a.context, len(text) - 256, a.targets).astype(int)
    report["quality"] = []
    exact: np.ndarray | None = None
    with multiprocessing.get_context("spawn").Pool(a.jobs, torch.set_num_threads, (1,)) as pool:
        for precision in PRECISIONS:
            keys = [
                passkey.Job(
                    a.model, None, "source", "trained", a.tokens, seed, False, FROM_DISK, precision
                )
                for seed in range(a.keys)
            ]
            found = sum(each["right"]["retrieval"] for each in pool.map(passkey.read_once, keys, 1))
            targets = [
                perplexity.Job(a.model, path, way, a.context, int(place), 256, FROM_DISK, precision)
                for place in places
            ]
            bits = np.array(pool.map(perplexity.bits, targets, 1))
            exact = bits if exact is None else exact
            more = bits - exact
            low, high = interval(found, a.keys)
            row = {
                "precision": precision,
                "keys_found": found,
                "keys": a.keys,
                "interval": [low, high],
                "tokens": a.tokens,
                "bits_per_byte": float(bits.mean()),
                "more_than_exact": float(more.mean()),
                "standard_error": standard_error(more),
                "context": a.context,
                "targets": a.targets,
            }
            report["quality"].append(row)
            print(
                f"{precision:>6}: pass keys {found}/{a.keys} [{low:.1%}, {high:.1%}] at "
                f"{a.tokens:,}; {row['bits_per_byte']:.4f} bits per byte at {a.context:,}, "
                f"{row['more_than_exact']:+.4f} ± {row['standard_error']:.4f}",
                flush=True,
            )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
