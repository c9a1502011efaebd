"""`kvstore run`: read texts, answer a prompt, show where the cache was served from."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from kvstore.cli import options
from kvstore.cli.usage import UsageError, checking_input, words

_EXAMPLE = """\
examples:
  kvstore run --text war_and_peace.txt --prompt "Prince Andrew said" --stop .
  kvstore run --text a.txt --text b.txt --prompt "In short," --warm 1GiB --json
  kvstore run --store books --context peace --text war_and_peace.txt
"""


LONGEST = 2**30
"""Tokens of a text, as the demo's."""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "run",
        help="read texts, answer a prompt, keep the context",
        description="Read texts through a model whose past lives in the tiered store, then go on\n"
        "from a prompt. Bytes are tokens, so any file will do. With --context what was read is\n"
        "kept, to be asked again with `kvstore ask`; prompt and answer are not.",
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=options.HelpFormatter,
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        type=words,
        action="append",
        required=True,
        help="a text to read; several are read one after the other",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        type=words,
        help="what to go on from; only with --context it may be left out",
    )
    options.add_directory(parser)
    parser.add_argument(
        "--context", metavar="NAME", type=words, help="keep what is read in --store, by this name"
    )
    parser.add_argument(
        "--no-reuse",
        dest="reuse",
        action="store_false",
        help="read all of the text, also what a kept context has read",
    )
    options.add_durability(parser)
    options.add_model(parser)
    options.add_store(parser, hot="64MiB", warm="256MiB")
    options.add_answer(parser, stop=())
    parser.set_defaults(main=main)


def _read(name: str) -> bytes:
    """Read a file; one without an end (/dev/zero) is refused before it takes all memory."""
    with Path(name).open("rb") as file:
        read = file.read(LONGEST + 1)
    if len(read) > LONGEST:
        raise ValueError(f"{name} is longer than {LONGEST:,} bytes")
    return read


def main(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    if args.context and not args.store:
        raise UsageError("--context is kept in a store: give --store DIR too")
    if not args.prompt and not args.context:
        raise UsageError("nothing is asked and nothing kept: give --prompt TEXT or --context NAME")
    with checking_input():
        read = b"".join(map(_read, args.text))
    if not read:
        raise UsageError(f"{', '.join(args.text)}: the text is empty; there is nothing to read")

    # torch takes seconds to import, and a wrong command line should not.
    from kvstore.cli.screen import Screen
    from kvstore.cli.session import begin, opened

    with opened(args, partial(begin, text=read)) as session:
        screen = Screen(args.json)
        if session.tokens:
            screen.say(f"{session.tokens:,} of {len(read):,} tokens were read before", "dim")
        screen.read(session, read)
        answer = screen.answer(session.ask(args.prompt)) if args.prompt else None
        screen.report(session.report(answer))
    return 0
