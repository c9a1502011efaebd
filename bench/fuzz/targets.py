"""All targets by name: owns which of them an input goes to, and how long it may take."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from bench.fuzz.basis import Basis
from bench.fuzz.checks import check
from bench.fuzz.contexts import Contexts
from bench.fuzz.frames import Frames
from bench.fuzz.manifests import Manifests
from bench.fuzz.packs import Packs
from bench.fuzz.pieces import Pieces
from bench.fuzz.small import Chains, Graphs, Specs, Traces
from bench.fuzz.trees import Trees

SHARES = {
    "frames": 40,
    "manifests": 40,
    "pieces": 8,
    "packs": 4,
    "trees": 1,
    "spec": 2,
    "graphs": 2,
    "traces": 2,
    "chains": 1,
}
"""Of a hundred inputs."""

SECONDS = 2.0  # of the processor, for one input
NAMES = [name for name, share in SHARES.items() for _ in range(share)]
random.Random(0).shuffle(NAMES)

Target = Callable[[random.Random], str]


def target_of(number: int) -> str:
    """The name of what runs the input of this number."""
    return NAMES[number % len(NAMES)]


def make_targets(basis: Basis, place: Path) -> dict[str, Target]:
    """What runs an input, by name."""
    contexts = Contexts(basis, place / "store")
    return {
        "frames": Frames(basis).run,
        "manifests": Manifests(basis, contexts).run,
        "pieces": Pieces(basis, contexts).run,
        "packs": Packs(basis, place / "packs").run,
        "trees": Trees(basis, place / "tree").run,
        "spec": Specs(basis, place / "spec").run,
        "graphs": Graphs(place / "graphs").run,
        "traces": Traces(basis, place / "trace").run,
        "chains": Chains(basis).run,
    }


def run_one(targets: dict[str, Target], seed: int, number: int, rng: random.Random) -> str:
    """Run an input; say what became of it. All of it follows from what is given."""
    rng.seed(seed << 40 | number)
    before = time.process_time()
    became = targets[target_of(number)](rng)
    seconds = time.process_time() - before
    check(seconds < SECONDS, f"it took {seconds:.1f} s")
    return became
