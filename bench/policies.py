"""What an eviction policy costs a step: 128 skewed hits, then 64 victims chosen and replaced.

Times are microseconds of CPU a batch, medians over the run; `step` is the mean of a whole step,
which has the rare long calls (compaction) in it; `longest` is the longest call. The baseline is the
fastest per-slot LRU in Python, an OrderedDict.

python -m bench.policies
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from bench.arguments import Parser, at_least
from kvstore.policy import POLICIES, make_policy

HITS = 128
VICTIMS = 64
TIMES = ("touch_us", "peek_us", "victims_us", "admit_us", "step_us", "longest_us")
COLUMNS = ("policy", "slots", *TIMES)


def skewed_hits(rng: np.random.Generator, slots: int) -> np.ndarray:
    """Distinct slots [<= HITS], a few of them in most batches."""
    return np.unique((slots * rng.random(HITS) ** 4).astype(np.int64))


def measure(name: str, slots: int, steps: int) -> dict[str, Any]:
    """Microseconds a call of each kind, over `steps` steps."""
    rng = np.random.default_rng(0)
    policy = make_policy(name, slots)
    policy.admit(rng.permutation(slots))
    pinned = np.zeros(slots, bool)
    times = np.empty((steps, 4))
    for step in range(steps):
        hits = skewed_hits(rng, slots)
        pinned[hits] = True
        start = time.thread_time()
        policy.touch(hits)
        touched = time.thread_time()
        policy.peek(VICTIMS, pinned)
        peeked = time.thread_time()
        victims = policy.victims(VICTIMS, pinned)
        chosen = time.thread_time()
        policy.admit(victims)
        times[step] = np.diff([start, touched, peeked, chosen, time.thread_time()])
        pinned[hits] = False
    return row(name, slots, times, ("touch_us", "peek_us", "victims_us", "admit_us"))


def measure_ordered_dict(slots: int, steps: int) -> dict[str, Any]:
    """The same steps slot by slot."""
    rng = np.random.default_rng(0)
    order: OrderedDict[int, None] = OrderedDict.fromkeys(rng.permutation(slots).tolist())
    times = np.empty((steps, 3))
    for step in range(steps):
        hits = skewed_hits(rng, slots)
        start = time.thread_time()
        for slot in hits.tolist():
            order.move_to_end(slot)
        touched = time.thread_time()
        victims = [order.popitem(last=False)[0] for _ in range(VICTIMS)]
        chosen = time.thread_time()
        for slot in victims:
            order[slot] = None
        times[step] = np.diff([start, touched, chosen, time.thread_time()])
    return row("OrderedDict", slots, times, ("touch_us", "victims_us", "admit_us"))


def row(policy: str, slots: int, times: np.ndarray, names: tuple[str, ...]) -> dict[str, Any]:
    """times: float64 [steps, names], seconds."""
    times = times * 1e6
    medians = dict(zip(names, np.median(times, axis=0).round(1).tolist(), strict=True))
    step = round(float(times.sum(axis=1).mean()), 1)
    longest = round(float(times.max()), 1)
    return {"policy": policy, "slots": slots, **medians, "step_us": step, "longest_us": longest}


def main() -> None:
    parser = Parser("policies", __doc__)
    parser.add_argument("--slots", type=at_least(2), nargs="+", default=[4096, 65536, 1 << 20])
    parser.add_argument("--steps", type=at_least(1), default=20000)
    options = parser.parse_args()
    rows = []
    print("".join(f"{column:>12}" for column in COLUMNS))
    for slots in options.slots:
        for name in POLICIES:
            rows.append(measure(name, slots, options.steps))
        rows.append(measure_ordered_dict(slots, options.steps))
        for r in rows[-len(POLICIES) - 1 :]:
            print("".join(f"{r.get(column, '-'):>12}" for column in COLUMNS))
    print(json.dumps({"bench": "policies", "hits": HITS, "victims": VICTIMS, "rows": rows}))


if __name__ == "__main__":
    main()
