import numpy as np
from numpy.typing import NDArray

def attend(
    shape: tuple[int, int, int, int],  # S, G, M, R
    slab: tuple[int, int, int, int],  # slots, B, D, Dv
    element: int,  # of the slab: 0 float32, 1 bfloat16, 2 float16
    each_placed: bool,  # queries [S, G, M, R, D], not [S, G, 1, R, D]
    threads: int,
    q: int,  # this and what follows: addresses of contiguous arrays, 0: none; see attention.h
    cos: int,
    sin: int,
    keys: int,
    values: int,
    slots: int,
    gate: int,
    landmarks: int,
    local_out: int,
    local_lse: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    # output [S, G, R, Dv], log-sum-exp [S, G, R], weights [S, G, M, R]
    ...
