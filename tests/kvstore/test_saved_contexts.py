"""Kept contexts as things in a store: listed, forked, renamed, deleted, swept."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from twin import LANDMARK, SIZE, SPEC, Twin, marks_of, open_store, past, reopened, tokens

from kvstore import saved_contexts
from kvstore.config import IndexConfig, StoreConfig
from kvstore.errors import (
    CorruptBlockError,
    OtherFormatError,
    StoreClosedError,
    StoreFullError,
)
from kvstore.store import Store
from kvstore.verify import verify


def keep(store, name: str, t: int, seed: int = 1, **given) -> Twin:
    twin = Twin(store.context(name, streams=2, landmark_dim=LANDMARK, **given))
    twin.append([0, 1], t, seed)
    return twin


def test_what_is_known_without_opening(make_store, tmp_path):
    store = make_store(tmp_path)
    began = time.time()
    twin = keep(store, "a", 9, fingerprint="abc")
    twin.context.info["model"] = "m"
    twin.context.append([1], tokens(1, 1), None)
    twin.context.close()
    keep(store, "b", 0).context.close()
    store = reopened(make_store, store)
    assert store.kept.names() == ["a", "b"]
    a, b = (store.kept.describe(name) for name in store.kept.names())
    assert (a.tokens, a.blocks, a.nbytes) == (10, 4, 4 * SPEC.nbytes)
    assert (b.tokens, b.blocks, b.disk_bytes) == (0, 0, 0)
    ids, locations = store._disk.scan()
    frames = {block: len(frame) for block, frame in store._disk.frames()}
    assert a.disk_bytes == sum(frames.values()) == store._disk.frame_bytes(locations)
    assert store.disk_bytes(ids[:1]) == frames[ids[0]]
    assert (a.fingerprint, a.info, b.info) == ("abc", {"model": "m"}, {})
    assert began <= a.created <= a.saved <= b.created <= time.time()
    assert "a" in store.kept
    assert "c" not in store.kept
    with pytest.raises(KeyError, match="no context 'c' is kept; there are: a, b"):
        store.kept.describe("c")


def test_another_makers_blocks_are_refused(make_store, tmp_path):
    store = make_store(tmp_path)
    keep(store, "x", 9, fingerprint="mine").context.close()
    with pytest.raises(ValueError, match="'x' was kept with fingerprint mine, not yours"):
        store.context("x", fingerprint="yours")
    assert store.context("x", fingerprint="mine").fork().fingerprint == "mine"


def test_one_of_another_version_stands_in_nobodys_way(make_store, tmp_path):
    """It cannot be read, but the others can be changed, and it can be removed."""
    store = make_store(tmp_path)
    for name in "abc":
        keep(store, name, 20).context.close()
    manifest = json.loads(store.get_record(b"context/a"))
    store.put_record(b"context/a", json.dumps(manifest | {"format": 9}).encode())
    for look in (store.kept.describe, store.kept.require, store.context):
        with pytest.raises(OtherFormatError, match=r"'a' was saved in format 9.*: remove it"):
            look("a")
    with pytest.raises(OtherFormatError):
        store.check()
    store.kept.fork("b", "d")
    store.kept.rename("b", "e")
    store.kept.delete("c")
    keep(store, "f", 10).context.close()
    assert store.kept.names() == ["a", "d", "e", "f"]
    with pytest.raises(OtherFormatError):
        store.sweep()  # which blocks it has is not known
    store.kept.delete("a")
    assert store.sweep() == 2 * 2 * (20 // SIZE)  # those of a, and of c, removed beside it
    store.check()


@pytest.mark.parametrize("first_to_go", ["a", "b"])
def test_a_fork_on_disk_shares_everything(make_store, tmp_path, first_to_go):
    store = make_store(tmp_path)
    twin = keep(store, "a", 20)
    twin.context.close()
    records, blocks = store.record_keys(b"piece/"), len(store)
    store.kept.fork("a", "b")
    assert store.record_keys(b"piece/") == records
    assert len(store) == blocks
    store.kept.delete(first_to_go)
    assert len(store) == blocks
    other = "b" if first_to_go == "a" else "a"
    assert store.kept.names() == [other]
    store = reopened(make_store, store)
    twin.context = store.context(other)
    twin.check()
    twin.context.close()
    store.kept.delete(other)
    assert not len(store)
    assert not store.record_keys()


def test_both_sides_of_a_fork_go_on(make_store, tmp_path):
    store = make_store(tmp_path)
    a = keep(store, "a", 20)
    a.context.save()
    store.kept.fork("a", "b")
    b = a.fork()
    b.context.close()
    b.context = store.context("b")
    a.append([0, 1], 9, 2)
    b.append([0, 1], 11, 3)
    a.context.close()
    b.context.close()
    store = reopened(make_store, store)
    a.context, b.context = store.context("a"), store.context("b")
    a.check()
    b.check()
    a.context.delete()
    b.check()
    b.context.delete()
    assert not len(store)


def test_names_change_and_are_taken(make_store, tmp_path):
    store = make_store(tmp_path)
    twin = keep(store, "a", 20)
    with pytest.raises(ValueError, match="'a' is open already"):
        keep(store, "b", 1).context.fork("a")
    for change in (store.kept.rename, store.kept.fork):
        with pytest.raises(KeyError, match="no context 'x'"):
            change("x", "y")
    changes = (lambda: store.kept.rename("a", "c"), lambda: store.kept.delete("a"))
    for change in changes:  # open, but never saved
        with pytest.raises(KeyError, match="no context 'a'"):
            change()
    twin.context.save()
    for change in changes:
        with pytest.raises(ValueError, match="'a' is open"):
            change()
    twin.context.close()
    for change in (store.kept.rename, store.kept.fork):
        with pytest.raises(ValueError, match="'b' is kept already"):
            change("a", "b")
        with pytest.raises(ValueError, match="1 to 300 bytes"):
            change("a", "")
    store.kept.rename("a", "é/ 1")
    assert store.kept.names() == ["é/ 1"]
    twin.context = store.context("é/ 1")
    twin.check()


def test_many_small_saves_leave_few_pieces_and_write_little(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_contexts, "PIECE", 8000)
    store = make_store(tmp_path)
    twin = keep(store, "a", 0)
    written, put_record = 0, store.put_record

    def put(key, value):
        nonlocal written
        written += len(value or b"") * key.startswith(b"piece/")
        put_record(key, value)

    monkeypatch.setattr(store, "put_record", put)
    most = 0
    for i in range(200):
        twin.append([0, 1], SIZE, i)
        twin.context.save()
        most = max(most, len(twin.context.pieces))
    size = 200 * 2 * (8 + 4 * LANDMARK)
    assert len(store.record_keys(b"piece/")) == len(twin.context.pieces) <= most <= 14
    assert written < 20 * size + 200 * 1200  # each time what is new and the rest, not everything
    store = reopened(make_store, store)
    twin.context = store.context("a")
    twin.check()


@pytest.mark.parametrize("piece", [200, 4 * 2**20])
def test_a_fork_goes_back_to_a_snapshot(make_store, tmp_path, monkeypatch, piece):
    monkeypatch.setattr(saved_contexts, "PIECE", piece)
    store = make_store(tmp_path)
    twin = keep(store, "a", 0)
    pasts = []
    for i, t in enumerate((9, 17, 30, 2, 40)):
        twin.append([0, 1], t, i)
        twin.context.info["at"] = i
        twin.context.set_state({"at": torch.tensor(i)})
        twin.context.save(snapshot=i != 3)
        if i != 3:
            pasts.append(([list(p) for p in twin.planes], list(twin.marks), i))
    twin.append([0, 1], 9, 9)
    twin.context.close()
    store = reopened(make_store, store)
    assert store.kept.describe("a").snapshots == 4
    for snapshot, (planes, marks, i) in enumerate(pasts):
        blocks, pieces = len(store), store.record_keys(b"piece/")
        store.kept.fork("a", f"back{snapshot}", snapshot)
        back = Twin(store.context(f"back{snapshot}"))
        back.planes, back.marks = planes, marks
        back.check()
        assert back.context.info == {"at": i}
        assert back.context.get_state()["at"] == i
        assert (len(store), store.record_keys(b"piece/")) == (blocks, pieces)
        back.append([0, 1], 11, 20 + i)
        back.context.save(snapshot=True)
        assert store.kept.describe(f"back{snapshot}").snapshots == snapshot + 2
        back.context.close()
        again = Twin(store.context(f"back{snapshot}"))
        again.planes, again.marks = back.planes, back.marks
        again.check()
        again.context.close()
    with pytest.raises(IndexError):
        store.kept.fork("a", "b", 4)
    store.kept.delete("a")
    for snapshot in range(4):
        store.context(f"back{snapshot}").delete()
    assert not len(store)
    assert not store.record_keys()


def test_ids_from_anywhere_are_damage(make_store, tmp_path):
    store = make_store(tmp_path)
    twin = keep(store, "a", 50)
    twin.context.close()
    number = store.kept.require("a")["past"][0]["number"]
    key = b"piece/%012d" % number
    tensors = load_tensors(store.get_record(key))
    tensors["ids.0"][3] = 2**40
    store.put_record(key, save_tensors(tensors))
    with pytest.raises(CorruptBlockError, match="context 'a': no block has the id 1099511627776"):
        store.kept.describe("a")


def test_only_snapshots_that_there_are_can_be_gone_back_to(make_store, tmp_path):
    store = make_store(tmp_path)
    keep(store, "a", 50).context.save(snapshot=True)
    for snapshot in (-2, 1):
        with pytest.raises(IndexError, match=f"has no snapshot {snapshot}"):
            store.kept.fork("a", "b", snapshot)
    assert store.kept.names() == ["a"]
    store.kept.fork("a", "b", -1)
    assert store.kept.describe("b").snapshots == 1


def test_left_by_an_error_it_is_as_it_was_saved(make_store, tmp_path):
    store = make_store(tmp_path)
    twin = keep(store, "a", 20)
    twin.context.close()
    forks = []

    def go_on_and_fail(context) -> None:
        with context:
            context.append([0], tokens(1, 8), marks_of(1, 2))
            forks.append(context.fork("b"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go_on_and_fail(store.context("a"))
    assert len(store) == 12
    forks.pop().close(save=False)
    with pytest.raises(ZeroDivisionError):
        go_on_and_fail(store.context("c", streams=1, landmark_dim=LANDMARK))
    forks.pop().close(save=False)
    assert len(store) == 10
    assert store.kept.names() == ["a"]
    twin.context = store.context("a")
    twin.check()


def test_a_store_left_by_an_error_saves_no_context(make_store, tmp_path):
    store = make_store(tmp_path)
    twin = keep(store, "a", 20)
    twin.context.save()

    def go_on_and_fail() -> None:
        with store:
            twin.context.append([0, 1], tokens(2, 9), marks_of(2, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        go_on_and_fail()
    store = make_store(tmp_path)
    assert len(store) == 10
    twin.context = store.context("a")
    twin.check()


@pytest.mark.parametrize("closes", ["context", "store"])
def test_a_pin_that_an_interrupt_left_hides_no_error(make_store, tmp_path, closes):
    store = make_store(tmp_path)
    keep(store, "a", 20).context.close()
    twin = keep(store, "b", 20, 2)

    def stop() -> None:
        with store if closes == "store" else twin.context:
            store.pinned(twin.context.ids([0], torch.arange(3)[None])).__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    store.close()
    store = make_store(tmp_path)
    store.sweep()
    assert store.kept.names() == ["a"]
    assert len(store) == 10
    store.check()


def test_what_a_killed_process_left_is_swept(make_store, tmp_path):
    store = make_store(tmp_path)
    kept = keep(store, "a", 20)
    kept.context.close()
    lost = keep(store, "lost", 33, 2)
    lost.context.save()
    lost.append([0, 1], 20, 3)
    store.put_record(b"context/lost", None)  # as if it had been killed before the manifest
    store.contexts.clear()
    store = reopened(make_store, store)
    open_one = keep(store, "open", 8)
    assert store.sweep() == 2 * (53 // SIZE)
    kept.context = store.context("a")
    kept.check()
    open_one.check()
    assert store.sweep() == 0
    store.check()


def test_a_damaged_piece_names_the_context(make_store, tmp_path, monkeypatch):
    store = make_store(tmp_path)
    keep(store, "a", 20).context.close()
    get_record = store.get_record

    def get(key):
        if key.startswith(b"piece/"):
            raise CorruptBlockError("record is damaged")
        return get_record(key)

    monkeypatch.setattr(store, "get_record", get)
    with pytest.raises(CorruptBlockError, match="context 'a': record is damaged"):
        store.context("a")
    assert not store.contexts


# closing and keeping


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
@pytest.mark.parametrize("piece", [100, 4 * 2**20])
def test_reopening_gives_the_same_answers(make_store, tmp_path, monkeypatch, kind, piece):
    monkeypatch.setattr(saved_contexts, "PIECE", piece)
    index = IndexConfig(kind=kind, segment=64, ef_search=2)
    store = make_store(tmp_path, index)
    twin = Twin(store.context("a/b", streams=2, landmark_dim=LANDMARK))
    twin.append([0, 1], 320 * SIZE + 2, 1)
    twin.append([1], 2 * SIZE, 2)
    twin.context.index.wait()
    twin.append([0, 1], 20 * SIZE, 3)  # few: what is in use is still what was waited for
    twin.context.set_state({"position": torch.tensor(7), "w": torch.randn(3, 2).T})
    queries = marks_of(2, 1, seed=9)
    want = twin.context.search([0, 1], queries, 6)
    state = twin.context.get_state()
    twin.context.close()

    store = reopened(make_store, store)
    context = store.context("a/b", streams=2, landmark_dim=LANDMARK)
    twin.context = context
    twin.check()
    found = context.search([0, 1], queries, 6)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    again = context.get_state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    twin.append([0, 1], 5, 4)
    fork = twin.fork()
    twin.append([0, 1], 9, 5)
    fork.append([0, 1], 10, 6)
    twin.check()
    fork.check()
    fork.context.close()
    context.close()
    twin.context = store.context("a/b")
    twin.check()
    twin.context.delete()
    assert not len(store)
    assert not store.record_keys()


def test_a_closing_store_keeps_what_has_a_name(make_store, tmp_path):
    store = make_store(tmp_path)
    twin = Twin(store.context("x", streams=2, landmark_dim=LANDMARK))
    twin.append([0, 1], 9, 1)
    scratch = twin.fork()
    scratch.append([0, 1], 8, 2)
    assert len(store) == 8
    store = reopened(make_store, store)
    with pytest.raises(StoreClosedError):
        twin.context.get_state()
    with pytest.raises(StoreClosedError):
        scratch.context.get_state()
    assert len(store) == 4
    twin.context = store.context("x")
    twin.check()


def test_names_mean_nothing_in_a_temporary_store(make_store):
    store = make_store()
    context = store.context("x", streams=1, landmark_dim=LANDMARK)
    context.append([0], tokens(1, 9), marks_of(1, 2))
    context.close()
    assert not len(store)
    assert store.context("x", streams=1, landmark_dim=LANDMARK).tokens(0) == 0


def test_an_empty_context_is_kept(make_store, tmp_path):
    store = make_store(tmp_path)
    store.context("empty", streams=2, landmark_dim=LANDMARK).close()
    store = reopened(make_store, store)
    assert store.kept.names() == ["empty"]
    context = store.context("empty")
    assert context.tokens(0) == 0
    with pytest.raises(KeyError, match="no context 'other'"):
        store.context("other")
    with pytest.raises(KeyError, match="no context 'other'"):
        make_store().context("other")


def test_what_does_not_fit_the_kept_context_is_refused(make_store, tmp_path):
    store = make_store(tmp_path)
    store.context("x", streams=2, landmark_dim=LANDMARK).close()
    with pytest.raises(ValueError, match="'x' was kept with streams 2, not 3"):
        store.context("x", streams=3, landmark_dim=LANDMARK)
    with pytest.raises(ValueError, match="kept with landmark_dim 5, not 4"):
        store.context("x", streams=2, landmark_dim=4)
    with pytest.raises(ValueError, match="'x' is kept already"):
        store.context(streams=2, landmark_dim=LANDMARK).fork("x")
    for name in ("", "n" * 301, "é" * 51):
        with pytest.raises(ValueError, match="name has 1 to 300 bytes"):
            store.context(name, streams=1, landmark_dim=LANDMARK)
    key = b"context/x"
    store.put_record(key, store.get_record(key).replace(b'"format": 2', b'"format": 3'))
    with pytest.raises(ValueError, match="saved in format 3, this version reads format 2"):
        store.context("x", streams=2, landmark_dim=LANDMARK)


def test_a_lost_piece_is_noticed(make_store, tmp_path):
    store = make_store(tmp_path)
    store.context("x", streams=1, landmark_dim=LANDMARK).close()
    store.put_record(b"piece/000000000000", None)
    with pytest.raises(CorruptBlockError, match="'x' lacks its piece 0"):
        store.context("x")
    assert not store.contexts


def test_a_save_that_fails_leaves_the_last_one(make_store, tmp_path, monkeypatch):
    store = make_store(tmp_path)
    context = store.context("x", streams=1, landmark_dim=LANDMARK)
    context.append([0], tokens(1, 9), marks_of(1, 2))
    context.save()
    context.append([0], tokens(1, 9), marks_of(1, 2))
    put_record, left = store.put_record, 2

    def fail(key, value):
        nonlocal left
        left -= 1
        if left < 0:
            raise StoreFullError("no room")
        put_record(key, value)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put_record", fail)
        with pytest.raises(StoreFullError):
            context.close()
    assert context.tokens(0) == 18
    store.contexts.clear()
    again = store.context("x")
    assert again.tokens(0) == 9
    assert len(past(again, 0)[0]) == 9
    again.close()
    assert len(store.record_keys(b"piece/")) == 2


def test_blocks_are_on_disk_before_a_save_names_them(make_store, tmp_path, monkeypatch):
    store = make_store(tmp_path)
    context = store.context("x", streams=1, landmark_dim=LANDMARK)
    context.append([0], tokens(1, 40), marks_of(1, 10))
    put_record, lacking = store.put_record, []

    def put(key, value):
        lacking.append(len(store) - store.usage()["cold"].blocks)
        put_record(key, value)

    monkeypatch.setattr(store, "put_record", put)
    context.save()
    assert lacking
    assert not any(lacking)


@pytest.mark.parametrize("order", ["fork first", "kept first", "reopened"])
def test_kept_contexts_share_blocks(make_store, tmp_path, order):
    store = make_store(tmp_path)
    first = Twin(store.context("first", streams=1, landmark_dim=LANDMARK))
    first.append([0], 10 * SIZE, 1)
    second = Twin(first.context.fork("second"))
    second.planes, second.marks = [list(p) for p in first.planes], list(first.marks)
    scratch = first.fork()
    second.append([0], 3 * SIZE, 2)
    first.append([0], 2 * SIZE, 3)
    scratch.append([0], SIZE, 4)
    assert len(store) == 16
    if order == "fork first":
        scratch.context.close()
        assert len(store) == 15
        first.context.delete()
    elif order == "kept first":
        second.context.close()
        first.context.close()
        scratch.check()
        scratch.context.close()
        assert len(store) == 15
        store.context("first").delete()
        second.context = store.context("second")
    else:
        scratch.context.close()
        first.context.close()
        second.context.close()
        store = reopened(make_store, store)
        store.context("first").delete()
        second.context = store.context("second")
    assert len(store) == 13
    second.check()
    second.context.delete()
    assert not len(store)
    assert not store.record_keys()


def test_a_store_that_is_only_read_changes_nothing(make_store, tmp_path):
    store = make_store(tmp_path)
    twin = keep(store, "a", 20)
    twin.context.close()
    store.close()
    before = (tmp_path / "data.mdb").read_bytes()
    config = replace(store.config, read_only=True, warm=4 * SPEC.nbytes, hot=8 * SPEC.nbytes)
    with Store.open(tmp_path, config) as reader:
        twin.context = reader.context("a")
        twin.check()
        fork = twin.fork()
        fork.append([0, 1], 2 * SIZE, 2)
        fork.check()
        with pytest.raises(StoreFullError, match="warm is full: 4 new blocks are in memory"):
            fork.append([0, 1], 2 * SIZE, 3)
        fork.check()
        reader.check()
        with pytest.raises(ValueError, match="is not only read"):
            twin.context.save()
        for change in (
            lambda: reader.kept.fork("a", "b"),
            lambda: reader.kept.note("c", asked=1),
            lambda: reader.put_record(b"x", b"y"),
        ):
            with pytest.raises((ValueError, KeyError), match=r"read only|no context"):
                change()
        with pytest.raises(KeyError):
            reader.context("b")
        fork.context.close()
        fork = twin.fork()  # its room is free again
        fork.append([0, 1], 2 * SIZE, 4)
        fork.check()
    assert (tmp_path / "data.mdb").read_bytes() == before
    with pytest.raises(ValueError, match="nothing to read without a directory"):
        Store(SPEC, StoreConfig(read_only=True, device="cpu"))
    with Store.open(tmp_path, StoreConfig(read_only=True, device="cpu")) as reader:
        assert reader.kept.names() == ["a"]
    with pytest.raises(ValueError, match="warm: a store that is only read"):
        Store.open(tmp_path, replace(config, warm=1))
    with pytest.raises(ValueError, match="nowhere"):
        Store(SPEC, replace(config, directory=tmp_path / "nowhere"))


def test_a_reader_sees_the_store_as_it_was(make_store, tmp_path):
    """Whatever the writer removes, and puts in its place under the same ids and names."""
    store = make_store(tmp_path)
    twin = keep(store, "a", 400)
    twin.context.close()
    store.close()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(
        daemon=True, target=read_beside, args=(tmp_path, store.config, twin.planes, theirs)
    )
    child.start()
    assert ours.poll(60)
    assert ours.recv() == "opened"
    store = make_store(tmp_path)
    store.kept.delete("a")
    keep(store, "b", 800, 7).context.close()
    keep(store, "a", 50, 8).context.close()
    for i in range(3):  # beyond the map that the reader has
        store.put_record(b"large", bytes(4 << 20))
        keep(store, f"more {i}", 2000, i).context.close()
    ours.send("removed")
    assert ours.poll(60), "the reader says nothing"
    assert ours.recv() == "all as it was"
    child.join()


def read_beside(directory, config, planes, told) -> None:
    torch.set_num_threads(1)
    config = replace(config, read_only=True, hot=8 * SPEC.nbytes, warm=4 * SPEC.nbytes)
    with Store.open(directory, config) as reader:
        twin = Twin(reader.context("a"))
        twin.planes, twin.marks = planes, [reader.contexts["a"].index.landmarks(s) for s in (0, 1)]
        twin.check()
        told.send("opened")
        told.recv()
        try:
            twin.check()
            twin.context.close()
            twin.context = reader.context("a")
            twin.check()
            told.send("all as it was" if reader.kept.names() == ["a"] else "others")
        except Exception as error:
            told.send(type(error).__name__)


# What comes from anywhere

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A store with one context, and what is kept of it."""
    with open_store(tmp_path_factory.mktemp("fuzzed")) as store:
        twin = keep(store, "a", 20)
        twin.context.save(snapshot=True)
        twin.append([0, 1], 9, 2)
        twin.context.set_state({"x": torch.arange(3)})
        twin.context.close()
        keys = [b"context/a", *store.record_keys(b"piece/")]
        yield store, twin, {key: store.get_record(key) for key in keys}


