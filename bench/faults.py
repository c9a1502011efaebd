"""Kill a process that works on a store, damage a store's files: is anything lost, or ever wrong?

*Kills*: a child appends to contexts, forks, renames and removes them, and tells before and after
each change what the store must keep. It is killed with SIGKILL at a random moment, or in a named
step, and the next child goes on in the same directory. After each kill every context must be as it
was before or after the last change, bit for bit.

*Damage*: bits flipped, pages zeroed, swapped, overwritten, the file cut short or made longer. Each
context must read as it was written, or be refused with an error that names the damage; and the
process must live.

python -m bench.faults --kills 100 --damages 300
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from kvstore import BlockSpec, Context, KVStoreError, Store, StoreConfig
from kvstore.config import DURABILITIES
from kvstore.index.landmark_index import LandmarkIndex
from kvstore.mover import Mover
from kvstore.saved_contexts import SavedContexts
from kvstore.tiers.disk import DiskTier
from kvstore.verify import repair, verify

STREAMS, BLOCK, DIM = 2, 8, 4
SPEC = BlockSpec.kv(BLOCK, DIM, torch.float32)
CONFIG = {
    "hot": 64 * SPEC.nbytes,
    "warm": 256 * SPEC.nbytes,
    "cold": "16MiB",
    "device": "cpu",
    "staging": 4 * 64 * SPEC.nbytes,
}

Segments = list[list[int]]
"""What a context holds: [seed, tokens] one after the other."""

State = dict[str, Segments]

STEPS: dict[str, tuple[type, str]] = {
    "commit": (DiskTier, "_commit"),
    "write of blocks": (DiskTier, "write"),
    "deletion": (DiskTier, "delete"),
    "promotion": (Mover, "promote"),
    "reading up": (Mover, "bring_up"),
    "save": (SavedContexts, "write"),
    "sweep": (SavedContexts, "sweep"),
    "rename": (SavedContexts, "rename"),
    "landmarks": (LandmarkIndex, "add"),
}


def tokens_of(segments: Segments) -> torch.Tensor:
    """Return a context's keys, float32 [STREAMS, tokens, DIM]; its values are their negatives."""
    parts = [torch.empty(STREAMS, 0, DIM)]
    for seed, count in segments:
        generator = torch.Generator().manual_seed(seed)
        parts.append(torch.randn(STREAMS, count, DIM, generator=generator))
    return torch.cat(parts, dim=1)


def append(context: Context, seed: int, count: int) -> None:
    """Append a segment."""
    keys = tokens_of([[seed, count]])
    sealed = (context.tokens(0) % BLOCK + count) // BLOCK
    marks = torch.full((STREAMS, sealed, DIM), float(seed % 97))
    context.append(slice(None), [keys, -keys], marks)
    context.info["segments"] = [*context.info.get("segments", []), [seed, count]]


def fault_of(store: Store, name: str, segments: Segments) -> str | None:
    """Say how a context differs from what it must hold."""
    with store.context(name).fork() as context:
        if context.info.get("segments", []) != segments:
            return f"it holds {context.info.get('segments')}, not {segments}"
        want = tokens_of(segments)
        sealed = context.sealed(0)
        if context.tokens(0) != want.shape[1] or context.tokens(1) != want.shape[1]:
            return f"it has {context.tokens(0)} tokens, not {want.shape[1]}"
        ids = context.ids(slice(None), np.tile(np.arange(sealed), (STREAMS, 1)))
        rest = context.open_block(slice(None))
        for sign, blocks, tail in zip((1, -1), store.fetch(ids), rest, strict=True):
            if not torch.equal(torch.cat((blocks.flatten(1, 2), tail), dim=1), sign * want):
                return "its tokens are not those that were written"
    store.contexts[name].close(save=False)
    return None


# --- kills --------------------------------------------------------------------------------------


