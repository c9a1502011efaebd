"""Damage is found, wherever it is, and repair keeps what is whole."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from twin import LANDMARK, SIZE, Twin, reopened

from kvstore import saved_contexts
from kvstore.config import IndexConfig
from kvstore.errors import CorruptBlockError, CorruptStoreError, KVStoreError
from kvstore.manifest import numbers_of
from kvstore.tiers.tree import fault_of, readable
from kvstore.verify import repair, verify


@pytest.fixture
def kept(make_store, tmp_path, monkeypatch):
    """A store with a context of three snapshots, a fork of it that went on, and one apart."""
    monkeypatch.setattr(saved_contexts, "PIECE", 400)
    store = make_store(tmp_path)
    pasts: dict[str, Twin] = {}
    main = Twin(store.context("main", streams=2, landmark_dim=LANDMARK))
    for seed in range(3):
        main.append([0, 1], 41, seed)
        main.context.save(snapshot=True)
        pasts[f"main {main.context.tokens(0)}"] = copy_of(main)
    main.append([0, 1], 6, 3)
    main.context.save()
    fork = Twin(main.context.fork("fork"))
    fork.planes, fork.marks = [list(p) for p in main.planes], list(main.marks)
    fork.append([0, 1], 17, 4)
    apart = Twin(store.context("apart", streams=1, landmark_dim=LANDMARK))
    apart.append([0], 30, 5)
    pasts |= {"main": copy_of(main), "fork": copy_of(fork), "apart": copy_of(apart)}
    for twin in (main, fork, apart):
        twin.context.close()
    store.put_record(b"mine", b"a value of somebody else's")
    return reopened(make_store, store), pasts


def copy_of(twin: Twin) -> Twin:
    copy = Twin(twin.context)
    copy.planes, copy.marks = [list(p) for p in twin.planes], list(twin.marks)
    return copy


def same(store, name: str, twin: Twin) -> None:
    twin.context = store.context(name)
    try:
        twin.check()
    finally:
        twin.context.close(save=False)


def test_a_whole_store_has_nothing_to_report(kept):
    store, _ = kept
    seen: list[int] = []
    found = verify(store, seen.append)
    assert (found.damaged, found.broken, found.unreferenced) == ([], {}, 0)
    assert found.contexts == 3
    assert found.blocks == len(store) == seen[-1]
    assert repair(store, found) == []
    with store.context("apart") as context:
        Twin(context).append([0], 3 * SIZE, 6)  # not saved yet
        while_open = verify(store)
        assert (while_open.damaged, while_open.unreferenced) == ([], 0)
        with pytest.raises(ValueError, match="no context is open"):
            repair(store, while_open)


def damage_block(store, make_store, block: int):
    """Flip a bit of a block's frame in the file."""
    frames = dict(store._disk.frames())
    path = Path(store.config.directory) / "data.mdb"
    store.close()
    raw = bytearray(path.read_bytes())
    at = raw.find(frames[block])
    assert at > 0
    raw[at + len(frames[block]) // 2] ^= 4
    path.write_bytes(raw)
    return make_store(store.config.directory, store.config.index)


@pytest.mark.parametrize(
    ("where", "main", "fork"),
    [
        (2, None, None),
        (12, "main 41", "main 41"),
        (25, "main 82", "main 82"),
        (-1, "main", "main 123"),
    ],
)
def test_a_damaged_block_cuts_back_those_who_have_it(kept, make_store, where, main, fork):
    store, pasts = kept
    manifest = store.kept.require("fork" if where < 0 else "main")
    ids = np.split(store.kept.ids("x", manifest), np.cumsum(manifest["counts"])[:-1])
    store = damage_block(store, make_store, int(ids[1][where]))
    found = verify(store)
    assert found.lost_blocks == [ids[1][where]]
    assert sum("is damaged on disk: its checksum does not match" in w for w in found.damaged) == 1
    assert set(found.broken) == ({"fork", "main"} if where > 0 else {"fork"})
    words = repair(store, found)
    assert len(words) == len(found.broken) + 1
    again = verify(store)
    assert (again.damaged, again.unreferenced) == ([], 0)
    same(store, "apart", pasts["apart"])
    for name, past in (("main", main), ("fork", fork)):
        if past is None:
            assert name not in store.kept
        else:
            same(store, name, pasts[past])
    store.check()
    assert store.get_record(b"mine")


def test_a_damaged_rest_and_a_lost_piece(kept):
    store, pasts = kept
    manifest = store.kept.require("main")
    store.put_record(b"piece/%012d" % manifest["rest"][0], None)
    store.put_record(b"piece/%012d" % manifest["snapshots"][1]["rest"][0], b"no safetensors")
    found = verify(store)
    assert {name: bool(back) for name, back in found.broken.items()} == {"main": True, "fork": True}
    assert any("lacks its piece" in words for words in found.damaged)
    words = repair(store, found)
    assert "context 'main' of 129 tokens was cut back to its save at 123" in words
    assert "context 'fork' is whole, without 1 damaged snapshots" in words
    assert verify(store).damaged == []
    same(store, "main", pasts["main 123"])
    same(store, "fork", pasts["fork"])  # of it only a snapshot was damaged
    assert store.kept.describe("fork").snapshots == 2


def test_check_finds_what_verify_finds(kept, make_store):
    store, _ = kept
    store.check()
    with store.context("fork") as context, context.fork() as throwaway:
        Twin(throwaway).append([0, 1], 3 * SIZE, 8)
        store.check()
    block = int(store.kept.ids("x", store.kept.require("main"))[3])
    store = damage_block(store, make_store, block)
    store.check_tables()
    with pytest.raises(CorruptBlockError, match="is damaged on disk"):
        store.check()
    repair(store, verify(store))
    store.check()
    store.put_record(b"context/apart", b"{}")
    with pytest.raises(CorruptBlockError, match="'apart': its manifest makes no sense"):
        store.check()


def test_an_unreadable_manifest_goes_and_others_stay(kept):
    store, pasts = kept
    store.put_record(b"context/fork", b"{}")
    store.put_record(b"context/other", b"\xff")
    found = verify(store)
    assert set(found.broken) == {"fork", "other"}
    assert found.unreferenced == 2 * ((129 + 17) // SIZE - 129 // SIZE)
    repair(store, found)
    assert store.kept.names() == ["apart", "main"]
    assert store.sweep() == found.unreferenced
    for name in ("apart", "main"):
        same(store, name, pasts[name])


def test_keys_that_no_save_has_written(kept):
    store, pasts = kept
    strange = [
        b"context/\xff",
        b"context/a/b",
        b"context/%61",
        b"piece/7",
        b"piece/\xff",
        b"piece/x",
    ]
    for key in strange:
        store.put_record(key, b"anything")
    assert store.kept.names() == ["apart", "fork", "main"]
    found = verify(store)
    assert sorted(found.strange) == sorted(strange)
    assert len(found.damaged) == len(strange)
    with store.context("main") as context:
        context.save()
    repair(store, found)
    assert verify(store).damaged == []
    for name in ("apart", "fork", "main"):
        same(store, name, pasts[name])


@pytest.mark.parametrize("key", [b"mine", b"piece.000000000001", b"dontext/main"])
def test_a_damaged_record_of_no_context_goes(kept, key):
    """A caller's, or one of a context whose key has changed by a bit."""
    store, pasts = kept
    store.put_record(b"other", b"stays")
    with store._disk._file._env.begin(write=True) as transaction:
        transaction.put(key, b"01234567what its checksum denies", db=store._disk._records)
    found = verify(store)
    assert found.records == [key]
    assert len(found.damaged) == 1
    assert repair(store, found) == [f"record {key!r} was removed: it says nothing that can be read"]
    assert verify(store).damaged == []
    assert store.get_record(b"other") == b"stays"
    assert store.get_record(key) is None
    for name in ("apart", "fork", "main"):
        same(store, name, pasts[name])


def test_a_context_of_another_version_is_left_alone(kept):
    store, _ = kept
    value = store.get_record(b"context/main")
    store.put_record(b"context/main", value.replace(b'"format": 2', b'"format": 3'))
    with pytest.raises(ValueError, match="'main' was saved in format 3"):
        verify(store)
    assert store.get_record(b"context/main")


def test_repair_finds_nothing_in_a_store_of_blocks_alone(make_store, tmp_path):
    from twin import SPEC, tokens

    store = make_store(tmp_path)
    ids = store.put([p.unflatten(1, (-1, SIZE))[0] for p in tokens(1, 80)])
    store.flush()
    store = damage_block(store, make_store, int(ids[3]))
    found = verify(store)
    assert found.unreferenced == 20
    assert len(found.damaged) == 1
    repair(store, found)
    assert len(store) == 19
    assert store.fetch(np.delete(ids, 3))[0].shape == (19, *SPEC.planes[0].shape)


def test_damaged_index_files_are_found_and_removed(make_store, tmp_path):
    index = IndexConfig(kind="hnsw", segment=8)
    store = make_store(tmp_path, index)
    twin = Twin(store.context("a", streams=2, landmark_dim=LANDMARK))
    twin.append([0, 1], 40 * SIZE, 0)
    queries = torch.randn(2, 3, LANDMARK)
    found = twin.context.search(slice(None), queries, 5)[0]
    twin.context.close()
    store = reopened(make_store, store)
    assert verify(store).damaged == []
    graphs = sorted((tmp_path / "index").glob("*.hnsw"))
    assert len(graphs) == 4
    raw = bytearray(graphs[0].read_bytes())
    raw[len(raw) // 2] ^= 1
    graphs[0].write_bytes(raw)
    graphs[1].with_suffix(".sum").write_bytes(b"\xff")
    (tmp_path / "index" / "left.1234").write_bytes(b"by a process that was killed")
    findings = verify(store)
    assert findings.graphs == graphs[:2]
    assert len(findings.damaged) == 2
    assert all("it is built anew" in done for done in repair(store, findings))
    assert sorted((tmp_path / "index").glob("*.hnsw")) == graphs[2:]
    assert verify(store).damaged == []
    with store.context("a") as context:
        assert torch.equal(context.search(slice(None), queries, 5)[0], found)
    built = set((tmp_path / "index").glob("*.hnsw"))
    assert set(graphs[2:]) < built <= set(graphs)
    assert not (tmp_path / "index" / "left.1234").exists()


# The tree


def test_a_whole_tree_makes_sense_at_any_time(make_store, tmp_path):
    """With pages freed and used again, large values, and while it is open."""
    store = make_store(tmp_path)
    path = tmp_path / "data.mdb"
    rng = random.Random(0)
    for i in range(30):
        with store.context(f"c{rng.randrange(5)}", streams=2, landmark_dim=LANDMARK) as context:
            twin = Twin(context)
            twin.append([0, 1], rng.randrange(1, 400), i)
        if i % 3 == 0:
            store.kept.delete(rng.choice(store.kept.names()))
        store.put_record(b"large", bytes(rng.randrange(100_000)))
        assert fault_of(path) is None
    store.close()
    assert fault_of(path) is None


def test_what_makes_no_sense_in_a_tree(kept, make_store):
    """Every byte of branch and leaf pages that LMDB goes by."""
    store, _ = kept
    directory = Path(store.config.directory)
    store.close()
    path = directory / "data.mdb"
    whole = path.read_bytes()
    leaves = [
        page
        for page in range(2, len(whole) // 4096)
        if int.from_bytes(whole[page * 4096 :][:8], "little") == page
        and whole[page * 4096 + 10] in (1, 2)
    ]
    assert leaves
    quiet = 0
    for page in leaves:
        for at in (0, 10, 12, 14, 16, 17):
            raw = bytearray(whole)
            raw[page * 4096 + at] ^= 1
            path.write_bytes(raw)
            fault = fault_of(path)
            quiet += fault is None
            if fault is not None and page == leaves[0]:
                with pytest.raises(CorruptBlockError, match="is damaged: its tree: "):
                    make_store(directory)
    assert quiet < len(leaves) * 6 // 2  # of pages that are free, which nobody reads
    path.write_bytes(whole)
    assert fault_of(path) is None
    make_store(directory).check()


def live_leaves(path):
    """The leaves of the last commit's tables that hold small values."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        tables, lost = readable(data)
    assert not lost
    named = [entries for name, entries in tables.items() if name]
    return {at // 4096 for entries in named for _, at, size in entries if size < 1000}


def test_no_entry_of_a_page_reaches_into_another(kept):
    """Every bit of what is said of an entry: LMDB moves the others by it when one is deleted.

    But for the last bits of its sizes, as entries have even places, and the size of a value with
    pages of its own: checksums tell.
    """
    store, _ = kept
    path = Path(store.config.directory) / "data.mdb"
    store.close()
    whole = path.read_bytes()
    leaves = live_leaves(path)
    assert len(leaves) >= 3
    for page in leaves:
        start = page * 4096
        (lower,) = struct.unpack_from("<H", whole, start + 12)
        places = struct.unpack_from(f"<{(lower - 16) // 2}H", whole, start + 16)
        for place in places[:: max(1, len(places) // 5)]:
            large = struct.unpack_from("<H", whole, start + place + 4)[0] == 1
            for bit in [*range(32 if large else 1, 48), *range(49, 64)]:
                raw = bytearray(whole)
                raw[start + place + bit // 8] ^= 1 << bit % 8
                path.write_bytes(raw)
                assert fault_of(path) is not None, (page, place, bit)


def test_a_list_of_free_pages_is_in_order(kept):
    store, _ = kept
    path = Path(store.config.directory) / "data.mdb"
    for i in range(4):  # pages to be free
        store.put_record(b"large", bytes(50_000 * (i % 2 + 1)))
    store.close()
    whole = path.read_bytes()
    found = 0
    for at in range(2 * 4096, len(whole) - 24, 2):
        count, one, two = struct.unpack_from("<QQQ", whole, at)
        if 2 <= count < 500 and len(whole) // 4096 > one > two >= 2:
            path.write_bytes(whole[: at + 8] + struct.pack("<QQ", two, one) + whole[at + 24 :])
            found += fault_of(path) == "a list of free pages is out of order"
    assert found


def test_damaged_tables_are_no_new_ones(kept, make_store):
    """A table of another kind kills LMDB; one of another name would be begun anew, in silence."""
    store, pasts = kept
    directory = Path(store.config.directory)
    store.close()
    path = directory / "data.mdb"
    whole = path.read_bytes()
    found = 0
    for name in (b"records", b"packs", b"directory"):
        at = whole.find(name)
        while at > 0:
            for place, bit in ((at, 1), (at + len(name) + 4, 4), (at + len(name) + 4, 8)):
                raw = bytearray(whole)
                raw[place] ^= bit
                path.write_bytes(raw)
                try:
                    opened = make_store(directory)
                except CorruptStoreError:
                    found += 1
                    continue
                same(opened, "apart", pasts["apart"])  # a page that is free
                opened.close()
            at = whole.find(name, at + 1)
    assert found >= 9
    for left in (0, 100):
        path.write_bytes(whole[:left])
        with pytest.raises(CorruptStoreError, match="is damaged"):
            make_store(directory)
    path.unlink()
    with pytest.raises(CorruptStoreError, match=r"data\.mdb is gone or empty"):
        make_store(directory)
    path.write_bytes(whole)
    same(make_store(directory), "apart", pasts["apart"])


def test_a_false_last_page_does_not_grow_the_file(kept, make_store):
    store, _ = kept
    directory = Path(store.config.directory)
    store.close()
    path = directory / "data.mdb"
    whole = path.read_bytes()
    for bit in range(64):
        raw = bytearray(whole)
        for meta in (0, 4096):
            raw[meta + 136 + bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with contextlib.suppress(CorruptStoreError):
            make_store(directory).close()
        assert path.stat().st_size <= len(whole) + (4 << 20)


@pytest.mark.parametrize("seed", range(12))
def test_damage_anywhere_in_the_file_is_found_or_harmless(kept, make_store, seed):
    """Each context is as it was, or opening it or its blocks says that it is damaged."""
    store, pasts = kept
    directory = Path(store.config.directory)
    store.close()
    path = directory / "data.mdb"
    whole = path.read_bytes()
    rng = random.Random(seed)
    for _ in range(4):
        raw = bytearray(whole)
        at = rng.randrange(8192, len(raw))  # behind the two meta pages
        kind = rng.randrange(3)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at : at + 4096] = bytes(len(raw[at : at + 4096]))
        else:
            other = rng.randrange(2, len(raw) // 4096) * 4096
            raw[at - at % 4096 : at - at % 4096 + 4096] = raw[other : other + 4096]
        path.write_bytes(raw)
        try:
            store = make_store(directory, store.config.index)
        except (KVStoreError, ValueError):
            continue
        try:
            for name in ("main", "fork", "apart"):
                try:
                    same(store, name, pasts[name])
                except (KVStoreError, KeyError, ValueError):
                    assert verify(store).damaged or name not in store.kept
        finally:
            try:
                store.close(save=False)
            except KVStoreError:
                store.close()


def test_json_of_manifests_is_plain(kept):
    store, _ = kept
    manifest = store.kept.require("main")
    assert json.loads(json.dumps(manifest)) == manifest
    numbers = {int(key[len(b"piece/") :]) for key in store.record_keys(b"piece/")}
    assert set(numbers_of(manifest)) <= numbers
    assert os.stat(Path(store.config.directory) / "data.mdb").st_mode & 0o777 == 0o600
