"""Reading a text and writing what follows: prefill, decode, sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.stream import Stream

PIECE = 2048
"""Tokens read at once; a multiple of every block size in use."""

ASKED = 256
"""Tokens of a prompt read at once: each may search for itself, and what is found takes memory."""


@dataclass(frozen=True)
class Sampling:
    """How the next byte is drawn. temperature 0 takes the likeliest; stop ends the answer."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1, not {self.top_p:g}")


def prefill(
    stream: Stream,
    text: bytes,
    progress: Callable[[int], None] = lambda tokens: None,
    piece: int = PIECE,
) -> Tensor:
    """Read a whole text; return the logits [256] after its last byte. Tell how far it is."""
    if not text:
        raise ValueError("the text is empty: there is nothing to read")
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    last = (len(tokens) - 1) // piece * piece
    for start in range(0, last, piece):
        stream.skim(tokens[start : start + piece])
        progress(start + piece)
    logits = stream.read(tokens[last:])
    progress(len(tokens))
    return logits


def generate(stream: Stream, prompt: str, sampling: Sampling) -> Iterator[bytes]:
    """Read the prompt in a throwaway fork and yield the answer's bytes one by one.

    Prompt and answer select blocks as the family's `answering` says. The stream stays unchanged.
    A stop string ends the answer and is not part of it.
    """
    if not prompt:
        raise ValueError("the prompt is empty: ask something")
    stops = [s.encode() for s in sampling.stop if s]
    hold = max((len(s) for s in stops), default=1) - 1  # bytes that may be a stop's beginning
    generator = torch.Generator().manual_seed(sampling.seed)
    asker = stream.fork()
    try:
        asker.retrieval = asker.answering()
        logits = prefill(asker, prompt.encode(), piece=ASKED)
        written = bytearray()
        given = 0
        for _ in range(sampling.max_new_tokens):
            token = sample(logits, sampling, generator)
            written.append(token)
            ends = [at for s in stops if (at := written.find(s)) >= 0]
            if ends:
                del written[min(ends) :]
                break
            while given < len(written) - hold:
                yield bytes(written[given : given + 1])
                given += 1
            if len(written) < sampling.max_new_tokens:
                logits = asker.read(torch.tensor([token]))
        while given < len(written):
            yield bytes(written[given : given + 1])
            given += 1
    finally:
        asker.context.close()


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one byte from logits [256]: nucleus sampling (Holtzman et al. 2020), or the best."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.double().cpu()
    share = ((logits - logits.max()) / sampling.temperature).softmax(dim=-1)  # never inf - inf
    if sampling.top_p < 1:
        ordered, order = share.sort(descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        share[order[outside]] = 0.0
    return int(torch.multinomial(share, 1, generator=generator))