def work(directory: str, state: State, seed: int, step: str | None, told: Connection) -> None:
    """Change contexts until killed; tell the state before and after each change."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    if step is not None:
        die_within(*STEPS[step], rng)
    durability = rng.choice(DURABILITIES)
    config = StoreConfig(directory=directory, durability=durability, **CONFIG)  # type: ignore[arg-type]
    with Store(SPEC, config) as store:
        while True:
            kind, act, after = act_of(store, state, rng)
            told.send((kind, state, after))
            act()
            state = after
            told.send((kind, state, state))


def act_of(store: Store, state: State, rng: random.Random) -> tuple[str, Callable[[], None], State]:
    """Draw a change: its kind, the change itself, and the state after it."""
    names = sorted(state)
    kind = rng.choice(["append", "append", "append", "fork", "rename", "delete", "ask"])
    name, new = rng.choice(names or ["c0"]), f"c{rng.randrange(6)}"
    after = {each: list(segments) for each, segments in state.items()}
    if names and kind == "delete":
        del after[name]
        return kind, partial(store.kept.delete, name), after
    if names and kind == "ask":
        return kind, partial(ask, store, name), after
    if names and kind == "fork" and new not in state:
        after[new] = list(after[name])
        return kind, partial(store.kept.fork, name, new), after
    if names and kind == "rename" and new not in state:
        after[new] = after.pop(name)
        return kind, partial(store.kept.rename, name, new), after
    name = rng.choice([*names, new])
    seeds = [(rng.randrange(2**31), rng.randrange(1, 200)) for _ in range(2)]
    after[name] = [*after.get(name, []), *([s, n] for s, n in seeds)]
    return "append", partial(grow, store, name, seeds), after


def grow(store: Store, name: str, seeds: list[tuple[int, int]]) -> None:
    """Append segments and save."""
    with store.context(name, streams=STREAMS, landmark_dim=DIM) as context:
        for seed, count in seeds:
            append(context, seed, count)


def ask(store: Store, name: str) -> None:
    """Read in a throwaway fork."""
    with store.context(name) as context, context.fork() as fork:
        append(fork, 1, 50)
        ids = fork.ids(slice(None), np.tile(np.arange(fork.sealed(0)), (STREAMS, 1)))
        store.fetch(ids)


def die_within(owner: type, method: str, rng: random.Random) -> None:
    """Have this process killed at a random call of a method: before it, after it, or within."""
    left, place = rng.randrange(1, 30), rng.choice(["before", "within", "after"])
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
        child.kill()
        child.join()
        while ours.poll():
            try:
                told = ours.recv()
            except EOFError:
                break
        if child.exitcode != -signal.SIGKILL:
            faults.append(f"kill {turn}: the child ended with {child.exitcode} at {told[0]}")
        at[step or "a random moment"] += 1
        kind, before, after = told
        sure, during = sure + (before == after), during + (before != after)
        try:
            state = found_state(directory, before, after)
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


def found_state(directory: Path, *states: State) -> State:
    """Open the store; return which of these states it is in, all of it checked."""
    with Store(SPEC, StoreConfig(directory=directory, **CONFIG)) as store:  # type: ignore[arg-type]
        store.check()
        names = store.kept.names()
        found = {name: store.kept.require(name)["info"].get("segments", []) for name in names}
        if found not in states:
            raise AssertionError(f"it holds {found}, none of {states}")
        for name, segments in found.items():
            if fault := fault_of(store, name, segments):
                raise AssertionError(f"context {name}: {fault}")
        if damaged := verify(store).damaged:
            raise AssertionError(damaged[0])
        store.sweep()
        if verify(store).unreferenced:
            raise AssertionError("blocks are left that no context has")
    return found


# --- damage -------------------------------------------------------------------------------------


def damages(directory: Path, count: int, seed: int, console: Console) -> dict[str, Any]:
    """Damage a store `count` times, each time anew, in a child that may die; return what came."""
    rng = random.Random(seed)
    state: State = {}
    with Store(SPEC, StoreConfig(directory=directory, **CONFIG)) as store:  # type: ignore[arg-type]
        for i in range(6):
            seeds = [(rng.randrange(2**31), rng.randrange(100, 400)) for _ in range(3)]
            grow(store, f"c{i}", seeds)
            state[f"c{i}"] = [[s, n] for s, n in seeds]
        store.kept.fork("c0", "fork")
        state["fork"] = state["c0"]
    path = directory / "data.mdb"
    whole = path.read_bytes()
    came: Counter[str] = Counter()
    faults: list[str] = []
    processes = multiprocessing.get_context("fork")
    for turn in track(range(count), "damages", console=console, disable=not console.is_terminal):
        raw, kind = damaged(whole, rng)
        path.write_bytes(raw)
        ours, theirs = processes.Pipe(duplex=False)
        child = processes.Process(target=look, args=(str(directory), state, theirs))
        child.start()
        theirs.close()
        child.join(60)
        if child.exitcode != 0:
            child.kill()
            faults.append(f"damage {turn} ({kind}): the process ended with {child.exitcode}")
            continue
        result, wrong = ours.recv()
        came[f"{kind}: {result}"] += 1
        faults += [f"damage {turn} ({kind}): {each}" for each in wrong]
    return {"damages": count, "came": dict(sorted(came.items())), "faults": faults}


def damaged(whole: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage a file's bytes in a random way."""
    raw = bytearray(whole)
    page = 4096
    pages = len(raw) // page
    kind = rng.choice(["bit", "byte", "zeros", "swap", "copy", "cut", "longer", "noise"])
    at, other = rng.randrange(len(raw)), rng.randrange(2, pages) * page
    here = at - at % page
    if kind == "bit":
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        raw[at] = rng.randrange(256)
    elif kind == "zeros":
        raw[here : here + page] = bytes(page)
    elif kind == "swap":
        here = max(here, 2 * page)
        one, two = raw[here : here + page], raw[other : other + page]
        raw[here : here + page], raw[other : other + page] = two, one
    elif kind == "copy":
        raw[here : here + page] = raw[other : other + page]
    elif kind == "cut":
        del raw[at:]
    elif kind == "longer":
        raw += rng.randbytes(rng.randrange(1, 3 * page))
    else:
        size = rng.randrange(1, 64)
        raw[at : at + size] = rng.randbytes(len(raw[at : at + size]))
    return bytes(raw), kind


