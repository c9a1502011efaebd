"""How far back bench.perplexity takes a model to see without a search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.perplexity import sight_of
from bench.reading import reading
from model.config import LandmarkConfig
from model.landmark_stream import Retrieval
from model.landmark_transformer import LandmarkTransformer


@pytest.mark.parametrize("grams", [(), (3, 6)])
def test_what_lies_further_back_changes_nothing(grams: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = LandmarkConfig(
        width=16, heads=2, mlp_width=16, layers="lr", block_size=8, window_blocks=1, segment=8,
        grams=grams,
    )  # fmt: skip
    model = LandmarkTransformer(config).eval().requires_grad_(False)
    nearest = Retrieval(top_k=0, near=3, segment=8)

    def logits(text: Tensor) -> Tensor:
        with reading(model, len(text), (1.0, 1.0), nearest) as stream:
            return stream.read(text)

    text = torch.randint(0, 256, (400,))
    sight = sight_of(config, nearest.near)
    for back, seen in ((sight, False), (24, True)):
        changed = text.clone()
        changed[:-back] ^= 1
        assert torch.equal(logits(changed), logits(text)) != seen
