"""`kvstore chat`: ask a kept context again and again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from kvstore.cli import options

_EXAMPLE = """\
examples:
  kvstore chat books peace --stop .
  printf 'Prince Andrew said\\nNatasha said\\n' | kvstore chat books peace --json
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "chat",
        help="ask a kept context again and again",
        description="Open a kept context once and answer one prompt a line, to the end of the\n"
        "input (Ctrl-D). Each is asked on its own; with --append each sees those before it.",
        epilog=_EXAMPLE,
        allow_abbrev=False,
        formatter_class=options.HelpFormatter,
    )
    options.add_asking(parser)
    parser.set_defaults(main=main)


def main(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    from kvstore.cli.screen import Screen
    from kvstore.cli.session import note_asked, opened, resume

    with opened(args, resume) as session:
        screen = Screen(args.json)
        for prompt in _prompts():
            answer = screen.converse(session, prompt, args.append)
            if args.json:
                screen.report(session.report(answer))
        if not args.json:
            screen.report(session.report(None))
    note_asked(args)
    return 0


def _prompts() -> Iterator[str]:
    """Yield the lines of the input, without those that are empty."""
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        if shown:
            print(shown, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        prompt = line.rstrip("\n").encode(errors="replace").decode(errors="replace")
        if prompt:
            yield prompt
