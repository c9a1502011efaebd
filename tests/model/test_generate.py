"""Sampling, stop strings and the order of reading, on a stream that says what it is told to."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.generate import ASKED, PIECE, Sampling, generate, prefill, sample
from model.landmark_stream import Retrieval


class FakeContext:
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class Parrot:
    """A stream whose likeliest next byte is always the script's; keeps what it has heard."""

    def __init__(self, script: bytes, peak: float = 30.0) -> None:
        self.script, self.peak = script, peak
        self.retrieval = Retrieval(top_k=4, near=4, segment=32)
        self.context = FakeContext()
        self.heard: list[bytes] = []
        self.forks: list[Parrot] = []
        self.said = 0

    def fork(self) -> Parrot:
        self.forks.append(Parrot(self.script, self.peak))
        return self.forks[-1]

    def answering(self) -> Retrieval:
        return replace(self.retrieval, segment=1)

    def skim(self, tokens: Tensor) -> None:
        self.heard.append(bytes(tokens.tolist()))

    def read(self, tokens: Tensor) -> Tensor:
        self.skim(tokens)
        logits = torch.zeros(256)
        logits[self.script[self.said % len(self.script)]] = self.peak
        self.said += 1
        return logits


def test_a_long_prompt_is_read_in_pieces() -> None:
    parrot, prompt = Parrot(b"yes"), "why? " * 200
    sampling = Sampling(max_new_tokens=3)
    assert b"".join(generate(parrot, prompt, sampling)) == b"yes"  # type: ignore[arg-type]
    (asker,) = parrot.forks
    assert b"".join(asker.heard) == prompt.encode() + b"ye"
    assert max(map(len, asker.heard)) == ASKED


def answer(parrot: Parrot, **fields: object) -> bytes:
    sampling = Sampling(**fields)  # type: ignore[arg-type]
    return b"".join(generate(parrot, "ask", sampling))  # type: ignore[arg-type]


# --- reading ------------------------------------------------------------------------------------


def test_prefill_reads_everything_in_order_and_tells_how_far_it_is() -> None:
    parrot = Parrot(b"x")
    text = bytes(range(256)) * (3 * PIECE // 256) + b"tail"
    told: list[int] = []
    logits = prefill(parrot, text, told.append)  # type: ignore[arg-type]
    assert b"".join(parrot.heard) == text
    assert told == [PIECE, 2 * PIECE, 3 * PIECE, 3 * PIECE + 4]
    assert int(logits.argmax()) == ord("x")


def test_nothing_to_read_or_to_ask_is_refused() -> None:
    with pytest.raises(ValueError, match="text is empty"):
        prefill(Parrot(b"x"), b"")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt is empty"):
        list(generate(Parrot(b"x"), "", Sampling()))  # type: ignore[arg-type]


def test_a_prompt_is_read_in_a_fork_that_is_closed_and_every_token_selects() -> None:
    parrot = Parrot(b"12345.")
    assert answer(parrot, max_new_tokens=6) == b"12345."
    (fork,) = parrot.forks
    assert parrot.heard == []
    assert (parrot.context.closed, fork.context.closed) == (0, 1)
    assert fork.retrieval == Retrieval(top_k=4, near=4, segment=1)
    assert b"".join(fork.heard).startswith(b"ask12345")


def test_the_fork_is_closed_when_the_answer_is_no_longer_wanted() -> None:
    parrot = Parrot(b"abc")
    pieces = generate(parrot, "ask", Sampling())  # type: ignore[arg-type]
    assert next(pieces) == b"a"
    assert parrot.forks[0].context.closed == 0
    pieces.close()  # type: ignore[attr-defined]
    assert parrot.forks[0].context.closed == 1


def test_bytes_are_given_as_they_come() -> None:
    parrot = Parrot(b"abc")
    pieces = generate(parrot, "ask", Sampling(max_new_tokens=5))  # type: ignore[arg-type]
    given_ = []
    for piece in pieces:
        given_.append(piece)
        assert len(parrot.forks[0].heard) <= len(given_)
    assert given_ == [b"a", b"b", b"c", b"a", b"b"]


def test_prompts_are_utf8() -> None:
    parrot = Parrot(b"x")
    list(generate(parrot, "né", Sampling(max_new_tokens=1)))  # type: ignore[arg-type]
    assert b"".join(parrot.forks[0].heard).startswith("né".encode())


# --- stop strings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "stop", "expected"),
    [
        (b"12345. and so on", (".",), b"12345"),
        (b"one STOP two", (" STOP ",), b"one"),
        (b"one STO STOP two", ("STOP",), b"one STO "),  # a beginning that comes to nothing
        (b"aaab", ("aab",), b"a"),
        (b"stop at once", ("stop",), b""),
        (b"no such thing", ("nothing",), b"no such thing"),
        (b"the earliest of several", ("several", "of"), b"the earliest "),
        (b"abcd", ("bcd", "abcde"), b"a"),
        (b"abcd", ("d", "bcd"), b"a"),
        ("naïve café".encode(), ("é",), "naïve caf".encode()),  # two bytes, one letter
        ("1 → 2".encode(), ("→",), b"1 "),
        (b"an empty one stops nothing", ("",), b"an empty one stops nothing"),
        (b"an end cut o", ("off",), b"an end cut o"),
    ],
)
def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(
    script: bytes, stop: tuple[str, ...], expected: bytes
) -> None:
    parrot = Parrot(script)
    assert answer(parrot, max_new_tokens=len(script), stop=stop) == expected
    assert parrot.forks[0].context.closed == 1


