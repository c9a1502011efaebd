"""Frames, through `Codec.decode`: owns frames with right checksums, and the space around blocks."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
import zstandard

from bench.fuzz.basis import Basis, Block
from bench.fuzz.checks import check, refusing
from bench.fuzz.mutations import EXTREMES, mangled
from kvstore.block import BlockSpec
from kvstore.codec import Codec
from kvstore.errors import CorruptBlockError


class Frames:
    """Frames, through `Codec.decode`."""

    def __init__(self, basis: Basis) -> None:
        self._bombs = basis.bombs
        self._of = [(Codec(spec), spec, blocks, Space(spec)) for spec, blocks in basis.blocks]

    def run(self, rng: random.Random) -> str:
        try:
            return self._run(rng)
        except BaseException:
            for *_, space in self._of:
                space.clear(range(-1, Space.ROWS + 1))
            raise

    def _run(self, rng: random.Random) -> str:
        which = rng.choices(range(len(self._of)), [30, 10, 20, 20, 3, 1])[0]
        codec, spec, blocks, space = self._of[which]
        block, other = rng.sample(blocks, 2)
        kind = rng.randrange(10)
        made = False  # with header and checksum right
        if kind < 4:
            frame = mangled(rng, block.frame, other.frame, head=40)
        elif kind < 9:
            made = True
            payload = self._payload(rng, block, other)
            frame = block.frame[:36] + struct.pack("<I", len(payload)) + payload
        else:
            at, width = rng.choice([(8, 8), (16, 4), (20, 2), (22, 2), (24, 8), (32, 4), (36, 4)])
            extreme = rng.choice(EXTREMES) & (1 << 8 * width) - 1
            number = extreme.to_bytes(width, "little")
            frame = block.frame[:at] + number + block.frame[at + width :]
        sealed = made or (rng.random() < 0.6 and len(frame) >= 8)
        if sealed:
            frame = xxhash.xxh3_64_intdigest(frame[8:]).to_bytes(8, "little") + frame[8:]
        # The rest of a batch is whole.
        batch = [rng.choice(blocks) for _ in range(rng.choice([0, 0, 0, 1, 3]))]
        batch.insert(at := rng.randrange(len(batch) + 1), block)
        frames: list[Any] = [each.frame for each in batch]
        frames[at] = memoryview(frame) if rng.random() < 0.5 else frame
        scattered = rng.sample(range(Space.ROWS), len(batch)) if rng.random() < 0.5 else None
        ids = np.array([each.number for each in batch])
        with refusing(CorruptBlockError) as raised:
            space.decode(codec, ids, frames, scattered)
        rows = scattered or list(range(len(batch)))
        space.check_the_rest(rows)
        head = block.frame[8:36] + struct.pack("<I", max(0, len(frame) - 40))
        if raised:
            check(frame != block.frame, f"a whole frame is refused: {raised[0]}")
            named = str(raised[0]).startswith(f"block {block.number} is damaged")
            check(named, f"another block is named than {block.number}: {raised[0]}")
        else:
            whole = frame == block.frame
            check(whole or sealed, "a frame with a wrong checksum is taken for whole")
            check(frame[8:40] == head, "a frame with another header is taken for whole")
            body = block.body if whole else _body(frame[40:], spec.nbytes)
            full = body is None or len(body) == spec.nbytes
            check(full, "a frame is taken that does not fill a block")
            for i, (each, row) in enumerate(zip(batch, rows, strict=True)):
                if i != at:
                    space.check_row(row, each.rows)
                elif body is not None:
                    space.check_row(row, planes_of(spec, body))
        space.clear(rows)
        if raised and rng.random() < 0.2:
            # What was refused leaves nothing behind.
            space.decode(codec, np.array([other.number]), [other.frame], [3])
            space.check_row(3, other.rows)
            space.clear([3])
        return "refused" if raised else "passed"

    def _payload(self, rng: random.Random, block: Block, other: Block) -> bytes:
        payload, kind = block.frame[40:], rng.randrange(10)
        if kind < 5:
            return mangled(rng, payload, other.frame[40:], head=12)
        if kind == 5 and rng.random() < 0.2:
            bomb = rng.choice(self._bombs)
            return mangled(rng, bomb, payload, head=12) if rng.random() < 0.3 else bomb
        body = rng.choice([block.body, other.body])
        if kind == 6:
            body = mangled(rng, body, block.body)
        elif kind == 7:
            body = rng.choice([body[:-1], body + b"\0", body * 3, b"", body[: len(body) // 2]])
        level = rng.choice([-5, 1, 3, 19]) if len(body) < 10_000 else 1
        parameters = zstandard.ZstdCompressionParameters.from_level(
            level,
            window_log=rng.choice([10, 17, 20]),
            write_checksum=rng.random() < 0.3,
            write_content_size=rng.random() < 0.6,
        )
        compressor = zstandard.ZstdCompressor(compression_params=parameters)
        if kind == 8:  # several frames, or one to be skipped
            half = len(body) // 2
            parts = [compressor.compress(body[:half]), compressor.compress(body[half:])]
            skipped = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"12345"
            return b"".join(rng.choice([parts, [skipped, *parts], [parts[0], skipped, parts[1]]]))
        return bytes(compressor.compress(body))


def _body(payload: bytes, nbytes: int) -> bytes | None:
    """What the first zstd frame of a payload holds, up to a block, read another way.

    None where zstd says that the frame is damaged: a decoder that was used before has a larger
    buffer, and may find that out only behind the end of the block.
    """
    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(payload)
    found = b""
    try:
        while len(found) < nbytes and (more := reader.read(nbytes - len(found))):
            found += more
    except zstandard.ZstdError:
        return None
    return found


def planes_of(spec: BlockSpec, body: bytes) -> list[np.ndarray]:
    """Order a payload's bytes as docs/format.md has it, slowly."""
    widths = [plane.dtype.itemsize for plane in spec.planes]
    planes = [np.empty((1, plane.nbytes), np.uint8) for plane in spec.planes]
    at, data = 0, np.frombuffer(body, np.uint8)
    for depth in reversed(range(max(widths))):
        for plane, width in zip(planes, widths, strict=True):
            if width > depth:
                count = plane.size // width
                plane[0, width - 1 - depth :: width] = data[at : at + count]
                at += count
    return planes


