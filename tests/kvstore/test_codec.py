"""Frames: bit for bit there and back, and nothing damaged ever comes back as a block."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest
import torch
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.block import BlockSpec, Plane
from kvstore.codec import FORMAT_VERSION, Codec
from kvstore.errors import CorruptBlockError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]

# Payloads that arithmetic would lose: NaNs with bits in them, infinities, minus zero, subnormals.
ODD_FLOAT32 = np.array(
    [0x7F800001, 0xFFC0DEAD, 0x7FFFFFFF, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x00400000],
    "<u4",
)


def arrays(codec, count, fill):
    """One uint8 [count, plane.nbytes] a plane."""
    return [fill(count, plane.nbytes).view(np.uint8) for plane in codec.spec.planes]


def noise(seed):
    generator = np.random.default_rng(seed)
    return lambda count, nbytes: generator.integers(0, 256, (count, nbytes), np.uint8)


def normal_bfloat16(seed):
    """Values as caches have them: their high bytes compress, their low bytes do not."""
    generator = np.random.default_rng(seed)

    def fill(count, nbytes):
        values = generator.normal(size=(count, nbytes // 2)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    return fill


def decoded(codec, ids, frames):
    out = arrays(codec, len(ids), lambda count, nbytes: np.full((count, nbytes), 0xA5, np.uint8))
    ids = np.asarray(ids, np.int64)
    try:
        codec.decode(ids, frames, out)
    except CorruptBlockError as error:
        with pytest.raises(CorruptBlockError, match=f"^{re.escape(str(error))}$"):
            codec.verify(ids, frames)
        raise
    codec.verify(ids, frames)
    return out


def assert_round_trip(codec, ids, planes):
    frames = codec.encode(ids, planes)
    for wanted, found in zip(planes, decoded(codec, ids, frames), strict=True):
        assert (wanted == found).all()
    return frames


@st.composite
def specs(draw):
    tokens = draw(st.integers(1, 9))
    return BlockSpec(
        tuple(
            Plane(
                f"p{index}",
                (tokens, *draw(st.lists(st.integers(1, 7), max_size=2))),
                draw(st.sampled_from(DTYPES)),
            )
            for index in range(draw(st.integers(1, 3)))
        )
    )


def mostly_regular(count, nbytes, seed):
    """Rows that compress in every byte, in none, or only here and there."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 256, (count, nbytes), np.uint8)
    rows[generator.random(count) < 0.4] //= 64
    rows[generator.random(count) < 0.3] = 7
    return rows


@given(spec=specs(), count=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_any_bytes_of_any_planes_come_back(spec, count, seed):
    codec = Codec(spec)
    ids = np.random.default_rng(seed).integers(0, 2**63 - 1, count, np.int64)
    planes = arrays(codec, count, lambda n, nbytes: mostly_regular(n, nbytes, seed))
    assert_round_trip(codec, ids, planes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (16, 8), (3, 5, 7), (64, 128)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype, shape):
    codec = Codec(BlockSpec((Plane("a", shape, dtype), Plane("b", shape, dtype))))
    for fill in (noise(1), lambda n, nbytes: np.zeros((n, nbytes), np.uint8)):
        assert_round_trip(codec, np.arange(5), arrays(codec, 5, fill))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_arithmetic_would_lose_come_back(dtype):
    width = dtype.itemsize
    odd = {
        2: np.array([0x7F81, 0xFFC1, 0x7FFF, 0x7F80, 0xFC00, 0x8000, 1, 0x7C01], "<u2"),
        4: ODD_FLOAT32,
        8: ODD_FLOAT32.astype("<u8") << np.uint64(32) | ODD_FLOAT32,
    }[width]
    codec = Codec(BlockSpec((Plane("a", (8,), dtype),)))
    planes = [np.stack([np.roll(odd, n) for n in range(8)]).view(np.uint8)]
    assert_round_trip(codec, np.arange(8), planes)


def test_a_batch_longer_than_one_group_comes_back():
    codec = Codec(BlockSpec.kv(16, 64))
    count = 3 * codec._group + 5
    assert_round_trip(codec, np.arange(count), arrays(codec, count, normal_bfloat16(2)))


def test_a_block_larger_than_a_zstd_block_comes_back():
    codec = Codec(BlockSpec.kv(1024, 200))
    frames = assert_round_trip(codec, np.arange(2), arrays(codec, 2, normal_bfloat16(3)))
    assert sum(map(len, frames)) < 0.8 * 2 * codec.spec.nbytes


def test_blocks_go_to_the_rows_asked_for():
    codec = Codec(BlockSpec.kv(4, 8))
    ids = np.arange(5)
    planes = arrays(codec, 5, noise(4))
    out = arrays(codec, 9, lambda count, nbytes: np.zeros((count, nbytes), np.uint8))
    rows = np.array([8, 0, 3, 2, 6])
    codec.decode(ids, codec.encode(ids, planes), out, rows)
    for wanted, found in zip(planes, out, strict=True):
        assert (found[rows] == wanted).all()
        assert not found[[1, 4, 5, 7]].any()


def test_what_can_be_compressed_is():
    codec = Codec(BlockSpec.kv(64, 128))
    planes = arrays(codec, 8, normal_bfloat16(5))
    ratio = 8 * codec.spec.nbytes / sum(map(len, codec.encode(np.arange(8), planes)))
    assert ratio > 1.35
    zeros = arrays(codec, 1, lambda count, nbytes: np.zeros((count, nbytes), np.uint8))
    assert len(codec.encode(np.arange(1), zeros)[0]) < 200


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 64), np.int8), np.zeros((2, 63), np.uint8), np.zeros((3, 64), np.uint8)]
)
def test_other_arrays_than_the_planes_are_refused(wrong):
    codec, ids = Codec(BlockSpec.kv(4, 8)), np.arange(2)
    good = np.zeros((2, 64), np.uint8)
    frames = codec.encode(ids, [good, good])
    for planes in ([good, wrong], [good]):
        with pytest.raises(ValueError, match=r"uint8 \[\(2, 64\), \(2, 64\)\] are needed"):
            codec.encode(ids, planes)
        with pytest.raises(ValueError, match="are needed"):
            codec.decode(ids, frames, planes)


