"""Reading through the real store: against the dense forward, and against a reading without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference_stream import Reference
from torch import Tensor

from kvstore import BlockSpec, IndexConfig, Store, StoreConfig
from kvstore.errors import HotTierTooSmallError, StoreFullError
from kvstore.policy import LRU
from model import checkpoint, haystack
from model.config import LandmarkConfig
from model.generate import Sampling, generate
from model.landmark_stream import LandmarkStream, Retrieval
from model.landmark_transformer import LandmarkTransformer
from model.layers import LocalAttention

NEAR = 1e-5
SELECTIVE = Retrieval(top_k=2, near=1, segment=4)
BLOCK = 8


def make_model(
    layers: str = "lrr", block_size: int = BLOCK, seed: int = 0, grams: tuple[int, ...] = ()
) -> LandmarkTransformer:
    """Random weights, with scores of a size that makes some blocks matter much more than others."""
    torch.manual_seed(seed)
    config = LandmarkConfig(
        width=32, heads=2, layers=layers, mlp_width=32, block_size=block_size, near=3, top_k=2,
        segment=block_size, grams=grams, buckets=64,
    )  # fmt: skip
    model = LandmarkTransformer(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "qkv" in name:
            weight.mul_(1.5)
    return model


MODEL = make_model()
REFERENCE = Reference(MODEL)


def text_of(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8).tobytes()


def tokens_of(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def dense(model: LandmarkTransformer, text: bytes) -> Tensor:
    """Run the training form over the text, filled up to whole blocks: [len(text), 256]."""
    size = model.config.block_size
    blocks = -(-len(text) // size)
    padded = tokens_of(text.ljust(blocks * size, b"\0")).long()
    return model(padded.view(1, blocks, size))[0].flatten(0, 1)[: len(text)]


def dense_in_chunks(model: LandmarkTransformer, text: bytes) -> Tensor:
    """Do what `dense` does without its matrix of all scores: one block of queries at a time.

    Retrieving layers are written out here from the formula; what treats each position by itself,
    and local attention, which has no such matrix, are the model's own.
    """
    size, heads = model.config.block_size, model.config.heads
    blocks = -(-len(text) // size)
    padded = tokens_of(text.ljust(blocks * size, b"\0")).long()
    x = model.embed(padded.view(1, blocks, size))
    stride = size + 1
    places = torch.arange(blocks * stride).view(blocks, stride)
    cos, sin = (t[..., t.shape[-1] // 2 :] for t in model.rotary.table(places, x.dtype))
    seen = torch.ones(stride, size, dtype=torch.bool).tril()
    for layer in model.layers:
        inner = layer.attention_norm(x)
        if isinstance(layer.attention, LocalAttention):
            x = x + layer.attention(inner, model.rotary)
        else:
            q, k, v = (t[0] for t in layer.attention.project(inner))  # [H, N, P, D]
            q, k = (
                torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
                for a, b in (t.chunk(2, dim=-1) for t in (q, k))
            )
            out = torch.empty_like(v)
            for n in range(blocks):
                s = torch.einsum("hrd,hnpd->hrnp", q[:, n], k[:, : n + 1]) * q.shape[-1] ** -0.5
                inside, gate = s[:, :, :n, :size].softmax(dim=-1), s[:, :, :n, size].exp()
                own = s[:, :, n, :size].exp() * seen
                total = own.sum(dim=-1) + gate.sum(dim=-1)
                past = torch.einsum("hrnp,hnpd->hrd", inside * gate[..., None], v[:, :n, :size])
                out[:, n] = (own @ v[:, n, :size] + past) / total[..., None]
            merged = out.permute(1, 2, 0, 3).reshape(1, blocks, stride, heads * out.shape[-1])
            x = x + layer.attention.out(merged)
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.head(model.norm(x[0, :, :-1])).flatten(0, 1)[: len(text)]


@contextmanager
def opened(
    model: LandmarkTransformer,
    retrieval: Retrieval,
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    **tiers: Any,
) -> Iterator[LandmarkStream]:
    config = model.config
    spec = BlockSpec.kv(config.block_size, config.head_dim, dtype)
    sizes: dict[str, Any] = {"hot": "4MiB", "warm": "1MiB", "cold": "32MiB", "device": "cpu"}
    with Store(spec, StoreConfig(**(sizes | tiers))) as store:
        context = store.context(
            name, streams=config.retrieving * config.heads, landmark_dim=config.head_dim
        )
        yield LandmarkStream(model, context, retrieval)
        store.check()
        if name is not None:
            context.close()


def read_in(stream: LandmarkStream, text: bytes, cuts: Sequence[int] = ()) -> Tensor:
    """Return the logits after every byte, the text being read in pieces of these lengths."""
    ends = np.cumsum([0, *cuts, len(text) - sum(cuts)]).tolist()
    pieces = [tokens_of(text[a:b]) for a, b in pairwise(ends) if a < b]
    return torch.cat([stream.score(piece) for piece in pieces])


def gap(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).max())


def all_of(length: int, block_size: int = BLOCK, segment: int | None = None) -> Retrieval:
    blocks = max(1, length // block_size)
    return Retrieval(top_k=blocks, near=blocks, segment=segment or block_size)


@st.composite
def readings(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Draw a length and how it is cut into pieces, odd ones and whole blocks."""
    length = draw(st.integers(1, 9 * BLOCK + 3))
    kind = draw(st.sampled_from(["whole", "tokens", "odd", "mixed"]))
    if kind == "tokens":
        return length, [1] * (length - 1)
    cuts: list[int] = []
    while kind != "whole" and sum(cuts) < length:
        sizes = [1, 3, 5, 7, 11, 13, 29] if kind == "odd" else [1, 2, BLOCK, 2 * BLOCK, 3, 20]
        cuts.append(draw(st.sampled_from(sizes)))
    return length, cuts[:-1]


