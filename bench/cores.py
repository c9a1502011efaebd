"""What the second of two threads is worth here: a whole core, or one core's other hyperthread."""

from __future__ import annotations

import statistics
import threading
import time
import zlib

import numpy as np


def worth_of_two(turns: int = 9) -> float:
    """How many times one thread's work two threads do: 2 where they have two cores to themselves.

    A virtual machine's two processors may be two hyperthreads of one core, or lie on either from
    one moment to the next: then it is 1.2 or so, and what needs two threads takes longer while what
    waits for memory does not. The median of some turns, of a tenth of a second in all.
    """
    data = np.random.default_rng(0).integers(0, 16, 1 << 17, np.uint8).tobytes()

    def work() -> None:
        zlib.compress(data, 1)  # without Python's lock

    def seconds(threads: int) -> float:
        others = [threading.Thread(target=work) for _ in range(threads - 1)]
        began = time.perf_counter()
        for other in others:
            other.start()
        work()
        for other in others:
            other.join()
        return time.perf_counter() - began

    return statistics.median(2 * seconds(1) / seconds(2) for _ in range(turns))
