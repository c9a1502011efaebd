"""What a stopped training goes on from: weights, optimizers, step, and whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    step: int,
    identity: dict[str, Any],
) -> None:
    """Write everything that a later run needs to go on after `step` steps.

    identity: what the training follows from, as JSON has it.
    """
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, entry in optimizer.state_dict()["state"].items():
            named = {f"optimizer.{o}.{i}.{k}": torch.as_tensor(v) for k, v in entry.items()}
            tensors |= named
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "identity": json.dumps(identity)})
    partial.replace(path)


def check_identity(path: Path, identity: dict[str, Any]) -> None:
    """Raise ValueError if a state is of a training that follows from something else."""
    try:
        with safe_open(path, framework="pt") as file:
            theirs = json.loads((file.metadata() or {}).get("identity", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not the state of a training: {error}") from error
    ours = json.loads(json.dumps(identity))
    other = [key for key in ours if theirs.get(key) != ours[key]]
    if other:
        raise ValueError(
            f"the training in {path.parent} was begun with another {' and '.join(other)}:"
            " give another --run, or the settings it was begun with"
        )


def load_state(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Read back what `save_state` wrote; return after how many steps that was."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    weights: dict[str, Tensor] = {}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in load_file(path).items():
        if key.startswith("optimizer."):
            _, o, i, name = key.split(".")
            states[int(o)].setdefault(int(i), {})[name] = value
        else:
            weights[key.removeprefix("model.")] = value
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step
