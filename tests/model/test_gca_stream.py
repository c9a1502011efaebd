"""Grouped Cross Attention read through a store: the same logits as over the whole text at once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvstore import BlockSpec, IndexConfig, Plane, Store, StoreConfig
from kvstore.errors import HotTierTooSmallError
from model.config import GCAConfig
from model.gca_stream import ChunkRetrieval, GCAStream
from model.gca_transformer import GroupedCrossTransformer
from model.generate import Sampling, generate, prefill

CONFIG = GCAConfig(
    width=32,
    heads=2,
    lower=1,
    groups=2,
    group_layers=2,
    mlp_width=64,
    block_size=8,
    landmark_dim=8,
    near=0,
    top_k=3,
    segment=4,
    lag=0,
    softmax="chunk",
    buckets=64,
)
WIDER = replace(
    CONFIG,
    grams=(),
    window_blocks=2,
    encoder=2,
    lower=2,
    group_layers=1,
    groups=3,
    heads=4,
    near=2,
    lag=1,
    softmax="found",
)
SIZE = CONFIG.block_size


def make(config: GCAConfig) -> GroupedCrossTransformer:
    torch.manual_seed(0)
    model = GroupedCrossTransformer(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
        if "query" in name or "landmark" in name:
            weight.mul_(2.0)
    return model


MODEL, OTHER = make(CONFIG), make(WIDER)
ALONE = make(replace(CONFIG, top_k=0))


@contextmanager
def opened(
    retrieval: ChunkRetrieval | None = None,
    hot: int = 64,
    index: IndexConfig | None = None,
    model: GroupedCrossTransformer = MODEL,
    directory: str | None = None,
    device: str = "cpu",
) -> Iterator[GCAStream]:
    """A stream on a store that rounds nothing; in a directory, on what is kept there."""
    layout = GCAStream.layout(model.config)
    planes = tuple(Plane(p.name, p.shape, torch.float32) for p in layout.spec.planes)
    spec = BlockSpec(planes)
    config = StoreConfig(
        hot=hot * spec.nbytes,
        warm="1MiB",
        device=device,
        index=index or IndexConfig(kind="exact"),
        directory=directory,
    )
    with Store(spec, config) as store:
        name = None if directory is None else "kept"
        context = store.context(name, streams=1, landmark_dim=layout.landmark_dim)
        yield GCAStream(model, context, retrieval)


def text_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def at_once(text: Tensor, segment: int, model: GroupedCrossTransformer = MODEL) -> Tensor:
    """The logits of the training form; a text is filled up to whole chunks."""
    padded = torch.cat((text, text.new_zeros(-len(text) % SIZE)))
    logits: Tensor = model(padded.view(1, -1, SIZE), segment)[0]
    return logits[0].flatten(0, 1)[: len(text)]


def scored(stream: GCAStream, text: Tensor, cuts: Sequence[int] = ()) -> Tensor:
    ends = [0, *sorted(c for c in cuts if 0 < c < len(text)), len(text)]
    parts = [stream.score(text[a:b]) for a, b in pairwise(ends) if b > a]
    return torch.cat(parts)


@pytest.mark.parametrize("segment", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("model", [MODEL, OTHER], ids=["published", "other"])
def test_whole_and_token_by_token_are_the_same(
    segment: int, model: GroupedCrossTransformer
) -> None:
    text = text_of(13 * SIZE + 5)
    wanted = at_once(text, segment, model)
    way = replace(GCAStream.retrieval_of(model.config), segment=segment)
    for cuts in ([], range(len(text)), range(0, len(text), SIZE), range(3, len(text), 7)):
        with opened(way, model=model) as stream:
            got = scored(stream, text, list(cuts))
        assert (got - wanted).abs().max() < 2e-4, (segment, cuts)
    assert wanted.std() > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIG, WIDER], ids=["published", "other"])
def test_on_a_gpu_it_is_the_same(config: GCAConfig) -> None:
    text = text_of(13 * SIZE + 5)
    wanted = at_once(text, config.segment, make(config))
    with opened(model=make(config).cuda(), device="cuda") as stream:
        got = scored(stream, text, [30, 31, 32, 60]).cpu()
    assert (got - wanted).abs().max() < 2e-4


def test_the_window_alone_finds_nothing() -> None:
    text = text_of(9 * SIZE + 3)
    wanted = at_once(text, 4, ALONE)
    with opened(GCAStream.retrieval_of(ALONE.config), model=ALONE) as stream:
        assert (scored(stream, text, [5, 30]) - wanted).abs().max() < 2e-4
        assert stream.store.stats.lookups == 0
    back = (ALONE.config.lower + 4) * (SIZE + 1) + 5  # no layer sees further than its window
    text[: len(text) - back] = 7
    assert torch.equal(at_once(text, 4, ALONE)[-1], wanted[-1])
    assert not torch.equal(at_once(text, 4, MODEL)[-1], at_once(text_of(9 * SIZE + 3), 4)[-1])


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 120),
    segment=st.sampled_from([0, 1, 2, 4, 8]),
    cuts=st.lists(st.integers(1, 119), max_size=8),
    seed=st.integers(0, 50),
)
def test_however_the_text_is_cut(length: int, segment: int, cuts: list[int], seed: int) -> None:
    text = text_of(length, seed)
    with opened(ChunkRetrieval(3, segment)) as stream:
        got = scored(stream, text, cuts)
    assert (got - at_once(text, segment)).abs().max() < 2e-4


PIECES = st.lists(
    st.tuples(st.integers(1, 60), st.sampled_from(["read", "skim", "score"]),
              st.sampled_from(["", "", "fork", "reopen"])),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(pieces=PIECES, segment=st.sampled_from([0, 1, 2, 4, 8]), model=st.sampled_from([0, 1]))
def test_whatever_is_read_and_kept_and_asked_in_between(
    pieces: list[tuple[int, str, str]], segment: int, model: int
) -> None:
    """One prediction, all or none, the upper layers waiting; going on with a fork, or with what a
    store has kept."""
    network = (MODEL, OTHER)[model]
    text = text_of(sum(n for n, *_ in pieces))
    wanted = at_once(text, segment, network)
    way = replace(GCAStream.retrieval_of(network.config), segment=segment)
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        stream = stack.enter_context(opened(way, model=network, directory=place))
        at = 0
        for n, how, then in pieces:
            part = text[at : at + n]
            at += n
            if how == "skim":
                stream.skim(part)
            elif how == "read":
                assert (stream.read(part) - wanted[at - 1]).abs().max() < 2e-4
            else:
                assert (stream.score(part) - wanted[at - n : at]).abs().max() < 2e-4
            if then == "fork":
                asker = stream.fork()
                asker.read(text_of(9, 1))  # what a fork reads is its own
                asker.context.close()
            elif then == "reopen":
                stream.save_state()
                stream.context.close()
                stack.close()
                stream = stack.enter_context(opened(way, model=network, directory=place))
                assert stream.position == at
        stream.context.close(save=False)


def test_a_search_by_chunk_after_one_by_token() -> None:
    """Whatever the rhythm was, a landmark has asked."""
    text = text_of(20 * SIZE)
    logits = []
    for first in (4, 0):
        with opened(ChunkRetrieval(3, first)) as stream:
            stream.skim(text)
            stream.retrieval = ChunkRetrieval(3, 4)
            stream.read(text_of(SIZE, 3))
            stream.retrieval = ChunkRetrieval(3, 0)
            logits.append(stream.read(text_of(3, 2)))
            assert (stream._asked != 0).any()
    assert torch.equal(*logits)


def test_controls_take_the_nearest_or_any() -> None:
    with opened(ChunkRetrieval(3, 4, "recent")) as stream:
        stream.skim(text_of(20 * SIZE))
        limits = torch.tensor([1, 2, 7, 20])
        queries = torch.randn(4, CONFIG.landmark_dim)
        recent = stream._find(queries, limits, 0)[0].tolist()
        assert recent == [[0, -1, -1], [1, 0, -1], [6, 5, 4], [19, 18, 17]]
        stream.retrieval = ChunkRetrieval(3, 4, "random")
        drawn = [stream._find(queries, limits, g)[0] for g in (0, 1)]
        assert not torch.equal(*drawn)
        assert all(((d >= 0) == (torch.arange(3) < limits[:, None])).all() for d in drawn)
        assert all((d < limits[:, None]).all() for d in drawn)
        often = torch.stack([stream._find(queries, limits, g)[0][3] for g in range(250)])
        assert often.unique().tolist() == list(range(20))
        assert (often.flatten().bincount() - 37.5).abs().max() < 25  # ± 6


@pytest.mark.parametrize("how", ["search", "recent", "random"])
def test_the_nearest_are_always_among_them_and_once(how: str) -> None:
    with opened(ChunkRetrieval(3, 4, how, near=2)) as stream:
        stream.skim(text_of(20 * SIZE))
        limits = torch.tensor([0, 1, 2, 3, 7, 20])
        found = stream._find(torch.randn(6, CONFIG.landmark_dim), limits, 0)[0].tolist()
    for limit, chunks in zip(limits.tolist(), found, strict=True):
        assert chunks[:2] == [max(-1, limit - 1), max(-1, limit - 2)]
        others = [chunk for chunk in chunks[2:] if chunk >= 0]
        assert all(chunk < limit - 2 for chunk in others)
        assert len(set(others)) == len(others) == min(3, max(0, limit - 2))
    assert len(found[-1]) == 5


def test_decoding_asks_early_for_what_the_last_step_used() -> None:
    with opened() as stream:
        stream.skim(text_of(20 * SIZE))
        for _ in range(4):
            stream.read(text_of(1))
        asked: list[int] = []
        prefetch = stream.store.prefetch
        stream.store.prefetch = lambda ids: asked.append(ids.size) or prefetch(ids)  # type: ignore
        stream.read(text_of(1))
        assert asked == [3, 3]  # a list a group
        stream.read(text_of(40 * SIZE - 5))  # its last searches are those of whole chunks
        asked.clear()
        stream.read(text_of(1))
        assert not any(asked)


def test_what_waits_is_bounded() -> None:
    with opened() as stream:
        for _ in range(5):
            stream.skim(text_of(50 * SIZE))
        most = 1 + stream._upper_layers * CONFIG.window_blocks
        assert len(stream._waiting) <= most * (SIZE + 1)
        assert stream.store.stats.lookups == 0  # nothing was fetched
        stream.read(text_of(3))
        assert len(stream._waiting) == 0
        assert stream.store.stats.lookups > 0


def test_a_fork_goes_on_from_the_same_place_and_leaves_it_alone() -> None:
    text, more = text_of(20 * SIZE + 3), text_of(2 * SIZE, 1)
    for read in (GCAStream.skim, GCAStream.read):
        with opened() as stream:
            read(stream, text)
            asker = stream.fork()
            asker.retrieval = asker.answering()
            assert asker.retrieval == ChunkRetrieval(3, 4)
            asker.retrieval = replace(asker.retrieval, segment=1)
            first = asker.score(more)
            asker.context.close()
            again = stream.fork()
            again.retrieval = replace(again.retrieval, segment=1, top_k=2)
            again.retrieval = replace(again.retrieval, top_k=3)
            assert torch.equal(again.score(more), first)
            both = torch.cat((text, more))
            assert (stream.score(more) - at_once(both, 4)[len(text) :]).abs().max() < 2e-4


def test_more_or_fewer_chunks_from_the_middle_of_a_segment_on() -> None:
    with opened() as stream:
        stream.read(text_of(20 * SIZE + 2))
        for k in (1, 5, 2):
            stream.retrieval = replace(stream.retrieval, top_k=k)
            assert stream.read(text_of(1)).isfinite().all()


@pytest.mark.parametrize("how", ["search", "recent", "random"])
def test_ways_to_retrieve(how: str) -> None:
    text = text_of(30 * SIZE)
    with opened(ChunkRetrieval(3, 4, how)) as stream:
        got = stream.score(text)
        for _ in range(3):  # not all of them search
            assert stream.read(text_of(1)).isfinite().all()
    same = (got - at_once(text, 4)).abs().max() < 2e-4
    assert same == (how == "search")
    assert got.isfinite().all()


def test_one_chunk_is_found_among_many() -> None:
    """A search over HNSW and one over all landmarks say the same."""
    text = text_of(400 * SIZE)
    logits = []
    for index in (IndexConfig(kind="exact"), IndexConfig(kind="hnsw", segment=64)):
        with opened(index=index) as stream:
            stream.skim(text)
            stream.context.index.wait()
            logits.append(stream.read(text_of(5, 2)))
            assert stream.context.index.stats.kind == index.kind
    assert (logits[0] - logits[1]).abs().max() < 1e-5


@pytest.mark.parametrize(("segment", "wanted"), [(0, 4), (1, 1), (2, 2), (4, 4), (8, 4)])
def test_answers_search_at_least_every_four_tokens(segment: int, wanted: int) -> None:
    with opened(ChunkRetrieval(3, segment)) as stream:
        stream.retrieval = stream.answering()
        assert stream.retrieval == ChunkRetrieval(3, wanted)


def test_chunks_that_four_does_not_divide_are_answered_in_segments_that_do() -> None:
    model = make(replace(CONFIG, block_size=6, segment=6))
    with opened(ChunkRetrieval(3, 0), model=model) as stream:
        stream.retrieval = stream.answering()
        assert stream.retrieval == ChunkRetrieval(3, 2)


def test_what_is_refused() -> None:
    with opened() as stream, pytest.raises(ValueError, match="must divide the block size 8"):
        stream.retrieval = ChunkRetrieval(3, 3)
    with pytest.raises(HotTierTooSmallError, match="give hot at least"), opened(hot=2):
        pass
    for wrong in ({"top_k": -1}, {"segment": -1}, {"how": "never"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            replace(ChunkRetrieval(3, 4), **wrong)  # type: ignore[arg-type]


def test_a_hot_tier_of_one_selection_suffices(tmp_path: Path) -> None:
    text = text_of(40 * SIZE)
    with opened(hot=3) as stream:
        got = stream.score(text)
    assert (got - at_once(text, 4)).abs().max() < 2e-4


def test_a_prompt_is_answered() -> None:
    with opened() as stream:
        prefill(stream, bytes(text_of(5000).tolist()))
        answers = [
            b"".join(generate(stream, "What?", Sampling(max_new_tokens=12))) for _ in range(2)
        ]
        assert answers[0] == answers[1]
        assert len(answers[0]) == 12