def test_noise_grows_by_little_more_than_the_header():
    codec = Codec(BlockSpec.kv(64, 128))
    frames = codec.encode(np.arange(3), arrays(codec, 3, noise(6)))
    assert max(map(len, frames)) <= codec.spec.nbytes + codec.header_nbytes + 64


def test_a_block_is_one_zstd_frame_that_any_decoder_reads():
    codec = Codec(BlockSpec.kv(32, 16))
    for fill in (normal_bfloat16(7), lambda count, nbytes: np.ones((count, nbytes), np.uint8)):
        planes = arrays(codec, 1, fill)
        (frame,) = codec.encode(np.arange(1), planes)
        block = zstandard.ZstdDecompressor().decompress(frame[codec.header_nbytes :])
        words = np.concatenate([plane.view("<u2")[0] for plane in planes])
        assert (
            block
            == (words & 255).astype(np.uint8).tobytes() + (words >> 8).astype(np.uint8).tobytes()
        )


@pytest.mark.parametrize("fill", [normal_bfloat16(8), noise(8)], ids=["compressed", "raw"])
def test_every_flipped_bit_is_noticed(fill):
    codec = Codec(BlockSpec.kv(4, 8))
    ids = np.array([3, 77])
    good, frame = codec.encode(ids, arrays(codec, 2, fill))
    damaged = bytearray(frame)
    for bit in range(8 * len(frame)):
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptBlockError, match="block 77 "):
            decoded(codec, ids, [good, bytes(damaged)])
        damaged[bit // 8] ^= 1 << bit % 8
    decoded(codec, ids, [good, bytes(damaged)])


def test_every_cut_and_every_lengthened_frame_is_noticed():
    codec = Codec(BlockSpec.kv(4, 8))
    ids = np.array([5])
    (frame,) = codec.encode(ids, arrays(codec, 1, normal_bfloat16(9)))
    for length in range(len(frame)):
        with pytest.raises(CorruptBlockError, match="block 5 "):
            decoded(codec, ids, [frame[:length]])
    with pytest.raises(CorruptBlockError, match="block 5 "):
        decoded(codec, ids, [frame + b"\0"])


def test_a_swapped_frame_is_noticed():
    codec = Codec(BlockSpec.kv(4, 8))
    ids = np.array([10, 11, 12])
    first, second, third = codec.encode(ids, arrays(codec, 3, normal_bfloat16(10)))
    with pytest.raises(CorruptBlockError, match=r"block 11 .* holds the frame of block 12"):
        decoded(codec, ids, [first, third, second])


@pytest.mark.parametrize(
    "other",
    [
        BlockSpec.kv(4, 8, torch.float16),
        BlockSpec.kv(8, 4),
        BlockSpec((Plane("k", (4, 8), torch.bfloat16), Plane("values", (4, 8), torch.bfloat16))),
    ],
    ids=["dtype", "shape", "name"],
)
def test_a_frame_of_another_specification_is_refused(other):
    codec, ids = Codec(BlockSpec.kv(4, 8)), np.array([6])
    frames = codec.encode(ids, arrays(codec, 1, normal_bfloat16(11)))
    with pytest.raises(CorruptBlockError, match=r"block 6 .*planes"):
        decoded(Codec(other), ids, frames)


def resealed(frame, **changes):
    """Change bytes of a frame and give it the checksum of what it then holds."""
    body = bytearray(frame)
    for first, piece in changes.values():
        body[first : first + len(piece)] = piece
    return xxhash.xxh3_64_intdigest(bytes(body[8:])).to_bytes(8, "little") + bytes(body[8:])


def test_another_format_version_is_refused():
    codec, ids = Codec(BlockSpec.kv(4, 8)), np.array([6])
    (frame,) = codec.encode(ids, arrays(codec, 1, normal_bfloat16(12)))
    newer = resealed(frame, version=(20, (FORMAT_VERSION + 1).to_bytes(2, "little")))
    with pytest.raises(CorruptBlockError, match=r"block 6 .*format version"):
        decoded(codec, ids, [newer])


@pytest.mark.parametrize("size", [0, 255, 2**31, 2**32 - 1])
def test_sizes_with_a_right_checksum_allocate_nothing(size):
    codec = Codec(BlockSpec.kv(4, 8))
    ids = np.array([1, 6])
    good, frame = codec.encode(ids, arrays(codec, 2, normal_bfloat16(13)))
    content_size = codec.header_nbytes + 5
    claims = resealed(frame, size=(content_size, size.to_bytes(4, "little")))
    with pytest.raises(CorruptBlockError, match="block 6 "):
        decoded(codec, ids, [good, claims])
    stored = resealed(frame, size=(codec.header_nbytes - 4, size.to_bytes(4, "little")))
    with pytest.raises(CorruptBlockError, match="block 6 "):
        decoded(codec, ids, [good, stored])


def test_a_claim_of_a_large_window_is_not_believed():
    codec, ids = Codec(BlockSpec.kv(4, 8)), np.array([6])
    (frame,) = codec.encode(ids, arrays(codec, 1, normal_bfloat16(13)))
    claim = (1 << 26).to_bytes(4, "little")
    with pytest.raises(CorruptBlockError, match="block 6 is damaged on disk: it holds 67108864 B"):
        decoded(codec, ids, [resealed(frame, size=(codec.header_nbytes + 5, claim))])


def test_nothing_may_follow_a_block():
    codec, ids = Codec(BlockSpec.kv(4, 8)), np.array([6])
    (frame,) = codec.encode(ids, arrays(codec, 1, normal_bfloat16(13)))
    payload = frame[codec.header_nbytes :]
    for more in (b"x", payload):
        size = (len(payload) + len(more)).to_bytes(4, "little")
        longer = resealed(frame + more, size=(codec.header_nbytes - 4, size))
        with pytest.raises(CorruptBlockError, match=r"block 6 is damaged on disk: .*unused data"):
            decoded(codec, ids, [longer])
        with pytest.raises(CorruptBlockError, match="block 6 "):
            codec.verify(ids, [longer])


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_anything_else_is_refused(junk):
    codec = Codec(BlockSpec.kv(4, 8))
    with pytest.raises(CorruptBlockError, match="block 9 "):
        decoded(codec, [9], [junk])


@given(junk=st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_a_payload_that_is_no_zstd_frame_is_refused(junk):
    codec = Codec(BlockSpec.kv(4, 8))
    ids = np.array([2, 9])
    good, frame = codec.encode(ids, arrays(codec, 2, normal_bfloat16(14)))
    head = bytearray(frame[: codec.header_nbytes])
    head[-4:] = len(junk).to_bytes(4, "little")
    with pytest.raises(CorruptBlockError, match="block 9 "):
        decoded(codec, ids, [good, resealed(bytes(head) + junk)])


@pytest.mark.parametrize("payload", [b"", b"not whole"])
def test_a_payload_that_is_no_zstd_frame_is_named(payload):
    """In a batch of whole ones, and as the only one."""
    codec, ids = Codec(BlockSpec.kv(4, 8)), np.array([2, 9, 11])
    first, frame, last = codec.encode(ids, arrays(codec, 3, normal_bfloat16(14)))
    payload = payload.replace(b"whole", frame[codec.header_nbytes :])
    head = frame[: codec.header_nbytes - 4] + len(payload).to_bytes(4, "little")
    wrong = resealed(head + payload)
    with pytest.raises(CorruptBlockError, match="block 9 "):
        decoded(codec, ids, [first, wrong, last])
    with pytest.raises(CorruptBlockError, match="block 9 "):
        decoded(codec, ids[1:2], [wrong])


def test_threads_share_a_codec():
    codec = Codec(BlockSpec.kv(16, 32))
    failures = []

    def work(seed):
        try:
            for turn in range(8):
                count = 1 + (seed * 7 + turn * 13) % 60
                planes = arrays(codec, count, normal_bfloat16(seed))
                assert_round_trip(codec, np.arange(count), planes)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_bad_arguments_are_refused():
    codec = Codec(BlockSpec.kv(4, 8))
    planes = arrays(codec, 2, noise(15))
    frames = codec.encode(np.arange(2), planes)
    with pytest.raises(ValueError, match="int64"):
        codec.encode(np.arange(2, dtype=np.int32), planes)
    with pytest.raises(ValueError, match="uint8"):
        codec.encode(np.arange(3), planes)
    with pytest.raises(ValueError, match="uint8"):
        codec.encode(np.arange(2), planes[:1])
    with pytest.raises(ValueError, match="2 ids for 1 frames"):
        codec.decode(np.arange(2), frames[:1], planes)
    with pytest.raises(ValueError, match="2 ids for 1 rows"):
        codec.decode(np.arange(2), frames, planes, np.array([0]))
    with pytest.raises(ValueError, match="complex64"):
        Codec(BlockSpec((Plane("a", (4,), torch.complex64),)))
