"""How a block should lie on disk: ratio and speed of the ways to compress it, and of the disk tier.

The blocks are bfloat16 keys and values, normal, smooth over tokens, keys with channels of different
scale; or those of a file, `--data FILE` with arrays `keys` and `values` [n, tokens, dim] as
bfloat16 bits (uint16) in an .npz. One thread; MB/s (1e6 B) of uncompressed blocks and of the
thread's own processor time, the fastest of the turns, which take the ways one after the other.
Encoding begins with planes in memory and ends with bytes, decoding ends with planes in memory.

- zstd: the block as it is, level 1.
- planes, one frame: bytes split by significance, then one zstd frame, level 1.
- planes, frame each: a zstd frame for each byte plane of each tensor, level 1.
- low raw: the low bytes stored as they are, the high bytes of both tensors in one frame, level 1.
- low raw, coded: the same, with the codec's own parameters: nearly Huffman coding alone.
- codec: kvstore.codec, which is that with headers and checksums, verified.
- disk: DiskTier.read and .write, of random blocks in ascending order, in batches of 2 MiB; beside
  them `LMDB + zstd`, the same frames got from an LMDB file, one a value, and decompressed, neither
  verified nor merged nor kept; and the frames, compressed before, put into it.

python -m bench.codec
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import zstandard

from bench.arguments import Parser, at_least, file
from kvstore import codec as codecs
from kvstore.block import BlockSpec
from kvstore.codec import Codec
from kvstore.tiers.disk import DiskTier

MIB = 1 << 20
HEAD_DIM = 128
Words = npt.NDArray[np.uint16]
Encoded = list[list[bytes]]


def bfloat16(values: npt.NDArray[np.float32]) -> Words:
    """Round to nearest even, keep the bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def keys_and_values(blocks: int, tokens: int) -> list[Words]:
    """Two planes [blocks, elements] as a cache has them."""
    generator = np.random.default_rng(0)
    planes = []
    for spread in (0.7, 0.2):
        noise = generator.standard_normal((blocks * tokens, HEAD_DIM), np.float32)
        noise[1:] += np.float32(0.9) * noise[:-1]
        scale = np.exp(generator.normal(0, spread, HEAD_DIM)).astype(np.float32)
        planes.append(bfloat16(noise * scale).reshape(blocks, -1))
    return planes


def recorded(path: Path, tokens: int) -> list[Words]:
    """The same from a file, cut into blocks of `tokens`."""
    with np.load(path) as arrays:
        planes = [arrays[name].view(np.uint16) for name in ("keys", "values")]
    dim = planes[0].shape[-1]
    return [np.ascontiguousarray(p.reshape(-1, dim)).reshape(-1, tokens * dim) for p in planes]


