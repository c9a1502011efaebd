"""What is compiled does what a few lines of Python say, and refuses what would leave its arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import _native
from kvstore.tiers.pack import chain_packs, frame_at, pack_up

SLOTS, IDS = 12, 20
slots = st.lists(st.integers(0, SLOTS - 1), unique=True)


def int64(values):
    return np.array(values, np.int64)


class Pins:
    def __init__(self):
        self.pins = np.zeros(SLOTS, np.int32)
        self.pinned = np.zeros(SLOTS, bool)
        self.count = np.zeros(1, np.int64)

    @property
    def all(self):
        return self.pins, self.pinned, self.count

    def check(self, held):
        expected = [sum(slot in some for some in held) for slot in range(SLOTS)]
        assert self.pins.tolist() == expected
        assert self.pinned.tolist() == [n > 0 for n in expected]
        assert self.count.tolist() == [sum(n > 0 for n in expected)]


@given(st.lists(slots, max_size=4), st.data())
def test_pins_are_counted(held, data):
    state = Pins()
    for some in held:
        _native.pin(int64(some), *state.all)
    state.check(held)
    for some in data.draw(st.permutations(held)):
        _native.unpin(int64(some), *state.all)
        held.remove(some)
        state.check(held)


@given(
    st.lists(st.integers(-2, IDS + 1), max_size=15),
    st.dictionaries(st.integers(0, IDS - 1), st.integers(0, SLOTS - 1)),
)
def test_what_is_present_is_pinned_and_nothing_else(ids, where):
    where = {block: slot for slot, block in {s: b for b, s in where.items()}.items()}
    table = np.full(IDS, -1, np.int32)
    table[list(where)] = list(where.values())
    state = Pins()
    place = np.full(SLOTS, 99, np.int64)
    found = _native.pin_present(int64(ids), table, *state.all, place)
    if not where.keys() >= set(ids):
        assert found is None
        state.check([])
        return
    assert found is not None
    expected = [where[block] for block in ids]
    assert found[0].tolist() == expected
    assert found[1].tolist() == list(dict.fromkeys(expected))
    state.check([found[1].tolist()])


@given(st.lists(st.integers(0, IDS - 1)), st.lists(st.integers(-1, 5), min_size=IDS, max_size=IDS))
def test_ids_are_split_by_whether_they_have_a_place(ids, places):
    having, where, lacking = _native.split(int64(ids), np.array(places, np.int32))
    assert having.tolist() == [block for block in ids if places[block] >= 0]
    assert where.tolist() == [places[block] for block in ids if places[block] >= 0]
    assert lacking.tolist() == [block for block in ids if places[block] < 0]


@given(slots, st.permutations(range(IDS)), st.data())
def test_blocks_arrive_and_leave(places, ids, data):
    ids = ids[: len(places)]
    block, table = np.full(SLOTS, -1, np.int64), np.full(IDS, -1, np.int32)
    _native.arrive(int64(ids), int64(places), block, table)
    where = dict(zip(ids, places, strict=True))
    assert [table[i] for i in range(IDS)] == [where.get(i, -1) for i in range(IDS)]
    gone = data.draw(st.lists(st.sampled_from(places), unique=True) if places else st.just([]))
    held = {slot: block for block, slot in where.items()}
    spare, sole = (np.ones(SLOTS, bool) for _ in range(2))
    left = _native.leave(int64(gone), block, table, spare, sole)
    assert spare.tolist() == sole.tolist() == [slot not in gone for slot in range(SLOTS)]
    assert left.tolist() == [held.pop(slot) for slot in gone]
    assert block.tolist() == [held.get(slot, -1) for slot in range(SLOTS)]
    where = {block: slot for slot, block in held.items()}
    assert table.tolist() == [where.get(i, -1) for i in range(IDS)]


@given(slots, st.permutations(range(IDS)), st.lists(st.integers(0, 3), min_size=IDS, max_size=IDS))
def test_victims_are_sorted_by_what_is_left_of_them(chosen, ids, copies):
    """copies: 1 for one in warm, 2 for one on disk, 3 for both."""
    block = int64(ids[:SLOTS])
    warm = np.array([i if copies[i] & 1 else -1 for i in range(IDS)], np.int32)
    cold = int64([i if copies[i] & 2 else -1 for i in range(IDS)])
    below, sole, saved = _native.sort_victims(int64(chosen), block, warm, cold)
    assert below.tolist() == [ids[s] for s in chosen if copies[ids[s]] & 1]
    assert sole[1].tolist() == [s for s in chosen if copies[ids[s]] == 0]
    assert saved[1].tolist() == [s for s in chosen if copies[ids[s]] == 2]
    for some, places in (sole, saved):
        assert some.tolist() == [ids[s] for s in places]


def test_what_lies_outside_is_refused_and_changes_nothing():
    state = Pins()
    block, table = np.full(SLOTS, -1, np.int64), np.full(IDS, -1, np.int32)
    cold = np.full(IDS, -1, np.int64)
    for wrong in (-1, SLOTS, 2**62):
        bad = int64([0, wrong])
        with pytest.raises(IndexError):
            _native.pin(bad, *state.all)
        with pytest.raises(IndexError):
            _native.unpin(bad, *state.all)
        with pytest.raises(IndexError):
            _native.arrive(int64([0, 1]), bad, block, table)
        with pytest.raises(IndexError):
            _native.leave(bad, block, table, state.pinned, state.pinned)
        with pytest.raises(IndexError):
            _native.mark_sole(int64([0, 1]), bad, cold, state.pinned)
        with pytest.raises(IndexError):
            _native.sum_by_slot(bad, np.zeros(2, np.float32), np.zeros(SLOTS, np.int64))
        with pytest.raises(IndexError):
            _native.sort_victims(bad, block, table, cold)
    with pytest.raises(IndexError):  # a slot without a block
        _native.leave(int64([0]), block, table, state.pinned, state.pinned)
    with pytest.raises(IndexError):
        _native.split(int64([IDS]), table)
    state.check([])
    assert (block == -1).all()
    assert (table == -1).all()


def test_arrays_that_do_not_belong_together_are_refused():
    state, table = Pins(), np.full(IDS, -1, np.int32)
    ids, short = int64([0, 1]), int64([0])
    with pytest.raises(ValueError, match="differ in length"):
        _native.arrive(ids, short, np.zeros(SLOTS, np.int64), table)
    with pytest.raises(ValueError, match="differ in length"):
        _native.pin(ids, state.pins, state.pinned[1:], state.count)
    with pytest.raises(ValueError, match="differ in length"):
        _native.find_tiers(ids, table, table[1:], np.zeros(IDS, np.int64), table)
    with pytest.raises(TypeError):  # never converted: what is written to would be a copy
        _native.pin(ids, state.pins.astype(np.int64), state.pinned, state.count)
    with pytest.raises(TypeError):
        _native.pin(ids, state.pins[::2], state.pinned, state.count)
    frozen = state.pins.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        _native.pin(ids, frozen, state.pinned, state.count)


@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 9))))
def test_weights_are_added_up_by_slot(given_weights):
    at = int64([slot for slot, _ in given_weights])
    weights = np.array([weight for _, weight in given_weights], np.float32)
    found, sums = _native.sum_by_slot(at, weights, np.full(SLOTS, 7, np.int64))
    expected = {}
    for slot, weight in given_weights:
        expected[slot] = expected.get(slot, 0) + weight
    assert found.tolist() == list(expected)
    assert sums.tolist() == list(expected.values())


@given(slots, st.permutations(range(IDS)), st.lists(st.booleans(), min_size=IDS, max_size=IDS))
def test_slots_are_marked_whose_blocks_are_not_on_disk(places, ids, saved):
    sole = np.zeros(SLOTS, bool)
    cold = int64([5 if each else -1 for each in saved])
    _native.mark_sole(int64(ids[: len(places)]), int64(places), cold, sole)
    expected = {slot: not saved[block] for block, slot in zip(ids, places, strict=False)}
    assert sole.tolist() == [expected.get(slot, False) for slot in range(SLOTS)]


def test_rows_are_copied_from_what_is_only_read_and_never_to_it():
    source, target = np.frombuffer(b"abcdef", np.uint8).reshape(3, 2), np.zeros((2, 2), np.uint8)
    _native.copy_rows(source, int64([2, 0]), target, None)
    assert target.tobytes() == b"efab"
    with pytest.raises(ValueError, match="writeable"):
        _native.copy_rows(target, None, source, int64([0, 1]))


FIRSTS = [[[2, 0], [3, 1]], [[3, 2, 1, 0]]]


def framed(block, payload, common=b"common"):
    body = block.to_bytes(8, "little") + common + len(payload).to_bytes(4, "little") + payload
    return hash(body).to_bytes(8, "little", signed=True) + body


def decode(frames, ids, firsts=(), planes=(), rows=None, unpack=bytes):
    """What `decode` returns where blocks of four bytes are packed as they are."""
    return _native.decode(
        frames,
        int64(ids),
        b"common",
        4,
        lambda body: hash(bytes(body)) % 2**64,
        unpack,
        LookupError,
        list(firsts),
        list(planes),
        int64(ids if rows is None else rows),
    )


def test_planes_are_put_together_within_bounds():
    out = [np.zeros((2, 2), np.uint8) for _ in "kv"]
    frame = framed(7, b"abcd")
    assert decode([frame], [7], FIRSTS[0], out, [1]) == 1
    assert [plane.tobytes() for plane in out] == [b"\0\0ac", b"\0\0bd"]
    for frames, firsts, rows in (
        ([frame], [[2, 0], [4, 1]], [1]),  # beyond the block's end
        ([framed(7, b"abc")], FIRSTS[0], [1]),  # a block that is too short
        ([framed(7, b"abcde")], FIRSTS[0], [1]),
        ([frame], FIRSTS[0], [0, 1]),
        ([frame, frame], FIRSTS[0], [0]),
        ([frame], FIRSTS[1], [0]),  # another number of planes
        ([frame], [[0], [0, 1, 2]], [0]),  # elements of three bytes
    ):
        with pytest.raises(ValueError, match=r"."):
            decode(frames, [7] * len(frames), firsts, out, rows)
    with pytest.raises(IndexError):
        decode([frame], [7], FIRSTS[0], out, [2])


def test_frames_count_until_the_first_that_is_not_as_it_should_be():
    good = framed(7, b"abcd")
    assert decode([good, memoryview(good)], [7, 7]) == 2
    wrong = [framed(6, b"abcd"), framed(7, b"abcd", b"others"), b"short", b"", good[:-1]]
    wrong += [good + b"e", good[:-1] + b"e", b"x" + good[1:]]
    for frame in wrong:
        assert decode([good, frame, good], [7, 7, 7]) == 1

    def refuse(payload):
        raise KeyError(bytes(payload))

    assert decode([good], [7], unpack=refuse) == 0
    with pytest.raises(ZeroDivisionError):
        decode([good], [7], unpack=lambda payload: 1 // 0)


def test_planes_are_taken_apart_within_bounds():
    planes = [np.frombuffer(b"\0\0ac", np.uint8).reshape(2, 2) for _ in "kv"]
    blocks = np.zeros((1, 4), np.uint8)
    _native.take_apart(planes, int64([1]), FIRSTS[0], blocks)
    assert blocks.tobytes() == b"aacc"
    with pytest.raises(IndexError):
        _native.take_apart(planes, int64([2]), FIRSTS[0], blocks)
    with pytest.raises(ValueError, match="blocks are"):
        _native.take_apart(planes, int64([1]), FIRSTS[0], blocks[:, :3].copy())


def test_frames_are_cut_where_the_table_says_and_never_beyond():
    pack = memoryview(b"\x0c\0\0\0\x0d\0\0\0\xff\xff\0\0ab")
    locations = int64([0, 1 + (7 << 16)])
    assert [bytes(f) for f in _native.cut_frames([pack], [0, 0], locations, 16)] == [b"a", b"b"]
    for wrong in (2, 3, -1, 2**61 + 2):
        assert _native.cut_frames([pack], [0], int64([wrong]), 16) is None
    assert _native.cut_frames([b""], [0], int64([0]), 16) is None
    with pytest.raises(IndexError):
        _native.cut_frames([pack], [1], int64([0]), 16)
    for bits in (0, 33):
        with pytest.raises(ValueError, match="bits"):
            _native.cut_frames([pack], [0], int64([0]), bits)


@given(
    st.lists(st.binary(max_size=40), min_size=1, max_size=12),
    st.integers(1, 100),
    st.integers(1, 100),
)
def test_packs_hold_all_frames_in_order_however_they_are_cut(frames, nbytes, other):
    for packs in (pack_up(frames, nbytes), pack_up(frames, other).cut(nbytes)):
        assert sum(packs.counts) == len(frames)
        assert packs.nbytes == sum(map(len, packs.values))
        found = [
            bytes(frame_at(memoryview(value), 4 * place))
            for value, count in zip(packs.values, packs.counts, strict=True)
            for place in range(count)
        ]
        assert found == frames
    two = chain_packs([pack_up(frames, nbytes), pack_up(frames[:1], nbytes)])
    assert two.values[-1] == pack_up(frames[:1], nbytes).values[0]
    assert sum(two.counts) == len(frames) + 1


@pytest.mark.parametrize("counts", [[1], [3], [1, 2], [2**64 - 1, 3], []])
def test_packs_of_other_numbers_of_frames_are_refused(counts):
    assert _native.join_frames([b"a", memoryview(b"xb")[1:]], [1, 1]) == [
        b"\x08\0\0\0\x09\0\0\0" + frame for frame in (b"a", b"b")
    ]
    with pytest.raises(ValueError, match="frames than there are"):
        _native.join_frames([b"a", b"b"], counts)


@given(slots, slots)
def test_marks_are_set_and_found(some, others):
    mask = np.zeros(SLOTS, bool)
    _native.mark(int64(some), mask, True)
    assert np.flatnonzero(mask).tolist() == sorted(some)
    assert _native.any_marked(int64(others), mask) == bool(set(some) & set(others))
    _native.mark(int64(others), mask, False)
    assert np.flatnonzero(mask).tolist() == sorted(set(some) - set(others))
    for call in (lambda: _native.mark(int64([SLOTS]), mask, True),
                 lambda: _native.any_marked(int64([-1]), mask)):  # fmt: skip
        with pytest.raises(IndexError):
            call()
