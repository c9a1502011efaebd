"""Kill a process that works on a store, damage a store's files: is anything lost, or ever wrong?

*Kills*: a child appends to contexts, forks, renames and removes them, and tells before and after
each change what the store must keep. It is killed with SIGKILL at a random moment, or in a named
step, and the next child goes on in the same directory. After each kill every context must be as it
was before or after the last change, bit for bit.

*Damage*: bits flipped, pages zeroed, swapped, overwritten, a file cut short or made longer: the
data, index files and all others. Each context must read as it was written, or be refused with an
error that names the damage, and the process must live; then it is repaired, sometimes by a process
that is killed meanwhile, and what is left must be right.

python -m bench.faults --kills 100 --damages 300
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bench.arguments import Parser, at_least
from bench.changes import SMALL, State
from kvstore import KVStoreError, Store
from kvstore.errors import CorruptStoreError
from kvstore.index.graph_files import GraphFiles
from kvstore.index.landmark_index import LandmarkIndex
from kvstore.mover import Mover
from kvstore.promises import DURABILITIES
from kvstore.salvage import salvage
from kvstore.saved_contexts import SavedContexts
from kvstore.tiers import lmdb_file
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.lmdb_file import LmdbFile
from kvstore.verify import repair, verify

STEPS: dict[str, tuple[type, str]] = {
    "commit": (DiskTier, "_commit"),
    "growth of the map": (LmdbFile, "_grow"),
    "write of blocks": (DiskTier, "write_packs"),
    "deletion": (DiskTier, "delete"),
    "promotion": (Mover, "promote"),
    "eviction": (Mover, "_evict"),
    "reading up": (Mover, "bring_up"),
    "save": (SavedContexts, "write"),
    "sweep": (SavedContexts, "sweep"),
    "rename": (SavedContexts, "rename"),
    "landmarks": (LandmarkIndex, "add"),
    "save of an index": (GraphFiles, "keep"),
}

RARE = {"growth of the map": 2}
"""Within how many calls a process is killed, where it does not live to see thirty."""


# --- kills --------------------------------------------------------------------------------------


def work(directory: str, state: State, seed: int, step: str | None, told: Connection) -> None:
    """Change contexts until killed; tell the state before and after each change."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    lmdb_file._FIRST_MAP_PAGES = 16  # so that there is growth
    if step is not None:
        die_within(*STEPS[step], rng, most=RARE.get(step, 30))
    durability = rng.choice(list(DURABILITIES))
    with SMALL.open(directory, durability=durability) as store:
        while True:
            kind, act, after = SMALL.draw(store, state, rng)
            told.send((kind, state, after))
            act()
            state = after
            told.send((kind, state, state))


