"""The benches' command lines: one parser, and the values that are checked before work begins.

What is wrong is said in one line with exit code 2.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from model import checkpoint
from model.corpus import text_named
from model.module_parser import ModuleParser


class Parser(ModuleParser):
    """A bench's parser: --help shows what the module says of itself, examples and all."""

    def __init__(self, bench: str, said: str) -> None:
        super().__init__(
            prog=f"python -m bench.{bench}",
            description=said,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )


def at_least(least: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` on."""

    def read(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(
                f"{value!r} is not a whole number of at least {least:,}"
            )
        return number

    return read


def duration(value: str) -> float:
    """Read a time."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds above 0")
    return number


def of_any(name: str) -> str:
    """Read the name of a model."""
    try:
        checkpoint.load(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def of_landmark(name: str) -> str:
    """Read the name of a model with Landmark Attention, for benches that measure nothing else."""
    family = checkpoint.load(of_any(name)).config.family
    if family != "landmark":
        raise argparse.ArgumentTypeError(f"{name!r} is of family {family!r}, not 'landmark'")
    return name


def folder(value: str) -> Path:
    """Read a folder that is there."""
    path = Path(value)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{value!r} is not a folder")
    return path


def with_novel(value: str) -> Path:
    """Read a folder with the validation novel."""
    try:
        text_named(folder(value), "moby_dick")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(value)


def file(value: str) -> Path:
    """Read a file that is there."""
    path = Path(value)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{value!r} is not a file")
    return path


def picture(value: str) -> Path:
    """Read where a picture is to be written: known to be possible before the work is done."""
    path = Path(value)
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("a picture needs matplotlib: pip install 'kvstore[bench]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise argparse.ArgumentTypeError(f"{value!r} does not end in .png, .svg or .pdf")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{value!r} is not in a folder that is there")
    return path
