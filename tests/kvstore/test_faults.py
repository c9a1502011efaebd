"""Killed processes and damaged files: nothing saved is lost, nothing wrong is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.promises import DURABILITIES

ROOT = Path(__file__).parents[2]


def faults(kills: int, damages: int, seed: int) -> None:
    argv = ["--kills", kills, "--damages", damages, "--seed", seed]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.faults", *map(str, argv)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["kills"]["kills"] == kills
    assert report["kills"]["faults"] == report["damages"]["faults"] == []
    assert sum(report["damages"]["came"].values()) == damages


def test_a_few_kills_and_damages() -> None:
    faults(8, 10, 1)


@pytest.mark.slow
def test_a_hundred_kills_and_damages() -> None:
    faults(100, 100, 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the simulation is written in C")
@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_loss_of_power(durability: str) -> None:
    """What was synced is never lost; without syncing the simulation finds losses."""
    argv = ["--cuts", "60", "--changes", "40", "--durability", durability]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.powerloss", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert bool(json.loads(ran.stdout.splitlines()[-1])["faults"]) == (durability == "none")
