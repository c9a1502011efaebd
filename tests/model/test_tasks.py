"""Training samples: what lies where, what it weighs, and that everything follows from the seed."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import model.corpus
import model.filler
import model.tasks
import model.train_gca
import model.train_landmark
from model.corpus import Corpus
from model.keys import QUESTIONS, needle
from model.tasks import Sample, Tasks, batch

BLOCK = 32


@pytest.fixture
def tasks(corpus: Corpus) -> Tasks:
    return Tasks(corpus)


def draws(tasks: Tasks, length: int, count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [tasks.hide(rng, length) for _ in range(count)]


@pytest.mark.parametrize("repeats", [0.0, 0.5])
@pytest.mark.parametrize("length", [128, 512])
def test_mentions_and_repeats_are_whole_samples(
    corpus_of: Callable[..., Corpus], repeats: float, length: int
) -> None:
    text = b"he saw Queequeg there, and so did she. " * 300
    corpus = corpus_of(text)
    tasks = Tasks(corpus, needles=0.0, mentions=1.0, repeats=repeats, gibberish=0.5)
    rng = np.random.default_rng(0)
    weighed = 0
    for _ in range(80):
        sample = tasks.sample(rng, length)
        assert sample.text.shape == sample.weight.shape == (length,)
        assert sample.answer is None
        weighed += bool((sample.weight < 1).any())
    assert corpus.texts[0].tobytes() == text  # the corpus itself is not written to
    assert weighed == 0 if repeats == 0 else 8 < weighed < 32  # 80 * 0.5 * 0.5


@pytest.mark.parametrize("gibberish", [0.0, 1.0])
def test_repeats_say_a_passage_twice(corpus_of: Callable[..., Corpus], gibberish: float) -> None:
    """Also where a corpus has no names to look back for: then that is all there is to repeat."""
    rng = np.random.default_rng(0)
    corpus = corpus_of(rng.integers(97, 123, 50000, dtype=np.uint8).tobytes())
    assert not any(corpus.names)
    tasks = Tasks(corpus, needles=0.0, mentions=1.0, repeats=0.0, gibberish=gibberish)
    for _ in range(60):
        sample = tasks.sample(rng, 512)
        text = sample.text.tobytes()
        again = [i for i in range(8, 512) if text.find(text[i - 8 : i + 1]) < i - 8]
        assert 15 < len(again) < 512 // 3
        assert again == list(range(again[0], again[-1] + 1))
        if gibberish:  # what can be known by looking back counts, the rest hardly does
            counted = np.flatnonzero(sample.weight == 1)
            assert 20 <= len(counted) < 512 // 3
            assert len(set(again) - set(counted.tolist())) <= 3  # it may go on by chance
            assert np.unique(sample.weight).tolist() == [np.float32(0.02), 1.0]
        else:
            assert (sample.weight == 1).all()


@pytest.mark.parametrize("length", [128, 256, 512, 1024])
def test_samples_have_their_length_and_weights(tasks: Tasks, length: int) -> None:
    rng = np.random.default_rng(3)
    kinds = Counter()
    for _ in range(200):
        sample = tasks.sample(rng, length)
        kinds[sample.answer is None] += 1
        assert sample.text.shape == sample.weight.shape == (length,)
        assert sample.text.dtype == np.uint8
        assert sample.weight.dtype == np.float32
        assert (sample.weight > 0).all()
        assert sample.said.any() == (sample.answer is not None)
        if sample.answer is None:
            assert (sample.weight == 1).all()
    assert 0.45 < kinds[False] / 200 < 0.75  # 0.6


def test_the_answer_is_where_it_is_said_to_be(tasks: Tasks) -> None:
    """The key follows its question, counts most, and stands in the needle before, said anyhow."""
    said = Counter()
    for sample in draws(tasks, 512, 300):
        text, answer = sample.text.tobytes(), sample.answer
        assert answer is not None
        number = text[answer].decode()
        assert len(number) == 5
        assert 10000 <= int(number) <= 99999
        before = text[: answer.start]
        name = before[before.rindex(b" The ") + 5 : -len(b" is ")].decode()
        assert before.endswith(f" The {name} is ".encode())
        ways = {
            "twice": f" The {name} is {number}. Remember it. {number} is the {name}. ",
            "once": f" The {name} is {number}. ",
            "note": f" Please note that the {name} is {number}, and keep it. ",
            "capitals": f" THE {name.upper()} IS {number}. ",
        }
        way = next(way for way, hidden in ways.items() if hidden.encode() in before)
        said[way] += 1
        hidden = ways[way].encode()
        assert before.count(hidden) == 1
        asked = text.count(f" The {name} is ".encode())
        assert asked == (2 if way in ("twice", "once") else 1)  # in the question, and the needle
        assert text[answer.stop : answer.stop + 1] == b"."
        heavy = np.flatnonzero(sample.weight == tasks.answer_weight)
        assert heavy.tolist() == list(range(answer.start - 1, answer.stop + 1))
        assert sample.said[answer.start - 1 : answer.stop + 1].all()
        question = text[sample.asked]
        assert before.endswith(question)
        assert question.endswith(f" The {name} is ".encode())
        assert question.startswith((f" What is the {name}?".encode(), f" The {name}".encode()))
        at = text.index(hidden)
        assert sample.said[at : at + len(hidden)].all()
        assert not sample.said[answer.stop + 1 :].any()
    assert 0.6 < said["twice"] / 300 < 0.8
    assert all(0.02 < said[way] / 300 < 0.25 for way in ("once", "note", "capitals"))


def test_most_samples_ask_for_the_pass_key_as_the_reader_will(tasks: Tasks) -> None:
    asked = Counter()
    for sample in draws(tasks, 512, 300):
        assert sample.answer is not None
        before = sample.text[: sample.answer.start - 1].tobytes().decode(errors="replace")
        asked[next((q for q in QUESTIONS if before.endswith(q)), "other")] += 1
    assert 0.3 < asked[QUESTIONS[0]] / 300 < 0.6  # 0.75 * 0.6
    assert 0.2 < asked[QUESTIONS[1]] / 300 < 0.4
    assert 0.15 < asked["other"] / 300 < 0.35
    assert needle(12345) == " The pass key is 12345. Remember it. 12345 is the pass key. "


@pytest.mark.parametrize("length", [256, 512])
def test_answers_and_needles_take_every_phase_of_a_block(tasks: Tasks, length: int) -> None:
    answers, keys, straddling = set(), set(), 0
    for sample in draws(tasks, length, 600):
        assert sample.answer is not None
        number = sample.text[sample.answer].tobytes()
        at = sample.text.tobytes().index(number)
        answers.add(sample.answer.start % BLOCK)
        keys.add(at % BLOCK)
        straddling += at // BLOCK != (at + 4) // BLOCK
    assert answers == set(range(BLOCK))
    assert keys == set(range(BLOCK))
    assert 0.05 < straddling / 600 < 0.25  # 4 / 32


def test_needles_lie_at_every_depth_among_decoys(tasks: Tasks) -> None:
    depths, decoys = [], 0
    for sample in draws(tasks, 1024, 300):
        assert sample.answer is not None
        text = sample.text.tobytes()
        depths.append(text.index(text[sample.answer]) / 1024)
        marks = text.count(b". Remember it. ")
        decoys += marks > 1
    low, high = np.quantile(depths, [0.1, 0.9])
    assert low < 0.2
    assert high > 0.7
    assert decoys > 60


def test_some_decoys_are_numbers_that_begin_like_the_key(tasks: Tasks) -> None:
    alike = Counter()
    for sample in draws(tasks, 1024, 400):
        assert sample.answer is not None
        text, key = sample.text.tobytes(), sample.text[sample.answer].tobytes()
        for other in re.findall(rb" (?=[1-9]\d{4}[. \n])(\d{5})", text):
            alike[next((i for i in range(5) if other[i] != key[i]), 5)] += 1
    assert all(alike[same] > 20 for same in range(5))


def test_a_thing_with_a_long_name_fits_the_shortest_sample(tasks: Tasks) -> None:
    for sample in draws(tasks, 128, 400, seed=9):
        assert sample.text.shape == (128,)


def test_a_batch_follows_from_seed_and_step(corpus: Corpus) -> None:
    first = batch(Tasks(corpus), 1, 5, 8, 128)
    again = batch(Tasks(corpus), 1, 5, 8, 128)
    assert len(first) == 8
    for a, b in zip(first, again, strict=True):
        assert a.text.shape == a.weight.shape == a.said.shape == (128,)
        assert np.array_equal(a.text, b.text)
        assert np.array_equal(a.weight, b.weight)
        assert np.array_equal(a.said, b.said)
        assert a.answer == b.answer
    for seed, step in ((1, 6), (2, 5)):
        other = batch(Tasks(corpus), seed, step, 8, 128)
        assert not all(np.array_equal(a.text, b.text) for a, b in zip(first, other, strict=True))


def test_a_chain_is_one_passage_in_order(corpus: Corpus) -> None:
    samples = batch(Tasks(corpus), 1, 5, 8, 128, chain=3)
    assert [s.passage for s in samples] == [0, 0, 0, 1, 2, 3, 4, 5]
    passage = b"".join(s.text.tobytes() for s in samples[:3])
    assert any(passage in text.tobytes() for text in corpus.texts)
    for sample in samples[:3]:
        assert (sample.weight == 1).all()
        assert not sample.said.any()
    for seed, step in ((1, 6), (2, 5)):
        other = batch(Tasks(corpus), seed, step, 8, 128, chain=3)
        assert not np.array_equal(other[0].text, samples[0].text)


def test_training_never_reads_the_demos_text() -> None:
    """The library's source and the readings' haystacks stay unseen: nothing here can name them."""
    for module in (
        model.corpus, model.filler, model.tasks, model.train_landmark, model.train_gca
    ):  # fmt: skip
        imported: set[str] = set()
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.ImportFrom):
                imported |= set(f"{node.module}".split(".")) | {a.name for a in node.names}
            elif isinstance(node, ast.Import):
                imported |= {part for a in node.names for part in a.name.split(".")}
        assert "numpy" in imported
        assert not imported & {"haystack", "sysconfig", "inspect", "linecache", "importlib", "sys"}
