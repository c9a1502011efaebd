"""The command line of a module that is run by itself (`python -m`)."""

from __future__ import annotations

import argparse
from typing import NoReturn


class ModuleParser(argparse.ArgumentParser):
    """Says what is wrong in one line, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.splitlines())}\n")
