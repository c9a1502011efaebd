"""What searching exactly, searching graphs, and building them cost, in microseconds on a CPU.

Owns the constants, measured by bench/index.py (float32, D = 64, m = 16, ef_construction = 100, one
thread of an AVX-512 core, caches swept before each search). Never looks at a clock: a choice that
depended on one would make answers depend on it, because a graph is approximate.
"""

from __future__ import annotations

from collections.abc import Iterable

FEW = 16
"""Queries up to which codes, on one thread, are as fast as all numbers on two or faster."""

CODES_CALL = 35.0
CODES_READ = 0.00008  # a landmark's number read and multiplied, for the first query
CODES_MULTIPLY = 0.00002  # a landmark's number multiplied, for each further query
CODES_SELECT = 0.0006  # a landmark's bounds looked at, for each further query

EXACT_CALL = 25.0
EXACT_READ = 0.00014  # the same of all numbers, for many queries
EXACT_MULTIPLY = 0.0000105
EXACT_SELECT = 0.0005  # a landmark's score looked at, for each query

# After other memory has been gone through: as much as a model does between two of its layers.
GRAPH_CALL = 250.0  # and the way into the graph, which the first query reads for all
GRAPH_VISIT = 1.4  # a graph searched by one query, for each entry of the beam

BUILD = 0.55  # a landmark inserted, for each entry of the beam


def exact_us(landmarks: int, queries: int, dim: int) -> float:
    """Microseconds for one stream's queries over all landmarks in range."""
    if queries <= FEW:
        further = CODES_MULTIPLY * dim + CODES_SELECT
        return CODES_CALL + landmarks * (CODES_READ * dim + further * (queries - 1))
    per_landmark = dim * (EXACT_READ + EXACT_MULTIPLY * (queries - 1)) + EXACT_SELECT * queries
    return EXACT_CALL + landmarks * per_landmark


def graph_us(graphs: int, rest: int, queries: int, dim: int, beam: int) -> float:
    """Microseconds for one stream's queries over `graphs` segments and `rest` landmarks exactly."""
    visited = GRAPH_VISIT * beam * (0.5 + dim / 128)
    exactly = exact_us(rest, queries, dim) if rest else 0.0
    return GRAPH_CALL + graphs * queries * visited + exactly


def build_us(sizes: Iterable[int], dim: int, beam: int) -> float:
    """Microseconds to build segments of these sizes on one thread."""
    return sum(sizes) * BUILD * beam * (0.5 + dim / 128)
