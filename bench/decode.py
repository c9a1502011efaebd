"""What a decoded token costs: the kernel, the store's bookkeeping, 64K against 1M, full attention.

Pairs are measured in turn in one run, medians are reported. GB/s counts the bytes of the keys and
values attended, once.

python -m bench.decode --model landmark
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.arguments import Parser, at_least, of_landmark
from bench.reading import cache_bytes, in_turns, reading
from kvstore.block import BlockSpec
from kvstore.config import StoreConfig
from kvstore.store import Store
from model import checkpoint, haystack
from model.attention import block_attention
from model.generate import prefill
from model.landmark import LandmarkAttention
from model.landmark_stream import Groups, LandmarkStream
from model.module_parser import device

RUNS = ("as it comes", "all hits")
"""The same bytes are decoded twice: the second time over all is hot, where hot holds as much."""


def pair(first: Callable[[], object], second: Callable[[], object], n: int) -> tuple[float, float]:
    """Time two things in turn, n times each; return the medians in seconds."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(n + n // 10 + 1):
        for kept, work in zip(times, (first, second), strict=True):
            began = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i > n // 10:
                kept.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def kernel(device: str, block_size: int, head_dim: int, n: int) -> dict[str, Any]:
    """Attention through the store, all hits, against gather + SDPA over the same blocks."""
    heads, blocks, kept = 8, 16, 4096
    spec = BlockSpec.kv(block_size, head_dim, torch.bfloat16)
    config = StoreConfig(hot=kept * spec.nbytes, warm=spec.nbytes, cold=None, device=device)
    with Store(spec, config) as store:
        shape = (kept, block_size, head_dim)
        ids = store.put([torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in "kv"])
        keys, values = store.hot_planes
        chosen = ids[np.random.default_rng(0).permutation(kept)[: heads * blocks]]
        chosen = chosen.reshape(heads, 1, blocks)
        q = torch.randn(heads, 1, 1, 1, head_dim, device=device)
        q *= head_dim**-0.5
        gate = torch.zeros(heads, 1, blocks, 1, device=device)
        with store.pinned(chosen) as pin:
            slots = torch.from_numpy(pin.slots).to(device).flatten()
        flat = q.view(1, heads, 1, head_dim).to(torch.bfloat16)  # SDPA wants all alike
        layout = (1, heads, blocks * block_size, head_dim)
        near_k, near_v = (p.index_select(0, slots).view(layout) for p in (keys, values))

        def through_store(gate: Tensor | None = None) -> Tensor:
            with store.pinned(chosen) as pin:
                at = torch.from_numpy(pin.slots).to(device)
                return block_attention(q, keys, values, at, gate, None)[0]

        def gather_sdpa() -> Tensor:
            k, v = (p.index_select(0, slots).view(layout) for p in (keys, values))
            return F.scaled_dot_product_attention(flat, k, v, scale=1.0)

        def contiguous_sdpa() -> Tensor:
            return F.scaled_dot_product_attention(flat, near_k, near_v, scale=1.0)

        def bookkeeping() -> None:
            with store.pinned(chosen):
                pass

        with torch.inference_mode():
            exact = gather_sdpa().flatten().float()
            assert torch.allclose(through_store().flatten().float(), exact, atol=0.02)
            ours, gathered = pair(through_store, gather_sdpa, n)
            again, dense = pair(through_store, contiguous_sdpa, n)
            gated, books = pair(lambda: through_store(gate), bookkeeping, n)
    size = heads * blocks * spec.nbytes
    return {
        "block_bytes": spec.nbytes,
        "store_us": ours * 1e6,
        "store_gb_s": size / ours / 1e9,
        "gather_sdpa_us": gathered * 1e6,
        "gather_sdpa_gb_s": size / gathered / 1e9,
        "contiguous_sdpa_us": dense * 1e6,
        "ratio_to_gather_sdpa": ours / gathered,
        "ratio_to_contiguous_sdpa": again / dense,
        "gated_us": gated * 1e6,
        "bookkeeping_us": books * 1e6,
        "n": n,
    }


