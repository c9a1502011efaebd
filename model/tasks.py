"""What a model is trained on: samples of text, and of needles to find. All follows from a seed.

A sample is bytes and a weight a byte: what the loss of predicting that byte counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model import keys
from model.corpus import Bytes, Source
from model.filler import code, foreign, noise, sentences, words

Filler = Callable[[np.random.Generator, int], tuple[Bytes, float]]
"""Returns so many bytes, and what they weigh in the loss."""

_THINGS = (
    "secret number", "door code", "room number", "magic word", "pass word", "key", "lucky number",
    "account number", "year of the war", "number of men", "answer", "code", "phone number", "page",
    "pass", "pass code", "access key", "house number", "price", "serial number",
)  # fmt: skip


@dataclass(frozen=True)
class Clue:
    """Where something is looked for, and where the text says it: a number, or another's name.

    asked: from where the question is understood to the answer's last byte but one.
    """

    asked: slice
    says: tuple[slice, ...]


@dataclass(frozen=True)
class Sample:
    """text: uint8 [length]; weight: float32 [length], of predicting that byte from those before.

    said: bool [length], the bytes of needles, decoys, question and answer; answer: the last one,
    the digits and what is said on the way to them, and asked: the question, up to it.
    passage: samples of a batch with the same number are one text, in order. clues: of questions
    after keys that have names.
    """

    text: Bytes
    weight: NDArray[np.float32]
    said: NDArray[np.bool_]
    answer: slice | None
    asked: slice | None = None
    passage: int = -1
    clues: tuple[Clue, ...] = ()


class Tasks:
    """Draws training samples of three kinds.

    Needles hidden in filler and asked for at the end; distant excerpts of one text that say the
    same name, or one thing twice, so that it pays to look back; plain text.

    needles: share of the first kind; named: share of those with several keys that have names, all
    asked for; hops: share of these keys that have two hops (A's key is said to be B's, B's is
    said elsewhere); aloud: whether the answer to these says whose it is first.
    mentions: share of the second kind among the others;
    repeats: share of things said twice in the second kind; gibberish: share of random words in
    those, which nothing but looking back can predict. filler: what needles are hidden in.
    """

    def __init__(
        self,
        corpus: Source,
        needles: float = 0.6,
        mentions: float = 0.0,
        repeats: float = 0.25,
        gibberish: float = 0.0,
        answer_weight: float = 8.0,
        named: float = 0.0,
        hops: float = 0.0,
        aloud: bool = False,
        filler: Filler | None = None,
    ) -> None:
        self.corpus = corpus
        self.needles = needles
        self.mentions = mentions
        self.repeats = repeats
        self.gibberish = gibberish
        self.answer_weight = answer_weight
        self.named = named
        self.hops = hops
        self.aloud = aloud
        self.filler = filler or self._any_filler

    def sample(self, rng: np.random.Generator, length: int) -> Sample:
        """Draw one sample of `length` bytes."""
        if rng.random() < self.needles:
            if self.named and rng.random() < self.named:
                return self.hide_named(rng, length)
            return self.hide(rng, length)
        if self.mentions and rng.random() < self.mentions:
            return self._again(rng, length)
        return _plain(self.corpus.window(rng, length))

    def _any_filler(self, rng: np.random.Generator, length: int) -> tuple[Bytes, float]:
        """Return text, or made-up bytes (random ones weigh little, as they cannot be learnt)."""
        kind = rng.random()
        if kind < 0.5:
            return self.corpus.window(rng, length), 1.0
        if kind < 0.62:
            return words(rng, length), 0.02
        if kind < 0.70:
            return noise(rng, length), 0.02
        if kind < 0.78:
            return foreign(rng, length), 0.1
        if kind < 0.84:
            return sentences(rng, length), 0.1
        return code(rng, length), 0.1

    def _again(self, rng: np.random.Generator, length: int) -> Sample:
        named = any(self.corpus.names)
        if rng.random() < self.repeats or not named:  # the same passage again, after another
            gibberish = bool(self.gibberish) and rng.random() < self.gibberish
            text = (words if gibberish else self.corpus.window)(rng, length).copy()
            size = int(rng.integers(24, length // 3))
            start = int(rng.integers(0, length - 2 * size))
            again = int(rng.integers(start + size, length - size + 1))
            text[again : again + size] = text[start : start + size]
            weight = np.full(length, 0.02 if gibberish else 1.0, np.float32)
            weight[again + 4 : again + size] = 1.0
            return _plain(text, weight)
        count = int(rng.integers(3, 9)) if length >= 512 else 2
        text = np.concatenate(self.corpus.mentions(rng, count, -(-length // count)))[:length]
        return _plain(text)

    def hide(self, rng: np.random.Generator, length: int) -> Sample:
        """Hide a needle (and decoys) at random places and ask for it near the end."""
        number = str(rng.integers(10000, 100000))
        name = "pass key" if rng.random() < 0.75 else _THINGS[rng.integers(len(_THINGS))]
        question = f" What is the {name}?" if rng.random() < 0.6 else ""
        question += f" The {name} is"
        answer = f" {number}."
        hidden = [self._saying(rng, name, number)]
        room = length - len(hidden[0]) - len(question) - len(answer)
        if room < 0:  # a short sample of a thing with a long name: ask shortly
            question = f" The {name} is"
            room = length - len(hidden[0]) - len(question) - len(answer)
        tail = int(rng.integers(0, min(48, room // 2 + 1)))
        room -= tail
        for _ in range(rng.integers(0, 4)):
            decoy = self._decoy(rng, name, number)
            if room - len(decoy) > length // 3:
                hidden.append(decoy)
                room -= len(decoy)
        filler, weight = self.filler(rng, room + tail)
        cuts = np.sort(rng.integers(0, room + 1, len(hidden)))
        pieces: list[tuple[Bytes, float, bool]] = []
        start = 0
        for cut, index in zip(cuts, rng.permutation(len(hidden)), strict=True):
            pieces.append((filler[start:cut], weight, False))
            pieces.append((np.frombuffer(hidden[index].encode(), np.uint8), 0.3, True))
            start = cut
        pieces.append((filler[start:room], weight, False))
        pieces.append((np.frombuffer(question.encode(), np.uint8), 0.3, True))
        at = sum(len(data) for data, _, _ in pieces)
        pieces.append((np.frombuffer(answer.encode(), np.uint8), self.answer_weight, True))
        pieces.append((filler[room:], weight, False))
        return Sample(
            np.concatenate([data for data, _, _ in pieces]),
            np.concatenate([np.full(len(data), each, np.float32) for data, each, _ in pieces]),
            np.concatenate([np.full(len(data), said) for data, _, said in pieces]),
            answer=slice(at + 1, at + 1 + len(number)),
            asked=slice(at - len(question), at + 1),
        )

    def hide_named(self, rng: np.random.Generator, length: int) -> Sample:
        """Hide keys that have names at random places and ask for some of them at the end."""
        for count in range(int(rng.integers(2, 3 + length // 256)), 0, -1):
            sample = self._named(rng, length, count)
            if sample is not None:
                return sample
        return self.hide(rng, length)  # a text too short for any

    def _named(self, rng: np.random.Generator, length: int, count: int) -> Sample | None:
        """Hide so many keys, and ask for some; None where they do not fit."""
        names = keys.draw_names(rng, count)
        numbers = dict(zip(names, rng.integers(10000, 100000, count).tolist(), strict=True))
        owners: dict[str, str] = {}
        hidden = {name: keys.say(name, number) for name, number in numbers.items()}
        referring = [n for n in keys.draw_names(rng, count) if rng.random() < self.hops]
        for name in [n for n in referring if n not in numbers]:
            owners[name] = names[rng.integers(count)]
            hidden[name] = keys.refer(name, owners[name])
            numbers[name] = numbers[owners[name]]
        asked = rng.permutation(sorted(numbers))[: 1 + length // 256].tolist()
        others = owners if self.aloud else {}
        said = [(keys.ask(n), keys.answer(numbers[n], others.get(n)) + ".") for n in asked]
        # What comes between is of any length: where an answer stands must say nothing.
        between = rng.integers(0, 32, len(said))
        end = sum(len(part) for pair in said for part in pair) + int(between.sum())
        room = length - end - sum(map(len, hidden.values()))
        if room < 0:
            return None
        filler, weight = self.filler(rng, length)
        cuts = np.sort(rng.integers(0, room + 1, len(hidden)))
        pieces: list[tuple[Bytes, float]] = []
        start = 0
        order = [list(hidden.values())[i] for i in rng.permutation(len(hidden))]
        for cut, sentence in zip(cuts, order, strict=True):
            pieces.append((filler[start:cut], weight))
            pieces.append((np.frombuffer(sentence.encode(), np.uint8), 0.3))
            start = cut
        pieces.append((filler[start:room], weight))
        start = room
        for (question, answer), size in zip(said, between, strict=True):
            pieces.append((np.frombuffer(question.encode(), np.uint8), 0.3))
            pieces.append((np.frombuffer(answer.encode(), np.uint8), self.answer_weight))
            pieces.append((filler[start : start + size], weight))
            start += size
        text = np.concatenate([data for data, _ in pieces])
        clues: list[Clue] = []
        for name, (question, answer) in zip(asked, said, strict=True):
            owner = owners.get(name, name)
            steps = [(hidden[owner], str(numbers[name]))]
            if name in others:
                steps.insert(0, (hidden[name], owner))
            clues += _clues(bytes(text), length - end, question + answer, steps)
        stop = length - int(between[-1]) - 1
        return Sample(
            text,
            np.concatenate([np.full(len(data), each, np.float32) for data, each in pieces]),
            np.zeros(length, bool),  # the names tell them from what other texts say
            answer=slice(stop + 2 - len(said[-1][1]), stop),
            clues=tuple(clues),
        )

    def _saying(self, rng: np.random.Generator, name: str, number: str) -> str:
        kind = rng.random()
        if kind < 0.7:
            return f" The {name} is {number}. Remember it. {number} is the {name}. "
        if kind < 0.85:
            return f" The {name} is {number}. "
        if kind < 0.93:
            return f" Please note that the {name} is {number}, and keep it. "
        return f" The {name} is {number}. ".upper()

    def _decoy(self, rng: np.random.Generator, name: str, number: str) -> str:
        """Say something that is not it: of another thing, or a number that begins the same."""
        other = name
        while other == name or other == "pass key":
            other = _THINGS[rng.integers(len(_THINGS))]
        same = int(rng.integers(0, 5))
        number = number[:same] + str(rng.integers(10000, 100000))[same:]
        kind = rng.random()
        if kind < 0.3:
            return f" The {other} is {number}. Remember it. {number} is the {other}. "
        if kind < 0.5:
            return f" The {other} is {number}. "
        if kind < 0.65:
            return f" What is the {other}? "
        return (f" {number} ", f" = {number}\n", f"({number}, ")[rng.integers(3)]


def _clues(text: bytes, end: int, dialogue: str, steps: list[tuple[str, str]]) -> list[Clue]:
    """Make a clue of each step of a question and its answer.

    steps: the sentence, hidden before `end`, that says what is looked for, and what that is: the
    answer has one after the other, before a full stop.
    """
    clues = []
    start = text.index(dialogue.encode(), end)
    understood = dialogue.index("?")
    for sentence, part in steps:
        stop = dialogue.index(f"{part}.", understood) + len(part)
        at = text.index(sentence.encode(), 0, end)
        says = (at + match.start() for match in re.finditer(part, sentence))
        clues.append(
            Clue(
                slice(start + understood, start + stop - 1),
                tuple(slice(place, place + len(part)) for place in says),
            )
        )
        understood = stop
    return clues


def _plain(text: Bytes, weight: NDArray[np.float32] | None = None) -> Sample:
    weight = np.ones(len(text), np.float32) if weight is None else weight
    return Sample(text, weight, np.zeros(len(text), bool), None)


def batch(
    tasks: Tasks, seed: int, step: int, count: int, length: int, chain: int = 0
) -> list[Sample]:
    """Draw step `step`'s samples; the first `chain` of them are one passage of a text, in order."""
    rng = np.random.default_rng([seed, step])
    samples = []
    if chain:
        passage = tasks.corpus.window(rng, chain * length).reshape(chain, length)
        samples = [replace(_plain(text), passage=0) for text in passage]
    others = (tasks.sample(rng, length) for _ in range(chain, count))
    return samples + [replace(other, passage=i) for i, other in enumerate(others, 1)]
