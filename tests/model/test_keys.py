"""Pass keys with names: what is hidden can be found, and by nothing but its name."""

from __future__ import annotations

import re

import numpy as np
import pytest

from model import haystack, keys
from model.corpus import Excerpts
from model.tasks import Sample, Tasks


def draw(seed: int, hops: float, length: int = 1024, aloud: bool = False) -> Sample:
    dots = Excerpts(np.full(5000, ord("."), np.uint8))
    tasks = Tasks(dots, hops=hops, aloud=aloud, filler=lambda *drawn: (dots.window(*drawn), 1.0))
    return tasks.hide_named(np.random.default_rng(seed), length)


def test_names_are_all_different() -> None:
    names = keys.draw_names(np.random.default_rng(0), 500)
    assert len(set(names)) == 500
    assert all(re.fullmatch("([bdfgjklmnprstvz][aeiou]){2,4}", name) for name in names)
    assert {len(name) for name in names} == {4, 6, 8}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("hops", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("aloud", [False, True])
def test_every_answer_follows_from_what_is_hidden(seed: int, hops: float, aloud: bool) -> None:
    """Aloud by way of the name whose key it is."""
    sample = draw(seed, hops, aloud=aloud)
    text = bytes(sample.text).decode()
    assert len(text) == 1024 == len(sample.weight) == len(sample.said)
    number = dict(re.findall(r"The pass key of (\w+) is (\d{5})\. Remember it\.", text))
    hidden = text[: text.index(" What is the pass key")]
    other = dict(re.findall(r"The pass key of (\w+) is that of (\w+)\.", hidden))
    if hops != 0.5:  # of a half there may be none
        assert bool(other) == bool(hops)
    assert not number.keys() & other.keys()
    asked = re.findall(
        r"What is the pass key of (\w+)\? The pass key of (\w+) is (\D*\d{5})\.", text
    )
    assert asked
    for name, again, answer in asked:
        assert name == again
        owner = other.get(name, name)
        way = f"that of {owner}. The pass key of {owner} is " if aloud and owner != name else ""
        assert answer == way + number[owner]
    assert sample.answer is not None
    assert bytes(sample.text[sample.answer]).decode() == asked[-1][2]
    heavy = bytes(sample.text[sample.weight == 8.0]).decode()
    assert heavy == "".join(f" {answer}." for *_, answer in asked)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("aloud", [False, True])
def test_clues_say_where_what_is_asked_is_said(seed: int, aloud: bool) -> None:
    sample = draw(seed, 0.5, aloud=aloud)
    text = bytes(sample.text).decode()
    hidden = text[: text.index(" What is the pass key")]
    asks = r"(?:(\?) The pass key of (\w+)|(\.) The pass key of (\w+)) is (?:that of )?(\w+)(?=\.)"
    asked = list(re.finditer(asks, text[len(hidden) :]))
    assert len(sample.clues) == len(asked) >= 1
    for clue, match in zip(sample.clues, asked, strict=True):
        name, said = match[2] or match[4], match[5]
        assert clue.asked.start == len(hidden) + match.start()
        assert clue.asked.stop == len(hidden) + match.end() - 1
        owner = name
        if said.isdigit() and f"The pass key of {name} is that of" in hidden:  # not aloud
            owner = re.findall(f"The pass key of {name} is that of (\\w+)", hidden)[0]
        places = [match.start() for match in re.finditer(said, hidden)]
        about = re.findall(f" The pass key of {owner} is (?:that of )?{said}[.]", hidden)
        assert len(about) == 1
        assert {text[place] for place in clue.says} == {said}
        assert {place.start for place in clue.says} <= set(places)
        first = clue.says[0].start
        assert re.search(f" The pass key of {owner} is (that of )?$", hidden[:first])
        assert len(clue.says) == (2 if said.isdigit() else 1)


def test_answers_stand_anywhere() -> None:
    places = np.array([draw(seed, 0.0).answer.start for seed in range(200)])  # type: ignore[union-attr]
    assert len(set(places % 16)) == 16
    text = bytes(draw(0, 0.0).text)
    gaps = np.diff([match.start() for match in re.finditer(b" What", text)])
    assert len(set(gaps)) > 1


def test_a_text_too_short_for_names_has_one_key_without() -> None:
    text = bytes(draw(0, 1.0, length=128).text)
    assert len(text) == 128
    assert b" is" in text
    assert b" of " not in text.split(b"?")[0]


def test_what_counts_as_right() -> None:
    hay = haystack.Haystack(b"", 12345, keys.ask("velora"))
    for said in (" 12345.", "12345", " 12345 is", keys.answer(12345), keys.answer(12345, "bade")):
        assert hay.right(said), said
    assert hay.right(keys.answer(12345, "bade") + ". The pass key of velora is 54321")
    for said in (
        "",
        " 1234",
        " 12346",
        " that of bade. 12345",
        keys.answer(12346, "bade"),
        "is 12345",
    ):
        assert not hay.right(said), said


@pytest.mark.parametrize("hops", [1, 2])
def test_keys_are_hidden_in_a_haystack(hops: int) -> None:
    text, asked = haystack.hide_keys(haystack.random_words, 20_000, 3, 16, hops)
    assert len(text) == 20_000
    said = text.decode()
    assert len(asked) == 16
    assert len({hay.question for hay in asked}) == 16
    for hay in asked:
        name = re.findall(r"pass key of (\w+)\?", hay.question)[0]
        if hops == 2:
            [name] = re.findall(rf"pass key of {name} is that of (\w+)\.", said)
        assert said.count(f"The pass key of {name} is {hay.number}. Remember it.") == 1
        assert hay.right(f" {hay.number}.")
    assert said.count("pass key of") == 16 * hops
    assert haystack.hide_keys(haystack.random_words, 20_000, 3, 16, hops)[0] == text
    with pytest.raises(ValueError, match="too few"):
        haystack.hide_keys(haystack.random_words, 1000, 3, 16, hops)
