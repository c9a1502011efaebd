"""A file whose structure is damaged is made anew of what can be read, and all of that is right."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from twin import LANDMARK, SPEC, Twin, assert_past

from kvstore.block import BlockSpec, Plane
from kvstore.errors import CorruptBlockError, CorruptStoreError, StoreFullError
from kvstore.salvage import DAMAGED, salvage
from kvstore.tiers.disk import FORMAT_KEY, planes_of
from kvstore.tiers.sealed import seal
from kvstore.tiers.spec_file import NAME, described, read_spec
from kvstore.verify import verify

PAGE = 4096


@pytest.fixture
def kept(make_store, tmp_path):
    """The directory of a closed store of several contexts with snapshots, and what they hold."""
    store = make_store(tmp_path / "store")
    pasts: dict[str, list[tuple[list, list]]] = {}
    for i in range(5):
        twin = Twin(store.context(f"c{i}", streams=2, landmark_dim=LANDMARK))
        pasts[f"c{i}"] = []
        for seed in range(3):
            twin.append([0, 1], 150, 10 * i + seed)
            twin.context.save(snapshot=True)
            pasts[f"c{i}"].append(([list(p) for p in twin.planes], list(twin.marks)))
        twin.context.close()
    store.close()
    return tmp_path / "store", pasts


def tree_pages(path: Path) -> list[int]:
    """Branches and leaves; some may be free."""
    raw = path.read_bytes()
    return [
        page
        for page in range(2, len(raw) // PAGE)
        if int.from_bytes(raw[page * PAGE :][:8], "little") == page
        and raw[page * PAGE + 10] in (1, 2)
    ]


def salvaged(directory: Path) -> list[str]:
    """Salvage; nothing is told where nothing can be read."""
    try:
        return salvage(directory, "64MiB")
    except CorruptStoreError as error:
        if "nothing can be read" not in str(error):
            raise
        return []


def held(store, name: str, pasts) -> bool:
    """Whether a context holds one of its saves, bit for bit."""
    with store.context(name) as context:
        for planes, marks in pasts[name]:
            if context.tokens(0) == len(planes[0][0]):
                for stream in (0, 1):
                    assert_past(context, stream, planes[stream], marks[stream])
                return True
    return False


def test_what_is_under_other_pages_is_saved(kept, make_store):
    directory, pasts = kept
    path = directory / "data.mdb"
    whole = path.read_bytes()
    all_kept = made = named = 0
    for page in tree_pages(path):
        raw = bytearray(whole)
        raw[page * PAGE + 12 : page * PAGE + 40] = bytes(28)
        path.write_bytes(raw)
        try:
            make_store(directory).close()
            continue  # a page that is free
        except CorruptStoreError:
            pass
        told = salvaged(directory)
        if not told:  # the page that names the tables
            assert path.read_bytes() == bytes(raw)
            continue
        assert (directory / DAMAGED).read_bytes() == bytes(raw)
        named += any(f"page {page}" in each for each in told)
        made += 1
        with make_store(directory) as store:
            assert verify(store).damaged == []
            names = store.kept.names()
            left = ", ".join(map(repr, names)) or "none"
            assert f"contexts that are left: {left}; there may have been others" in told
            all_kept += len(names) == len(pasts)
            assert all(held(store, name, pasts) for name in names)
            store.sweep()  # blocks of contexts that were lost
            Twin(store.context("new", streams=2, landmark_dim=LANDMARK)).append([0, 1], 99, 1)
            assert all(held(store, name, pasts) for name in names)
    assert made > 3
    assert made - 2 <= named <= made  # not those of the list of free pages, which is not needed
    assert all_kept  # of what a page of packs takes away there is an earlier save
    assert not (directory / "salvaged").exists()


@pytest.mark.parametrize("seed", range(6))
def test_a_file_that_was_cut_gives_what_is_left(kept, make_store, seed):
    directory, pasts = kept
    path = directory / "data.mdb"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(random.Random(seed).randrange(size // 2, size - PAGE))
    with pytest.raises(CorruptStoreError):
        make_store(directory)
    if not salvaged(directory):
        return
    with make_store(directory) as store:
        assert verify(store).damaged == []
        assert all(held(store, name, pasts) for name in store.kept.names())


def test_a_damaged_directory_of_a_pack_can_be_mended(kept, make_store):
    """It says which blocks there are: to store beside it would give their ids away."""
    directory, pasts = kept
    path = directory / "data.mdb"
    store = make_store(directory)
    ids, locations = store._disk.scan()
    members = ids[locations >> 16 == locations[0] >> 16].astype("<i8").tobytes()
    store.close()
    raw = bytearray(path.read_bytes())
    at = raw.find(members)
    while at > 0:
        raw[at + 3] ^= 1
        at = raw.find(members)
    path.write_bytes(raw)
    with pytest.raises(CorruptStoreError, match="the directory of pack"):
        make_store(directory)
    assert any("directory of pack" in each for each in salvage(directory, "64MiB"))
    with make_store(directory) as store:
        assert verify(store).damaged == []
        assert all(held(store, name, pasts) for name in store.kept.names())
        assert store.kept.names()


@pytest.mark.parametrize(("text", "says"), [("nonsense", "two lines"), (None, "json is missing")])
def test_the_specification_is_in_both_files(kept, make_store, text, says):
    directory, pasts = kept
    if text is None:
        (directory / NAME).unlink()
    else:
        (directory / NAME).write_text(text)
    with pytest.raises(CorruptStoreError, match=says):
        read_spec(directory)
    salvage(directory, "64MiB")
    assert read_spec(directory) == SPEC
    with make_store(directory) as store:
        assert all(held(store, name, pasts) for name in pasts)
    with pytest.raises(CorruptStoreError, match="does not say"):
        described("keys:float32[8")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"format": "9\n" * 10_000}),
        json.dumps({"format": 1, "planes": [{"name": "k", "shape": [8], "dtype": "x\n" * 10_000}]}),
    ],
    ids=["format", "dtype"],
)
def test_an_error_does_not_repeat_all_that_a_specification_says(tmp_path, text):
    (tmp_path / NAME).write_text(f"{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}\n")
    with pytest.raises((CorruptStoreError, ValueError)) as raised:
        read_spec(tmp_path)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("k" * 10_000, (8,)), ("k", (8,) * 10_000), ("k", (0,) * 10), ("k", (10**5000,)), ("", (8,))],
    ids=["name", "sizes", "nothing", "size", "no name"],
)
def test_a_plane_that_cannot_be(name, shape):
    with pytest.raises(ValueError, match="it needs a name of at most 100") as raised:
        Plane(name, shape, torch.bfloat16)
    assert len(str(raised.value)) < 600


def test_a_block_of_two_gib_cannot_be():
    with pytest.raises(ValueError, match="2 GiB or more"):
        BlockSpec([Plane("k", (2**16, 2**15), torch.uint8)])


@pytest.mark.parametrize(
    "planes",
    ["k:float32[,]", "k:float3[8]", "k:float32[0]", "k:float32[8] v:float32[4]", "k" * 9999],
)
def test_a_short_form_that_says_nothing(planes):
    with pytest.raises(CorruptStoreError, match="does not say") as raised:
        described(planes)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("payload", ["{}", "[1]", '{"planes": 7}', "[" * 9999, "no json"])
def test_a_format_record_that_says_nothing(payload):
    value = seal(FORMAT_KEY, payload.encode())
    with pytest.raises(CorruptBlockError, match=r"makes no sense|does not say"):
        described(planes_of(value))


def test_what_cannot_be_salvaged_is_left_as_it_was(kept, make_store):
    directory, _ = kept
    path = directory / "data.mdb"
    raw = bytearray(path.read_bytes())
    raw[2 * PAGE - 1 :] = b"x" + bytes(len(raw) - 2 * PAGE)
    path.write_bytes(raw)
    before = {each: each.read_bytes() for each in directory.rglob("*") if each.is_file()}
    with pytest.raises(CorruptStoreError, match="nothing can be read"):
        salvage(directory, "64MiB")
    assert before == {each: each.read_bytes() for each in directory.rglob("*") if each.is_file()}


@pytest.mark.parametrize("left", [None, b"", b"x" * 100])
def test_a_file_that_is_gone_cannot_be_salvaged(kept, left):
    directory, _ = kept
    (directory / "data.mdb").unlink()
    if left is not None:
        (directory / "data.mdb").write_bytes(left)
    with pytest.raises(CorruptStoreError, match="nothing can be read"):
        salvage(directory, "64MiB")


@pytest.mark.parametrize("cold", ["360KiB", "500KiB"])
def test_a_salvage_that_does_not_fit_changes_nothing(kept, make_store, cold):
    directory, _ = kept
    path = directory / "data.mdb"
    raw = bytearray(path.read_bytes())
    del raw[-PAGE:]
    path.write_bytes(raw)
    with pytest.raises(StoreFullError, match="cold tier is full: no room for"):
        salvage(directory, cold)
    assert path.read_bytes() == bytes(raw)
    assert not (directory / DAMAGED).exists()


def test_a_damaged_block_says_whose_it_is(kept, make_store):
    directory, _ = kept
    store = make_store(directory)
    with store.context("c3") as context:
        block = int(context.ids([1], np.array([[7]]))[0, 0])
    frame = dict(store._disk.frames())[block]
    store.close()
    path = directory / "data.mdb"
    raw = bytearray(path.read_bytes())
    raw[raw.find(frame) + 50] ^= 1
    path.write_bytes(raw)
    store = make_store(directory)
    context = store.context("c3")
    with pytest.raises(CorruptBlockError) as caught, context.fork() as fork:
        store.fetch(fork.ids([1], np.array([[7]])))
    assert caught.value.block == block
    assert "context 'c3', stream 1, block 7" in str(caught.value)
    assert f"kvstore verify {directory} --repair" in str(caught.value)
    assert context.place_of(10**9) is None
    context.close(save=False)
