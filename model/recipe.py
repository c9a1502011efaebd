"""What the training loop wants to know of a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.stages import Stage
from model.tasks import Sample


@dataclass(frozen=True)
class Recipe:
    """How a family is trained.

    config: makes the configuration. loss: takes the model, possibly compiled, a step's samples, the
    step and the curriculum. examine: measures a model on held-out text; takes a seed, too.
    written: the dtype of the finished weights in their file.
    """

    curriculum: tuple[Stage, ...]
    config: Callable[[], Any]
    loss: Callable[[Any, list[Sample], int, tuple[Stage, ...]], Tensor]
    examine: Callable[[Any, np.ndarray, int], dict[str, Any]]
    written: torch.dtype = torch.float32


def weighed_loss(
    logits: Tensor,  # [B, N, S, 256]
    text: Tensor,  # int64 [B, N * S]
    weight: Tensor,  # float32 [B, N * S], of predicting each byte
) -> Tensor:
    """Return the weighted mean cross entropy, nats a byte."""
    logits = logits.float().flatten(1, 2)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    return (loss * weight).sum() / weight.sum()
