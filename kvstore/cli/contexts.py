"""`kvstore contexts`: list the kept contexts of a store, fork, rename and remove them."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.cli import options
from kvstore.cli.text_chain import TextChain
from kvstore.cli.usage import checking_input, words
from kvstore.errors import CorruptBlockError, KVStoreError, OtherFormatError

if TYPE_CHECKING:
    from kvstore.saved_contexts import KeptContext
    from kvstore.store import Store

_EXAMPLE = """\
examples:
  kvstore contexts books
  kvstore contexts books fork peace war
  kvstore contexts books rename war and_peace
  kvstore contexts books rm peace
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "contexts",
        help="list, fork, rename and remove kept contexts",
        description="List the contexts that a store keeps, or change one. A fork shares what was\n"
        "read with the context it is made from; removing one of them takes nothing from the other.",
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=options.HelpFormatter,
    )
    parser.add_argument("store", metavar="DIR", type=words, help="the store's directory")
    options.add_cold(parser, needed=True)
    options.add_json(parser)
    actions = parser.add_subparsers(title="changes", metavar="[CHANGE]", dest="change")
    for name, names, about in (
        ("fork", ("NAME", "NEW"), "keep the same past under a second name"),
        ("rename", ("NAME", "NEW"), "give a context another name"),
        ("rm", ("NAME",), "remove a context, and the blocks that only it has"),
        ("sweep", (), "remove the blocks that no context has: a killed process may leave some"),
    ):
        action = actions.add_parser(
            name,
            help=about,
            description=about,
            argument_default=argparse.SUPPRESS,  # --json is said before it or behind it
            formatter_class=options.HelpFormatter,
        )
        for each in names:
            action.add_argument(each.lower(), metavar=each, type=words)
        options.add_json(action)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    with checking_input():
        # A list can be had while somebody else has the store.
        store = open_to_look(args, read_only=args.change is None)
    with store:
        swept = None
        with checking_input():
            if args.change == "fork":
                store.kept.fork(args.name, args.new)
                store.kept.note(args.new, asked=None)
            elif args.change == "rename":
                store.kept.rename(args.name, args.new)
            elif args.change == "rm":
                store.kept.delete(args.name)
            elif args.change == "sweep":
                swept = store.sweep()
        found, damaged, foreign = [], {}, {}
        for name in store.kept.names():
            try:
                found.append(_as_read(store.kept.describe(name)))
            except CorruptBlockError as error:
                damaged[name] = str(error)
            except OtherFormatError as error:
                foreign[name] = str(error)
    if args.json:
        listed = [asdict(each) for each in found]
        for each in listed:
            each["info"].pop("text", None)  # its digests, and its end in plain words
        unread = {"damaged": damaged, "other_format": foreign}
        print(json.dumps({"contexts": listed, **unread, "swept_blocks": swept}))
        return 1 if (damaged or foreign) and args.change is None else 0
    if swept is not None:
        print(f"{swept:,} blocks that no context had were removed")
    if args.change is None:
        if found or not (damaged or foreign):
            _show(found)
        said = "; ".join((*damaged.values(), *foreign.values()))
        if damaged:
            raise CorruptBlockError(said)
        if foreign:
            raise KVStoreError(said)
    return 0


def open_to_look(args: argparse.Namespace, read_only: bool = False) -> Store:
    """Open the store that `args` names with the least of memory: nothing of it is fetched."""
    from kvstore import Store, StoreConfig
    from kvstore.tiers.spec_file import read_spec

    nbytes = read_spec(Path(args.store)).nbytes
    config = StoreConfig(
        hot=nbytes,
        warm=nbytes,
        cold=args.cold,
        device="cpu",
        directory=args.store,
        read_only=read_only,
    )
    return Store.open(args.store, config)


def _as_read(context: KeptContext) -> KeptContext:
    """Count all tokens that were read: a model may keep those of the last block in its state."""
    with suppress(KeyError, ValueError):
        return replace(context, tokens=TextChain.from_json(context.info["text"]).tokens)
    return context


def _show(found: list[KeptContext]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kvstore.config import format_size

    if not found:
        print("no context is kept here")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", overflow="fold")
    table.add_column("model", overflow="fold")
    for column in ("tokens", "blocks", "raw", "on disk", "age", "asked"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in found:
        asked = each.info.get("asked")
        cells = (
            "".join(c if c.isprintable() else "\ufffd" for c in each.name),
            Path(str(each.info.get("model", "-"))).name,
            f"{each.tokens:,}",
            f"{each.blocks:,}",
            format_size(each.nbytes),
            format_size(each.disk_bytes),
            _ago(each.created),
            "never" if asked is None else _ago(asked),
        )
        table.add_row(*(Text(cell) for cell in cells))
    Console(highlight=False).print(table)


def _ago(seconds: float) -> str:
    age = max(0.0, time.time() - seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= size:
            return f"{age // size:.0f} {unit}"
    return "now"