# --- with everything retrieved it is the dense model ----------------------------------------------


def test_the_reference_is_the_dense_model() -> None:
    """The two ways of being right agree, in float64, far below what is asked of the stream."""
    text = text_of(61)
    for layers in ("lrr", "r", "rl", "ll"):
        model = make_model(layers)
        want = dense(make_model(layers).double(), text)
        reference = Reference(model)
        assert gap(reference.logits(text), want) < 1e-9
        retrieval = all_of(61, segment=4)
        assert gap(reference.logits(text, retrieval, [3, 20]), want) < 1e-9


@settings(max_examples=40, deadline=None, derandomize=True)
@given(reading=readings(), segment=st.sampled_from([1, 2, 4, 8]), share_heads=st.booleans())
@example(reading=(1, []), segment=8, share_heads=False)
@example(reading=(BLOCK, []), segment=8, share_heads=False)
@example(reading=(BLOCK - 1, []), segment=1, share_heads=False)
@example(reading=(BLOCK + 1, [BLOCK]), segment=4, share_heads=False)
@example(reading=(75, [33, 9]), segment=4, share_heads=True)
def test_with_every_block_it_equals_the_dense_forward(
    reading: tuple[int, list[int]], segment: int, share_heads: bool
) -> None:
    length, cuts = reading
    text = text_of(length)
    retrieval = replace(all_of(length, segment=segment), share_heads=share_heads)
    with opened(MODEL, retrieval, cold=None) as stream:
        assert gap(read_in(stream, text, cuts), dense(MODEL, text)) < NEAR
        assert stream.position == length


@pytest.mark.parametrize("layers", ["r", "rl", "llrr", "lrlr"])
def test_any_order_of_layers(layers: str) -> None:
    model = make_model(layers)
    text = text_of(70)
    with opened(model, all_of(70)) as stream:
        assert gap(read_in(stream, text, [1, 30, 2]), dense(model, text)) < NEAR


@pytest.mark.parametrize("cuts", [[1] * 69, [1, 30, 2]])
def test_strings_that_are_embedded_whole(cuts: list[int]) -> None:
    model = make_model(grams=(3, 6))
    text = text_of(70)
    assert gap(dense(model, text), dense(make_model(), text)) > 100 * NEAR
    with opened(model, all_of(70)) as stream:
        assert gap(read_in(stream, text, cuts), dense(model, text)) < NEAR


@pytest.mark.parametrize("segment", [1, 8, 32])
def test_shipped_block_size_and_segments(segment: int) -> None:
    model = make_model("llrr", block_size=32)
    text = text_of(300)
    with opened(model, all_of(300, 32, segment)) as stream:
        assert gap(read_in(stream, text, [100, 7, 133]), dense(model, text)) < NEAR


def test_one_token_blocks() -> None:
    model = make_model("lr", block_size=1)
    with opened(model, all_of(12, 1)) as stream:
        assert gap(read_in(stream, text_of(12), [5, 1]), dense(model, text_of(12))) < NEAR


