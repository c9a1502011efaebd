"""Training samples: what lies where, what it weighs, and that everything follows from the seed."""

from __future__ import annotations

import ast
import gzip
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import model.data
import model.train_gca
import model.train_landmark
from model.data import (
    QUESTIONS,
    Corpus,
    Sample,
    Tasks,
    batch,
    code,
    foreign,
    needle,
    noise,
    read_text,
    sentences,
    words,
)

BLOCK = 32


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "one.txt").write_bytes(b"Call me Ishmael. " * 400)
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(b"It was the best of times. " * 900))
    (tmp_path / "kept.out.txt").write_bytes(b"never")
    (tmp_path / "notes.md").write_bytes(b"not a text")
    return Corpus(tmp_path, leave_out=("kept",))


@pytest.fixture
def tasks(corpus: Corpus) -> Tasks:
    return Tasks(corpus)


def draws(tasks: Tasks, length: int, count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [tasks.hide(rng, length) for _ in range(count)]


# --- the corpus ---------------------------------------------------------------------------------


def test_corpus_reads_plain_and_compressed_texts(corpus: Corpus, tmp_path: Path) -> None:
    assert [p.name for p in corpus.paths] == ["one.txt", "two.txt.gz"]
    assert corpus.texts[1].tobytes() == b"It was the best of times. " * 900
    assert corpus.share.tolist() == pytest.approx([17 * 400 / 30200, 26 * 900 / 30200])
    assert read_text(tmp_path / "one.txt").tobytes() == b"Call me Ishmael. " * 400


def test_windows_are_weighed_by_size_and_begin_anywhere(corpus: Corpus) -> None:
    rng = np.random.default_rng(0)
    windows = [corpus.window(rng, 40).tobytes() for _ in range(600)]
    texts = [t.tobytes() for t in corpus.texts]
    assert all(any(w in t for t in texts) for w in windows)
    assert 0.15 < sum(w in texts[0] for w in windows) / 600 < 0.31  # 0.225
    assert len(set(windows)) == 17 + 26  # every phase of both repeated sentences


def test_a_window_longer_than_its_text_repeats_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")
    assert Corpus(tmp_path).window(np.random.default_rng(0), 8).tobytes() == b"abcabcab"


@pytest.mark.parametrize("leave_out", [(), ("only",)])
def test_a_folder_without_texts_is_refused(tmp_path: Path, leave_out: tuple[str, ...]) -> None:
    if leave_out:
        (tmp_path / "only.txt").write_bytes(b"text")
    with pytest.raises(ValueError, match=rf"no \*.txt or \*.txt.gz files .* {tmp_path}"):
        Corpus(tmp_path, leave_out)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        Corpus(tmp_path / "nowhere")


def test_empty_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty"):
        Corpus(tmp_path)


@pytest.mark.parametrize("raw", [b"not gzip", gzip.compress(bytes(1000))[:-12]])
def test_a_damaged_gz_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "bad.txt.gz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"bad\.txt\.gz"):
        Corpus(tmp_path)


def named(tmp_path: Path, *texts: bytes) -> Corpus:
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(text)
    return Corpus(tmp_path)


def test_names_are_capitalised_words_inside_sentences_said_often_enough(tmp_path: Path) -> None:
    often = b"he saw Queequeg there. " * 4
    rare = b"and then Ishmael. Ishmael went. Often he saw Often. Ann and Ann, Ann and Ann. " * 3
    common = b"the Whale " * 401
    corpus = named(tmp_path, often + rare + common)
    assert [places.tolist() for places in corpus.names[0]] == [[7, 30, 53, 76]]


def test_mentions_are_excerpts_in_order_that_say_one_name(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pieces = [b"he saw %s. " % n for n in (b"Queequeg", b"Starbuck") for _ in range(40)]
    filler = [words(rng, 90).tobytes().lower() + b" " for _ in pieces]
    order = rng.permutation(len(pieces))
    text = b"".join(filler[i] + pieces[i] for i in order)
    corpus = named(tmp_path, text, b"no names here. " * 40)
    for _ in range(40):
        excerpts = [e.tobytes() for e in corpus.mentions(rng, 5, 64)]
        assert {len(e) for e in excerpts} == {64}
        assert any(all(n in e for e in excerpts) for n in (b"Queequeg", b"Starbuck"))
        places = [text.index(e) for e in excerpts]
        assert places == sorted(places)


def test_mentions_are_of_texts_weighed_by_size(tmp_path: Path) -> None:
    corpus = named(tmp_path, b"he saw Queequeg. " * 40, b"he saw Starbuck. " * 360)
    rng = np.random.default_rng(0)
    first = sum(b"Queequeg" in corpus.mentions(rng, 1, 40)[0].tobytes() for _ in range(400))
    assert 0.05 < first / 400 < 0.16  # 0.1


def test_mentions_of_a_short_text_repeat_it(tmp_path: Path) -> None:
    corpus = named(tmp_path, b"he saw Queequeg. " * 4)
    for excerpt in corpus.mentions(np.random.default_rng(0), 6, 200):
        assert excerpt.tobytes() == (b"he saw Queequeg. " * 12)[:200]


# --- filler -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [words, noise, foreign, sentences, code])
@pytest.mark.parametrize("length", [1, 33, 5000])
def test_filler_has_the_length_asked_for_and_varies(make: object, length: int) -> None:
    assert callable(make)
    text = make(np.random.default_rng(1), length)
    assert text.dtype == np.uint8
    assert text.shape == (length,)
    assert np.array_equal(text, make(np.random.default_rng(1), length))
    assert length == 1 or not np.array_equal(text, make(np.random.default_rng(2), length))


def test_filler_is_what_it_says() -> None:
    rng = np.random.default_rng(0)
    assert set(words(rng, 3000).tobytes()) == set(b"abcdefghijklmnopqrstuvwxyz ")
    assert {len(set(noise(rng, 9000).tolist())) for _ in range(8)} == {256, 95}
    assert b"The grass is green. The sky is blue." in sentences(rng, 500).tobytes()
    letters = foreign(rng, 3000).tobytes().decode(errors="ignore")
    assert max(map(ord, letters)) > 0x370
    lines = code(rng, 9000).tobytes().decode().splitlines()
    assert any(line.startswith("        ") for line in lines)


@pytest.mark.parametrize("repeats", [0.0, 0.5])
@pytest.mark.parametrize("length", [128, 512])
def test_mentions_and_repeats_are_whole_samples(
    tmp_path: Path, repeats: float, length: int
) -> None:
    text = b"he saw Queequeg there, and so did she. " * 300
    corpus = named(tmp_path, text)
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
def test_repeats_say_a_passage_twice(tmp_path: Path, gibberish: float) -> None:
    """Also where a corpus has no names to look back for: then that is all there is to repeat."""
    rng = np.random.default_rng(0)
    corpus = named(tmp_path, rng.integers(97, 123, 50000, dtype=np.uint8).tobytes())
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


# --- needles ------------------------------------------------------------------------------------


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
    for module in (model.data, model.train_landmark, model.train_gca):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            if isinstance(node, ast.ImportFrom):
                imported |= set(f"{node.module}".split(".")) | {a.name for a in node.names}
            elif isinstance(node, ast.Import):
                imported |= {part for a in node.names for part in a.name.split(".")}
        assert "numpy" in imported
        assert not imported & {"haystack", "sysconfig", "inspect", "linecache", "importlib", "sys"}