def die_within(owner: type, method: str, rng: random.Random, most: int = 30) -> None:
    """Have this process killed at one of the next calls of a method: before it, after, within."""
    left, place = rng.randrange(1, most), rng.choice(["before", "within", "after"])
    real = getattr(owner, method)

    def called(*args: Any, **given: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if left == 0 and place == "within":  # a moment after it has begun
            Timer(rng.random() * 2e-3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        out = real(*args, **given)
        if left == 0 and place == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    setattr(owner, method, called)


def kills(directory: Path, count: int, seed: int, console: Console) -> dict[str, Any]:
    """Kill `count` children one after the other; return what was found."""
    processes = multiprocessing.get_context("fork")
    rng = random.Random(seed)
    state: State = {}
    faults: list[str] = []
    at: Counter[str] = Counter()
    sure = during = 0
    for turn in track(range(count), "kills", console=console, disable=not console.is_terminal):
        step = rng.choice([None, *STEPS])
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(
            target=work, args=(str(directory), state, rng.randrange(2**31), step, theirs)
        )
        child.start()
        theirs.close()
        deadline = time.monotonic() + (5.0 if step else rng.random() * 0.6)
        told = ("nothing", state, state)
        while (left := deadline - time.monotonic()) > 0 and child.is_alive():
            if ours.poll(left):
                try:
                    told = ours.recv()
                except EOFError:
                    break
        itself = time.monotonic() < deadline
        child.kill()
        child.join()
        while ours.poll():
            try:
                told = ours.recv()
            except EOFError:
                break
        if child.exitcode != -signal.SIGKILL:
            faults.append(f"kill {turn}: the child ended with {child.exitcode} at {told[0]}")
        at[step if step and itself else "a random moment"] += 1
        kind, before, after = told
        sure, during = sure + (before == after), during + (before != after)
        try:
            state = SMALL.found_state(directory, before, after)
        except (KVStoreError, ValueError, KeyError, AssertionError) as error:
            faults.append(f"kill {turn} ({step}, {kind}): {type(error).__name__}: {error}")
            shutil.rmtree(directory)
            state = {}
    return {
        "kills": count,
        "between_changes": sure,
        "within_a_change": during,
        "at": dict(at),
        "faults": faults,
    }


# --- damage -------------------------------------------------------------------------------------


def damages(directory: Path, count: int, seed: int, console: Console) -> dict[str, Any]:
    """Damage a store `count` times, each time anew, in a child that may die; return what came."""
    rng = random.Random(seed)
    state: State = {}
    with SMALL.open(directory) as store:
        for i in range(6):
            seeds = [(rng.randrange(2**31), rng.randrange(100, 400)) for _ in range(3)]
            SMALL.grow(store, f"c{i}", seeds)
            state[f"c{i}"] = [[s, n] for s, n in seeds]
        with store.context("c0") as context:
            context.save(snapshot=True)
        store.kept.fork("c0", "fork")
        state["fork"] = state["c0"]
    processes = multiprocessing.get_context("fork")

    def run(kill: int | None = None, again: bool = False) -> tuple[int | None, Any]:
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(
            target=look, args=(str(directory), state, answers, kill, again, theirs)
        )
        child.start()
        theirs.close()
        child.join(60)
        child.kill()
        return child.exitcode, ours.recv() if child.exitcode == 0 else None

    answers: dict[str, list[int]] = {}
    _, (_, _, answers) = run()
    whole = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    came: Counter[str] = Counter()
    killed = 0
    faults: list[str] = []
    for turn in track(range(count), "damages", console=console, disable=not console.is_terminal):
        for path in directory.rglob("*"):
            if path.is_file() and path not in whole:
                path.unlink()
        for path, raw in whole.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(raw)
        others = [path for path in whole if path.name not in ("data.mdb", "owner")]
        path = rng.choice(others) if rng.random() < 0.2 else directory / "data.mdb"
        raw, kind = damaged(whole[path], rng)
        path.write_bytes(raw)
        kind = f"{kind} in {path.name if path.parent == directory else 'index/*' + path.suffix}"
        if rng.random() < 0.25:  # killed while it repairs, and begun again
            code, found = run(kill=rng.randrange(2**31))
            killed += code == -signal.SIGKILL
            if code == -signal.SIGKILL:
                code, found = run(again=True)
        else:
            code, found = run()
        if code != 0 or found is None:
            faults.append(f"damage {turn} ({kind}): the process ended with {code}")
            continue
        result, wrong, _ = found
        came[f"{kind}: {result}"] += 1
        faults += [f"damage {turn} ({kind}): {each}" for each in wrong]
    came_of = dict(sorted(came.items()))
    return {"damages": count, "killed_in_repair": killed, "came": came_of, "faults": faults}


def damaged(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage a file's bytes in a random way."""
    raw = bytearray(whole)
    page = 4096 if len(raw) >= 4 * 4096 else max(1, len(raw) // 8)
    pages = len(raw) // page
    kind = rng.choice(["bit", "byte", "zeros", "swap", "copy", "cut", "longer", "noise"])
    at, other = rng.randrange(len(raw)), rng.randrange(2, pages) * page
    here = at - at % page
    if kind == "bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        raw[at] = rng.randrange(256)
    elif kind == "zeros":
        raw[here : here + page] = bytes(len(raw[here : here + page]))
    elif kind == "swap":
        here = min(max(here, 2 * page), (pages - 1) * page)
        one, two = raw[here : here + page], raw[other : other + page]
        raw[here : here + page], raw[other : other + page] = two, one
    elif kind == "copy":
        here = min(here, (pages - 1) * page)
        raw[here : here + page] = raw[other : other + page]
    elif kind == "cut":
        del raw[at:]
    elif kind == "longer":
        raw += rng.randbytes(rng.randrange(1, 3 * page))
    else:
        size = rng.randrange(1, 64)
        raw[at : at + size] = rng.randbytes(len(raw[at : at + size]))
    return bytes(raw), kind


def look(
    directory: str,
    state: State,
    answers: dict[str, list[int]],
    kill: int | None,
    again: bool,
    told: Connection,
) -> None:
    """Open a damaged store, read every context, repair it, and look again.

    answers: what a search must find in each context. kill: die at a moment of the repair that this
    seed says. again: one that was killed may have repaired it in part. Tells how it went, what was
    wrong, and what searches found.
    """
    torch.set_num_threads(1)
    wrong: list[str] = []
    found_by: dict[str, list[int]] = {}

    def read(name: str) -> None:
        if fault := SMALL.fault_of(store, name, store.kept.require(name)["info"]["segments"]):
            wrong.append(f"{name}: {fault}")
        with store.context(name).fork() as fork:
            queries = SMALL.landmarks_of(2, 3)
            found_by[name] = fork.search(slice(None), queries, 8)[0].ravel().tolist()
        store.contexts[name].close(save=False)

    salvaged, changed = False, again
    steps: tuple[tuple[type, str], ...]
    try:
        store = Store.open(directory, SMALL.config(directory))
    except CorruptStoreError:
        try:
            if kill is not None:
                rng = random.Random(kill)
                steps = ((SavedContexts, "replace"), (DiskTier, "_commit"), (DiskTier, "adopt"))
                owner, method = rng.choice(steps)
                die_within(owner, method, rng, most=3)
            salvage(Path(directory), SMALL.cold)
            store = Store.open(directory, SMALL.config(directory))
        except CorruptStoreError:
            told.send(("found, nothing can be read", wrong, {}))
            return
        salvaged = changed = True
    except (KVStoreError, ValueError) as error:
        told.send((f"not opened ({type(error).__name__})", wrong, {}))
        return
    refused = 0
    for name, segments in state.items():
        try:
            if not changed and store.kept.require(name)["info"]["segments"] != segments:
                wrong.append(f"{name}: it is another context")
            read(name)
        except (KVStoreError, ValueError, KeyError):
            refused += 1
            for context in list(store.contexts.values()):
                context.close(save=False)
    if not changed:
        wrong += [f"{n}: searches find others" for n in found_by if found_by[n] != answers.get(n)]
    result = (
        "found, the file made anew" if salvaged else "repaired at last" if again else "harmless"
    )
    try:
        found = verify(store)
        if found.damaged:
            result = "found"
        elif refused and not changed:
            wrong.append("a context was refused, and verify finds nothing")
        if kill is not None:
            rng = random.Random(kill)
            steps = ((SavedContexts, "replace"), (SavedContexts, "sweep"), (DiskTier, "_commit"))
            owner, method = rng.choice(steps)
            die_within(owner, method, rng, most=3)
        if repair(store, found):
            if verify(store).damaged:
                result = "found, not all repaired"
            for name in store.kept.names():
                read(name)
        store.close(save=False)
    except KVStoreError as error:
        result = f"found, not repaired ({type(error).__name__})"
    told.send((result, wrong if answers else [], found_by))


def main() -> int:
    parser = Parser("faults", __doc__)
    parser.add_argument(
        "--kills", type=at_least(0), default=100, help="how many processes are killed"
    )
    parser.add_argument(
        "--damages", type=at_least(0), default=300, help="how often files are damaged"
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    report: dict[str, Any] = {"bench": "faults", "seed": args.seed}
    for name, run, count in (("kills", kills, args.kills), ("damages", damages, args.damages)):
        place = Path(tempfile.mkdtemp(prefix="faults-"))
        try:
            report[name] = run(place / "store", count, args.seed, console)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        faults = report[name]["faults"]
        print(f"{name}: {count}, faults: {len(faults)}")
        for fault in faults[:20]:
            print(f"  {fault}")
    for what, times in report["damages"]["came"].items():
        print(f"  {what:40}{times:>6}")
    print(json.dumps(report))
    return 1 if report["kills"]["faults"] or report["damages"]["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
