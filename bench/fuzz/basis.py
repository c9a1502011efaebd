"""What inputs are made from: owns whole blocks, stores, traces, the same whenever they are made."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import xxhash
import zstandard

from kvstore import saved_contexts
from kvstore.block import BlockSpec, Plane
from kvstore.cli.text_chain import TextChain
from kvstore.codec import Codec
from kvstore.config import IndexConfig, StoreConfig
from kvstore.store import Store
from kvstore.tiers.disk import DiskTier
from kvstore.trace import Tier, TraceWriter

COLD = 4 << 20  # capacity of the file whose pages are mutated
SMALL = BlockSpec(
    (
        Plane("keys", (4, 3), torch.bfloat16),
        Plane("values", (4, 2, 3), torch.float32),
        Plane("marks", (4,), torch.int16),
    )
)
LANDMARK = 5


@dataclass
class Block:
    """One block, what it holds and its frame."""

    number: int
    rows: list[np.ndarray]
    frame: bytes
    body: bytes  # of the payload, decompressed


@dataclass
class Basis:
    """What is mutated; the same for the same program, whenever it is made.

    store, tree: directories of closed stores.
    """

    store: Path
    tree: Path
    blocks: list[tuple[BlockSpec, list[Block]]]
    bombs: list[bytes]
    trace: bytes
    records: dict[bytes, bytes]

    @property
    def digest(self) -> str:
        """Of all of it: a number names the same input only where this is the same."""
        found = xxhash.xxh3_64(self.trace + b"".join(self.bombs))
        found.update((self.tree / "data.mdb").read_bytes())
        for key in sorted(self.records):
            found.update(key + self.records[key])
        for _, blocks in self.blocks:
            for block in blocks:
                found.update(block.frame)
        return found.hexdigest()


def make_basis(directory: Path) -> Basis:
    """Make all that inputs are made from."""
    # Nothing may depend on when it was made.
    with mock.patch("time.time", return_value=1.7e9):
        records = make_store(directory / "store")
    make_tree(directory / "tree")
    blocks = [(spec, make_blocks(spec, seed)) for seed, spec in enumerate(specifications())]
    return Basis(
        directory / "store",
        directory / "tree",
        blocks,
        make_bombs(),
        make_trace(directory / "trace"),
        records,
    )


def specifications() -> list[BlockSpec]:
    """Small and large, of all widths; the last has more than one zstd block."""
    wide = (
        Plane("a", (3, 5), torch.float64),
        Plane("b", (3,), torch.bool),
        Plane("c", (3, 2), torch.float16),
    )
    return [
        SMALL,
        BlockSpec((Plane("x", (7,), torch.uint8),)),
        BlockSpec(wide),
        BlockSpec.kv(16, 32),
        BlockSpec.kv(64, 128),
        BlockSpec.kv(64, 512, torch.float32),
    ]


def make_blocks(spec: BlockSpec, seed: int) -> list[Block]:
    """Blocks that compress wholly, partly, in their high bytes only, and not at all."""
    rng, codec, made = np.random.default_rng(seed), Codec(spec), []
    for number, kind in enumerate(["zeros", "steps", "numbers", "numbers", "noise", "noise"]):
        rows = []
        for plane in spec.planes:
            if kind == "zeros":
                row = np.zeros(plane.nbytes, np.uint8)
            elif kind == "steps":
                row = (np.arange(plane.nbytes) // 16).astype(np.uint8)
            elif kind == "noise" or not plane.dtype.is_floating_point:
                row = rng.integers(0, 256, plane.nbytes).astype(np.uint8)
            else:
                numbers = torch.from_numpy(rng.standard_normal(plane.shape)).to(plane.dtype)
                row = numbers.reshape(-1).view(torch.uint8).numpy()
            rows.append(row[None])
        block = number + (2**40 if number == 3 else 0)
        frame = codec.encode(np.array([block]), rows)[0]
        body = zstandard.ZstdDecompressor().decompress(frame[40:])
        made.append(Block(block, rows, frame, body))
    return made


def make_bombs() -> list[bytes]:
    """zstd frames of zeros, of up to 4 GiB, that say how many there are or do not."""
    bombs = []
    for blocks in (2, 100, 1 << 13, 1 << 15):
        zeros = ((1 << 17) << 3 | 2).to_bytes(3, "little") + b"\0"
        last = ((1 << 17) << 3 | 3).to_bytes(3, "little") + b"\0"
        body = zeros * (blocks - 1) + last
        size = struct.pack("<Q", blocks << 17)
        for head in (b"\xe0" + size, b"\xa0" + size[:4], b"\x00\x38", b"\x00\x00", b"\x00\xa8"):
            bombs.append(zstandard.FRAME_HEADER + head + body)
    return bombs


def make_store(directory: Path) -> dict[bytes, bytes]:
    """A store with contexts of several pieces, snapshots, forks; returns its records."""
    config = StoreConfig(
        hot=600 * SMALL.nbytes,
        warm=400 * SMALL.nbytes,
        cold="32MiB",
        directory=directory,
        device="cpu",
        index=IndexConfig(kind="exact"),
    )
    generator = torch.Generator().manual_seed(0)

    def append(context: Any, tokens: int) -> None:
        sealed = (context.tokens(0) % 4 + tokens) // 4
        shape = (context.streams, tokens)
        planes = [
            torch.randn(*shape, 3, generator=generator).bfloat16(),
            torch.randn(*shape, 2, 3, generator=generator),
            torch.randint(-9, 9, shape, generator=generator, dtype=torch.int16),
        ]
        marks = torch.randn(context.streams, sealed, LANDMARK, generator=generator)
        context.append(slice(None), planes, marks)

    with Store(SMALL, config) as store:
        with mock.patch.object(saved_contexts, "PIECE", 900):
            a = store.context("a", streams=2, landmark_dim=LANDMARK, fingerprint="f" * 32)
            a.info |= {"model": "m", "index": "exact", "retrieval": {"top_k": 8}}
            chain = TextChain()
            for tokens in (50, 21, 3, 9):
                append(a, tokens)
                chain = chain.extended(b"some text " * tokens * 30)
                a.info["text"] = chain.to_json()
                a.set_state({"x": torch.arange(tokens), "y": torch.zeros(2, 0)})
                a.save(snapshot=tokens in (50, 3))
            fork = a.fork("fork")
            append(fork, 9)
            fork.close()
            a.close()
            wide = store.context("wide", streams=12, landmark_dim=LANDMARK)
            append(wide, 9)
            wide.close()
        store.context("empty", streams=1, landmark_dim=1).close()
        large = store.context("large", streams=1, landmark_dim=LANDMARK)
        append(large, 6)
        large.set_state({"much": torch.zeros(5 << 20, dtype=torch.uint8)})
        large.close()
        keys = [k for k in store.record_keys() if k.startswith((b"context/", b"piece/"))]
        return {key: store.get_record(key) or b"" for key in keys}


def make_tree(directory: Path) -> None:
    """A closed store's file with branches, large values and free pages."""
    with contextlib.closing(DiskTier(directory, SMALL, COLD)) as tier:
        locations = []
        for start in range(0, 60, 6):
            ids = np.arange(start, start + 6)
            locations.append(tier.write(ids, tree_rows(ids)))
            tier.put_meta({b"large %d" % start: random.Random(start).randbytes(700 * start)})
            # Of the same size: where both lie in one place, no table has fewer pages than it says.
            tier.put_meta({b"large twin %d" % start: random.Random(-start).randbytes(700 * start)})
        for first in range(0, 100, 20):
            tier.put_meta(
                {b"record %d" % i: b"value %d " % i * 30 for i in range(first, first + 20)}
            )
        tier.delete(locations[2][:3])
        tier.delete(locations[3])
        tier.put_meta({b"large 30": None, b"record 7": None})


def tree_rows(ids: Sequence[int] | np.ndarray) -> list[np.ndarray]:
    """What the blocks of that file hold, uint8 [n, plane.nbytes] a plane."""
    rows = []
    for number, plane in enumerate(SMALL.planes):
        seeds = [random.Random(100 * int(i) + number).randbytes(plane.nbytes) for i in ids]
        rows.append(np.frombuffer(b"".join(seeds), np.uint8).reshape(len(ids), -1))
    return rows


def make_trace(path: Path) -> bytes:
    """A trace of several chunks."""
    with (
        mock.patch("time.time", return_value=1.7e9),
        mock.patch("time.monotonic_ns", side_effect=range(10**6)),
        TraceWriter(path, {"hot_slots": 5}) as writer,
    ):
        for chunk in range(4):
            ids = np.arange(5) + 300**chunk
            writer.put(ids)
            writer.fetch(ids, np.array([0, 1, 2, 3, 0], np.uint8))
            writer.weigh(ids, np.ones(5, np.float32))
            writer.evict(ids[:2], Tier.WARM)
            writer.delete(ids)
            writer.flush()
    return path.read_bytes()
