"""How a training changes with its steps: the stages, and what slides from one to the next."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """`steps` steps of `count` samples of `length` bytes.

    gating: the landmarks' share in the attention (see grouped_softmax_attention) at the stage's
    end; it slides there from that of the stage before. distractors: see LandmarkAttention.forward;
    by Grouped Cross Attention, if any, the chunks of other samples may be found;
    chain: how many of the samples are one passage, each of which may retrieve from those before
    it; needles, mentions, repeats, gibberish, named, hops, aloud: see Tasks.
    clues: what it counts that searches miss what is asked for (see GroupedCrossTransformer).
    restart: share of the peak learning rate with which a new cosine begins (Loshchilov & Hutter
    2017, arXiv 1608.03983); 0: none does.
    """

    steps: int
    length: int
    count: int
    gating: float = 1.0
    distractors: int = 0
    chain: int = 0
    needles: float = 0.5
    mentions: float = 0.4
    repeats: float = 0.5
    gibberish: float = 0.3
    named: float = 0.0
    hops: float = 0.0
    aloud: bool = False
    clues: float = 0.0
    restart: float = 0.0


def stage_of(step: int, curriculum: tuple[Stage, ...]) -> Stage:
    """Return the stage that a step belongs to."""
    for stage in curriculum:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return curriculum[-1]


def learning_rate(step: int, curriculum: tuple[Stage, ...], peak: float) -> float:
    """Rise linearly, then fall along a cosine to a twentieth of the peak; so in every cycle."""
    cycles: list[list[Stage]] = []
    for stage in curriculum:
        if stage.restart or not cycles:
            cycles.append([])
        cycles[-1].append(stage)
    totals = [sum(stage.steps for stage in cycle) for cycle in cycles]
    here = 0
    while step >= totals[here] and here + 1 < len(cycles):
        step -= totals[here]
        here += 1
    peak *= cycles[here][0].restart or 1.0
    warmup = min(200, totals[here] // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, totals[here] - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def gating_at(step: int, curriculum: tuple[Stage, ...]) -> float:
    """Return the landmarks' share at a step."""
    last = curriculum[0].gating
    for stage in curriculum:
        if step < stage.steps:
            return last + (stage.gating - last) * step / stage.steps
        step, last = step - stage.steps, stage.gating
    return last