class TimedStream(LandmarkStream):
    """A stream that adds up what its retrieving layers take.

    retrieving_seconds: everything in them, projections and the cache's growth too.
    attention_seconds: searching the past, fetching blocks and attending to them.
    """

    retrieving_seconds = 0.0
    attention_seconds = 0.0

    def _retrieving(
        self, attention: LandmarkAttention, x: Tensor, groups: Groups, layer: int
    ) -> Tensor:
        began = time.perf_counter()
        out = super()._retrieving(attention, x, groups, layer)
        self.retrieving_seconds += time.perf_counter() - began
        return out

    def _fetch(
        self,
        q: Tensor,
        asking: Tensor,
        groups: Groups,
        streams: slice,
        local: tuple[Tensor, Tensor],
    ) -> Tensor:
        began = time.perf_counter()
        out = super()._fetch(q, asking, groups, streams, local)
        self.attention_seconds += time.perf_counter() - began
        return out


def decode(askers: list[TimedStream], texts: list[Tensor]) -> np.ndarray:
    """Let each read its text byte by byte, all in turn.

    Return milliseconds [streams, turns, 3], medians: a token, in the retrieving layers, attention.
    """
    turns = []
    for asker, text in in_turns(askers, texts):
        seconds = []
        for token in text:
            asker.retrieving_seconds = asker.attention_seconds = 0.0
            began = time.perf_counter()
            asker.read(token[None])
            whole = time.perf_counter() - began
            seconds.append((whole, asker.retrieving_seconds, asker.attention_seconds))
        turns.append(1e3 * np.median(seconds, axis=0))
    return np.array(turns).reshape(-1, len(askers), 3).swapaxes(0, 1)


def decoded(name: str, lengths: list[int], steps: int, device: str) -> list[dict[str, Any]]:
    """Read library source of each length, then decode the `steps` bytes that follow, in turn."""
    model = checkpoint.load(name).to(device)
    streams, rows, after = [], [], []
    with ExitStack() as stack:
        for tokens in lengths:
            text = haystack.source_text(tokens + steps, seed=1)
            after.append(torch.frombuffer(bytearray(text[tokens:]), dtype=torch.uint8))
            plain = stack.enter_context(reading(model, tokens, device=device))
            stream = TimedStream(model, plain.context)
            began = time.perf_counter()
            prefill(stream, text[:tokens])
            seconds = time.perf_counter() - began
            stream.context.index.wait()
            stream.save_state()
            streams.append(stream)
            row: dict[str, Any] = {"tokens": tokens, "prefill_tokens_per_s": tokens / seconds}
            rows.append(row | {"n": steps})
        for run in RUNS:
            askers = [TimedStream(model, stream.context.fork()) for stream in streams]
            before = [stream.store.stats.snapshot() for stream in streams]
            turns = decode(askers, after)
            for stream, asker, row, was, each in zip(
                streams, askers, rows, before, turns, strict=True
            ):
                asker.context.close()
                now = stream.store.stats.snapshot()
                lookups = now["lookups"] - was["lookups"]
                hot = now["tiers"]["hot"]["hits"] - was["tiers"]["hot"]["hits"]
                whole, retrieving, attention = np.median(each, axis=0).tolist()
                row[run] = {
                    "ms_per_token": whole,
                    "retrieving_ms": retrieving,
                    "attention_ms": attention,
                    "turns_ms": each[:, 0].tolist(),
                    "hot_share": hot / max(1, lookups),
                }
    return rows


def full_attention(name: str, tokens: int, device: str, n: int) -> dict[str, Any]:
    """One token's SDPA over contiguous keys and values of all retrieving layers."""
    config = checkpoint.load(name).config
    best: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        shape = (1, config.heads, tokens, config.head_dim)
        k, v = (torch.randn(shape, device=device).to(dtype) for _ in "kv")
        q = torch.randn(1, config.heads, 1, config.head_dim, device=device).to(dtype)
        attend = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
        with torch.inference_mode():
            seconds = pair(attend, lambda: None, n)[0] * config.retrieving
        size = cache_bytes(checkpoint.load(name), tokens) // torch.bfloat16.itemsize
        size *= dtype.itemsize
        if not best or seconds * 1e3 < best["ms_per_token"]:
            best = {
                "dtype": str(dtype).removeprefix("torch."),
                "ms_per_token": seconds * 1e3,
                "gb_s": size / seconds / 1e9,
                "n": n,
            }
    return best


