"""The entry of the `kvstore` command: finds the subcommand, maps failures to exit codes.

0: done. 1: it could not be done, such as a full store. 2: wrong usage or input. 129, 130 and 143:
told to stop by SIGHUP, Ctrl-C or SIGTERM. Every failure is one line on stderr. Never does the work
itself.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import kvstore
from kvstore.cli import ask, chat, contexts, demo, run, verify
from kvstore.cli.options import HelpFormatter
from kvstore.cli.usage import Parser, UsageError
from kvstore.errors import CorruptBlockError, KVStoreError


class Stopped(KeyboardInterrupt):
    """The process was told to stop by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    name = "kvstore"
    args: argparse.Namespace | None = None
    # torch's threads wait for each other in a loop, which beside other work costs eight times the
    # speed; read once, when torch is imported (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Whoever closed one of these wants nothing of it.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115 - as long as the process
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    # What a terminal cannot show must not end a run of a million tokens.
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="replace")
    try:
        with _stoppable():
            parser, commands = _parsers()
            given = sys.argv[1:] if argv is None else argv
            if given and given[0] in commands:
                name = f"kvstore {given[0]}"
            args, unknown = parser.parse_known_args(given)
            if unknown:
                raise UsageError(f"unrecognized arguments: {' '.join(unknown)}")
            code: int = args.main(args)
            sys.stdout.flush()
            return code
    except SystemExit as exit:  # --help and --version
        return int(exit.code or 0)
    except UsageError as error:
        return _fail(name, f"error: {error}", 2)
    except MemoryError as error:
        return _fail(name, f"error: {_no_memory(error, args)}", 1)
    except KVStoreError as error:
        message = str(error)
        directory = getattr(args, "store", None)
        if isinstance(error, CorruptBlockError) and directory and "kvstore verify" not in message:
            if name != "kvstore verify":
                message += f"; `kvstore verify {directory}` says what is damaged, --repair mends it"
            elif args is not None and not args.repair:
                message += "; --repair makes it anew of what can be read"
            else:
                message += "; put a copy of it in its place, or remove it"
        return _fail(name, f"error: {message}", 1)
    except BrokenPipeError:
        _give_up_stdout()
        return 1
    except OSError as error:
        _give_up_stdout()
        name_of_file = "" if error.filename is None else f"{error.filename}: "
        return _fail(name, f"error: {name_of_file}{error.strerror or error}", 1)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        return _fail(name, "interrupted", 128 + number)


def _no_memory(error: MemoryError, args: argparse.Namespace | None) -> str:
    message = "not enough memory"
    if args is not None and "hot" in args:
        message += f" with --hot {args.hot} and --warm {args.warm}"
    return f"{message}: {error}" if str(error) else message


def _parsers() -> tuple[Parser, set[str]]:
    parser = Parser(
        prog="kvstore",
        description=kvstore.__doc__,
        epilog="example: kvstore demo\n\n`kvstore COMMAND --help` lists a command's options.",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvstore {kvstore.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (run, demo, ask, chat, contexts, verify):
        command.add_to(commands)
    return parser, set(commands.choices)


def _give_up_stdout() -> None:
    """Let go of what stdout still holds: nobody takes it, and Python would complain at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(name: str, message: str, code: int) -> int:
    print(f"{name}: {' '.join(message.splitlines())}", file=sys.stderr)
    return code


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a terminal that closes end the work in order.

    So that a temporary store is removed.

    A second one is ignored: it would stop the removal half way. Signals are the main thread's;
    elsewhere they are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One that was ignored from the start (nohup, a job in the background) stays so.
    known = (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP"))
    numbers = [n for n in known if n is not None and signal.getsignal(n) != signal.SIG_IGN]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
