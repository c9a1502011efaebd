"""`kvstore verify`: read all that a store keeps, say what is damaged, and mend it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from kvstore.cli import options
from kvstore.cli.usage import checking_input, words
from kvstore.errors import CorruptStoreError

_EXAMPLE = """\
examples:
  kvstore verify books
  kvstore verify books --repair
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "verify",
        help="check what a store keeps, and repair it",
        description="Read every block, record and context of a store and say what is not what was\n"
        "written; exit code 1 if anything is. --repair takes a damaged context back to its last\n"
        "snapshot before the damage, or removes it, and touches nothing else; a file whose\n"
        "structure is damaged is made anew of what can be read, and the old one kept.",
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=options.HelpFormatter,
    )
    parser.add_argument("store", metavar="DIR", type=words, help="the store's directory")
    parser.add_argument("--repair", action="store_true", help="mend what can be mended")
    options.add_cold(parser, needed=True)
    options.add_json(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    from rich.console import Console
    from rich.progress import Progress

    from kvstore.cli.contexts import open_to_look
    from kvstore.salvage import salvage
    from kvstore.verify import repair, verify

    salvaged: list[str] = []
    with checking_input():
        try:
            # Whether all is whole can be seen while somebody else has the store.
            store = open_to_look(args, read_only=not args.repair)
        except CorruptStoreError as error:
            if not args.repair:
                raise
            told = salvage(Path(args.store), args.cold)
            salvaged = list(dict.fromkeys((str(error), *told)))
            store = open_to_look(args)
    with store:
        with checking_input():  # a context of another version is no damage
            store.kept.require_version()
        blocks = len(store)
        quiet = args.json or not Console(stderr=True).is_terminal
        with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
            task = progress.add_task("verifying", total=blocks)
            found = verify(store, lambda done: progress.update(task, completed=done))
        mended = salvaged + (repair(store, found) if args.repair and found.damaged else [])
        left = verify(store).damaged if mended else found.damaged
    if args.json:
        figures = {
            "blocks": found.blocks,
            "contexts": found.contexts,
            "damaged": found.damaged,
            "repaired": mended,
            "unreferenced_blocks": found.unreferenced,
        }
        print(json.dumps(figures))
        return 1 if left else 0
    for line in (*found.damaged, *mended):
        print(line)
    faults = "are left" if salvaged else f"were read, {len(found.damaged):,} faults were found"
    print(f"{found.contexts:,} contexts and {found.blocks:,} blocks {faults}")
    if found.unreferenced:
        sweep = f"`kvstore contexts {args.store} sweep` removes them"
        print(f"{found.unreferenced:,} blocks belong to no context: {sweep}")
    return 1 if left else 0
