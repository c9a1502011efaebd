"""How far back bench.perplexity takes a model to see without a search."""

from __future__ import annotations

from dataclasses import replace

from bench.perplexity import sight_of
from model.config import ModelConfig


def test_layers_add_up_and_strings_reach_further() -> None:
    config = ModelConfig(layers="llr", block_size=32, window_blocks=1, reach=4, grams=())
    assert sight_of(config, 3) == (2 * 2 + 4) * 32 + 4
    assert sight_of(replace(config, grams=(3, 6)), 3) == (2 * 2 + 4) * 32 + 6
