"""`kvstore run`: read texts, answer a prompt, show where the cache was served from."""

from __future__ import annotations

import argparse
from pathlib import Path

from kvstore.cli import options
from kvstore.cli.usage import UsageError, checking_input, words

_EXAMPLE = """\
examples:
  kvstore run --text war_and_peace.txt --prompt "Prince Andrew said" --stop .
  kvstore run --text a.txt --text b.txt --prompt "In short," --warm 1GiB --json
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "run",
        help="read texts and answer a prompt",
        description="Read texts through a model whose past lives in the tiered store, then go on\n"
        "from a prompt. Bytes are tokens, so any file will do.",
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=options.HelpFormatter,
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        required=True,
        help="a text to read; several are read one after the other",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", type=words, required=True, help="what to go on from"
    )
    options.add_shared(parser, hot="64MiB", warm="256MiB", stop=())
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    with checking_input():
        read = b"".join(Path(name).read_bytes() for name in args.text)
    if not read:
        raise UsageError(f"{', '.join(args.text)}: the text is empty; there is nothing to read")

    # torch takes seconds to import, and a wrong command line should not.
    from kvstore.cli.screen import Screen
    from kvstore.cli.session import opened

    with opened(args) as session:
        screen = Screen(args.json)
        screen.read(session, read)
        answer = screen.answer(session.ask(args.prompt))
        screen.report(session.report(answer, None, None))
    return 0