class Space:
    """Where blocks are decoded to, with rows around them that must stay as they are."""

    ROWS = 6
    MARK = 0xA5

    def __init__(self, spec: BlockSpec) -> None:
        shape = self.ROWS + 2
        self._planes = [np.full((shape, p.nbytes), self.MARK, np.uint8) for p in spec.planes]
        self._marks = [bytes([self.MARK]) * p.nbytes for p in spec.planes]

    def decode(
        self, codec: Codec, ids: np.ndarray, frames: list[Any], rows: list[int] | None
    ) -> None:
        if rows is None:
            codec.decode(ids, frames, [plane[1 : 1 + len(ids)] for plane in self._planes])
        else:
            codec.decode(ids, frames, [plane[1:-1] for plane in self._planes], np.array(rows))

    def check_the_rest(self, rows: Sequence[int]) -> None:
        for plane, mark in zip(self._planes, self._marks, strict=True):
            for row in range(-1, self.ROWS + 1):
                if row not in rows:
                    check(plane[row + 1].tobytes() == mark, f"row {row} beside {rows} was written")

    def check_row(self, row: int, want: list[np.ndarray]) -> None:
        for plane, right in zip(self._planes, want, strict=True):
            check(plane[row + 1].tobytes() == right.tobytes(), "another value was decoded")

    def clear(self, rows: Sequence[int]) -> None:
        for plane in self._planes:
            for row in rows:
                plane[row + 1] = self.MARK
