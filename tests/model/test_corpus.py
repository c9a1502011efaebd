"""Texts: which are read, how they are drawn from, and where their names are."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model.corpus import Corpus, read_text
from model.filler import words


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


def test_names_are_capitalised_words_inside_sentences_said_often_enough(
    corpus_of: Callable[..., Corpus],
) -> None:
    often = b"he saw Queequeg there. " * 4
    rare = b"and then Ishmael. Ishmael went. Often he saw Often. Ann and Ann, Ann and Ann. " * 3
    common = b"the Whale " * 401
    corpus = corpus_of(often + rare + common)
    assert [places.tolist() for places in corpus.names[0]] == [[7, 30, 53, 76]]


def test_mentions_are_excerpts_in_order_that_say_one_name(corpus_of: Callable[..., Corpus]) -> None:
    rng = np.random.default_rng(0)
    pieces = [b"he saw %s. " % n for n in (b"Queequeg", b"Starbuck") for _ in range(40)]
    filler = [words(rng, 90).tobytes().lower() + b" " for _ in pieces]
    order = rng.permutation(len(pieces))
    text = b"".join(filler[i] + pieces[i] for i in order)
    corpus = corpus_of(text, b"no names here. " * 40)
    for _ in range(40):
        excerpts = [e.tobytes() for e in corpus.mentions(rng, 5, 64)]
        assert {len(e) for e in excerpts} == {64}
        assert any(all(n in e for e in excerpts) for n in (b"Queequeg", b"Starbuck"))
        places = [text.index(e) for e in excerpts]
        assert places == sorted(places)


def test_mentions_are_of_texts_weighed_by_size(corpus_of: Callable[..., Corpus]) -> None:
    corpus = corpus_of(b"he saw Queequeg. " * 40, b"he saw Starbuck. " * 360)
    rng = np.random.default_rng(0)
    first = sum(b"Queequeg" in corpus.mentions(rng, 1, 40)[0].tobytes() for _ in range(400))
    assert 0.05 < first / 400 < 0.16  # 0.1


def test_mentions_of_a_short_text_repeat_it(corpus_of: Callable[..., Corpus]) -> None:
    corpus = corpus_of(b"he saw Queequeg. " * 4)
    for excerpt in corpus.mentions(np.random.default_rng(0), 6, 200):
        assert excerpt.tobytes() == (b"he saw Queequeg. " * 12)[:200]
