"""A KV cache in three tiers: device memory, host memory, disk."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore.block import BlockSpec, Plane
    from kvstore.config import IndexConfig, StoreConfig
    from kvstore.context import Context
    from kvstore.errors import KVStoreError
    from kvstore.store import Store

__version__ = "0.1.0"
__all__ = ["BlockSpec", "Context", "IndexConfig", "KVStoreError", "Plane", "Store", "StoreConfig"]

_HOMES = {
    "BlockSpec": "kvstore.block",
    "Context": "kvstore.context",
    "IndexConfig": "kvstore.config",
    "KVStoreError": "kvstore.errors",
    "Plane": "kvstore.block",
    "Store": "kvstore.store",
    "StoreConfig": "kvstore.config",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: torch takes seconds, and `kvstore --help` needs none of it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
