"""The index: exact search against numpy, HNSW against exact, forks, rebuilds, bad input."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings

from kvstore import _native
from kvstore.config import IndexConfig
from kvstore.errors import KVStoreError, StoreClosedError
from kvstore.index import GraphFiles, LandmarkIndex, builder, cost, exact, pages
from kvstore.index.segment import Segment, plan

DIM = 16
SMALL_HNSW = IndexConfig(kind="hnsw", segment=64, sample=1)


def clustered(n: int, dim: int = DIM, seed: int = 0) -> torch.Tensor:
    """Points [n, dim] around 32 centres, a third as far from them as these are from each other."""
    generator = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(99).normal(size=(32, dim))
    points = centres[generator.integers(0, 32, n)] + generator.normal(size=(n, dim))
    return torch.from_numpy(points.astype(np.float32))


def reference(landmarks, queries, k, before=None):
    """Numbers and scores of the best k, the slow way: numpy in float64, one query at a time."""
    m = len(queries)
    numbers = np.full((m, k), -1)
    scores = np.full((m, k), -np.inf)
    for i in range(m):
        stop = len(landmarks) if before is None else min(len(landmarks), int(before[i]))
        products = landmarks[:stop].astype(np.float64) @ queries[i].astype(np.float64)
        best = np.argsort(-products, kind="stable")[:k]
        numbers[i, : len(best)], scores[i, : len(best)] = best, products[best]
    return numbers, scores


def same(index, landmarks, queries, k, before, found):
    """Check found against the reference for one stream; near ties may be in either order."""
    numbers, scores = (part.numpy() for part in found)
    want, want_scores = reference(landmarks, queries, k, before)
    np.testing.assert_allclose(scores, want_scores, rtol=1e-4, atol=1e-4)
    assert ((numbers < 0) == (want < 0)).all()
    for i in range(len(queries)):
        real = numbers[i][numbers[i] >= 0]
        assert len(set(real.tolist())) == len(real)
        assert (real < (len(landmarks) if before is None else min(before[i], len(landmarks)))).all()
        np.testing.assert_allclose(
            landmarks[real].astype(np.float64) @ queries[i].astype(np.float64),
            scores[i][numbers[i] >= 0],
            rtol=1e-4,
            atol=1e-4,
        )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_exact_is_numpy(data):
    draw = data.draw
    streams, dim = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 16]))
    m, k = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = np.random.default_rng(draw(st.integers(0, 2**16)))
    index = LandmarkIndex(IndexConfig(kind="exact"), streams, dim)
    landmarks = [np.empty((0, dim), np.float32) for _ in range(streams)]
    for _ in range(draw(st.integers(0, 6))):
        some = draw(st.lists(st.integers(0, streams - 1), unique=True, max_size=streams))
        n = draw(st.sampled_from([0, 1, 2, 63, 64, 65, 700, 1500]))
        rows = generator.normal(size=(len(some), n, dim)).astype(np.float32)
        index.add(some, torch.from_numpy(rows))
        for i, stream in enumerate(some):
            landmarks[stream] = np.concatenate([landmarks[stream], rows[i]])
        if draw(st.booleans()):
            index = index.fork()
    queries = generator.normal(size=(streams, m, dim)).astype(np.float32)
    longest = max(map(len, landmarks))
    before = draw(
        st.none()
        | st.integers(0, longest + 70)
        | st.lists(st.integers(0, longest + 70), min_size=m, max_size=m)
    )
    given_before = torch.tensor(before) if isinstance(before, list) else before
    blocks, scores = index.search(slice(None), torch.from_numpy(queries), k, given_before)
    assert blocks.shape == scores.shape == (streams, m, k)
    assert blocks.dtype == torch.int64
    assert scores.dtype == torch.float32
    bounds = None if before is None else np.broadcast_to(before, m)
    for s in range(streams):
        assert index.length(s) == len(landmarks[s])
        np.testing.assert_array_equal(index.landmarks(s).numpy(), landmarks[s])
        real = blocks[s][blocks[s] >= 0]
        found = index.gather([s], real[None])[0]
        np.testing.assert_array_equal(found.numpy(), landmarks[s][real.numpy()])
        same(index, landmarks[s], queries[s], k, bounds, (blocks[s], scores[s]))


# few queries, by codes


def many(kind: str, n: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Landmarks float32 [n, dim] of a kind that something about codes could be wrong for."""
    points = generator.normal(size=(n, dim))
    common = generator.normal(size=dim)
    if kind == "common":
        points = 0.25 * points + 4 * common
    elif kind == "nearly equal":
        points = 1e-5 * points + 100 * common
    elif kind == "duplicates":
        points = points[generator.integers(0, max(n // 8, 1), n)]
    elif kind == "zeros":
        points *= generator.random((n, 1)) < 0.2
    elif kind == "outliers":
        points *= 1000.0 ** generator.integers(-1, 2, (n, 1))
    elif kind == "sparse":
        points *= generator.random((n, dim)) < 0.1
    elif kind == "whole":
        points = np.round(points)
    elif kind == "tiny":
        points *= 1e-41
    elif kind == "small":
        points *= 1e-22
    elif kind == "large":
        points *= 1e18
    elif kind == "huge":
        points = np.clip(points, -3, 3) * 1e38
    elif kind == "all sizes":
        points *= 10.0 ** generator.uniform(-44, 37, (n, 1))
    return points.astype(np.float32)


KINDS = [
    "random",
    "common",
    "nearly equal",
    "duplicates",
    "zeros",
    "outliers",
    "sparse",
    "whole",
    "tiny",
    "small",
    "large",
    "huge",
    "all sizes",
]


def best(landmarks: np.ndarray, query: np.ndarray, k: int, start: int, stop: int):
    """Numbers and scores of the k best in range: float64, rounded; of equals the older first."""
    products = landmarks[start:stop].astype(np.float64) @ query.astype(np.float64)
    with np.errstate(over="ignore"):
        scores = products.astype(np.float32)
    order = np.argsort(-scores, kind="stable")[:k]
    return order + start, scores[order]


def check_best(landmarks, query, k, start, stop, numbers, scores):
    """Check an answer; a sum in another order may be rounded to a neighbour."""
    want, want_scores = best(landmarks, query, k, start, stop)
    assert (numbers[len(want) :] == -1).all()
    assert (scores[len(want) :] == -np.inf).all()
    numbers, scores = numbers[: len(want)], scores[: len(want)]
    assert len(set(numbers.tolist())) == len(want)
    assert ((numbers >= start) & (numbers < stop)).all()
    keys = list(zip(-scores, numbers, strict=True))
    assert keys == sorted(keys)
    magnitude = np.abs(landmarks.astype(np.float64)) @ np.abs(query.astype(np.float64))
    slack = 1e-44 + 2.0**-23 * np.abs(want_scores) + 1e-14 * magnitude[want]
    with np.errstate(invalid="ignore"):
        off = np.abs(scores.astype(np.float64) - want_scores)
    assert ((off <= slack) | (scores == want_scores)).all()
    # Each score is that of its landmark.
    exact = landmarks[numbers].astype(np.float64) @ query.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.abs(scores - exact)
        assert ((off <= slack + 2.0**-23 * np.abs(exact)) | (scores == np.float32(exact))).all()


@contextlib.contextmanager
def in_parts():
    """Read half of all landmarks' numbers first, however few there are, whatever that says."""
    with (
        patch.object(pages, "MANY", 2),
        patch.object(pages, "NUMBERS", range(1, 1000)),
        patch.object(pages, "LEADING", -1),
    ):
        yield


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    asked=st.sampled_from(
        ["random", "along", "against", "positive", "zeros", "tiny", "large", "one"]
    ),
    n=st.integers(1, 700) | st.integers(700, 3000),
    dim=st.integers(1, 130) | st.sampled_from([4, 16, 64, 128]),
    k=st.integers(1, 20) | st.sampled_from([64, 300]),
    cuts=st.lists(st.integers(1, 2999), max_size=4),
    start=st.integers(0, 100) | st.just(0),
    beyond=st.none() | st.integers(0, 3000),
    plain=st.booleans(),
    parts=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_codes_lose_nothing(kind, asked, n, dim, k, cuts, start, beyond, plain, parts, seed):
    generator = np.random.default_rng(seed)
    landmarks = many(kind, n, dim, generator)
    query = generator.normal(size=dim)
    if asked in ("along", "against"):
        row = landmarks[generator.integers(0, n)].astype(np.float64)
        query = row / (np.abs(row).max() or 1) * (1 if asked == "along" else -1)
    query = query * {"zeros": 0, "tiny": 1e-40, "large": 1e25}.get(asked, 1)
    if asked == "positive":
        query = np.abs(query)
    if asked == "one":
        query *= np.arange(dim) == generator.integers(0, dim)
    query = query.astype(np.float32)
    held = pages.LandmarkPages(1, dim, torch.device("cpu"))
    edges = sorted({0, n, *(cut for cut in cuts if cut < n)})
    with in_parts() if parts else contextlib.nullcontext():
        for i, (a, b) in enumerate(itertools.pairwise(edges)):
            held.append(0, torch.from_numpy(landmarks[a:b]))
            held = held.fork() if i % 2 else held
    at = torch.from_numpy(query[None])
    numbers, scores = _native.top_k(
        held.codes, [0], held.counts, at.data_ptr(), 1, dim, k, beyond, start, 1, plain
    )
    stop = n if beyond is None else min(n, beyond)
    check_best(landmarks, query, k, min(start, stop), stop, numbers[0, 0], scores[0, 0])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rounded", ["landmarks", "query"])
def test_codes_that_mislead_lose_nothing(rounded, plain):
    """All that rounding takes from a winner makes it worse, so only the bound can keep it."""
    generator = np.random.default_rng(1)
    n, dim, k = 1024, 64, 4
    signs = generator.choice([-1.0, 1.0], dim)
    landmarks = np.zeros((n, dim))
    landmarks[:, 0] = 127  # makes the scale 1, so that whole numbers are exact
    landmarks[:, 1] = generator.integers(1, 3, n)  # a little ahead of the winners
    query = np.zeros(dim)
    query[1] = 1
    winners = 16 * generator.choice(n // 16 - 1, 3 * k, replace=False)
    landmarks[winners, 1] = -2
    if rounded == "landmarks":
        query[2:] = 127 * signs[2:]
        landmarks[winners, 2:] = 0.49 * signs[2:]
    else:
        query[0] = 127
        query[2:] = 0.49 * signs[2:]
        landmarks[:, 2:] = generator.choice([-127, 127], (n, dim - 2))
        landmarks[winners, 2:] = 127 * signs[2:]
        landmarks[:, 0] = 0
    landmarks = np.concatenate((landmarks, -landmarks)).astype(np.float32)  # in common: nothing
    query = query.astype(np.float32)
    held = pages.LandmarkPages(1, dim, torch.device("cpu"))
    held.append(0, torch.from_numpy(landmarks))
    numbers, scores = _native.top_k(
        held.codes, [0], held.counts, query.ctypes.data, 1, dim, k, None, 0, 1, plain
    )
    assert set(numbers[0, 0].tolist()) <= set(winners.tolist())
    check_best(landmarks, query, k, 0, 2 * n, numbers[0, 0], scores[0, 0])


@pytest.mark.parametrize("plain", [False, True])
def test_a_small_landmark_wins_over_large_ones_that_cancel_out(plain):
    generator = np.random.default_rng(4)
    landmarks = generator.permuted(np.tile([127.0, -127.0], (1024, 32)), axis=1)
    landmarks = np.concatenate((landmarks, -landmarks)).astype(np.float32)
    winners = generator.choice(2048, 12, replace=False)
    landmarks[winners] = 0.5
    held = pages.LandmarkPages(1, 64, torch.device("cpu"))
    held.append(0, torch.from_numpy(landmarks))
    query = np.ones(64, np.float32)
    numbers, _ = _native.top_k(
        held.codes, [0], held.counts, query.ctypes.data, 1, 64, 4, None, 0, 1, plain
    )
    assert numbers[0, 0].tolist() == sorted(winners.tolist())[:4]


def test_what_pages_have_in_common_is_not_left_out(monkeypatch):
    monkeypatch.setattr(pages, "SMALLEST", 0)  # each fork keeps what was there in its page
    generator = np.random.default_rng(2)
    centres = np.repeat([[-5.0], [5.0], [-3.0]], 300, axis=0)
    landmarks = (centres + 0.1 * generator.normal(size=(900, 16))).astype(np.float32)
    held = pages.LandmarkPages(1, 16, torch.device("cpu"))
    for part in torch.from_numpy(landmarks).split(300):
        held = held.fork()
        held.append(0, part)
    assert len(held.codes) > 1
    for sign in (1, -1):
        query = np.full(16, sign, np.float32)
        numbers, scores = _native.top_k(
            held.codes, [0], held.counts, query.ctypes.data, 1, 16, 4, None, 0
        )
        check_best(landmarks, query, 4, 0, 900, numbers[0, 0], scores[0, 0])


def test_scores_that_float32_makes_equal_are_all_looked_at():
    generator = np.random.default_rng(3)
    landmarks = (2.0**22 + generator.integers(0, 4, (2000, 16))).astype(np.float32)
    held = pages.LandmarkPages(1, 16, torch.device("cpu"))
    held.append(0, torch.from_numpy(landmarks))
    query = np.ones(16, np.float32)
    numbers, scores = _native.top_k(
        held.codes, [0], held.counts, query.ctypes.data, 1, 16, 8, None, 0
    )
    want, want_scores = best(landmarks, query, 8, 0, 2000)
    assert numbers[0, 0].tolist() == want.tolist()
    assert scores[0, 0].tolist() == want_scores.tolist()


def test_codes_leave_few_to_be_scored():
    """A bound that is right but loose would be found by nothing else than the time it takes."""
    generator = np.random.default_rng(0)
    landmarks = 0.25 * generator.normal(size=(8192, 64)) + generator.normal(size=64)
    held = pages.LandmarkPages(1, 64, torch.device("cpu"))
    for part in torch.from_numpy(landmarks.astype(np.float32)).split(3000):
        held.append(0, part)
    counts = []
    for _ in range(20):
        query = torch.from_numpy(generator.normal(size=(1, 64)).astype(np.float32))
        counts.append(_native.candidates(held.codes, 0, held.counts, query.data_ptr(), 64, 4))
    assert 4 <= np.median(counts) <= 20


@pytest.mark.parametrize("plain", [False, True])
def test_a_landmark_wins_by_what_is_read_last(plain):
    """All that it has is along an axis of the rest, just where the query's rest points."""
    generator = np.random.default_rng(6)
    landmarks = np.zeros((2048, 16), np.float32)
    landmarks[:, :8] = generator.uniform(-10, 9.8, (2048, 8))
    winners = generator.choice(2048, 4, replace=False)
    landmarks[winners] = 0
    landmarks[winners, 15] = 10
    query = np.zeros(16, np.float32)
    query[[0, 15]] = 1
    held = pages.LandmarkPages(1, 16, torch.device("cpu"))
    with in_parts():
        held.append(0, torch.from_numpy(landmarks))
    numbers, _ = _native.top_k(
        held.codes, [0], held.counts, query.ctypes.data, 1, 16, 4, None, 0, 1, plain
    )
    assert numbers[0, 0].tolist() == sorted(winners.tolist())


@pytest.mark.parametrize("plain", [False, True])
def test_what_differs_along_few_axes_is_read_in_parts(plain, monkeypatch):
    refer, told = _native.Codes.refer, []

    def noted(codes, stream, mean, axes, lead):
        told.append(axes)
        refer(codes, stream, mean, axes, lead)

    monkeypatch.setattr(_native.Codes, "refer", noted)
    generator = np.random.default_rng(5)
    n, dim = 12_100, 64
    turned = np.linalg.qr(generator.normal(size=(dim, dim)))[0]
    landmarks = (generator.normal(size=(n, dim)) * 0.9 ** np.arange(dim)) @ turned
    landmarks = (landmarks + 3 * generator.normal(size=dim)).astype(np.float32)
    held = pages.LandmarkPages(1, dim, torch.device("cpu"))
    held.append(0, torch.from_numpy(landmarks[:8000]))
    held.append(0, torch.from_numpy(landmarks[8000:-100]))
    held.append(0, torch.from_numpy(landmarks[-100:]))
    assert len(told) == 2  # a page, and the larger one that took its place
    assert told[0] is None
    axes = told[1]
    np.testing.assert_allclose(axes.T @ axes, np.eye(dim), atol=1e-12)
    spread = ((landmarks - landmarks.mean(0)) @ axes).var(0)
    assert spread[: dim // 2].sum() > pages.LEADING * spread.sum()
    counts = []
    for _ in range(20):
        query = generator.normal(size=dim).astype(np.float32)
        numbers, scores = _native.top_k(
            held.codes, [0], held.counts, query.ctypes.data, 1, dim, 4, None, 0, 1, plain
        )
        check_best(landmarks, query, 4, 0, n, numbers[0, 0], scores[0, 0])
        counts.append(_native.candidates(held.codes, 0, held.counts, query.ctypes.data, dim, 4))
    assert 4 <= np.median(counts) <= 20


def shared(held, queries, k, threads):
    s, m, dim = queries.shape
    return _native.top_k(
        held.codes, list(range(s)), held.counts, queries.data_ptr(), m, dim, k, None, 0, threads
    )


@pytest.mark.skipif(sys.platform != "linux", reason="torch brings libgomp on Linux")
def test_torchs_threads_are_found():
    if "libgomp" in Path("/proc/self/maps").read_text():
        assert _native.can_share()


def test_threads_find_the_same():
    held = pages.LandmarkPages(5, DIM, torch.device("cpu"))
    for stream in range(5):
        held.append(stream, clustered(6000, seed=stream))
    for seed in range(50):
        queries = torch.randn(5, 3, DIM, generator=torch.Generator().manual_seed(seed))
        alone = shared(held, queries, 4, 1)
        for threads in (2, 3, 8):
            for mine, theirs in zip(alone, shared(held, queries, 4, threads), strict=True):
                np.testing.assert_array_equal(mine, theirs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_searches_without_the_threads_it_has_not():
    held = pages.LandmarkPages(2, DIM, torch.device("cpu"))
    for stream in range(2):
        held.append(stream, clustered(6000, seed=stream))
    queries = torch.randn(2, 1, DIM)
    numbers, _ = shared(held, queries, 4, 2)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = False
        try:
            same = bool((shared(held, queries, 4, 2)[0] == numbers).all())
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_a_thread_raises_is_raised_here():
    held = pages.LandmarkPages(4, DIM, torch.device("cpu"))
    for stream in range(4):
        held.append(stream, clustered(6000, seed=stream))
    held.counts = [6000, 6000, 6000, 99_999]  # more than there is memory for
    for _ in range(20):
        with pytest.raises(IndexError, match="no page holds"):
            shared(held, torch.randn(4, 1, DIM), 4, 2)


@pytest.mark.parametrize("m", [1, 2, exact.FEW, exact.FEW + 1])
def test_few_queries_and_many_find_the_same(m):
    landmarks, queries = clustered(5000, 64), torch.randn(2, m, 64)
    index = LandmarkIndex(IndexConfig(kind="exact"), 2, 64)
    index.add([0, 1], torch.stack((landmarks, landmarks.flip(0))))
    blocks, scores = index.search([0, 1], queries, 6, 4000)
    for i in range(m):
        alone = index.search([0, 1], queries[:, i : i + 1], 6, torch.tensor(4000))
        assert torch.equal(alone[0][:, 0], blocks[:, i])
        torch.testing.assert_close(alone[1][:, 0], scores[:, i])


def test_equal_scores_come_in_the_order_of_their_numbers():
    index = LandmarkIndex(IndexConfig(kind="exact"), 1, DIM)
    index.add([0], torch.ones(1, 1000, DIM))
    blocks, _ = index.search([0], torch.ones(1, 1, DIM), 5, 900)
    assert blocks.flatten().tolist() == [0, 1, 2, 3, 4]


def test_memory_of_codes_is_counted():
    index = LandmarkIndex(IndexConfig(kind="exact"), 1, 64)
    index.add([0], torch.randn(1, 100_000, 64))
    rows = index._pages._pages[0].data
    each = index.nbytes * 4 * 64 / rows.nbytes
    assert 4 * 64 + 70 < each < 4 * 64 + 72


@pytest.mark.parametrize(("rows", "width", "k"), [(1, 64 * 300, 5), (7, 64 * 90, 16), (40, 640, 3)])
def test_two_stage_selection_is_topk(rows, width, k):
    scores = torch.randn(rows, width)
    scores[:, 100:110] = scores[:, 50:51]  # ties over group borders
    indices, values = exact.select(scores, k)
    assert torch.equal(values, scores.topk(k).values)
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row.tolist())) == k for row in indices)


@pytest.mark.parametrize("scores", [1, 4096 * 3, 4096 * 12])
def test_tiles_change_nothing(monkeypatch, scores):
    landmarks, queries = torch.randn(2, 9000, DIM), torch.randn(2, 6, DIM)
    before = torch.tensor([9000, 8999, 4097, 4096, 5, 0])
    index = LandmarkIndex(IndexConfig(kind="exact"), 2, DIM)
    index.add(slice(None), landmarks)
    whole = index.search(slice(None), queries, 20, before)
    monkeypatch.setattr(exact, "SCORES", scores)
    tiled = index.search(slice(None), queries, 20, before)
    assert torch.equal(whole[0], tiled[0])
    torch.testing.assert_close(whole[1], tiled[1])


def test_scores_do_not_depend_on_pages_or_forks():
    landmarks, queries = clustered(5000, 64), torch.randn(1, 3, 64)
    at_once = LandmarkIndex(IndexConfig(kind="exact"), 1, 64)
    at_once.add([0], landmarks[None])
    forked = LandmarkIndex(IndexConfig(kind="exact"), 1, 64)
    for i, part in enumerate(landmarks.split(37)):
        forked = forked.fork() if i % 50 == 49 else forked
        forked.add([0], part[None])
    for some in (queries, queries[:, :1]):
        a, b = at_once.search([0], some, 5000), forked.search([0], some, 5000)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_landmarks_that_have_much_in_common_are_found():
    """As trained ones do: most of each is their mean, which no query points along."""
    generator = torch.Generator().manual_seed(0)
    dim = 64
    common = torch.randn(dim, generator=generator)
    landmarks = 8 * common / common.norm() + 0.25 * torch.randn(8192, dim, generator=generator)
    queries = torch.randn(200, dim, generator=generator) / 8
    config = IndexConfig(kind="hnsw", ef_search=256, sample=0)
    index = LandmarkIndex(config, 1, dim)
    index.add([0], landmarks[None])
    index.wait()
    numbers, scores = index.search([0], queries[None], 8)
    assert index.stats.kind == "hnsw"
    exact = LandmarkIndex(IndexConfig(kind="exact"), 1, dim)
    exact.add([0], landmarks[None])
    best, _ = exact.search([0], queries[None], 8)
    found = (numbers[0, :, :, None] == best[0, :, None, :]).any(-1).float().mean()
    assert found > 0.7  # by inner products alone: 0.07
    own = (landmarks[numbers[0]] @ queries[:, :, None])[..., 0]
    assert torch.allclose(own, scores[0], atol=1e-4)


def test_gather():
    index = LandmarkIndex(IndexConfig(), 3, DIM)
    rows = torch.randn(3, 3000, DIM)
    index.add(slice(None), rows[:, :2000])
    fork = index.fork()
    fork.add(slice(None), rows[:, 2000:])
    blocks = torch.randint(0, 3000, (2, 4, 7))
    found = fork.gather([2, 0], blocks)
    assert torch.equal(found[0], rows[2][blocks[0]])
    assert torch.equal(found[1], rows[0][blocks[1]])
    assert fork.gather([], blocks[:0]).shape == (0, 4, 7, DIM)
    with pytest.raises(KeyError, match="stream 1 has no block 2000"):
        index.gather([1], torch.tensor([[3, 2000]]))
    with pytest.raises(KeyError, match="stream 1 has no block -2"):
        index.gather([1], torch.tensor([[-2, 2]]))
    with pytest.raises(ValueError, match="expected int64"):
        index.gather([1], torch.tensor([[1.0]]))


def test_forks_of_forks_have_few_pages():
    index = LandmarkIndex(IndexConfig(kind="exact"), 2, DIM)
    index.add([0, 1], clustered(4000).expand(2, -1, -1))
    for _ in range(60):
        index = index.fork()
        index.add([1], torch.randn(1, 100, DIM))
    assert len(index._pages._pages) < 6
    assert index.length(0) == 4000
    assert index.length(1) == 10000


def test_growing_wastes_less_than_half():
    index = LandmarkIndex(IndexConfig(kind="exact"), 2, DIM)
    for _ in range(200):
        index.add([0, 1], torch.randn(2, 16, DIM))
    used = 2 * 3200 * DIM * 4
    assert used <= index.nbytes < 2 * used
    assert index.stats.landmarks == 6400


# HNSW


def test_plan_covers_whole_segments_in_descending_powers_of_two():
    assert plan(0, 64) == plan(63, 64) == []
    assert plan(64 * 7 + 5, 64) == [(0, 256), (256, 384), (384, 448)]
    for count in range(0, 5000, 17):
        ranges = plan(count, 64)
        assert [a for a, _ in ranges] == [0, *(b for _, b in ranges)][: len(ranges)]
        assert sum(b - a for a, b in ranges) == count // 64 * 64
        assert len(ranges) == bin(count // 64).count("1")


@pytest.mark.parametrize("m", [1, 9])
def test_hnsw_finds_most_of_what_exact_finds(m):
    landmarks = clustered(3000)
    index = LandmarkIndex(IndexConfig(kind="hnsw", segment=256, sample=1), 2, DIM)
    index.add([0, 1], torch.stack([landmarks, landmarks.flip(0)]))
    index.wait()
    assert index.kind_for(m) == "hnsw"
    hits = 0
    queries = clustered(2 * 90, seed=1).view(2, 90, DIM)
    for i in range(0, 90, m):
        some = queries[:, i : i + m]
        blocks, scores = index.search([0, 1], some, 10)
        assert (scores.diff(dim=-1) <= 0).all()
        for s in range(2):
            rows = index.landmarks(s).numpy()
            products = np.einsum("mkd,md->mk", rows[blocks[s]], some[s])
            np.testing.assert_allclose(scores[s], products, rtol=1e-4, atol=1e-4)
            want, _ = reference(rows, some[s].numpy(), 10)
            hits += sum(
                len(np.intersect1d(a, b)) for a, b in zip(blocks[s].numpy(), want, strict=True)
            )
    assert hits / (2 * 90 * 10) > 0.95
    stats = index.stats
    assert stats.kind == "hnsw"
    assert stats.queries == 180
    assert stats.mean_query_us > 0
    assert stats.recall is not None
    assert stats.recall > 0.95


@example(n=96, k=64, bounds=1, waits=False)  # all that the graph gives but one is beyond the bound
@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 400),
    k=st.sampled_from([1, 5, 64, 100, 500]),
    bounds=st.none() | st.integers(0, 450) | st.lists(st.integers(0, 450), min_size=3, max_size=3),
    waits=st.booleans(),
)
def test_hnsw_honours_before_and_k(n, k, bounds, waits):
    """With a beam wider than the index HNSW is exact, so every path must agree with numpy."""
    config = IndexConfig(kind="hnsw", segment=64, ef_search=512, ef_construction=200)
    index = LandmarkIndex(config, 1, DIM)
    landmarks = clustered(n)
    index.add([0], landmarks[None])
    if waits:
        index.wait()
    queries = torch.randn(1, 3, DIM)
    before = torch.tensor(bounds) if isinstance(bounds, list) else bounds
    blocks, scores = index.search([0], queries, k, before)
    limit = None if bounds is None else np.broadcast_to(bounds, 3)
    same(index, landmarks.numpy(), queries[0].numpy(), k, limit, (blocks[0], scores[0]))
    index.close()


@pytest.mark.parametrize(
    ("bounds", "kind"), [([300, 300], "hnsw"), ([300, 192], "hnsw"), ([300, 191], "exact")]
)
def test_a_bound_inside_a_segment(bounds, kind):
    """Near the segment's end it is searched for more; farther back the answer is exact."""
    config = IndexConfig(kind="hnsw", segment=64, ef_search=256, sample=1)
    index = LandmarkIndex(config, 1, DIM)
    landmarks = clustered(310)
    index.add([0], landmarks[None])
    index.wait()
    assert [(s.start, s.stop) for s in index._segments.active[0]] == [(0, 256)]
    queries = torch.randn(1, 2, DIM)
    blocks, scores = index.search([0], queries, 8, torch.tensor(bounds))
    assert index.stats.kind == kind
    same(index, landmarks.numpy(), queries[0].numpy(), 8, bounds, (blocks[0], scores[0]))


def test_a_rebuild_answers_the_same():
    landmarks, queries = clustered(700), clustered(50, seed=3)

    def answers(chunk: int) -> list[torch.Tensor]:
        index = LandmarkIndex(IndexConfig(kind="hnsw", segment=128, ef_search=4), 1, DIM)
        for part in landmarks.split(chunk):
            index.add([0], part[None])
            index.search([0], queries[None, :1], 4)
        index.wait()
        found = [index.search([0], query[None, None], 4) for query in queries]
        index.close()
        return [part for pair in found for part in pair]

    want = answers(700)
    for chunk in (1, 16, 333):
        assert all(torch.equal(a, b) for a, b in zip(want, answers(chunk), strict=True))


def test_answers_do_not_depend_on_the_builders_speed(monkeypatch):
    landmarks, queries = clustered(600), clustered(600, seed=3)

    def answers() -> list[torch.Tensor]:
        index = LandmarkIndex(IndexConfig(kind="hnsw", segment=64, ef_search=2), 1, DIM)
        found = []
        for i in range(0, 600, 8):
            index.add([0], landmarks[None, i : i + 8])
            found += [*index.search([0], queries[None, i : i + 1], 2)]
        assert index.stats.kind == "hnsw"
        index.close()
        return found

    want = answers()
    build = Segment.build

    def slowly(self, called_off):
        time.sleep(0.01)
        build(self, called_off)

    monkeypatch.setattr(Segment, "build", slowly)
    assert all(torch.equal(a, b) for a, b in zip(want, answers(), strict=True))


@pytest.mark.parametrize("landmarks", [torch.zeros(1, 200, DIM), torch.ones(1, 200, DIM)])
def test_equal_landmarks_are_all_found(landmarks):
    index = LandmarkIndex(SMALL_HNSW, 1, DIM)
    index.add([0], landmarks)
    index.wait()
    blocks, _ = index.search([0], torch.ones(1, 1, DIM), 200)
    assert sorted(blocks.flatten().tolist()) == list(range(200))


def test_a_graph_that_gives_up_is_made_up_for(monkeypatch):
    index = LandmarkIndex(SMALL_HNSW, 1, DIM)
    landmarks = clustered(210)
    index.add([0], landmarks[None])
    index.wait()
    search = Segment.search
    monkeypatch.setattr(
        Segment, "search", lambda self, q, k: None if self.start else search(self, q, k)
    )
    query = torch.randn(1, 1, DIM)
    blocks, scores = index.search([0], query, 6)
    same(index, landmarks.numpy(), query[0].numpy(), 6, None, (blocks[0], scores[0]))


def test_segments_that_were_merged_are_let_go():
    index = LandmarkIndex(SMALL_HNSW, 1, DIM)
    for part in clustered(64 * 16 + 40).split(32):
        index.add([0], part[None])
        index.search([0], torch.randn(1, 1, DIM), 1)
    assert list(index._segments._built[0]) == [(0, 1024)]


def test_segments_across_a_fork_are_each_sides_own():
    config = IndexConfig(kind="hnsw", segment=64, ef_search=256)
    index = LandmarkIndex(config, 1, DIM)
    common, ours, theirs = clustered(100), clustered(28, seed=7), clustered(28, seed=8)
    index.add([0], common[None])
    fork = index.fork()
    query = torch.randn(1, 1, DIM)
    for side, rest in ((index, ours), (fork, theirs)):
        side.add([0], rest[None])
        side.wait()
        rows = torch.cat((common, rest)).numpy()
        blocks, scores = side.search([0], query, 100)
        assert side.stats.kind == "hnsw"
        same(side, rows, query[0].numpy(), 100, None, (blocks[0], scores[0]))


def test_unequal_streams():
    index = LandmarkIndex(SMALL_HNSW, 3, DIM)
    landmarks = clustered(300)
    for stream, n in enumerate((300, 0, 70)):
        index.add([stream], landmarks[None, :n])
    index.wait()
    blocks, scores = index.search([2, 1, 0], torch.randn(3, 2, DIM), 80)
    assert (blocks[0] >= 0).sum() == 2 * 70
    assert (blocks[1] == -1).all()
    assert (scores[1] == -torch.inf).all()
    assert (blocks[2] >= 0).all()


# auto


def test_auto_builds_what_single_queries_have_paid_for(monkeypatch):
    monkeypatch.setattr(cost, "BUILD", 1e-3)
    monkeypatch.setattr(cost, "GRAPH_CALL", 0.0)
    monkeypatch.setattr(cost, "GRAPH_VISIT", 0.5)
    landmarks, query = torch.randn(8192, 128), torch.randn(1, 1, 128)
    index = LandmarkIndex(IndexConfig(segment=4096, sample=0, ef_search=64), 1, 128)
    index.add([0], landmarks[None])
    kinds = []
    for _ in range(200):
        index.search([0], query, 4)
        kinds.append(index.stats.kind)
    first = kinds.index("hnsw")
    assert first > 1
    assert set(kinds[first:]) == {"hnsw"}
    again = LandmarkIndex(IndexConfig(segment=4096, sample=0, ef_search=64), 1, 128)
    again.add([0], landmarks[None])
    for kind in kinds:
        again.search([0], query, 4)
        assert again.stats.kind == kind


def test_auto_prefers_exact_for_few_landmarks_and_for_many_queries(monkeypatch):
    monkeypatch.setattr(cost, "GRAPH_CALL", 50.0)
    index = LandmarkIndex(IndexConfig(segment=1024, ef_search=32), 1, 64)
    index.add([0], torch.randn(1, 1024, 64))
    index.wait()
    assert index.kind_for(1) == "exact"
    index.add([0], torch.randn(1, 15 * 1024, 64))
    assert index.kind_for(1) == "exact"
    index.wait()
    assert index.kind_for(1) == "hnsw"
    assert index.kind_for(512) == "exact"


def test_a_fork_that_asks_for_segments_leaves_them_to_its_origin(monkeypatch):
    monkeypatch.setattr(cost, "GRAPH_CALL", 0.0)
    monkeypatch.setattr(cost, "GRAPH_VISIT", 0.5)
    index = LandmarkIndex(IndexConfig(segment=4096, ef_search=64), 1, DIM)
    index.add([0], clustered(16384)[None])
    fork = index.fork()
    fork.wait()
    fork.close()
    began = time.perf_counter()
    index.wait()
    assert time.perf_counter() - began < 0.1
    assert index.kind_for(1) == "hnsw"


def test_kind_exact_never_builds():
    index = LandmarkIndex(IndexConfig(kind="exact", segment=16), 1, DIM)
    index.add([0], torch.randn(1, 20000, DIM))
    index.wait()
    index.search([0], torch.randn(1, 1, DIM), 4)
    assert index.kind_for(1) == index.stats.kind == "exact"
    assert index._builder._end is None


def test_resume_answers_as_before():
    config = IndexConfig(kind="hnsw", segment=64, ef_search=2)
    index = LandmarkIndex(config, 2, DIM)
    index.add([0], clustered(520)[None])
    index.wait()  # uses eight segments' worth; seven would be ripe
    index.add([1], clustered(90)[None])
    queries = torch.randn(2, 1, DIM)
    want = index.search([0, 1], queries, 8)
    again = LandmarkIndex(config, 2, DIM)
    for stream in range(2):
        again.add([stream], index.landmarks(stream)[None])
    again.resume(index.progress())
    found = again.search([0, 1], queries, 8)
    assert torch.equal(want[0], found[0])
    assert torch.equal(want[1], found[1])
    with pytest.raises(ValueError, match="more landmarks"):
        LandmarkIndex(config, 2, DIM).resume(index.progress())
    with pytest.raises(ValueError, match="2 streams, not 3"):
        LandmarkIndex(config, 3, DIM).resume(index.progress())


# forks


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_forks_do_not_see_each_other(kind):
    config = IndexConfig(kind=kind, segment=64, ef_search=4096)
    parent = LandmarkIndex(config, 1, DIM)
    landmarks = [clustered(300).numpy()]
    indexes = [parent]
    parent.add([0], torch.from_numpy(landmarks[0])[None])
    for step in range(12):
        if step in (1, 4, 5):
            indexes.append(indexes[step % len(indexes)].fork())
            landmarks.append(landmarks[step % len(landmarks)])
        for i, index in enumerate(indexes):
            rows = clustered(20 + i, seed=100 * step + i).numpy()
            index.add([0], torch.from_numpy(rows)[None])
            landmarks[i] = np.concatenate([landmarks[i], rows])
    for index, rows in zip(indexes, landmarks, strict=True):
        index.wait()
        queries = torch.randn(1, 2, DIM)
        blocks, scores = index.search([0], queries, 12)
        same(index, rows, queries[0].numpy(), 12, None, (blocks[0], scores[0]))
        np.testing.assert_array_equal(index.landmarks(0).numpy(), rows)
    indexes[0].close()
    indexes[1].search([0], queries, 3)


def test_a_fork_is_cheap():
    index = LandmarkIndex(IndexConfig(kind="exact"), 4, 64)
    index.add(slice(None), torch.randn(4, 32768, 64))
    times = []
    for _ in range(20):
        began = time.perf_counter()
        fork = index.fork()
        fork.add([0, 1], torch.randn(2, 2, 64))
        fork.close()
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


# the builder


def test_a_failed_build_surfaces_at_the_next_call(monkeypatch):
    index = LandmarkIndex(SMALL_HNSW, 1, DIM)
    monkeypatch.setattr("kvstore.index.segment.stack", lambda views: 1 // 0)
    index.add([0], clustered(64)[None])
    deadline = time.monotonic() + 10
    while not index._builder._failed and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(KVStoreError, match="could not be built: integer division"):
        index.search([0], torch.randn(1, 1, DIM), 1)
    with pytest.raises(KVStoreError, match="could not be built"):
        index.wait()
    monkeypatch.undo()
    index.wait()
    index.search([0], torch.randn(1, 1, DIM), 1)
    assert index.stats.kind == "hnsw"
    index.close()


def test_closing_ends_the_thread_with_the_last_holder():
    def running() -> int:
        return sum(thread.name == "kvstore-index" for thread in threading.enumerate())

    others = running()
    index = LandmarkIndex(IndexConfig(kind="hnsw", segment=2048), 1, 64)
    index.add([0], torch.randn(1, 8192, 64))
    fork = index.fork()
    index.close()
    index.close()
    assert running() == others + 1
    began = time.perf_counter()
    fork.close()
    assert time.perf_counter() - began < 0.5
    assert running() == others
    for use in (index.wait, index.fork, lambda: index.search([0], torch.randn(1, 1, 64), 1)):
        with pytest.raises(StoreClosedError):
            use()


def test_dropped_segments_are_not_built(monkeypatch):
    built = builder.Builder()
    hold = threading.Event()
    views = [torch.randn(64, DIM)]
    stack = pages.stack
    monkeypatch.setattr("kvstore.index.segment.stack", lambda v: hold.wait() and stack(v))
    kept = [Segment(SMALL_HNSW, 0, 64, views) for _ in range(2)]
    calls = []
    build = Segment.build
    monkeypatch.setattr(Segment, "build", lambda self, off: (calls.append(self), build(self, off)))
    built.submit(kept[0])
    dropped = Segment(SMALL_HNSW, 0, 64, views)
    built.submit(dropped)
    del dropped
    built.submit(kept[1])
    hold.set()
    assert [segment.ready() for segment in kept] == calls
    built.release()


# bad input


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    index = LandmarkIndex(IndexConfig(), 1, DIM)
    rows = torch.randn(1, 3, DIM)
    rows[0, 1, 2] = bad
    with pytest.raises(ValueError, match="landmarks hold numbers that are not finite"):
        index.add([0], rows)
    assert index.length(0) == 0
    with pytest.raises(ValueError, match="queries hold numbers that are not finite"):
        index.search([0], rows, 1)
    rows[:] = 3e38  # finite, though their sum is not
    index.add([0], rows)


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_an_addition_that_is_cut_short_adds_nothing(kind, monkeypatch):
    config = IndexConfig(kind=kind, segment=64)
    first, second = clustered(200), clustered(300, seed=1)
    with closing(LandmarkIndex(config, 2, DIM)) as index:
        index.add([0, 1], torch.stack((first, first)))
        append = index._pages.append

        def interrupted(stream, rows):
            append(stream, rows)
            if stream == 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(index._pages, "append", interrupted)
            with pytest.raises(KeyboardInterrupt):
                index.add([0, 1], torch.stack((second, second)))
        assert index.length(0) == index.length(1) == 200
        index.add([0, 1], torch.stack((second.flip(0), second)))
        index.wait()
        whole = torch.cat((first, second.flip(0))).numpy()
        queries = clustered(8, seed=2)
        found = index.search([0], queries[None], 4)
        want, _ = reference(whole, queries.numpy(), 4)
        if kind == "exact":
            assert (found[0][0].numpy() == want).all()
        else:
            hits = [len(set(a) & set(b)) for a, b in zip(found[0][0].tolist(), want, strict=True)]
            assert sum(hits) / want.size > 0.95


def test_wrong_input_is_refused_in_one_line():
    index = LandmarkIndex(IndexConfig(), 2, DIM)
    rows = torch.randn(2, 3, DIM)
    for call, words in [
        (lambda: index.add([0], rows), r"landmarks have shape \(2, 3, 16\); expected \(1, n, 16\)"),
        (lambda: index.add([0, 1], rows[0]), "landmarks have shape"),
        (lambda: index.add([0, 1], rows[..., 1:]), "landmarks have shape"),
        (lambda: index.add([0, 1], rows.long()), "expected a float dtype"),
        (lambda: index.add([0, 2], rows), "stream 2 is not one of 0 to 1"),
        (lambda: index.add([0, -1], rows), "stream -1 is not one of 0 to 1"),
        (lambda: index.add([1, 1], rows), "name one twice"),
        (lambda: index.search([0], rows, 1), "queries have shape"),
        (lambda: index.search([0, 1], rows, 0), "k is 0"),
        (lambda: index.search([0, 1], rows, 1, -1), "block numbers begin at 0"),
        (lambda: index.search([0, 1], rows, 1, torch.tensor([1, 2])), "expected whole numbers"),
        (lambda: index.search([0, 1], rows, 1, torch.rand(3)), "expected whole numbers"),
        (lambda: LandmarkIndex(IndexConfig(), 0, 4), "at least 1"),
        (lambda: LandmarkIndex(IndexConfig(), 1, 0), "at least 1"),
        (lambda: index.length(2), "stream 2 is not"),
    ]:
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert index.stats.landmarks == 0


def test_an_empty_index_finds_nothing():
    for kind in ("exact", "hnsw", "auto"):
        index = LandmarkIndex(IndexConfig(kind=kind), 2, DIM)
        index.wait()
        blocks, scores = index.search(slice(None), torch.randn(2, 3, DIM), 4)
        assert (blocks == -1).all()
        assert (scores == -torch.inf).all()
        assert index.search([], torch.empty(0, 3, DIM), 4)[0].shape == (0, 3, 4)
        assert index.search([0], torch.empty(1, 0, DIM), 4)[0].shape == (1, 0, 4)
        assert index.stats.recall is None


def test_other_float_dtypes_are_taken():
    index = LandmarkIndex(IndexConfig(), 1, DIM)
    rows = torch.randn(1, 5, DIM).bfloat16()
    index.add([0], rows)
    assert torch.equal(index.landmarks(0), rows[0].float())
    assert index.search([0], rows[:, 2:3].double(), 1)[0].shape == (1, 1, 1)


# Graphs in files


def test_a_kept_graph_is_loaded_and_answers_the_same(tmp_path, monkeypatch) -> None:
    landmarks = torch.randn(2, 300, DIM)
    queries = torch.randn(2, 5, DIM)

    def answers(files: GraphFiles | None) -> tuple[torch.Tensor, torch.Tensor]:
        index = LandmarkIndex(SMALL_HNSW, 2, DIM, files=files)
        index.add([0, 1], landmarks)
        index.wait()
        found = index.search([0, 1], queries, 7)
        assert index.stats.kind == "hnsw"
        index.close()
        return found

    want = answers(None)
    place = tmp_path / "index"
    assert not place.exists()
    files = GraphFiles(place)
    built = answers(files)
    names = sorted(path.name for path in place.iterdir())
    assert len(names) == 2 * len([name for name in names if name.endswith(".hnsw")]) > 0
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in place.iterdir())

    def never(*_: object) -> None:
        raise AssertionError("a graph was built again")

    with monkeypatch.context() as patch:
        patch.setattr(Segment, "_insert", never)
        loaded = answers(files)
        read_only = answers(GraphFiles(place, writable=False))
    for found in (built, loaded, read_only):
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert sorted(path.name for path in place.iterdir()) == names


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "no sum", "swap"])
def test_a_damaged_file_is_built_anew(tmp_path, damage: str) -> None:
    landmarks, queries = torch.randn(1, 450, DIM), torch.randn(1, 5, DIM)
    files = GraphFiles(tmp_path)

    def answers() -> tuple[torch.Tensor, torch.Tensor]:
        index = LandmarkIndex(SMALL_HNSW, 1, DIM, files=files)
        index.add([0], landmarks)
        index.wait()
        return index.search([0], queries, 7)

    want = answers()
    paths = sorted(tmp_path.glob("*.hnsw"))
    before = {path: path.read_bytes() for path in paths}
    assert len(paths) > 1
    for i, path in enumerate(paths):
        raw = bytearray(before[path])
        if damage == "flip":
            raw[len(raw) // 2] ^= 1
        elif damage == "cut":
            del raw[len(raw) // 2 :]
        elif damage == "longer":
            raw += b"x"
        elif damage == "swap":
            raw = bytearray(before[paths[i - 1]])
        else:
            path.with_suffix(".sum").unlink()
        path.write_bytes(raw)
    found = answers()
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert {path: path.read_bytes() for path in paths} == before


def test_the_same_graph_kept_twice_at_once_is_whole_at_every_moment(tmp_path) -> None:
    """Two contexts with the same landmarks build the same graph, each on a thread of its own."""

    def save(path: str) -> None:
        with open(path, "wb") as file:
            for part in range(64):
                file.write(bytes([part]) * 4096)

    def keep() -> None:
        for _ in range(100):
            files.keep("k", save)

    files = GraphFiles(tmp_path)
    keepers = [threading.Thread(target=keep) for _ in range(2)]
    for keeper in keepers:
        keeper.start()
    seen = 0
    while any(keeper.is_alive() for keeper in keepers):
        # As another process looks, which no lock keeps out.
        found = files.find("k") is not None
        assert found or not seen
        seen += found
    assert seen
    assert not files.damaged()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.hnsw", "k.sum"]


def test_what_killed_processes_left_goes(tmp_path) -> None:
    for name in ("other.partial", "other.total", f"k.{os.getpid()}"):
        (tmp_path / name).touch()
    GraphFiles(tmp_path).keep("k", lambda path: Path(path).write_bytes(b"graph"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k.hnsw", "k.sum"]


def test_a_graph_that_goes_before_it_is_loaded_is_built(tmp_path, monkeypatch) -> None:
    landmarks, queries = torch.randn(1, 450, DIM), torch.randn(1, 5, DIM)

    def answers() -> tuple[torch.Tensor, torch.Tensor]:
        index = LandmarkIndex(SMALL_HNSW, 1, DIM, files=GraphFiles(tmp_path))
        index.add([0], landmarks)
        index.wait()
        return index.search([0], queries, 7)

    want = answers()
    monkeypatch.setattr(GraphFiles, "find", lambda self, key: tmp_path / "gone.hnsw")
    assert all(torch.equal(a, b) for a, b in zip(answers(), want, strict=True))


def test_the_least_recently_used_graphs_go(tmp_path) -> None:
    files = GraphFiles(tmp_path, most=1000)
    for i in range(6):
        files.keep(f"k{i}", lambda path, i=i: Path(path).write_bytes(bytes([i]) * 300))
        os.utime(tmp_path / f"k{i}.hnsw", ns=(i, i))
        if i == 3:
            assert files.find("k1") is not None
    assert {path.stem for path in tmp_path.glob("*.hnsw")} == {"k1", "k4", "k5"}
    assert {path.stem for path in tmp_path.glob("*.sum")} == {"k1", "k4", "k5"}
    files.keep("large", lambda path: Path(path).write_bytes(bytes(5000)))
    assert files.find("large") is not None


def test_a_full_disk_keeps_no_graph_and_says_nothing(tmp_path) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("cannot write")

    files = GraphFiles(tmp_path)
    files.keep("k", fail)
    assert not list(tmp_path.iterdir())
    assert files.find("k") is None
    (tmp_path / "file").touch()
    GraphFiles(tmp_path / "file").keep("k", fail)