def matmul_rate(n: int = 20) -> float:
    """GFLOP/s of a float32 matmul of 1024 x 1024 x 1024, best of n: what this machine can do."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds) / 1e9


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = Parser("decode", __doc__)
    parser.add_argument("--model", type=of_landmark, default="landmark")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument(
        "--lengths", type=at_least(512), nargs="+", default=[64 * 1024, 1024 * 1024]
    )
    parser.add_argument(
        "--steps", type=at_least(16), default=256, help="tokens decoded at each length"
    )
    parser.add_argument(
        "-n", type=at_least(3), default=300, help="repetitions of the small measurements"
    )
    a = parser.parse_args()
    report: dict[str, Any] = {"bench": "decode", "device": a.device, "model": a.model}
    report["threads"] = torch.get_num_threads()
    report["matmul_gflop_s"] = round(matmul_rate())
    print(f"float32 matmul: {report['matmul_gflop_s']} GFLOP/s on {report['threads']} threads")
    report["kernel"] = [kernel(a.device, b, d, a.n) for b, d in ((32, 64), (64, 128))]
    for row in report["kernel"]:
        print(
            f"blocks of {row['block_bytes']} B, 8 heads x 16: store {row['store_us']:.0f} us"
            f" ({row['store_gb_s']:.1f} GB/s), gather + SDPA {row['gather_sdpa_us']:.0f} us"
            f" ({row['gather_sdpa_gb_s']:.1f} GB/s), ratio {row['ratio_to_gather_sdpa']:.2f};"
            f" to contiguous SDPA {row['ratio_to_contiguous_sdpa']:.2f};"
            f" with gates of its own {row['gated_us']:.0f} us;"
            f" bookkeeping {row['bookkeeping_us']:.0f} us",
            flush=True,
        )
    report["lengths"] = decoded(a.model, a.lengths, a.steps, a.device)
    for row in report["lengths"]:
        print(f"{row['tokens']} tokens: prefill {row['prefill_tokens_per_s']:.0f} tokens/s")
        for run in RUNS:
            r = row[run]
            print(
                f"  {run}: {r['ms_per_token']:.2f} ms a token,"
                f" {r['retrieving_ms']:.2f} in the retrieving layers, {r['attention_ms']:.2f} of it"
                f" for attention through the store; hot {r['hot_share']:.1%}",
                flush=True,
            )
    first, last = report["lengths"][0], report["lengths"][-1]
    full = report["full_attention"] = full_attention(a.model, last["tokens"], a.device, 10)
    ratio, hits = (
        float(np.median(np.divide(last[run]["turns_ms"], first[run]["turns_ms"]))) for run in RUNS
    )
    speedup = full["ms_per_token"] / last["as it comes"]["attention_ms"]
    layers = full["ms_per_token"] / last["as it comes"]["retrieving_ms"]
    prefill_ratio = last["prefill_tokens_per_s"] / first["prefill_tokens_per_s"]
    report |= {
        "decode_ratio": ratio,
        "decode_ratio_all_hits": hits,
        "full_attention_over_ours": speedup,
        "full_attention_over_retrieving_layers": layers,
        "prefill_ratio": prefill_ratio,
    }
    print(
        f"full attention over {last['tokens']} tokens: {full['ms_per_token']:.1f} ms a token"
        f" ({full['dtype']}, {full['gb_s']:.1f} GB/s), {speedup:.0f} times that through the store,"
        f" {layers:.0f} times the whole retrieving layers\n"
        f"decode, longest to shortest: {ratio:.2f}, all hits {hits:.2f};"
        f" prefill tokens/s {prefill_ratio:.2f}"
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
