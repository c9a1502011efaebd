"""`kvstore ask`: answer a prompt on a kept context, without reading its text again."""

from __future__ import annotations

import argparse
import time
from functools import partial

from kvstore.cli import options
from kvstore.cli.usage import words

_EXAMPLE = """\
examples:
  kvstore ask books peace --prompt "Prince Andrew said" --stop .
  kvstore ask books peace --prompt "In short," --append --json
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "ask",
        help="answer a prompt on a kept context",
        description="Open a context that `kvstore run --context` has kept, with the model that\n"
        "made it, and go on from a prompt. The context stays as it is.",
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=options.HelpFormatter,
    )
    options.add_asking(parser)
    parser.add_argument(
        "--prompt", metavar="TEXT", type=words, required=True, help="what to go on from"
    )
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    from kvstore.cli.screen import Screen
    from kvstore.cli.session import note_asked, opened, resume

    with opened(args, partial(resume, began=time.perf_counter())) as session:
        screen = Screen(args.json)
        screen.report(session.report(screen.converse(session, args.prompt, args.append)))
    note_asked(args)
    return 0