@settings(max_examples=200, deadline=None)
@given(
    script=st.text("ab", min_size=1, max_size=12),
    stop=st.lists(st.text("ab", max_size=4), max_size=3),
    most=st.integers(1, 12),
)
def test_stopping_is_cutting_at_the_first_stop_that_is_complete(
    script: str, stop: list[str], most: int
) -> None:
    got = answer(Parrot(script.encode()), max_new_tokens=most, stop=tuple(stop)).decode()
    said = (script * 12)[:most]
    for end in range(1, most + 1):
        cuts = [said[:end].index(s) for s in stop if s and s in said[:end]]
        if cuts:
            assert got == said[: min(cuts)]
            return
    assert got == said


# --- drawing a byte -----------------------------------------------------------------------------


def draw(logits: Tensor, count: int, **fields: float) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**fields)  # type: ignore[arg-type]
    return Counter(sample(logits, sampling, generator) for _ in range(count))


def some_logits(seed: int = 0) -> Tensor:
    return 2 * torch.randn(256, generator=torch.Generator().manual_seed(seed))


def test_temperature_zero_takes_the_likeliest() -> None:
    logits = some_logits()
    assert draw(logits, 20, temperature=0.0, top_p=0.3) == {int(logits.argmax()): 20}


@pytest.mark.parametrize("temperature", [1e-3, 1e-12, 1e-40, 1e-300, 5e-324])
def test_the_smallest_temperatures_take_the_likeliest_too(temperature: float) -> None:
    logits = some_logits()
    assert draw(logits, 20, temperature=temperature) == {int(logits.argmax()): 20}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.full((256,), -math.inf)
    logits[:4] = torch.tensor([0.0, 1.0, 2.0, -1.0])
    drawn = draw(logits, 4000, temperature=temperature)
    share = [math.exp(x / temperature) for x in (0.0, 1.0, 2.0, -1.0)]
    for byte, weight in enumerate(share):
        p = weight / sum(share)
        assert abs(drawn[byte] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_p=st.floats(1e-6, 1.0),
    temperature=st.sampled_from([0.3, 1.0]),
)
def test_top_p_leaves_the_smallest_set_that_reaches_it(
    seed: int, top_p: float, temperature: float
) -> None:
    logits = some_logits(seed)
    share = (logits.double() / temperature).softmax(dim=-1).tolist()
    nucleus: set[int] = set()
    mass = 0.0
    for byte in sorted(range(256), key=lambda b: -share[b]):
        if mass >= top_p + 1e-6:
            break
        nucleus.add(byte)
        mass += share[byte]
    assert set(draw(logits, 60, temperature=temperature, top_p=top_p)) <= nucleus


def test_top_p_draws_from_the_whole_set() -> None:
    logits = torch.full((256,), -math.inf)
    logits[7:11] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draw(logits, 300, temperature=1.0, top_p=0.85)) == {7, 8, 9}
    assert set(draw(logits, 300, temperature=1.0, top_p=0.65)) == {7, 8}
    assert set(draw(logits, 300, temperature=1.0, top_p=1e-9)) == {7}
    assert set(draw(logits, 300, temperature=1.0, top_p=1.0)) == {7, 8, 9, 10}


def test_the_seed_decides() -> None:
    def say(seed: int) -> bytes:
        return answer(Parrot(b"x", peak=0.0), max_new_tokens=30, temperature=1.0, seed=seed)

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"temperature": math.nan}, "temperature must be 0 or more"),
        ({"temperature": math.inf}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top-p must be above 0"),
        ({"top_p": 1.1}, "top-p must be above 0"),
        ({"top_p": math.nan}, "top-p must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)  # type: ignore[arg-type]
