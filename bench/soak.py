"""One process that writes and several that read, for a long time: wrong values, leaks, memory.

The writer appends to contexts, forks, renames, removes and asks them, beyond what memory holds. The
readers open the store again and again and read every context that there was when they opened it. A
wrong value is a fault, and so is an error, a pin or a block that is left over, and memory beyond
what the process took before it opened the store and 1.1 times the memory tiers, staging and the
largest index that was open. Memory is read after every change, and once more after the C library
has given back what is free: this bench makes and compares as much as the store takes in, and leaves
as much behind.

python -m bench.soak --seconds 600 --readers 8
python -m bench.soak --seconds 3600 --readers 0 --large
"""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import tempfile
import time
from collections import Counter
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.arguments import Parser, at_least, duration
from bench.changes import LARGE, SMALL, State, Work
from kvstore import KVStoreError
from kvstore.heap import give_back
from kvstore.verify import verify


def anonymous_bytes() -> int:
    """Return the process's memory without pages of files."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def write(directory: Path, work: Work, seconds: float, seed: int, told: Any) -> None:
    """Change contexts for so long; tell how much was done and what memory it took."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    state: State = {}
    changes: Counter[str] = Counter()
    work.keys_of(0, work.longest)  # torch takes memory of its own when it is first used
    bare = anonymous_bytes()
    most = most_held = largest = file_bytes = index_bytes = 0
    end = time.monotonic() + seconds
    with work.open(directory) as store:
        config = store.config
        budget = config.hot + config.warm + config.staging
        least = 3 * (work.hot + work.warm)
        while time.monotonic() < end:
            kind, act, after = work.draw(store, state, rng)
            if len(store) > 1.2 * least:
                kind, act, after = work.removal(store, state, rng.choice(sorted(state)))
            elif kind == "delete" and len(store) < least:
                continue
            done = act()
            state = after
            changes[kind] += 1
            if kind in ("append", "ask"):
                assert isinstance(done, int)
                index_bytes = max(index_bytes, done)
            largest = max(largest, len(store))
            most = max(most, anonymous_bytes() - bare)
            give_back()
            most_held = max(most_held, anonymous_bytes() - bare)
            file_bytes = max(file_bytes, (directory / "data.mdb").stat().st_size)
        store.check_tables()
        wrong = []
        for name, segments in state.items():
            if fault := work.fault_of(store, name, segments):
                wrong.append(f"{name}: {fault}")
        pinned = int(store._mover.hot.pinned.sum())
        found = verify(store)
        live = store.usage()["cold"].used_bytes
    told.send(
        {
            "changes": dict(changes),
            "budget_mib": budget / 2**20,
            "index_mib": index_bytes / 2**20,
            "anonymous_mib_at_most": most / 2**20,
            "held_mib_at_most": most_held / 2**20,
            "anonymous_of_budget": most / (budget + index_bytes),
            "held_of_budget": most_held / (budget + index_bytes),
            "most_blocks": largest,
            "memory_blocks": work.hot + work.warm,
            "file_mib": file_bytes / 2**20,
            "used_mib_at_the_end": live / 2**20,
            "pins_left": pinned,
            "blocks_left_over": found.unreferenced,
            "damaged": found.damaged + wrong,
        }
    )


def read(directory: Path, work: Work, stop: Event, told: Any) -> None:
    """Read every context again and again until told to stop; tell what came."""
    torch.set_num_threads(1)
    came: Counter[str] = Counter()
    wrong: list[str] = []
    while not stop.is_set():
        try:
            with work.open(directory, read_only=True) as store:
                for name in store.kept.names():
                    segments = store.kept.require(name)["info"]["segments"]
                    if fault := work.fault_of(store, name, segments):
                        wrong.append(f"{name}: {fault}")
                    came["read"] += 1
                came["opened"] += 1
        except (KVStoreError, ValueError, KeyError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
    told.send((dict(came), wrong))


def main() -> int:
    parser = Parser("soak", __doc__)
    parser.add_argument("--seconds", type=duration, default=600)
    parser.add_argument("--readers", type=at_least(0), default=8)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--large", action="store_true", help="320 MiB in memory, blocks of 32 KiB")
    args = parser.parse_args()
    work = LARGE if args.large else SMALL
    processes = multiprocessing.get_context("spawn")
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    directory, stop = place / "store", processes.Event()
    try:
        with work.open(directory):
            pass  # so that there is something to open
        ours, theirs = processes.Pipe()
        writer = processes.Process(
            target=write, args=(directory, work, args.seconds, args.seed, theirs)
        )
        writer.start()
        readers = []
        for _ in range(args.readers):
            mine, its = processes.Pipe()
            process = processes.Process(target=read, args=(directory, work, stop, its))
            process.start()
            readers.append((process, mine))
        report: dict[str, Any] = {"bench": "soak", "seconds": args.seconds, "readers": args.readers}
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
    figures: dict[str, Any] = report["writer"]
    left = figures["pins_left"] or figures["blocks_left_over"]
    # Of small tiers Python itself is the most.
    over = args.large and figures["anonymous_of_budget"] > 1.1
    return 1 if wrong or figures["damaged"] or left or over else 0


if __name__ == "__main__":
    raise SystemExit(main())
