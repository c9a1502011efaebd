"""`kvstore demo`: find a pass key that is hidden in a million tokens every machine has."""

from __future__ import annotations

import argparse

from kvstore.cli import options
from kvstore.cli.usage import checking_input, share, whole

_EXAMPLE = """\
examples:
  kvstore demo
  kvstore demo --tokens 65536 --hot 2MiB --warm 8MiB --depth 0.1 --seed 7
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "demo",
        help="find a pass key hidden in a million tokens",
        description="Hide a pass key of five digits in the source of Python's standard library,\n"
        "read it all through the tiered store, ask for the key, and say whether the answer is\n"
        "right. Exit code 1 if it is wrong.",
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=options.HelpFormatter,
    )
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=whole(1, 2**30),
        default=2**20,
        help="bytes of text, the needle counted in (default: 1048576)",
    )
    parser.add_argument(
        "--depth",
        metavar="F",
        type=share,
        default=0.5,
        help="where the key is hidden: 0 is the beginning, 1 the end (default: 0.5)",
    )
    options.add_directory(parser)
    # Together under a fifth of the GiB of cache that a million tokens take, so the disk serves.
    options.add_model(parser)
    options.add_store(parser, hot="32MiB", warm="128MiB")
    options.add_answer(parser, stop=(".",))
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    from kvstore.cli.screen import Screen
    from kvstore.cli.session import begin, opened
    from model.haystack import hide, source_text
    from model.keys import needle

    with checking_input():
        haystack = hide(source_text, args.tokens, args.seed, args.depth)
    with opened(args, begin) as session:
        screen = Screen(args.json)
        place = haystack.text.index(needle(haystack.number).encode())
        screen.say(
            f"{args.tokens:,} tokens of Python's standard library, and at token {place:,} of them:"
        )
        screen.say(f"{needle(haystack.number)}\n")
        screen.read(session, haystack.text)
        screen.say(f">{haystack.question}", end="")
        answer = screen.answer(session.ask(haystack.question))
        right = haystack.right(answer)
        screen.report(session.report(answer, str(haystack.number), right))
        if right:
            screen.say(f"\nRight: the pass key is {haystack.number}.", "bold green")
        else:
            screen.say(f"\nWrong: the pass key is {haystack.number}.", "bold red")
    return 0 if right else 1
