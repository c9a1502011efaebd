"""What searching exactly, searching a graph, and building one cost, in microseconds on a CPU.

Owns the constants that bench/index.py measured (float32, D = 64, m = 16, ef_construction = 100,
two AVX-512 cores, one thread). Never looks at a clock: a choice that depended on one would make
answers depend on it, because a graph is approximate.
"""

from __future__ import annotations

from collections.abc import Iterable

EXACT_CALL = 25.0
EXACT_READ = 0.00013  # a landmark's number read and multiplied, for the first query
EXACT_MULTIPLY = 0.000011  # a landmark's number multiplied, for each further query
EXACT_SELECT = 0.0005  # a landmark's score looked at, for each query

GRAPH_CALL = 15.0
GRAPH_VISIT = 0.45  # a graph searched by one query, for each entry of the beam

BUILD = 0.55  # a landmark inserted, for each entry of the beam


def exact_us(landmarks: int, queries: int, dim: int) -> float:
    """Microseconds for one stream's queries over all landmarks in range."""
    per_landmark = dim * (EXACT_READ + EXACT_MULTIPLY * (queries - 1)) + EXACT_SELECT * queries
    return EXACT_CALL + landmarks * per_landmark


def graph_us(graphs: int, rest: int, queries: int, dim: int, beam: int) -> float:
    """Microseconds for one stream's queries over `graphs` segments and `rest` landmarks exactly."""
    visited = GRAPH_VISIT * beam * (0.5 + dim / 128)
    return GRAPH_CALL + graphs * queries * visited + exact_us(rest, queries, dim)


def build_us(sizes: Iterable[int], dim: int, beam: int) -> float:
    """Microseconds to build segments of these sizes on one thread."""
    return sum(sizes) * BUILD * beam * (0.5 + dim / 128)
