"""Haystacks: exact length, the needle where it was asked for, everything from the seed."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import haystack
from model.haystack import Haystack, excerpt, hide, library_source, source_text
from model.keys import QUESTIONS, needle

FILLERS = [
    haystack.source_text,
    haystack.random_words,
    haystack.random_bytes,
    haystack.other_letters,
    excerpt(b"a text of one's own, rather short. "),
]


walked = cache(library_source)


@pytest.fixture(autouse=True)
def _walk_the_library_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haystack, "library_source", walked)


@pytest.mark.parametrize("filler", FILLERS)
@pytest.mark.parametrize("length", [0, 1, 1000, 70001])
def test_fillers_are_exact_in_length_and_follow_from_the_seed(
    filler: Callable[[int, int], bytes], length: int
) -> None:
    text = filler(length, 3)
    assert len(text) == length
    assert text == filler(length, 3)
    if length > 100:
        assert text != filler(length, 4)


def test_library_source_is_whole_and_without_tests() -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = walked()
    names = {p.relative_to(root).as_posix() for p in paths}
    assert {"argparse.py", "json/decoder.py", "os.py"} <= names
    assert not [n for n in names if "/test/" in f"/{n}" or "/tests/" in f"/{n}"]
    assert not [n for n in names if "site-packages" in n or "__pycache__" in n]
    assert paths == sorted(paths)


def test_source_text_goes_through_all_files_and_then_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"{name}.py" for name in "abcdefgh"]
    for file in files:
        file.write_text(file.stem)
    monkeypatch.setattr(haystack, "library_source", lambda: files)
    text = source_text(24, 0).decode()
    rounds = [text[:8], text[8:16], text[16:]]
    assert [sorted(r) for r in rounds] == [list("abcdefgh")] * 3
    assert len(set(rounds)) == 3  # each round in another order
    assert source_text(11, 0).decode() == text[:11]  # a longer text begins as the shorter one
    monkeypatch.setattr(haystack, "library_source", list)
    with pytest.raises(ValueError, match="no standard library source"):
        source_text(10, 0)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(len(needle(12345)), 3000),
    seed=st.integers(0, 2**40),
    depth=st.none() | st.floats(0, 1),
)
def test_the_needle_lies_at_its_depth(tokens: int, seed: int, depth: float | None) -> None:
    found = hide(haystack.random_words, tokens, seed, depth)
    hidden = needle(found.number).encode()
    assert len(found.text) == tokens
    assert 10000 <= found.number <= 99999
    assert found.text.count(hidden) == 1
    at = found.text.index(hidden)
    room = tokens - len(hidden)
    assert found.text[:at] + found.text[at + len(hidden) :] == haystack.random_words(room, seed)
    if depth is not None:
        assert abs(at - depth * room) <= 0.5
    assert found == hide(haystack.random_words, tokens, seed, depth)


def test_depth_zero_is_the_beginning_and_one_the_end() -> None:
    assert hide(haystack.random_words, 500, 0, 0.0).text.startswith(b" The pass key is ")
    assert hide(haystack.random_words, 500, 0, 1.0).text.endswith(b" is the pass key. ")


def test_keys_and_depths_vary_with_the_seed() -> None:
    found = [hide(haystack.random_words, 500, seed) for seed in range(60)]
    assert len({f.number for f in found}) > 55
    places = [f.text.index(b" The pass key is") for f in found]
    assert min(places) < 60
    assert max(places) > 380


def test_a_depth_asked_for_leaves_the_key_as_it_was() -> None:
    keys = {hide(haystack.random_words, 500, 7, depth).number for depth in (None, 0.0, 0.3, 1.0)}
    assert len(keys) == 1


@pytest.mark.parametrize("depth", [-0.1, 1.01, float("nan"), float("inf")])
def test_a_depth_out_of_range_is_refused(depth: float) -> None:
    with pytest.raises(ValueError, match=r"depth .* must be between 0"):
        hide(haystack.random_words, 500, 0, depth)


def test_a_text_shorter_than_the_needle_is_refused() -> None:
    least = len(needle(12345))
    assert hide(haystack.random_words, least, 0).text == needle(
        hide(haystack.random_words, least, 0).number
    ).encode()  # fmt: skip
    with pytest.raises(ValueError, match="too few: the needle alone has"):
        hide(haystack.random_words, least - 1, 0)


def test_other_phrases_and_questions() -> None:
    found = hide(haystack.random_bytes, 400, 2, 0.5, lambda n: f"<{n}>", "Which?")
    assert f"<{found.number}>".encode() in found.text
    assert found.question == "Which?"
    assert hide(haystack.random_bytes, 400, 2).question == QUESTIONS[0]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12345.", True),
        ("12345", True),
        (" 12345 is the pass key", True),
        (" 1234", False),
        (" 12346.", False),
        (" 54321 12345", False),
        ("", False),
        (" x12345", False),
    ],
)
def test_an_answer_is_right_if_it_begins_with_the_key(answer: str, right: bool) -> None:
    assert Haystack(b"", 12345).right(answer) is right
