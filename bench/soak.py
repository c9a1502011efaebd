"""One process that writes and several that read, for a long time: wrong values, leaks, memory.

The writer appends to contexts, forks, renames, removes and asks them, beyond what memory holds. The
readers open the store again and again and read every context that there was when they opened it. A
wrong value is a fault, and so is an error.

python -m bench.soak --seconds 600 --readers 8
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.faults import CONFIG, SPEC, State, act_of, fault_of
from kvstore import KVStoreError, Store, StoreConfig
from kvstore.verify import verify


def config(directory: Path, read_only: bool = False) -> StoreConfig:
    """The settings of writer and readers: little memory, so that the disk serves."""
    return StoreConfig(directory=directory, read_only=read_only, **CONFIG)  # type: ignore[arg-type]


def anonymous_bytes() -> int:
    """Return the process's memory without pages of files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def write(directory: Path, seconds: float, seed: int, told: Any) -> None:
    """Change contexts for so long; tell how much was done and what memory it took."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    state: State = {}
    changes: Counter[str] = Counter()
    end = time.monotonic() + seconds
    settled, most, largest = 0, 0, 0
    with Store(SPEC, config(directory)) as store:
        while time.monotonic() < end:
            kind, act, after = act_of(store, state, rng)
            if sum(n for segments in after.values() for _, n in segments) > 40_000:
                name = rng.choice(sorted(state))
                kind, act = "delete", partial(store.kept.delete, name)
                after = {each: s for each, s in state.items() if each != name}
            act()
            state = after
            changes[kind] += 1
            total = sum(changes.values())
            if total == 200:
                settled = anonymous_bytes()
            if total >= 200 and total % 50 == 0:
                most = max(most, anonymous_bytes())
            largest = max(largest, len(store))
        store.check()
        pinned = int(store._mover.hot.pinned.sum())
        found = verify(store)
    told.send(
        {
            "changes": dict(changes),
            "anonymous_mib_after_200_changes": settled / 2**20,
            "anonymous_mib_at_most": most / 2**20,
            "most_blocks": largest,
            "memory_blocks": (int(store.config.hot) + int(store.config.warm)) // SPEC.nbytes,
            "pins_left": pinned,
            "blocks_left_over": found.unreferenced,
            "damaged": found.damaged,
        }
    )


def read(directory: Path, stop: Event, told: Any) -> None:
    """Read every context again and again until told to stop; tell what came."""
    torch.set_num_threads(1)
    came: Counter[str] = Counter()
    wrong: list[str] = []
    while not stop.is_set():
        try:
            with Store(SPEC, config(directory, read_only=True)) as store:
                for name in store.kept.names():
                    segments = store.kept.require(name)["info"]["segments"]
                    if fault := fault_of(store, name, segments):
                        wrong.append(f"{name}: {fault}")
                    came["read"] += 1
                came["opened"] += 1
        except (KVStoreError, ValueError, KeyError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
    told.send((dict(came), wrong))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    directory, stop = place / "store", processes.Event()
    try:
        with Store(SPEC, config(directory)):
            pass  # so that there is something to open
        ours, theirs = processes.Pipe()
        writer = processes.Process(target=write, args=(directory, args.seconds, args.seed, theirs))
        writer.start()
        readers = []
        for _ in range(args.readers):
            mine, its = processes.Pipe()
            process = processes.Process(target=read, args=(directory, stop, its))
            process.start()
            readers.append((process, mine))
        report = {"bench": "soak", "seconds": args.seconds, "readers": args.readers}
        report |= {"writer": ours.recv()}
        stop.set()
        came: Counter[str] = Counter()
        wrong: list[str] = []
        for process, mine in readers:
            found, faults = mine.recv()
            came.update(found)
            wrong += faults
            process.join()
        writer.join()
    finally:
        shutil.rmtree(place, ignore_errors=True)
    report |= {"came": dict(came), "wrong": wrong}
    for key, value in report.items():
        print(f"{key}: {value}")
    print(json.dumps(report))
    return 1 if wrong or report["writer"]["damaged"] else 0  # type: ignore[index]


if __name__ == "__main__":
    raise SystemExit(main())
