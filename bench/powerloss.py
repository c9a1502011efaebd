"""Cut the power, in simulation: is anything acknowledged lost, is anything left wrong?

`kill -9` says nothing of that, because what a killed process wrote the system still has. So a shim
under the process that works on a store logs each write to data.mdb and each wait for the disk. Then
the power is cut at many places of that log: what was waited for is on the disk, and of what was not
a random part, in sectors of 512 bytes. Every image must open as the store was before or after the
last change that was begun, with everything that was acknowledged.

With durability "async" the last change that was acknowledged may be lost, whole. With "none" the
store does not wait for the disk, and the simulation must find losses: otherwise it would prove
nothing.

python -m bench.powerloss --cuts 300
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from bench.arguments import Parser, at_least
from bench.changes import SMALL, State
from kvstore import KVStoreError
from kvstore.promises import DURABILITIES

SECTOR = 512

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* One record: kind, flag, offset, length, then the bytes. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int kind_of(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    if (n >= 9 && !strcmp(path + n - 9, "/data.mdb")) return 'W';
    if (n >= 6 && !strcmp(path + n - 6, "/marks")) return 'A';
    return 0;
}

static void note(char kind, char flag, off_t at, const struct iovec *parts, int count) {
    static FILE *log;
    long long head[2] = {at, 0};
    pthread_mutex_lock(&lock);
    if (!log) log = fopen(getenv("SHIM_LOG"), "ab");
    for (int i = 0; i < count; i++) head[1] += parts[i].iov_len;
    fwrite(&kind, 1, 1, log);
    fwrite(&flag, 1, 1, log);
    fwrite(head, sizeof head, 1, log);
    for (int i = 0; i < count; i++) fwrite(parts[i].iov_base, 1, parts[i].iov_len, log);
    fflush(log);
    pthread_mutex_unlock(&lock);
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static void wrote(int fd, off_t at, const struct iovec *parts, int count) {
    int kind = kind_of(fd);
    if (kind) note(kind, !!(fcntl(fd, F_GETFL) & O_DSYNC), at, parts, count);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    ssize_t done = real(fd, data, size, at);
    struct iovec part = {(void *)data, done > 0 ? done : 0};
    if (done > 0) wrote(fd, at, &part, 1);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    return pwrite(fd, data, size, at);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    REAL(pwritev);
    ssize_t done = real(fd, parts, count, at);
    if (done > 0) wrote(fd, at, parts, count);
    return done;
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off_t at) {
    return pwritev(fd, parts, count, at);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    off_t at = kind_of(fd) == 'W' ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t done = real(fd, data, size);
    struct iovec part = {(void *)data, done > 0 ? done : 0};
    if (done > 0) wrote(fd, at, &part, 1);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    off_t at = kind_of(fd) == 'W' ? lseek(fd, 0, SEEK_CUR) : 0;
    ssize_t done = real(fd, parts, count);
    if (done > 0) wrote(fd, at, parts, count);
    return done;
}

int fdatasync(int fd) {
    REAL(fdatasync);
    int done = real(fd);
    if (!done && kind_of(fd) == 'W') note('S', 0, 0, NULL, 0);
    return done;
}

int fsync(int fd) {
    REAL(fsync);
    int done = real(fd);
    if (!done && kind_of(fd) == 'W') note('S', 0, 0, NULL, 0);
    return done;
}
"""


@dataclass(frozen=True)
class Record:
    """One entry of the shim's log. kind: W(rite), S(ync) or A(cknowledged). synced: by itself."""

    kind: str
    synced: bool
    at: int
    data: bytes


def records_of(log: bytes) -> list[Record]:
    """Parse the shim's log."""
    found, at = [], 0
    while at < len(log):
        kind, flag, place, size = struct.unpack_from("<cbqq", log, at)
        at += 18
        found.append(Record(kind.decode(), bool(flag), place, log[at : at + size]))
        at += size
    return found


