"""Threads of a store share one heap, where the C library is glibc."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes, sys, threading
from kvstore.heap import give_back, keep_together
c = ctypes.CDLL(None)
if sys.argv[1] == "together":
    keep_together()
give_back()
everybody = threading.Barrier(4)
def work():
    everybody.wait()
    for _ in range(1000):
        c.free(ctypes.c_void_p(c.malloc(100)))
    everybody.wait()
c.malloc.restype = ctypes.c_void_p
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
c.fdopen.restype = ctypes.c_void_p
told = ctypes.c_void_p(c.fdopen(1, b"w"))
c.malloc_info(0, told)
c.fflush(told)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
@pytest.mark.parametrize("how", ["together", "apart"])
def test_threads_share_one_heap(how):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert (done.stdout.count("<heap nr=") == 1) == (how == "together")
