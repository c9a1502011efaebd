"""Wrong usage: what a command line may not say, told in one line with exit code 2.

Owns the parser's manner of failing and the conversion of single values. Never does any work.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from kvstore.errors import HotTierTooSmallError


class UsageError(Exception):
    """The command was used wrongly, or its input cannot be used."""


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError; argparse prints the whole usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@contextmanager
def checking_input() -> Iterator[None]:
    """Turn the errors that mean bad input into UsageError, here and only here.

    A ValueError in the middle of the work is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except OSError as error:
        name = "" if error.filename is None else f"{error.filename}: "
        raise UsageError(f"{name}{error.strerror or error}") from error
    except (ValueError, KeyError, HotTierTooSmallError) as error:
        raise UsageError(str(error.args[0] if error.args else error)) from error


def text(value: str) -> str:
    """Read words for the model: what a shell passes that is not UTF-8 is no text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8") from None
    return value


def words(value: str) -> str:
    """Read text that says something."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty")
    return text(value)


def whole(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from least to most."""

    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(
                f"{value!r} is not a whole number from {least:,} to {most:,}"
            )
        return number

    return read


def share(value: str) -> float:
    """Read a number from 0 to 1."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number from 0 to 1")
    return number


def number(value: str) -> float:
    """Read a finite number."""
    try:
        read = float(value)
    except ValueError:
        read = math.nan
    if not math.isfinite(read):
        raise argparse.ArgumentTypeError(f"{value!r} is not a number")
    return read