def work(directory: str, changes: int, seed: int, durability: str) -> None:
    """Change contexts, and say so in `marks` before and after each change. Runs under the shim."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    state: State = {}
    marks = os.open(Path(directory).parent / "marks", os.O_WRONLY | os.O_CREAT, 0o600)
    mark = partial(os.write, marks)
    with SMALL.open(directory, durability=durability) as store:
        for _ in range(changes):
            _, act, after = SMALL.draw(store, state, rng)
            mark(json.dumps([state, after]).encode())
            act()
            state = after
            mark(json.dumps([state, state]).encode())


def image_at(records: list[Record], cut: int, rng: random.Random) -> tuple[bytes, list[State]]:
    """Return what a disk may hold after a cut there, and the states that were marked before it."""
    sure = bytearray()
    pending: list[Record] = []
    states: list[State] = [{}]

    def apply(at: int, data: bytes) -> None:
        if len(sure) < at + len(data):
            sure.extend(bytes(at + len(data) - len(sure)))
        sure[at : at + len(data)] = data

    for record in records[:cut]:
        if record.kind == "A":
            states += [state for state in json.loads(record.data) if state != states[-1]]
        elif record.kind == "S":
            for one in pending:
                apply(one.at, one.data)
            pending = []
        elif record.synced:
            apply(record.at, record.data)
        else:
            pending.append(record)
    sectors = [
        (one.at + i, one.data[i : i + SECTOR])
        for one in pending
        for i in range(0, len(one.data), SECTOR)
    ]
    share = rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    kept = [sector for sector in sectors if rng.random() < share]
    for at, data in kept:
        apply(at, data)
    return bytes(sure), states


def change_was_done(records: list[Record], cut: int) -> bool:
    """Say whether the last change marked before a cut was done."""
    last = next(record for record in reversed(records[:cut]) if record.kind == "A")
    before, after = json.loads(last.data)
    return bool(before == after)


def cuts(count: int, changes: int, seed: int, durability: str, console: Console) -> dict[str, Any]:
    """Work under the shim, then cut the power `count` times."""
    rng = random.Random(seed)
    place = Path(tempfile.mkdtemp(prefix="powerloss-"))
    try:
        (place / "shim.c").write_text(SHIM)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", place / "shim.so", place / "shim.c", "-ldl"],
            check=True,
        )
        store = place / "store"
        argv = [sys.executable, "-m", "bench.powerloss", "--work", str(store)]
        argv += ["--changes", str(changes), "--seed", str(seed), "--durability", durability]
        environment = {"LD_PRELOAD": str(place / "shim.so"), "SHIM_LOG": str(place / "log")}
        subprocess.run(argv, env=os.environ | environment, check=True)
        records = records_of((place / "log").read_bytes())
        kinds = Counter(record.kind for record in records)
        # From where on the store is there and has said so.
        first = next(i for i, record in enumerate(records) if record.kind == "A")
        faults: list[str] = []
        behind = 0
        for turn in track(range(count), "cuts", console=console, disable=not console.is_terminal):
            cut = rng.randrange(first + 1, len(records) + 1)
            image, states = image_at(records, cut, rng)
            copy = place / "copy"
            copy.mkdir(mode=0o700)
            (copy / "data.mdb").write_bytes(image)
            shutil.copy(store / "spec.json", copy)
            try:
                # The last two are before and after the change that was begun last; or it is done.
                done = change_was_done(records, cut)
                sure = states[-1:] if done else states[-2:]
                lost = states[-len(sure) - 1 : -len(sure)] if durability == "async" else []
                behind += SMALL.found_state(copy, *sure, *lost) in lost
            except (KVStoreError, ValueError, KeyError, AssertionError) as error:
                what = f"{type(error).__name__}: {error}"
                faults.append(f"cut {turn} at {cut} of {len(records)}: {what[:200]}")
            shutil.rmtree(copy)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {"cuts": count, "records": dict(kinds), "lost_the_last_change": behind, "faults": faults}


def main() -> int:
    parser = Parser("powerloss", __doc__)
    parser.add_argument("--cuts", type=at_least(1), default=300, help="how often the power is cut")
    parser.add_argument("--changes", type=at_least(1), default=60, help="how many changes are made")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--durability", choices=tuple(DURABILITIES), default="sync")
    parser.add_argument("--work", metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args.changes, args.seed, args.durability)
        return 0
    torch.set_num_threads(1)
    console = Console(stderr=True)
    report = cuts(args.cuts, args.changes, args.seed, args.durability, console)
    print(f"{args.cuts} cuts in a log of {report['records']}: {len(report['faults'])} faults")
    for fault in report["faults"][:10]:
        print(f"  {fault}")
    print(json.dumps({"bench": "powerloss", "durability": args.durability, **report}))
    return 1 if bool(report["faults"]) != (args.durability == "none") else 0


if __name__ == "__main__":
    raise SystemExit(main())