def look(directory: str, state: State, told: Connection) -> None:
    """Open a damaged store, read every context, repair it, and look again."""
    torch.set_num_threads(1)
    wrong: list[str] = []
    try:
        store = Store(SPEC, StoreConfig(directory=directory, **CONFIG))  # type: ignore[arg-type]
    except (KVStoreError, ValueError) as error:
        told.send((f"not opened ({type(error).__name__})", wrong))
        return
    refused = 0
    for name, segments in state.items():
        try:
            if fault := fault_of(store, name, segments):
                wrong.append(f"{name}: {fault}")
        except (KVStoreError, ValueError, KeyError):
            refused += 1
            for context in list(store.contexts.values()):
                context.close(save=False)
    result = "harmless"
    try:
        found = verify(store)
        if found.damaged:
            result = "found"
        elif refused:
            wrong.append("a context was refused, and verify finds nothing")
        repair(store, found)
        left = verify(store).damaged
        for name in store.kept.names():
            segments = store.kept.require(name)["info"]["segments"]
            if fault := fault_of(store, name, segments):
                wrong.append(f"{name}, repaired: {fault}")
        if left:
            result = "found, not all repaired"
        store.close(save=False)
    except KVStoreError as error:
        result = f"found, not repaired ({type(error).__name__})"
    told.send((result, wrong))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=100, help="how many processes are killed")
    parser.add_argument("--damages", type=int, default=300, help="how often files are damaged")
    parser.add_argument("--seed", type=int, default=0)
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