def test_reading_gives_the_logits_after_the_last_byte() -> None:
    text = text_of(43)
    with opened(MODEL, all_of(43)) as one, opened(MODEL, all_of(43)) as other:
        scored = read_in(one, text, [20])
        other.read(tokens_of(text[:20]))
        logits = other.read(tokens_of(text[20:]))
    assert logits.shape == (256,)
    assert gap(logits, scored[-1]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_tokens_of_any_integer_dtype(dtype: torch.dtype) -> None:
    with opened(MODEL, all_of(20)) as stream:
        logits = stream.score(tokens_of(text_of(20)).to(dtype))
    assert gap(logits, dense(MODEL, text_of(20))) < NEAR


@pytest.mark.parametrize("tokens", [torch.zeros(0, dtype=torch.uint8), torch.zeros(2, 3)])
def test_what_is_no_text_is_refused(tokens: Tensor) -> None:
    with opened(MODEL, all_of(8)) as stream:
        for take in (stream.read, stream.score):
            with pytest.raises(ValueError, match="read takes bytes"):
                take(tokens)
        assert stream.position == 0


def test_bf16_blocks_are_near() -> None:
    text = text_of(70)
    with opened(MODEL, all_of(70), torch.bfloat16) as stream:
        logits = read_in(stream, text, [19, 30])
    assert 1e-5 < gap(logits, dense(MODEL, text)) < 0.1


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_any_index(kind: str) -> None:
    text = text_of(150)
    index = IndexConfig(kind=kind, segment=4, ef_search=64)
    retrieval = Retrieval(top_k=3, near=2, segment=4)
    with opened(MODEL, retrieval, index=index) as stream:
        logits = read_in(stream, text, [70, 3])
    assert gap(logits, REFERENCE.logits(text, retrieval, [70, 3])) < NEAR


@pytest.mark.parametrize("everything", [True, False])
def test_shipped_weights(everything: bool) -> None:
    """Trained scores are large and sharp; still float32 is all that differs."""
    model = checkpoint.load("landmark")
    size = model.config.block_size
    text = haystack.hide(haystack.random_words, 700, seed=3, depth=0.4).text
    retrieval = all_of(700, size) if everything else Retrieval(top_k=4, near=4, segment=size)
    with opened(model, retrieval) as stream:
        got = read_in(stream, text, [100, 300])
    scale = float(got.abs().max())
    assert scale > 5
    assert gap(got, Reference(model).logits(text, retrieval, [100, 300])) < NEAR * scale
    if everything:
        assert gap(got, dense(model, text)) < NEAR * scale


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same() -> None:
    model, text = make_model().cuda(), text_of(300)
    for tiers in ({}, TINY[0]):
        with opened(model, SELECTIVE, **({"device": "cuda"} | tiers)) as stream:
            logits = read_in(stream, text, [150, 3, 1, 1]).cpu()
        assert gap(logits, REFERENCE.logits(text, SELECTIVE, [150, 3, 1, 1])) < NEAR


def test_the_dense_forward_in_chunks_is_the_dense_forward() -> None:
    text = text_of(300)
    for layers in ("lr", "rlr"):
        model = make_model(layers).double()
        assert gap(dense_in_chunks(model, text), dense(model, text)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("length", [4096, 32768])
def test_long_texts_and_decode_beyond(length: int) -> None:
    """As near to the dense forward as it is asked to be, and as near to the truth as that one is.

    float32 itself is 1e-5 off the float64 truth in the worst of so many rows.
    """
    model = make_model("lr", block_size=32)
    text = text_of(length + 70)
    with opened(model, all_of(len(text), 32), hot="32MiB", cold="256MiB") as stream:
        pieces = [stream.score(tokens_of(text[i : i + 512])) for i in range(0, length, 512)]
        pieces += [stream.score(tokens_of(text[i : i + 1])) for i in range(length, length + 70)]
    got = torch.cat(pieces)
    expected = dense_in_chunks(model, text)
    assert gap(got, expected) < NEAR
    truth = Reference(model).logits(text)
    assert gap(got, truth) < 1.25 * gap(expected, truth) < 2 * NEAR


# --- selecting ------------------------------------------------------------------------------------

retrievals = st.builds(
    Retrieval,
    top_k=st.sampled_from([0, 1, 2, 3, 5, 40]),
    near=st.sampled_from([0, 1, 2, 3, 6, 40]),
    segment=st.sampled_from([1, 2, 4, 8]),
    share_heads=st.booleans(),
    search=st.sampled_from([True, True, True, False]),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(reading=readings(), retrieval=retrievals)
@example(reading=(75, []), retrieval=Retrieval(2, 2, 8))
@example(reading=(75, [1] * 74), retrieval=Retrieval(2, 1, 1))
@example(reading=(75, [40, 5]), retrieval=Retrieval(3, 2, 4, share_heads=True))
@example(reading=(75, [40, 5]), retrieval=Retrieval(40, 2, 4))
@example(reading=(75, [40, 5]), retrieval=Retrieval(3, 0, 4))
def test_selection_follows_its_rules(reading: tuple[int, list[int]], retrieval: Retrieval) -> None:
    """Near blocks always, at their places; older ones scored at one, put behind in age order."""
    length, cuts = reading
    text = text_of(length, seed=1)
    with opened(MODEL, retrieval, cold=None) as stream:
        logits = read_in(stream, text, cuts)
    assert gap(logits, REFERENCE.logits(text, retrieval, cuts)) < NEAR


def test_the_rules_make_a_difference() -> None:
    """Otherwise the tests above would compare like with like: each setting changes the answers."""
    text = text_of(75, seed=1)
    base = Retrieval(top_k=2, near=2, segment=4)
    others = [
        replace(base, top_k=0),
        replace(base, top_k=3),
        replace(base, near=3),
        replace(base, segment=2),
        replace(base, share_heads=True),
        replace(base, search=False),
    ]
    answers = [REFERENCE.logits(text, r) for r in (base, *others)]
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert gap(a, b) > 100 * NEAR


def test_nothing_retrieved_is_the_window_alone() -> None:
    """Nothing near and nothing found asks the store for nothing; of what lies before the own block
    only the few bytes that the first embeddings know of have an effect."""
    text, other = text_of(75), text_of(75, seed=5)
    model = make_model("r")
    with opened(model, Retrieval(top_k=0, near=0, segment=8)) as stream:
        logits = read_in(stream, text, [30])
        assert stream.store.stats.lookups == 0
    with opened(model, Retrieval(top_k=0, near=0, segment=8)) as stream:
        changed = read_in(stream, other[:69] + text[69:], [30])
    assert torch.equal(logits[72:], changed[72:])


def test_a_text_shorter_than_a_block_needs_no_store() -> None:
    text = text_of(BLOCK - 1)
    with opened(MODEL, Retrieval(top_k=2, near=2, segment=8)) as stream:
        logits = read_in(stream, text, [2, 1])
        assert len(stream.store) == 0
        assert stream.store.stats.lookups == 0
    assert gap(logits, dense(MODEL, text)) < NEAR


class Listener(LRU):
    """An order that keeps what it hears of attention."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.heard: list[np.ndarray] = []

    def weigh(self, slots: np.ndarray, weights: np.ndarray) -> None:
        self.heard.append(weights)


@pytest.mark.parametrize("cuts", [[1] * 42, [42]])
def test_the_policy_hears_each_blocks_share_of_attention(cuts: list[int]) -> None:
    model = make_model("r")
    reference = Reference(model)
    text, retrieval = text_of(43), Retrieval(top_k=3, near=2, segment=8)
    made: list[Listener] = []

    def policy(slots: int) -> Listener:
        made.append(Listener(slots))
        return made[-1]

    with opened(model, retrieval, policy=policy) as stream:
        read_in(stream, text, cuts)
    reference.logits(text, retrieval, cuts)
    heard = [w for policy in made for w in policy.heard]
    expected = np.concatenate(reference.shares).sum()
    assert abs(np.concatenate(heard).sum() - expected) < NEAR * expected
    last = np.concatenate(reference.shares[-2:])  # of both heads, five blocks each
    assert gap(np.sort(heard[-1]), np.sort(last)) < NEAR


# --- tiers ----------------------------------------------------------------------------------------

BYTES = 2 * BLOCK * 16 * 4
"""Of a block of MODEL in float32."""

TINY = [
    {"hot": 6 * BYTES, "warm": 4 * BYTES},
    {"hot": 7 * BYTES, "warm": 4 * BYTES, "policy": "sieve"},
    {"hot": 9 * BYTES, "warm": 400 * BYTES, "cold": None},
    {"hot": 6 * BYTES, "warm": 1, "staging": BYTES},
]


@pytest.mark.parametrize("tiers", TINY)
def test_where_blocks_lie_changes_no_bit(tiers: dict[str, Any]) -> None:
    """Three blocks a head and a hot tier that holds one selection: waves, and reads from disk."""
    text, cuts = text_of(40 * BLOCK + 5), [150, 3, 1, 1, 70]
    retrieval = Retrieval(top_k=2, near=1, segment=2)
    with opened(MODEL, retrieval) as stream:
        calm = read_in(stream, text, cuts)
        assert stream.store.stats.hot.hits == stream.store.stats.lookups
    with opened(MODEL, retrieval, **tiers) as stream:
        waves: list[int] = []
        cut = stream.store.waves

        def counted(selection: np.ndarray) -> Iterator[slice]:
            parts = list(cut(selection))
            waves.append(len(parts))
            return iter(parts)

        stream.store.waves = counted  # type: ignore[method-assign]
        rough = read_in(stream, text, cuts)
        stats = stream.store.stats
        assert max(waves) > 5
        assert (stats.warm if tiers.get("cold", 1) is None else stats.cold).hits > 100
        assert stats.not_found == 0
        stats.check()
    assert torch.equal(rough, calm)


def test_a_hot_tier_below_one_selection_is_refused_with_what_it_takes() -> None:
    retrieval = Retrieval(top_k=2, near=1, segment=8)
    least = pytest.raises(HotTierTooSmallError, match=r"\b6144 bytes")  # six blocks
    with least, opened(MODEL, retrieval, hot=5 * BYTES):
        pass
    with opened(MODEL, retrieval, hot=6 * BYTES) as stream:
        stream.read(tokens_of(text_of(200)))
        with pytest.raises(HotTierTooSmallError):
            stream.retrieval = replace(retrieval, top_k=3)
        stream.read(tokens_of(text_of(9)))


def test_a_full_store_says_so_and_what_was_read_before_stays() -> None:
    """A read that failed midway is not gone on from; a fork made before it is as good as ever."""
    text = text_of(120)
    with opened(MODEL, SELECTIVE, cold=None, hot=6 * BYTES, warm=37 * BYTES) as stream:
        before = read_in(stream, text[:80])  # ten blocks in each of four streams
        spare = stream.fork()
        with pytest.raises(StoreFullError):
            stream.read(tokens_of(text[80:]))
        for again in (lambda: stream.read(tokens_of(b"x")), stream.save_state, stream.fork):
            with pytest.raises(RuntimeError, match="failed midway"):
                again()
        stream.store.check()
        rest = read_in(spare, text[80:83])
    with opened(MODEL, SELECTIVE) as alone:
        expected = read_in(alone, text[:83], [80])
    assert torch.equal(torch.cat((before, rest)), expected)


# --- forks and states -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 40, 43, 79, 80])
def test_a_fork_goes_on_by_itself(at: int) -> None:
    """What a fork reads leaves the stream, and another fork, as if it had not been."""
    text, asked = text_of(110), text_of(37, seed=2)
    with opened(MODEL, SELECTIVE) as alone:
        expected = read_in(alone, text, [at])
    with opened(MODEL, SELECTIVE) as alone:
        answers = read_in(alone, text[:at] + asked, [at, 20])[at:]
    with opened(MODEL, SELECTIVE) as stream:
        begun = read_in(stream, text[:at])
        blocks = len(stream.store)
        forks = [stream.fork() for _ in range(2)]
        for fork in forks:
            assert torch.equal(read_in(fork, asked, [20]), answers)
        forks[0].context.close()
        assert (stream.position, forks[1].position) == (at, at + 37)
        rest = read_in(stream, text[at:])
        forks[1].context.close()
        assert torch.equal(torch.cat((begun, rest)), expected)
        assert len(stream.store) == 4 * (110 // BLOCK) >= blocks


def test_a_fork_of_a_fork() -> None:
    text = text_of(90)
    with opened(MODEL, SELECTIVE) as alone:
        expected = read_in(alone, text, [30, 30])
    with opened(MODEL, SELECTIVE) as stream:
        stream.read(tokens_of(text[:30]))
        child = stream.fork()
        child.read(tokens_of(text[30:60]))
        grandchild = child.fork()
        child.read(tokens_of(text_of(25, seed=3)))
        child.context.close()
        assert torch.equal(read_in(grandchild, text[60:]), expected[60:])


@pytest.mark.parametrize("tiers", [{}, TINY[0]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_asking_twice_gives_the_same_bytes(temperature: float, tiers: dict[str, Any]) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=temperature, seed=5)
    with opened(MODEL, SELECTIVE, **tiers) as stream:
        stream.read(tokens_of(text_of(100)))
        blocks = len(stream.store)
        answers = [b"".join(generate(stream, "What is it?", sampling)) for _ in range(3)]
        assert len(answers[0]) == 12
        assert answers[1:] == answers[:1] * 2
        assert (stream.position, len(stream.store)) == (100, blocks)
        other = b"".join(generate(stream, "Who is it?", sampling))
        assert b"".join(generate(stream, "What is it?", sampling)) == answers[0] != other


def test_an_answer_is_what_reading_it_would_say() -> None:
    """Prompt and answer as part of the text, each token selecting alone: the same bytes."""
    text, prompt = text_of(100), b"What is it?"
    with opened(MODEL, SELECTIVE) as stream:
        stream.read(tokens_of(text))
        answer = b"".join(generate(stream, prompt.decode(), Sampling(max_new_tokens=30)))
    whole = text + prompt + answer
    with opened(MODEL, SELECTIVE) as stream:
        stream.read(tokens_of(text))
        stream.retrieval = replace(SELECTIVE, segment=1)
        logits = read_in(stream, whole[100:], [len(prompt)] + [1] * 29)
    assert bytes(logits.argmax(-1).tolist())[len(prompt) - 1 : -1] == answer


@pytest.mark.parametrize("at", [5, 40, 43])
def test_a_saved_state_goes_on_exactly(at: int) -> None:
    text = text_of(100)
    with opened(MODEL, SELECTIVE) as alone:
        expected = read_in(alone, text, [at])
    with opened(MODEL, SELECTIVE) as stream:
        stream.read(tokens_of(text[:at]))
        stream.save_state()
        again = LandmarkStream(MODEL, stream.context, SELECTIVE)
        assert again.position == at
        assert torch.equal(read_in(again, text[at:]), expected[at:])


@pytest.mark.parametrize("at", [5, 40, 43])
def test_a_kept_context_goes_on_tomorrow(tmp_path: Path, at: int) -> None:
    text = text_of(100)
    with opened(MODEL, SELECTIVE) as alone:
        expected = read_in(alone, text, [at])
    with opened(MODEL, SELECTIVE, name="book", directory=tmp_path) as stream:
        stream.read(tokens_of(text[:at]))
        stream.save_state()
    with opened(MODEL, SELECTIVE, name="book", directory=tmp_path, **TINY[0]) as stream:
        assert stream.position == at
        assert torch.equal(read_in(stream, text[at:]), expected[at:])


def test_a_state_that_was_handed_over_is_not_written_to() -> None:
    """A stream that reads on after saving leaves what it saved as it was."""
    with opened(MODEL, SELECTIVE) as stream:
        stream.read(tokens_of(text_of(43)))
        stream.save_state()
        before = stream.context.get_state()
        stream.read(tokens_of(text_of(3)))
        after = stream.context.get_state()
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_state_that_is_not_of_all_that_was_read_is_refused() -> None:
    with opened(MODEL, SELECTIVE) as stream:
        stream.read(tokens_of(text_of(43)))
        with pytest.raises(ValueError, match="holds 43 tokens, its state is of 0"):
            LandmarkStream(MODEL, stream.context)
        stream.save_state()
        stream.read(tokens_of(text_of(1)))
        with pytest.raises(ValueError, match="holds 44 tokens, its state is of 43"):
            LandmarkStream(MODEL, stream.context)


@pytest.mark.parametrize("wrong", [{"top_k": -1}, {"near": -1}, {"segment": 0}, {"segment": 3}])
def test_retrievals_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with opened(MODEL, SELECTIVE) as stream:
        name = next(iter(wrong))
        with pytest.raises(ValueError, match=f"{name} .*must"):
            LandmarkStream(MODEL, stream.context, replace(SELECTIVE, **wrong))  # type: ignore[arg-type]


def test_a_stream_takes_the_models_own_settings() -> None:
    with opened(MODEL, SELECTIVE) as stream:
        assert LandmarkStream(MODEL, stream.context).retrieval == Retrieval(
            top_k=2, near=3, segment=8
        )
