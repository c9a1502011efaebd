"""The command line of a module that is run by itself (`python -m`)."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch


class ModuleParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")


def device(value: str) -> str:
    """Read where a model can run."""
    try:
        torch.zeros(1, device=value)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{value!r} cannot be used here: {reason}") from None
    return value
