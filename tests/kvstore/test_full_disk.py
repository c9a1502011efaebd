"""A disk that is really full: a small tmpfs, where the machine lets one be mounted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from twin import LANDMARK, SIZE, SPEC, Twin, open_store

from kvstore.errors import StoreFullError
from kvstore.store import Store
from kvstore.verify import verify


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, of which a file called `ballast` has half a MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        (place / "ballast").write_bytes(bytes(2**19))
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def grown(store: Store, name: str, seed: int) -> Twin:
    """Keep a context of 300 tokens; nothing of it if that fails."""
    twin = Twin(store.context(name, streams=2, landmark_dim=LANDMARK))
    try:
        twin.append([0, 1], 75 * SIZE, seed)
        twin.context.save()
    except StoreFullError:
        twin.context.close(save=False)
        raise
    return twin


def test_reads_and_removals_go_on_and_it_recovers(small_disk: Path) -> None:
    twins: dict[str, Twin] = {}

    def whole(store: Store) -> None:
        for name, twin in twins.items():
            twin.context = store.context(name)
            twin.check()
            twin.context.close(save=False)

    with open_store(small_disk / "store", hot=100) as store:

        def fill() -> None:
            for i in range(500):
                twins[f"c{i}"] = grown(store, f"c{i}", i)
                twins[f"c{i}"].context.close()

        with pytest.raises(StoreFullError, match=r"the disk under .* is full"):
            fill()
        assert len(twins) > 20
        store.check()
        whole(store)
        for name in list(twins)[:3]:
            store.kept.delete(name)
            del twins[name]
        (small_disk / "ballast").unlink()
        for i in range(1000, 1005):
            twins[f"c{i}"] = grown(store, f"c{i}", i)
            twins[f"c{i}"].context.close()
        whole(store)
        assert (verify(store).damaged, verify(store).unreferenced) == ([], 0)
        store.check()
        config = replace(store.config, hot=200 * SPEC.nbytes)
    with Store(SPEC, config) as store:
        assert sorted(store.kept.names()) == sorted(twins)
        whole(store)
        assert verify(store).damaged == []
