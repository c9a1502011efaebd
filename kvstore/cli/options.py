"""The options that commands share, and the settings they become.

Owns names, defaults and help texts. Never opens or allocates anything.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from kvstore.cli.usage import number, share, text, whole, words
from kvstore.policy import POLICIES
from kvstore.promises import DURABILITIES, PRECISIONS

if TYPE_CHECKING:
    from kvstore.config import StoreConfig
    from model.generate import Sampling


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps examples as they are written and leaves room for the option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=96)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model reads, and how."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="NAME",
        default="landmark",
        help="a shipped model or a checkpoint's path (default: landmark)",
    )
    model.add_argument(
        "--top-k",
        metavar="K",
        type=whole(1, 2**20),
        help="blocks that each search of the model finds (default: the model's own)",
    )
    model.add_argument(
        "--index",
        choices=("auto", "exact", "hnsw"),
        default="auto",
        help="how blocks are searched: auto, exact or hnsw (default: auto)",
        metavar="KIND",
    )


def add_store(parser: argparse.ArgumentParser, *, hot: str, warm: str) -> None:
    """Add the sizes of the tiers and what is theirs; defaults are given."""
    store = parser.add_argument_group("store (sizes like 64MiB or 1.5GB)")
    store.add_argument(
        "--device",
        metavar="DEVICE",
        default="auto",
        help="auto, cpu or cuda: where the model runs and hot lies (default: auto)",
    )
    store.add_argument("--hot", metavar="SIZE", default=hot, help=f"device memory (default: {hot})")
    store.add_argument(
        "--warm", metavar="SIZE", default=warm, help=f"host memory (default: {warm})"
    )
    add_cold(store)
    store.add_argument(
        "--precision",
        choices=tuple(PRECISIONS),
        default="exact",
        help="how blocks are written to disk: "
        + "; ".join(f"{name}: {promise}" for name, promise in PRECISIONS.items())
        + " (default: exact)",
        metavar="HOW",
    )
    store.add_argument(
        "--policy",
        choices=tuple(POLICIES),
        default="lru",
        help=f"which block leaves a full tier: {' or '.join(POLICIES)} (default: lru)",
        metavar="NAME",
    )
    store.add_argument(
        "--trace", metavar="FILE", type=text, help="record every access of a block in FILE"
    )


def add_directory(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where the store lies."""
    parser.add_argument(
        "--store",
        metavar="DIR",
        type=words,
        help="where the disk tier lies (default: a temporary directory, removed at the end)",
    )


def add_durability(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what a loss of power may take of what is kept."""
    parser.add_argument(
        "--durability",
        choices=tuple(DURABILITIES),
        default="sync",
        help="; ".join(f"{name}: {promise}" for name, promise in DURABILITIES.items())
        + " (default: sync)",
        metavar="MODE",
    )


def add_cold(parser: argparse._ActionsContainer, *, needed: bool = False) -> None:
    """Add the size of the file on disk; needed: where it cannot be none."""
    or_none = "" if needed else ", or none: no disk"
    parser.add_argument(
        "--cold",
        metavar="SIZE",
        default="64GiB",
        help=f"disk, compressed{or_none} (default: 64GiB)",
    )


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Add what the commands that ask a kept context share."""
    parser.add_argument("store", metavar="DIR", type=words, help="the store's directory")
    parser.add_argument("context", metavar="NAME", type=words, help="the context's name")
    parser.add_argument(
        "--model", metavar="FILE", help="the checkpoint that made it, where it has been moved"
    )
    parser.add_argument(
        "--append", action="store_true", help="keep prompt and answer, behind what was read"
    )
    add_durability(parser)
    add_store(parser, hot="64MiB", warm="256MiB")
    add_answer(parser, stop=())


def add_answer(parser: argparse.ArgumentParser, *, stop: tuple[str, ...]) -> None:
    """Add the options that say how an answer is drawn, and shown; stop: where it ends."""
    answer = parser.add_argument_group("answer")
    answer.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=whole(1, 2**31 - 1),
        default=64,
        help="the longest answer, in bytes (default: 64)",
    )
    answer.add_argument(
        "--temperature",
        metavar="T",
        type=number,
        default=0.0,
        help="0 takes the likeliest byte, more is more varied (default: 0)",
    )
    answer.add_argument(
        "--top-p",
        metavar="P",
        type=share,
        default=1.0,
        help="draw from the likeliest bytes that together have this share (default: 1)",
    )
    shown = " ".join(f'"{s}"' for s in stop) or "none"
    answer.add_argument(
        "--stop",
        metavar="TEXT",
        type=text,
        action="append",
        help=f'end the answer before TEXT; may be repeated; "" for none (default: {shown})',
    )
    answer.add_argument(
        "--seed",
        metavar="N",
        type=whole(0, 2**32 - 1),
        default=0,
        help="of all that is random (default: 0)",
    )
    add_json(answer)
    parser.set_defaults(stop_default=stop)


def add_json(parser: argparse._ActionsContainer) -> None:
    """Add the option that is for programs."""
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON and nothing else"
    )


def store_config(args: argparse.Namespace) -> StoreConfig:
    """Return the store's settings. ValueError where they make no sense together.

    The index is set where there is an option for it.
    """
    from kvstore.config import IndexConfig, StoreConfig

    if args.cold == "none" and args.store is not None:
        raise ValueError(
            f"--store {args.store} would stay empty with --cold none: give --cold a size, "
            "or leave --store out"
        )
    return StoreConfig(
        hot=args.hot,
        warm=args.warm,
        cold=None if args.cold == "none" else args.cold,
        directory=args.store,
        device=args.device,
        policy=args.policy,
        precision=args.precision,
        durability=getattr(args, "durability", "sync"),
        trace=args.trace,
        index=IndexConfig(kind=getattr(args, "index", "auto")),
    )


def sampling(args: argparse.Namespace) -> Sampling:
    """Return how the answer is drawn. ValueError for a negative temperature or the like."""
    from model.generate import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        stop=tuple(s for s in args.stop or args.stop_default if s),
        seed=args.seed,
    )
