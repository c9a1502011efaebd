"""The codec: a block's planes <-> its frame, the checked, compressed bytes that go to disk. Pure.

Owns the frame format (docs/format.md) and is the only file that imports zstandard. It never opens
a file and knows nothing of tiers.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from kvstore import _native
from kvstore.block import BlockSpec
from kvstore.errors import CorruptBlockError

FORMAT_VERSION = 1

Frame = bytes | memoryview
Bytes2D = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.int64]

_MAGIC = b"KVBF"
_CODEC_PLANES_ZSTD = 1
_ITEM_SIZES = (1, 2, 4, 8)
_ID_END = 16

# Near enough Huffman coding alone: bytes of one significance have a skewed histogram but hardly a
# repetition, and level 1's search for short matches makes encoding take twice, decoding one and
# a half times as long, and frames 3% larger (bench/codec.py). Matches of 7 bytes still fold what is
# constant.
_COMPRESSION = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    write_content_size=1,
    write_checksum=0,
    write_dict_id=0,
)

# So many bytes of blocks are encoded at a time, and their frames with them: all of it stays in the
# processor's second-level cache.
_GROUP_BYTES = 1 << 19
_GROUP_BLOCKS = 256

# A unit that does not shrink by a 32nd on a few probed blocks is not given to the compressor.
_WORTH = 32
_PROBES = 4

# Of the zstd format (RFC 8878): the magic number, and a descriptor that says "one segment, its
# size in 4 bytes".
_ZSTD_HEADER = zstandard.FRAME_HEADER + b"\xa0"


@dataclass(frozen=True)
class _Unit:
    """The bytes of one significance of all planes, coded with one table.

    depth: 0 for the most significant byte of each element, where the exponents are.
    spans: (plane, its first column, its last column + 1) for each plane that has such a byte.
    """

    depth: int
    spans: tuple[tuple[int, int, int], ...]
    nbytes: int


class Codec:
    """Turns blocks of one specification into frames and back, many at a time, bit for bit.

    Any number of threads may use one codec at once; zstd and numpy run without the GIL.
    """

    def __init__(self, spec: BlockSpec) -> None:
        for plane in spec.planes:
            if plane.dtype.is_complex or plane.dtype.itemsize not in _ITEM_SIZES:
                raise ValueError(
                    f"plane {plane.name!r} has dtype {plane.dtype}: it cannot be stored"
                )
        self.spec = spec
        self.description = " ".join(
            f"{plane.name}:{str(plane.dtype).removeprefix('torch.')}"
            f"[{','.join(str(n) for n in plane.shape)}]"
            for plane in spec.planes
        )
        self._sizes = [plane.nbytes for plane in spec.planes]
        self._units = _units(spec)
        # Where in a block's bytes by significance each unit begins.
        self._starts = [0, *accumulate(unit.nbytes for unit in self._units[:-1])]
        self._firsts = _firsts(spec, self._units)
        # What every frame of this specification has in common, compared as a whole.
        self._common = (
            _MAGIC
            + struct.pack("<HH", FORMAT_VERSION, _CODEC_PLANES_ZSTD)
            + xxhash.xxh3_64_intdigest(self.description.encode()).to_bytes(8, "little")
            + struct.pack("<I", spec.nbytes)
        )
        self.kind = self._common
        self._common_end = _ID_END + len(self._common)
        self.header_nbytes = self._common_end + 4
        self._group = min(max(1, _GROUP_BYTES // spec.nbytes), _GROUP_BLOCKS)
        self._local = threading.local()

    def encode(
        self,
        ids: Ids,
        planes: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> list[bytes]:
        """Return one frame a block.

        ids: int64 [n], each >= 0. planes: one uint8 [m, plane.nbytes] a plane, rows contiguous.
        rows: int64 [n], the row of each block; without it m is n, in order.
        """
        self._check_arrays(ids, planes, rows)
        planes = list(planes)
        rows = np.arange(len(ids)) if rows is None else rows
        only_top = len(ids) > 0 and self._only_top_compresses(planes, rows)
        frames: list[bytes] = []
        for start in range(0, len(ids), self._group):
            group = slice(start, start + self._group)
            blocks = self._take_apart(planes, rows[group])
            frames += (self._splice if only_top else self._stream)(ids[group], blocks)
        return frames

    def kind_of(self, frame: Frame) -> bytes:
        """Return what a frame says it is, unverified: the `kind` of the codec that made it."""
        return bytes(frame[_ID_END : self._common_end])

    def decode(
        self,
        ids: Ids,
        frames: Sequence[Frame],
        out: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        """Verify every frame and write its block's planes into `out`.

        ids: int64 [n], whose frames these must be. out: one uint8 [m, plane.nbytes] a plane, rows
        contiguous. rows: int64 [n], the row of `out` for each block; without it m is n, in order.
        A damaged frame, one of another block or of another specification raises
        CorruptBlockError naming the block; what its rows hold then is undefined.
        """
        self._check_arrays(ids, out, rows)
        rows = np.arange(len(ids)) if rows is None else rows
        self._decode(ids, frames, self._firsts, out, rows)

    def verify(self, ids: Ids, frames: Sequence[Frame]) -> None:
        """Raise what `decode` would, without putting the planes together."""
        self._decode(ids, frames, [], [], ids)

    def _decode(
        self,
        ids: Ids,
        frames: Sequence[Frame],
        firsts: list[list[int]],
        planes: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64],
    ) -> None:
        """Verify and decompress frames, and put these planes of their blocks together."""
        if len(frames) != len(ids):
            raise ValueError(f"{len(ids)} ids for {len(frames)} frames")
        frames, planes = list(frames), list(planes)
        good = _native.decode(
            frames,
            ids,
            self._common,
            self.spec.nbytes,
            xxhash.xxh3_64_intdigest,
            self._unpacker(),
            zstandard.ZstdError,
            firsts,
            planes,
            rows,
        )
        if good < len(frames):
            block, reason = int(ids[good]), self._fault(int(ids[good]), bytes(frames[good]))
            raise CorruptBlockError(f"block {block} is damaged on disk: {reason}", block)

    def _check_arrays(
        self,
        ids: Ids,
        planes: Sequence[Bytes2D],
        rows: npt.NDArray[np.int64] | None = None,
    ) -> None:
        if ids.dtype != np.int64 or ids.ndim != 1:
            raise ValueError(f"ids are {ids.dtype} {ids.shape}: int64 [n] is needed")
        if rows is None:
            count = len(ids)
        elif rows.shape == ids.shape:
            count = len(planes[0]) if planes else 0
        else:
            raise ValueError(f"{len(ids)} ids for {len(rows)} rows")
        if len(planes) != len(self._sizes) or not all(
            plane.shape == (count, size) and plane.dtype == np.uint8
            for plane, size in zip(planes, self._sizes, strict=True)
        ):
            given = ", ".join(f"{plane.dtype} {plane.shape}" for plane in planes)
            needed = [(count, size) for size in self._sizes]
            raise ValueError(f"planes are {given}: uint8 {needed} are needed")

    # Writing

    def _take_apart(self, planes: list[Bytes2D], rows: npt.NDArray[np.int64]) -> Bytes2D:
        """Split elements into bytes by significance: all units of each block, until the next call.

        uint8 [n, spec.nbytes].
        """
        blocks = self._scratch()[: len(rows)]
        _native.take_apart(planes, rows, self._firsts, blocks)
        return blocks

    def _only_top_compresses(self, planes: list[Bytes2D], rows: npt.NDArray[np.int64]) -> bool:
        """Say, from a few blocks, whether the lower bytes are noise, as those of mantissas are."""
        blocks = self._take_apart(planes, rows[:: -(-len(rows) // _PROBES)].copy())
        for unit, first in zip(self._units[:-1], self._starts, strict=False):
            stored = sum(map(len, self._compress(blocks, first, unit.nbytes)))
            size = len(blocks) * unit.nbytes
            if stored < size - size // _WORTH:
                return False
        return True

    def _compress(self, blocks: Bytes2D, first: int, nbytes: int) -> Any:
        """Compress so many bytes of each block, from the first on, into zstd frames."""
        spans = np.empty((len(blocks), 2), np.uint64)
        spans[:, 0] = np.arange(first, blocks.size, blocks.shape[1], dtype=np.uint64)
        spans[:, 1] = nbytes
        rows = zstandard.BufferWithSegments(blocks.data, spans.tobytes())
        return self._compressor().multi_compress_to_buffer(rows, threads=1)

    def _splice(self, ids: Ids, blocks: Bytes2D) -> list[bytes]:
        """Compress the top unit alone and put the others before it, in the same zstd frame, raw."""
        raw = self._starts[-1]
        tops = self._compress(blocks, raw, self._units[-1].nbytes)
        header = _ZSTD_HEADER + struct.pack("<I", self.spec.nbytes)
        skip = zstandard.frame_header_size(tops[0])  # the frames are of one size
        return _native.make_frames(
            ids, self._common, blocks, raw, tops, skip, header, xxhash.xxh3_64_intdigest
        )

    def _stream(self, ids: Ids, blocks: Bytes2D) -> list[bytes]:
        """Compress all units of each block into one zstd frame, each with tables of its own."""
        frames = []
        for block, row in zip(ids.tolist(), blocks, strict=True):
            stream = self._compressor().compressobj(size=self.spec.nbytes)
            pieces: list[bytes] = []
            for unit, first in zip(self._units, self._starts, strict=True):
                pieces.append(stream.compress(row[first : first + unit.nbytes].data))
                pieces.append(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
            pieces.append(stream.flush())
            payload = b"".join(pieces)
            body = struct.pack("<q", block) + self._common + struct.pack("<I", len(payload))
            body += payload
            frames.append(xxhash.xxh3_64_intdigest(body).to_bytes(8, "little") + body)
        return frames

    # Reading

    def _fault(self, block: int, frame: bytes) -> str:
        """Say what is wrong with a frame that was refused."""
        if len(frame) < self.header_nbytes:
            return f"its frame is cut short at {len(frame)} B"
        if int.from_bytes(frame[:8], "little") != xxhash.xxh3_64_intdigest(frame[8:]):
            return "its checksum does not match"
        found = int.from_bytes(frame[8:16], "little", signed=True)
        if found != block:
            return f"its place holds the frame of block {found}"
        if frame[16:22] != self._common[:6]:
            return f"its frame is not of format version {FORMAT_VERSION}"
        if frame[16 : self._common_end] != self._common:
            return f"its frame is not of the planes {self.description}"
        size = int.from_bytes(frame[self._common_end : self.header_nbytes], "little")
        if size != len(frame) - self.header_nbytes:
            return "its size is not what it says"
        try:
            self._unpacker()(frame[self.header_nbytes :])
        except zstandard.ZstdError as error:
            return str(error)
        raise AssertionError("a frame was refused that is as it should be")

    def _unpacker(self) -> Callable[[Frame], bytes]:
        """Return what decompresses payloads on this thread; ZstdError where it cannot."""
        # One that lasts: to make a new one for each batch took as long as a small block takes.
        decompress = self._decompressor().decompress
        nbytes = self.spec.nbytes

        def unpack(payload: Frame) -> bytes:
            size = zstandard.frame_content_size(payload)
            if size != nbytes:  # it gets no memory to hold more
                raise zstandard.ZstdError(f"it holds {size} B for {nbytes}")
            block: bytes = decompress(payload, 0, False, False)
            return block

        return unpack

    # What each thread has for itself: zstd contexts are not safe to share.

    def _compressor(self) -> Any:
        if not hasattr(self._local, "compressor"):
            self._local.compressor = zstandard.ZstdCompressor(compression_params=_COMPRESSION)
        return self._local.compressor

    def _decompressor(self) -> Any:
        if not hasattr(self._local, "decompressor"):
            window = 1 << max(10, (self.spec.nbytes - 1).bit_length())
            self._local.decompressor = zstandard.ZstdDecompressor(max_window_size=window)
        return self._local.decompressor

    def _scratch(self) -> Bytes2D:
        """Return this thread's array; fresh large arrays would fault page by page."""
        if not hasattr(self._local, "blocks"):
            self._local.blocks = np.empty((max(self._group, _PROBES), self.spec.nbytes), np.uint8)
        blocks: Bytes2D = self._local.blocks
        return blocks


def _units(spec: BlockSpec) -> tuple[_Unit, ...]:
    """Plan the units, least significant first, so that the one that compresses best comes last."""
    units = []
    for depth in reversed(range(max(plane.dtype.itemsize for plane in spec.planes))):
        spans = []
        column = 0
        for index, plane in enumerate(spec.planes):
            if plane.dtype.itemsize > depth:
                elements = plane.nbytes // plane.dtype.itemsize
                spans.append((index, column, column + elements))
                column += elements
        units.append(_Unit(depth, tuple(spans), column))
    return tuple(units)


def _firsts(spec: BlockSpec, units: tuple[_Unit, ...]) -> list[list[int]]:
    """Say where in a decompressed block each plane's bytes begin, most significant first.

    One place for each byte of the plane's elements.
    """
    firsts: list[list[int]] = [[] for _ in spec.planes]
    start = 0
    for unit in units:
        for plane, first, _ in unit.spans:
            firsts[plane].insert(0, start + first)
        start += unit.nbytes
    return firsts