class Way:
    """One way to lay out the bytes of blocks: which go together into one zstd frame, which raw.

    groups: of byte planes, 0 the keys' high bytes, 1 the values', 2 the keys' low bytes, 3 the
    values'; None for the elements as they are.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[int]] | None,
        raw: Sequence[Sequence[int]] = (),
        parameters: Any = None,
    ) -> None:
        self.groups, self.raw = groups, raw
        if parameters is None:
            self.compressor = zstandard.ZstdCompressor(level=1)
        else:
            self.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self.decompressor = zstandard.ZstdDecompressor()

    def encode(self, planes: list[Words]) -> Encoded:
        if self.groups is None:
            whole = np.concatenate(planes, axis=1)
            return [[self.compressor.compress(row.data)] for row in whole]
        bytes_ = [(plane >> 8).astype(np.uint8) for plane in planes]
        bytes_ += [plane.astype(np.uint8) for plane in planes]
        coded = [np.concatenate([bytes_[i] for i in group], axis=1) for group in self.groups]
        raw = [np.concatenate([bytes_[i] for i in group], axis=1) for group in self.raw]
        return [
            [self.compressor.compress(part[row].data) for part in coded]
            + [part[row].tobytes() for part in raw]
            for row in range(len(planes[0]))
        ]

    def decode(self, blocks: Encoded, out: list[Words]) -> None:
        elements = out[0].shape[1]
        step = max(1, (1 << 19) // (4 * elements))
        for start in range(0, len(blocks), step):
            group = blocks[start : start + step]
            if self.groups is None:
                parts = [self._column(group, 0, True).view(np.uint16)]
                for index, plane in enumerate(out):
                    plane[start : start + step] = parts[0][:, index * elements :][:, :elements]
                continue
            bytes_: list[Any] = [None] * 4
            for index, members in enumerate([*self.groups, *self.raw]):
                column = self._column(group, index, index < len(self.groups))
                for place, member in enumerate(members):
                    bytes_[member] = column[:, place * elements :][:, :elements]
            for index, plane in enumerate(out):
                words = plane[start : start + step]
                np.multiply(bytes_[index], 256, out=words, dtype=np.uint16)
                np.bitwise_or(words, bytes_[index + 2], out=words)

    def _column(self, group: Encoded, index: int, coded: bool) -> npt.NDArray[np.uint8]:
        if coded:
            joined = b"".join([self.decompressor.decompress(parts[index]) for parts in group])
        else:
            joined = b"".join([parts[index] for parts in group])
        return np.frombuffer(joined, np.uint8).reshape(len(group), -1)


WAYS = {
    "zstd": Way(None),
    "planes, one frame": Way([[0, 1, 2, 3]]),
    "planes, frame each": Way([[0], [1], [2], [3]]),
    "low raw": Way([[0, 1]], [[2, 3]]),
    "low raw, coded": Way([[0, 1]], [[2, 3]], codecs._COMPRESSION),
}


def fastest(calls: Sequence[Callable[[], object]], turns: int) -> list[float]:
    """Seconds of each call, the least of the turns."""
    least = [float("inf")] * len(calls)
    for _ in range(turns):
        for index, call in enumerate(calls):
            start = time.thread_time()
            call()
            least[index] = min(least[index], time.thread_time() - start)
    return least


def layouts(planes: list[Words], spec: BlockSpec, turns: int) -> list[dict[str, Any]]:
    """Ratio and speed of every way, and of the codec."""
    batch = max(1, 2 * MIB // spec.nbytes)
    planes = [plane[:batch] for plane in planes]
    ids, rows = np.arange(batch), [plane.view(np.uint8) for plane in planes]
    out = [np.empty_like(plane) for plane in planes]
    out_rows = [plane.view(np.uint8) for plane in out]
    codec = Codec(spec)
    encoders: list[Callable[[], object]] = []
    decoders: list[Callable[[], object]] = []
    stored = []
    for way in WAYS.values():
        blocks = way.encode(planes)
        stored.append(sum(len(part) for parts in blocks for part in parts))
        encoders.append(partial(way.encode, planes))
        decoders.append(partial(way.decode, blocks, out))
    frames = codec.encode(ids, rows)
    stored.append(sum(map(len, frames)))
    encoders.append(partial(codec.encode, ids, rows))
    decoders.append(partial(codec.decode, ids, frames, out_rows))
    for decode in decoders:
        for plane in out:
            plane.fill(0)
        decode()
        assert all((a == b).all() for a, b in zip(planes, out, strict=True))
    nbytes = batch * spec.nbytes
    return [
        {
            "name": name,
            "ratio": nbytes / size,
            "encode_mb_s": nbytes / encode / 1e6,
            "decode_mb_s": nbytes / decode / 1e6,
        }
        for name, size, encode, decode in zip(
            [*WAYS, "codec"],
            stored,
            fastest(encoders, max(3, turns // 4)),
            fastest(decoders, turns),
            strict=True,
        )
    ]


def disk(planes: list[Words], spec: BlockSpec, turns: int) -> list[dict[str, Any]]:
    """The disk tier against the same frames in a plain LMDB file."""
    rows = [plane.view(np.uint8) for plane in planes]
    count, batch = len(rows[0]), max(1, 2 * MIB // spec.nbytes)
    header = Codec(spec).header_nbytes
    decompressor = zstandard.ZstdDecompressor()
    generator = np.random.default_rng(1)
    out = [np.empty((batch, plane.nbytes), np.uint8) for plane in spec.planes]
    with tempfile.TemporaryDirectory() as directory:
        tier = DiskTier(Path(directory) / "tier", spec, 8 * count * spec.nbytes)
        plain = lmdb.open(f"{directory}/plain", map_size=8 * count * spec.nbytes, sync=False)
        ids = np.arange(count)
        locations = np.concatenate(
            [
                tier.write(ids[i : i + batch], [plane[i : i + batch] for plane in rows])
                for i in range(0, count, batch)
            ]
        )
        frames = [frame for _, frame in tier.frames()]

        def put(numbers: Sequence[int], turn: int) -> None:
            with plain.begin(write=True) as transaction:
                for key, number in enumerate(numbers, turn * count):
                    transaction.put(key.to_bytes(8, "big"), frames[number], append=True)

        def get(numbers: Sequence[int]) -> None:
            with plain.begin(buffers=True) as transaction:
                for number in numbers:
                    frame = transaction.get(number.to_bytes(8, "big"), b"")
                    decompressor.decompress(frame[header:])

        put(range(count), 0)
        reads, gets, writes, puts = ([float("inf")] for _ in range(4))
        for turn in range(turns):
            chosen = np.sort(generator.choice(count, min(batch, count), replace=False))
            numbers, places = chosen.tolist(), locations[chosen]
            reads += fastest([partial(tier.read, chosen, places, out)], 1)
            gets += fastest([partial(get, numbers)], 1)
            if turn < 20:
                writes += fastest(
                    [partial(tier.write, chosen, [plane[chosen] for plane in rows])], 1
                )
                puts += fastest([partial(put, numbers, turn + 1)], 1)
        used = tier.used_bytes
        stored = tier.block_count * spec.nbytes
        tier.close()
        plain.close()
    nbytes = min(batch, count) * spec.nbytes
    return [
        {
            "name": name,
            "ratio": ratio,
            "encode_mb_s": nbytes / min(encode) / 1e6,
            "decode_mb_s": nbytes / min(decode) / 1e6,
        }
        for name, ratio, encode, decode in (
            ("disk", stored / used, writes, reads),
            ("LMDB + zstd", count * spec.nbytes / sum(map(len, frames)), puts, gets),
        )
    ]


def main() -> None:
    parser = Parser("codec", __doc__)
    parser.add_argument("--turns", type=at_least(1), default=60, help="how often each is measured")
    parser.add_argument("--data", type=file, help=".npz with keys and values, bfloat16 bits")
    args = parser.parse_args()
    rows = []
    for kib in (8, 32):
        tokens = kib * 1024 // (4 * HEAD_DIM)
        if args.data:
            planes = recorded(args.data, tokens)
        else:
            planes = keys_and_values(32 * MIB // (kib * 1024), tokens)
        spec = BlockSpec.kv(tokens, planes[0].shape[1] // tokens)
        for row in layouts(planes, spec, args.turns) + disk(planes, spec, args.turns):
            rows.append({"block_bytes": spec.nbytes} | row)
    print(f"{'block':>8}  {'':20}{'ratio':>7}{'encode':>9}{'decode':>9}  MB/s")
    for row in rows:
        print(
            f"{row['block_bytes']:>8}  {row['name']:20}{row['ratio']:>7.3f}"
            f"{row['encode_mb_s']:>9.0f}{row['decode_mb_s']:>9.0f}"
        )
    print(json.dumps({"bench": "codec", "turns": args.turns, "rows": rows}))


if __name__ == "__main__":
    main()
