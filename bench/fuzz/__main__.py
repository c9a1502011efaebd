"""Run inputs: owns the arguments, the child processes and the report.

Children begin anew every 20,000 inputs; `--only N` replays one input. Inputs/s are of the
processor's time. The last line is JSON; the exit code is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import mmap
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import bench.fuzz
from bench.arguments import Parser, at_least
from bench.fuzz.basis import Basis, make_basis
from bench.fuzz.targets import SHARES, make_targets, run_one, target_of

CHUNK = 20_000
MEMORY = 512 << 20
PATIENCE = 60.0  # on the clock, for one input
MOST_DEATHS = 50
TOLD = 500  # inputs between two reports of a child


def limit_memory() -> None:
    """Refuse this process more than MEMORY beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def resident() -> int:
    """The most memory that this process had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def where(error: BaseException) -> str:
    """The last place of this project that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/kvstore/" in f.filename or "/bench/fuzz/" in f.filename]
    ours = [f for f in ours if f.name not in ("check", "refusing")]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def work(basis: Basis, seed: int, first: int, last: int, at: Any, told: Connection) -> None:
    """Run inputs first..last, saying which one (`at`), what became of them and what is wrong."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    rng = random.Random()
    # In the parent's directory, which goes with all that children leave that have died.
    with tempfile.TemporaryDirectory(dir=basis.store.parent) as place:
        targets = make_targets(basis, Path(place))
        limit_memory()
        began = resident()
        became: Counter[tuple[str, str]] = Counter()
        seconds = dict.fromkeys(SHARES, 0.0)
        for number in range(first, last):
            at[0] = number
            name = target_of(number)
            start = time.process_time()
            try:
                what = run_one(targets, seed, number, rng)
            except Exception as error:
                what = "fault"
                told.send(("fault", number, name, type(error).__name__, where(error), str(error)))
            became[name, what] += 1
            seconds[name] += time.process_time() - start
            if number % TOLD == 0 or number == last - 1:
                told.send(("done", number + 1, became, seconds, resident() - began))
                became, seconds = Counter(), dict.fromkeys(SHARES, 0.0)
        # Without an orderly end, which is not what is tested: stores are left open.
        told.send(("end",))
        told.close()
    os._exit(0)


@dataclass
class Found:
    """One kind of fault: the first input that has it, and how many have."""

    number: int
    target: str
    error: str
    place: str
    message: str
    count: int = 0


class Run:
    """All inputs, in children one after the other, and what was found."""

    def __init__(self, basis: Basis, seed: int, told: Callable[[int], None]) -> None:
        self._basis, self._seed, self._told = basis, seed, told
        self.became: Counter[tuple[str, str]] = Counter()
        self.seconds = dict.fromkeys(SHARES, 0.0)
        self.faults: dict[tuple[str, str, str], Found] = {}
        self.deaths = self.most_memory = 0

    def run(self, inputs: int, jobs: int) -> None:
        chunks = [(a, min(a + CHUNK, inputs)) for a in range(0, inputs, CHUNK)][::-1]
        children: list[Child] = []
        try:
            while (chunks and self.deaths < MOST_DEATHS) or children:
                while chunks and len(children) < jobs and self.deaths < MOST_DEATHS:
                    children.append(Child(self._basis, self._seed, *chunks.pop()))
                wait([child.told for child in children], 1.0)
                for child in list(children):
                    if not self._hear(child):
                        continue
                    children.remove(child)
                    if child.next < child.last:
                        chunks.append((child.next, child.last))
        finally:
            for child in children:
                child.process.kill()

    def _hear(self, child: Child) -> bool:
        """Take in what a child says; say whether it is no more."""
        ended = died = False
        try:
            while child.told.poll():
                kind, *said = child.told.recv()
                if kind == "fault":
                    self.add(*said)
                elif kind == "done":
                    reached, became, seconds, memory = said
                    self.became += became
                    for name, spent in seconds.items():
                        self.seconds[name] += spent
                    self.most_memory = max(self.most_memory, memory)
                    self._told(reached - child.next)
                    child.next = reached
                else:
                    ended = True
        except (EOFError, ConnectionResetError):
            died = not ended
        if not died and not ended:
            at = child.at[0]
            if at != child.seen:
                child.seen, child.since = at, time.monotonic()
            if time.monotonic() - child.since < PATIENCE:
                return False
            child.process.kill()
            died = True
        child.process.join()
        if died:
            code = child.process.exitcode or 0
            hung = time.monotonic() - child.since >= PATIENCE
            how = "hang" if hung else signal.Signals(-code).name if code < 0 else f"exit {code}"
            at = max(child.at[0], child.next)
            self.add(at, target_of(at), "death", how, f"the process died of {how}")
            self.deaths += 1
            child.next = at + 1
        return True

    def add(self, number: int, target: str, error: str, place: str, message: str) -> None:
        key = (target, error, place)
        found = self.faults.setdefault(key, Found(number, target, error, place, message[:300]))
        found.count += 1


class Child:
    """A process that runs a range of inputs."""

    def __init__(self, basis: Basis, seed: int, first: int, last: int) -> None:
        processes = multiprocessing.get_context("fork")
        self.next, self.last = first, last
        self.at = memoryview(mmap.mmap(-1, 8)).cast("q")  # shared: it outlives the child
        self.at[0] = first
        self.seen, self.since = -1, time.monotonic()
        self.told, theirs = processes.Pipe(duplex=False)
        arguments = (basis, seed, first, last, self.at, theirs)
        self.process = processes.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()


def replay(basis: Basis, seed: int, number: int) -> int:
    """Run one input here, with the traceback of what is wrong; return the exit code."""
    faulthandler.enable()
    with tempfile.TemporaryDirectory(dir=basis.store.parent) as place:
        targets = make_targets(basis, Path(place))
        limit_memory()
        try:
            became = run_one(targets, seed, number, random.Random())
            print(f"input {number} of seed {seed}, {target_of(number)}: {became}")
            code = 0
        except Exception:
            traceback.print_exc()
            code = 1
    print(json.dumps({"seed": seed, "number": number, "basis": basis.digest, "fault": bool(code)}))
    sys.stdout.flush()
    shutil.rmtree(basis.store.parent, ignore_errors=True)
    os._exit(code)


def report(run: Run, args: argparse.Namespace, seconds: float, digest: str) -> dict[str, Any]:
    """Print the figures for people; return them all."""
    rows = []
    print(f"{'':12}{'inputs':>10}{'passed':>10}{'refused':>10}{'faults':>8}{'inputs/s':>10}")
    for name in SHARES:
        counts = {what: run.became[name, what] for what in ("passed", "refused", "fault")}
        total, spent = sum(counts.values()), run.seconds[name]
        rate = round(total / spent) if spent else 0
        rows.append({"target": name, "inputs": total, **counts, "inputs_per_s": rate})
        passed, refused, fault = counts.values()
        print(f"{name:12}{total:>10,}{passed:>10,}{refused:>10,}{fault:>8,}{rate:>10,}")
    faults = sorted(run.faults.values(), key=lambda each: each.number)
    for each in faults:
        print(
            f"FAULT, {each.count} times, first --only {each.number} ({each.target}): "
            f"{each.error} at {each.place}: {each.message}"
        )
    if run.deaths >= MOST_DEATHS:
        print("too many processes died: not all inputs were run")
    return {
        "bench": "fuzz",
        "seed": args.seed,
        "inputs": sum(run.became.values()),
        "basis": digest,
        "seconds": round(seconds, 1),
        "grown_mib": round(run.most_memory / 2**20, 1),
        "deaths": run.deaths,
        "faults": [vars(each) for each in faults],
        "rows": rows,
    }


def main() -> int:
    parser = Parser("fuzz", bench.fuzz.__doc__)
    parser.add_argument("--inputs", type=at_least(1), default=1_000_000)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--jobs", type=at_least(1), default=1, help="processes at a time")
    parser.add_argument("--only", type=at_least(0), help="replay the input of this number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    with tempfile.TemporaryDirectory() as directory:
        basis = make_basis(Path(directory))
        digest = basis.digest
        if args.only is not None:
            return replay(basis, args.seed, args.only)
        began = time.perf_counter()
        with Progress(console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("inputs", total=args.inputs)
            run = Run(basis, args.seed, lambda done: progress.advance(task, done))
            run.run(args.inputs, args.jobs)
        figures = report(run, args, time.perf_counter() - began, digest)
    print(json.dumps(figures))
    return 1 if run.faults else 0


if __name__ == "__main__":
    sys.exit(main())