def another_version(store) -> bool:
    try:
        store.kept.require_version()
    except ValueError:
        return True
    return False


def assert_refused_or_whole(store) -> None:
    """Whatever is kept now: it is the context, or a named error, and verify can say so."""
    try:
        context = store.context("a")
    except (CorruptBlockError, KeyError, ValueError):
        assert not store.contexts
        if another_version(store):
            with pytest.raises(ValueError, match="saved in format"):
                verify(store)
            return
        found = verify(store)
        assert found.damaged or "a" not in store.kept
        return
    context.close(save=False)
    verify(store)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_manifests_from_anywhere(fuzzed, data):
    store, twin, records = fuzzed
    manifest = json.loads(records[b"context/a"])
    for _ in range(data.draw(st.integers(1, 3))):
        place, key = manifest, data.draw(st.sampled_from(sorted(manifest)))
        while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(list(keys)))
        if data.draw(st.booleans()):
            place[key] = data.draw(JSON)
        elif isinstance(place, dict):
            del place[key]
            break
    store.put_record(b"context/a", json.dumps(manifest).encode())
    try:
        assert_refused_or_whole(store)
    finally:
        store.put_record(b"context/a", records[b"context/a"])
    twin.context = store.context("a")
    twin.check()
    twin.context.close(save=False)


