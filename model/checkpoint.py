"""Weights on disk: safetensors with the configuration in the header. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.families import FAMILIES

SHIPPED = Path(__file__).parent / "checkpoints"

_UNSAID = {"gca": {"near": 0, "lag": 0, "softmax": "chunk"}}
"""By family, what is meant by a file from before these sizes were there: not today's defaults."""


def save(model: Any, path: Path, info: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write a model's weights, its configuration and `info` (how it was made) to `path`.

    dtype: of the weights in the file; a model that is loaded has float32.
    """
    header = {"config": json.dumps(model.config.to_dict()), "info": json.dumps(info)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    weights = {name: t.detach().to(dtype).contiguous() for name, t in model.state_dict().items()}
    save_file(weights, partial, metadata=header)
    partial.replace(path)


def fingerprint(model: Any) -> str:
    """Return a digest of a model's configuration and weights: 32 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def full_name(name: str) -> str:
    """Return a name that `load` understands from any folder: a shipped one, or the whole path."""
    return name if (SHIPPED / f"{name}.safetensors").is_file() else str(Path(name).resolve())


def load(name: str) -> Any:
    """Load a shipped model by name ("landmark") or any checkpoint by path.

    Raises ValueError naming the shipped ones if there is no such checkpoint, or it is not one.
    """
    path = SHIPPED / f"{name}.safetensors"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.safetensors"))) or "none"
        raise ValueError(
            f"no model {name!r}: give a checkpoint's path or a shipped one ({shipped})"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            sizes = dict(json.loads(header["config"]))
            if sizes["family"] not in FAMILIES:
                raise ValueError(f"model family {sizes['family']!r} is unknown: update kvstore")
            family = FAMILIES[sizes["family"]]
            config = family.config(**_UNSAID.get(sizes["family"], {}) | sizes)
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        model = family.network(config, initialize=False)
        model.load_state_dict(weights)
        if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
            raise ValueError("it has weights that are not finite")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of a model of ours: {reason}") from error
    return model.eval().requires_grad_(False)
