"""How Grouped Cross Attention is trained: the curriculum, the loss, and what is watched."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import GCAConfig
from model.corpus import Excerpts
from model.recipe import Recipe, weighed_loss
from model.stages import Stage, stage_of
from model.tasks import Sample, Tasks

_FIRST = partial(Stage, mentions=0.6, repeats=0.6, needles=0.9, named=0.9)
_THEN = partial(_FIRST, needles=0.8, named=0.8)
_MIXTURE = partial(Stage, needles=0.4, named=0.75, hops=0.5, mentions=0.4, repeats=0.5)
_CLUED = partial(_MIXTURE, needles=0.6, named=0.8, aloud=True, clues=0.5)

CURRICULUM = (
    _FIRST(300, 512, 16),
    _THEN(350, 1024, 8, distractors=1, hops=0.5),
    _FIRST(350, 512, 16, hops=0.7),
    _THEN(200, 1024, 8, hops=0.6),
    _MIXTURE(1200, 1024, 8, distractors=1),
    _MIXTURE(500, 4096, 2, distractors=1),
    _MIXTURE(80, 16384, 1),
    _CLUED(300, 1024, 8, distractors=1, restart=0.5),
    _CLUED(350, 4096, 2, distractors=1),
    _CLUED(80, 16384, 1),
)
"""Names come first, in texts so short that every chunk is found: so the search learns at once what
to look for. With distractors, the chunks of the other sequences of a batch may be found. Two hops
are not learnt before the second cycle, where they are answered aloud."""

_SEGMENTS = (None, None, 4, None, 0)
"""What steps use in turn: the configuration's segments; short ones, so that any place learns to
ask; and whole chunks, for which the landmark before asks."""

_JUDGING = 0.3
"""What it counts that the weights of the chunks found are not what the attention takes of each."""


def loss_of(
    model: Any,
    text: Tensor,  # int64 [B, length]
    weight: Tensor,  # float32 [B, length]
    segment: int | None = None,
    noise: bool = False,
    foreign: bool = False,
    passage: Tensor | None = None,  # int64 [B]
    apart: Tensor | None = None,  # bool [B, N]
    meant: Tensor | None = None,  # bool [B, N, S, N]
    clues: float = 0.0,
    judging: float = 0.0,
) -> Tensor:
    """Return the weighted mean cross entropy, nats a byte, and what the searches did wrong.

    clues: what it counts that they miss; judging: that they misjudge. See gca_transformer.Reading.
    """
    chunks = text.unflatten(1, (-1, model.config.block_size))
    with torch.autocast(text.device.type, torch.bfloat16):
        read = model(chunks, segment, noise, foreign, passage, apart, meant)
    loss = weighed_loss(read.logits, text, weight)
    return loss + clues * read.missed + judging * read.misjudged


def _step_loss(
    forward: Any, samples: list[Sample], step: int, curriculum: tuple[Stage, ...]
) -> Tensor:
    device = next(forward.parameters()).device
    text = torch.from_numpy(np.stack([s.text for s in samples]).astype(np.int64)).to(device)
    weight = torch.from_numpy(np.stack([s.weight for s in samples])).to(device)
    said = torch.from_numpy(np.stack([s.said for s in samples])).to(device)
    passage = torch.tensor([s.passage for s in samples], device=device)
    apart = said.unflatten(1, (-1, forward.config.block_size)).any(dim=-1)
    segment = _SEGMENTS[step % len(_SEGMENTS)]
    stage = stage_of(step, curriculum)
    meant = None
    if stage.clues:
        meant = torch.from_numpy(meant_by(samples, forward.config)).to(device)
    return loss_of(
        forward, text, weight, segment, True, bool(stage.distractors), passage, apart, meant,
        stage.clues, _JUDGING,
    )  # fmt: skip


def meant_by(samples: list[Sample], config: GCAConfig) -> NDArray[np.bool_]:
    """Return which chunks a byte should find, bool [B, N, S, N]."""
    size, length = config.block_size, len(samples[0].text)
    meant = np.zeros((len(samples), length, length // size), bool)
    for row, sample in enumerate(samples):
        for clue in sample.clues:
            for place in clue.says:
                chunks = slice(place.start // size, (place.stop - 1) // size + 1)
                meant[row, clue.asked, chunks] = True
    return meant.reshape(len(samples), -1, size, length // size)


@torch.no_grad()
def examine(model: Any, held_out: np.ndarray, seed: int) -> dict[str, Any]:
    """Measure on text not trained on: bits a byte, and of pass keys, named keys and keys in two
    hops the share that is found among the chunks of 16 texts of 1,024 bytes."""
    rng = np.random.default_rng([seed, 1 << 20])
    device = next(model.parameters()).device
    filler = Excerpts(held_out)
    tasks = Tasks(filler, aloud=True, filler=lambda *drawn: (filler.window(*drawn), 1.0))
    text = np.stack([filler.window(rng, 1024) for _ in range(16)]).astype(np.int64)
    x = torch.from_numpy(text).to(device)
    nats = loss_of(model, x, torch.ones(x.shape, device=device))
    report: dict[str, Any] = {"bits_per_byte_1024": round(float(nats) / math.log(2), 4)}
    for name in ("pass key", "named", "two hops"):
        samples = [_draw(tasks, rng, name) for _ in range(32)]
        report[f"found_{name.replace(' ', '_')}"] = _share_found(model, samples)
    return report


def _draw(tasks: Tasks, rng: np.random.Generator, kind: str) -> Sample:
    tasks.hops = float(kind == "two hops")
    while True:
        sample = tasks.hide(rng, 1024) if kind == "pass key" else tasks.hide_named(rng, 1024)
        assert sample.answer is not None
        if kind == "pass key":
            if bytes(sample.text[: sample.answer.start - 1]).endswith(b" pass key is"):
                return sample
        elif (sample.answer.stop - sample.answer.start > 5) == (kind == "two hops"):
            return sample


def _share_found(model: Any, samples: list[Sample]) -> float:
    device, found = next(model.parameters()).device, 0
    for first in range(0, len(samples), 16):
        some = samples[first : first + 16]
        x = torch.from_numpy(np.stack([s.text for s in some]).astype(np.int64)).to(device)
        said = torch.from_numpy(np.stack([s.said for s in some])).to(device)
        apart = said.unflatten(1, (-1, model.config.block_size)).any(dim=-1)
        chunks = x.unflatten(1, (-1, model.config.block_size))
        read = model(chunks, 4, foreign=True, apart=apart)
        guess = read.logits.flatten(1, 2).argmax(-1)
        for row, wanted, sample in zip(guess, x, some, strict=True):
            assert sample.answer is not None
            start, stop = sample.answer.start, sample.answer.stop
            found += bool((row[start - 1 : stop - 1] == wanted[start:stop]).all())
    return found / len(samples)


RECIPE = Recipe(CURRICULUM, GCAConfig, _step_loss, examine, written=torch.float16)