@pytest.mark.parametrize(
    "change",
    [
        {"block": [["k\n"] * 10_000]},
        {"format": 10**4000},
        {"format": "9\n" * 10_000},
        {"index": {"kind": "\n" * 10_000}},
        {"index": {"x" * 10_000: 1}},
        {"index": {"\x1b[7m": 1}},
        {"streams": [1] * 10_000},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_error_does_not_repeat_all_that_a_manifest_says(fuzzed, change):
    store, _, records = fuzzed
    manifest = json.loads(records[b"context/a"]) | change
    store.put_record(b"context/a", json.dumps(manifest).encode())
    try:
        with pytest.raises((CorruptBlockError, ValueError)) as raised:
            store.context("a")
    finally:
        store.put_record(b"context/a", records[b"context/a"])
    assert len(str(raised.value)) < 400
    assert str(raised.value).isprintable()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_records_from_anywhere(fuzzed, data):
    store, twin, records = fuzzed
    key = data.draw(st.sampled_from(sorted(records)))
    value = bytearray(records[key])
    kind = data.draw(st.sampled_from(["bytes", "cut", "change", "other", "none"]))
    if kind == "bytes":
        value = bytearray(data.draw(st.binary(max_size=200)))
    elif kind == "cut":
        del value[data.draw(st.integers(0, len(value) - 1)) :]
    elif kind == "change":
        for _ in range(data.draw(st.integers(1, 4))):
            value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "other":
        value = bytearray(records[data.draw(st.sampled_from(sorted(records)))])
    store.put_record(key, None if kind == "none" else bytes(value))
    try:
        assert_refused_or_whole(store)
    finally:
        store.put_record(key, records[key])
    twin.context = store.context("a")
    twin.check()
    twin.context.close(save=False)
