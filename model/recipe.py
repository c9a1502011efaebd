"""What the training loop wants to know of a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from model.data import Sample
from model.stages import Stage


@dataclass(frozen=True)
class Recipe:
    """How a family is trained.

    config: makes the configuration. loss: takes the model, possibly compiled, a step's samples, the
    step and the curriculum. examine: measures a model on held-out text; takes a seed, too.
    """

    curriculum: tuple[Stage, ...]
    config: Callable[[], Any]
    loss: Callable[[Any, list[Sample], int, tuple[Stage, ...]], Tensor]
    examine: Callable[[Any, np.ndarray, int], dict[str, Any]]
