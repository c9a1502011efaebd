"""Contexts: appending in any portions, forks and who frees what, keeping and reopening."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from twin import (
    DIM,
    LANDMARK,
    SIZE,
    SPEC,
    Twin,
    marks_of,
    open_store,
    past,
    tokens,
)

from kvstore.block_map import BlockMap
from kvstore.errors import KVStoreError, StoreClosedError, StoreFullError


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_portions_and_forks(data):
    """Whatever is appended where, each context reads its own past, and no block is left over."""
    with open_store() as store:
        portions_and_forks(store, data.draw)


def portions_and_forks(store, draw) -> None:
    streams = draw(st.integers(1, 3))
    twins = [Twin(store.context(streams=streams, landmark_dim=LANDMARK))]
    for step in range(draw(st.integers(1, 14))):
        twin = draw(st.sampled_from(twins))
        action = draw(st.sampled_from(["append", "append", "append", "fork", "close"]))
        if action == "append":
            some = draw(st.permutations(range(streams)))[: draw(st.integers(1, streams))]
            some = [
                s
                for s in some
                if twin.context.tokens(s) % SIZE == twin.context.tokens(some[0]) % SIZE
            ]
            twin.append(some, draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 70 * SIZE])), step)
        elif action == "fork":
            twins.append(twin.fork())
        elif len(twins) > 1:
            twin.context.close()
            twins.remove(twin)
        for other in twins:
            other.check()
        held = {int(i) for t in twins for i in t.context._map.ids()}
        assert len(store) == len(held)
        store.check()
    for twin in twins:
        twin.context.close()
    assert not len(store)
    assert not store.contexts


def test_streams_by_slice_and_by_number_are_the_same(make_store):
    store = make_store()
    with store.context(streams=4, landmark_dim=LANDMARK) as context:
        planes, marks = tokens(2, 9), marks_of(2, 2)
        context.append(slice(1, 3), planes, marks)
        context.append([3, 0], [p.flip(0) for p in planes], marks.flip(0))
        for a, b in ((1, 0), (2, 3)):
            for x, y in zip(past(context, a), past(context, b), strict=True):
                assert torch.equal(x, y)
        views = context.open_block(slice(1, 3))
        assert [tuple(v.shape) for v in views] == [(2, 1, DIM), (2, 1, 2, DIM), (2, 1)]
        assert views[0].data_ptr() == context._open[0][1].data_ptr()
        assert context.open_block([])[0].shape == (0, 0, DIM)
        blocks, scores = context.search([1, 0], marks[:, :1], 1)
        assert blocks.shape == scores.shape == (2, 1, 1)
        context.append([], tokens(0, 3))
        assert context.tokens(0) == 9


def test_whole_blocks_are_put_at_once_without_a_copy(make_store, monkeypatch):
    store = make_store()
    context = store.context(streams=2, landmark_dim=LANDMARK)
    seen = []
    put = store.put
    monkeypatch.setattr(store, "put", lambda planes: (seen.append(planes), put(planes))[1])
    planes = tokens(2, 5 * SIZE)
    context.append(slice(None), planes, marks_of(2, 5))
    assert len(seen) == 1
    assert seen[0][0].data_ptr() == planes[0].data_ptr()
    context.append(slice(None), tokens(2, 2 * SIZE + 1), marks_of(2, 2))
    context.append(slice(None), tokens(2, 2 * SIZE - 1), marks_of(2, 2))
    assert [len(s[0]) for s in seen] == [10, 4, 2, 2]


def test_ids(make_store):
    store = make_store()
    context = store.context(streams=3, landmark_dim=LANDMARK)
    context.append(slice(None), tokens(3, 6 * SIZE), marks_of(3, 6))
    context.append([2], tokens(1, SIZE), marks_of(1, 1))
    table = context.ids(slice(None), np.tile(np.arange(6), (3, 1)))
    assert len(np.unique(table)) == 18
    blocks = np.array([[[0, 6], [5, 5]], [[1, 1], [2, 0]]])
    found = context.ids([2, 0], torch.from_numpy(blocks))
    assert found.dtype == np.int64
    assert found.shape == (2, 2, 2)
    assert found[1, 0, 0] == table[0, 1]
    assert found[0, 1, 1] == table[2, 5]
    assert context.ids([1], np.empty((1, 0), np.int64)).shape == (1, 0)
    for streams, wrong, words in [
        ([1], 6, "stream 1 has no block 6, only 6"),
        ([2], 7, "stream 2 has no block 7, only 7"),
        ([0], -1, "stream 0 has no block -1"),
    ]:
        with pytest.raises(KeyError, match=words):
            context.ids(streams, np.array([[0, wrong]]))
    with pytest.raises(ValueError, match="expected int64"):
        context.ids([0], np.array([0, 1]))
    with pytest.raises(ValueError, match="expected int64"):
        context.ids([0], np.array([[0.5]]))


def test_forks_of_forks_have_few_runs(make_store):
    store = make_store()
    twin = Twin(store.context(streams=2, landmark_dim=LANDMARK))
    for step in range(40):
        twin.append([0, 1], 3, step)
        before = twin
        twin = twin.fork()
        before.context.close()
    twin.check()
    assert len(twin.context._map._runs) < 8
    twin.context.close()
    assert not len(store)


def test_a_fork_is_cheap(make_store):
    store = make_store()
    context = store.context(streams=4, landmark_dim=LANDMARK)
    n = 32768
    planes = [torch.zeros(4, n * SIZE, *p.shape[1:], dtype=p.dtype) for p in SPEC.planes]
    store.put = lambda planes: np.arange(len(planes[0]))
    context.append(slice(None), planes, torch.randn(4, n, LANDMARK))
    store.delete = lambda ids: None
    times = []
    for _ in range(20):
        began = time.perf_counter()
        fork = context.fork()
        times.append(time.perf_counter() - began)
        fork.close()
    assert min(times) < 1e-3


# state


def test_state_is_copied_in_and_out(make_store):
    context = make_store().context(streams=1, landmark_dim=LANDMARK)
    assert context.get_state() == {}
    window = torch.zeros(3)
    context.set_state({"window": window})
    window += 1
    fork = context.fork()
    context.get_state()["window"] += 2
    assert torch.equal(context.get_state()["window"], torch.zeros(3))
    fork.set_state({"other": torch.ones(1)})
    assert list(context.get_state()) == ["window"]
    with pytest.raises(TypeError, match="named tensors"):
        context.set_state({"position": 3})
    with pytest.raises(TypeError, match="named tensors"):
        context.set_state({3: window})
    assert list(context.get_state()) == ["window"]


# bad input


def test_bad_input_appends_nothing(make_store):
    store = make_store()
    context = store.context(streams=2, landmark_dim=LANDMARK)
    twin = Twin(context)
    twin.append([0, 1], 6, 1)
    good, marks = tokens(2, 6), marks_of(2, 2)

    def spoiled(plane: int, value: float) -> list[torch.Tensor]:
        planes = [p.clone() for p in good]
        planes[plane].view(-1)[7] = value
        return planes

    bad_marks = marks.clone()
    bad_marks[1, 0, 2] = float("nan")
    for planes, landmarks, words in [
        (spoiled(0, float("nan")), marks, "keys hold numbers that are not finite"),
        (spoiled(1, float("inf")), marks, "values hold numbers that are not finite"),
        (good, bad_marks, "landmarks hold numbers that are not finite"),
        (good, None, r"landmarks of shape \(2, 2, 5\) are needed"),
        (good, marks[:, :1], r"landmarks have shape \(2, 1, 5\); expected \(2, 2, 5\)"),
        (good, marks.long(), "expected a float dtype"),
        (good[:2], marks, "2 planes were given; a block has keys, values, marks"),
        ([good[0].float(), *good[1:]], marks, "keys are torch.float32"),
        ([good[0], good[1][..., :2], good[2]], marks, r"values are .* expected .*\(2, 6, 2, 3\)"),
        ([good[0], good[1][:, :5], good[2]], marks, "values are"),
        ([p[:1] for p in good], marks, "keys are"),
        ([p[0] for p in good], marks, "keys are"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            context.append([0, 1], planes, landmarks)
        assert "\n" not in str(caught.value)
        twin.check()
        assert len(store) == 2
    for streams, words in [([0, 2], "stream 2 is not one of 0 to 1"), ([1, 1], "one twice")]:
        with pytest.raises(ValueError, match=words):
            context.append(streams, good, marks)
    context.append([0], tokens(1, 1))
    with pytest.raises(ValueError, match="not equally full"):
        context.append([0, 1], good, marks)
    with pytest.raises(ValueError, match="not equally full"):
        context.open_block([0, 1])
    with pytest.raises(ValueError, match="at least 1"):
        store.context(streams=0, landmark_dim=LANDMARK)


def test_large_finite_numbers_are_taken(make_store):
    context = make_store().context(streams=1, landmark_dim=LANDMARK)
    planes = tokens(1, 3)
    planes[1][:] = 3e38
    context.append([0], planes)
    assert context.tokens(0) == 3


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_full_store_leaves_everything_as_it_was(make_store, room):
    store = make_store(hot=2 + room, cold=None)
    twin = Twin(store.context(streams=2, landmark_dim=LANDMARK))
    twin.append([0, 1], 6, 1)
    with pytest.raises(StoreFullError):
        twin.append([0, 1], 8, 2)
    twin.check()
    assert len(store) == 2
    twin.append([0, 1], 1, 3)
    twin.check()


def test_a_failing_index_leaves_everything_as_it_was(make_store, monkeypatch):
    store = make_store()
    twin = Twin(store.context(streams=2, landmark_dim=LANDMARK))
    twin.append([0, 1], 6, 1)

    def fail(*_):
        raise KVStoreError("a segment could not be built")

    with monkeypatch.context() as patch:
        patch.setattr(twin.context.index, "add", fail)
        with pytest.raises(KVStoreError, match="segment"):
            twin.append([0, 1], 8, 2)
    twin.check()
    assert len(store) == 2
    twin.append([0, 1], 8, 3)
    twin.check()


# closing and keeping


def test_a_closed_context_is_of_no_use(make_store):
    store = make_store()
    context = store.context("name", streams=1, landmark_dim=LANDMARK)
    with pytest.raises(ValueError, match="'name' is open already"):
        store.context("name", streams=1, landmark_dim=LANDMARK)
    with pytest.raises(ValueError, match="only a context with a name"):
        context.save()
    context.close()
    context.close()
    for use in (
        lambda: context.append([0], tokens(1, 1)),
        lambda: context.open_block([0]),
        lambda: context.ids([0], np.zeros((1, 1), np.int64)),
        lambda: context.search([0], torch.zeros(1, 1, LANDMARK), 1),
        context.fork,
        context.get_state,
        context.delete,
        context.save,
    ):
        with pytest.raises(StoreClosedError):
            use()
    store.context("name", streams=1, landmark_dim=LANDMARK)


def test_a_map_takes_back_what_it_appended():
    block_map = BlockMap(2)
    block_map.append([0, 1], np.arange(6).reshape(2, 3))
    fork = block_map.fork()
    fork.append([1], np.array([[7, 8]]))
    fork.take_back([1], 2)
    fork.append([1], np.array([[9]]))
    assert fork.lookup([1], np.arange(4)[None]).tolist() == [[3, 4, 5, 9]]
    assert fork.ids().tolist() == [0, 1, 2, 3, 4, 5, 9]
    assert block_map.release()[0].tolist() == []
    assert sorted(fork.release()[0].tolist()) == [0, 1, 2, 3, 4, 5, 9]


def test_maps_join_only_what_nobody_else_holds():
    maps = [BlockMap(2)]
    for i in range(9):
        maps[-1].append([0], np.arange(10 * i, 10 * i + 3)[None])
        maps.append(maps[-1].fork())
    for gone in (8, 7, 6, 5):
        assert [len(ids) for ids in maps.pop(gone).release()] == [0, 0]
    maps[0].mark_saved()
    maps.append(maps[-1].fork())
    assert len(maps[-1]._runs) == 6
    want = [10 * i + j for i in range(9) for j in range(3)]
    assert maps[-1].lookup([0], np.arange(27)[None]).tolist() == [want]
    free, saved = [], []
    for block_map in maps:
        some, others = block_map.release()
        free += some.tolist()
        saved += others.tolist()
    assert sorted(free) == want[3:]
    assert saved == [0, 1, 2]


def test_maps_that_join_remember_what_was_saved():
    block_map = BlockMap(1)
    for i in range(9):
        block_map.append([0], np.array([[i]]))
        if i == 2:
            block_map.mark_saved()
        before, block_map = block_map, block_map.fork()
        before.release()
    assert len(block_map._runs) < 9
    free, saved = block_map.release()
    assert sorted([*free.tolist(), *saved.tolist()]) == list(range(9))
    assert {0, 1, 2} <= set(saved.tolist())
