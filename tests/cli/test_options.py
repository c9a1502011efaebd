"""What the options become."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kvstore.cli import options
from kvstore.cli.usage import Parser
from kvstore.config import IndexConfig, StoreConfig
from model.generate import Sampling


def parsed(*argv: str) -> argparse.Namespace:
    parser = Parser()
    options.add_model(parser)
    options.add_store(parser, hot="2MiB", warm="3MiB")
    options.add_directory(parser)
    options.add_answer(parser, stop=("end",))
    return parser.parse_args(argv)


def test_defaults() -> None:
    args = parsed()
    assert options.store_config(args) == StoreConfig(hot="2MiB", warm="3MiB")
    assert options.sampling(args) == Sampling(stop=("end",))
    assert (args.model, args.top_k, args.json) == ("landmark", None, False)


def test_every_option_of_the_store() -> None:
    given = "--store d --hot 4KiB --warm 5KiB --cold 6MiB --device cpu --index hnsw --policy sieve"
    assert options.store_config(parsed(*given.split(), "--trace", "t")) == StoreConfig(
        hot=4096,
        warm=5120,
        cold=6 * 2**20,
        directory=Path("d"),
        device="cpu",
        policy="sieve",
        trace=Path("t"),
        index=IndexConfig(kind="hnsw"),
    )
    assert options.store_config(parsed("--cold", "none")).cold is None
    with pytest.raises(ValueError, match="--store d would stay empty with --cold none"):
        options.store_config(parsed("--store", "d", "--cold", "none"))


def test_every_option_of_the_answer() -> None:
    given = "--max-new-tokens 5 --temperature 0.5 --top-p 0.25 --stop a --stop b --seed 9"
    assert options.sampling(parsed(*given.split())) == Sampling(5, 0.5, 0.25, ("a", "b"), 9)
    assert options.sampling(parsed("--stop", "")).stop == ()


def test_every_other_option() -> None:
    args = parsed("--model", "m", "--top-k", "7", "--json")
    assert (args.model, args.top_k, args.json) == ("m", 7, True)
