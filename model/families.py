"""The families of models: what each is configured, made and read with.

A family is added here and nowhere else (docs/add_a_model.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from model.config import GCAConfig, LandmarkConfig
from model.gca_stream import GCAStream
from model.gca_transformer import GroupedCrossTransformer
from model.landmark_stream import LandmarkStream
from model.landmark_transformer import LandmarkTransformer
from model.stream import Stream


@dataclass(frozen=True)
class Family:
    """config: a frozen dataclass of sizes, with a field `family`; network: the module made of it;
    stream: how it reads a text through a store."""

    config: type[Any]
    network: type[Any]
    stream: type[Stream]


FAMILIES = {
    "landmark": Family(LandmarkConfig, LandmarkTransformer, LandmarkStream),
    "gca": Family(GCAConfig, GroupedCrossTransformer, GCAStream),
}


def family_of(model: Any) -> Family:
    """Return the family of a model, or of its configuration."""
    return FAMILIES[getattr(model, "config", model).family]
