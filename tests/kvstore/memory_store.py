"""What a context needs of a store, in dicts; shares no code with the store."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from kvstore.context import Context
from kvstore.errors import StoreFullError


class MemoryStore:
    """Blocks and records in dicts; at most `most` blocks."""

    def __init__(self, spec, directory, index, most, blocks=None, records=None) -> None:
        self.spec = spec
        self.config = SimpleNamespace(directory=directory, index=index)
        self.device = torch.device("cpu")
        self.most = most
        self.blocks = {} if blocks is None else blocks
        self.records = {} if records is None else records
        self.contexts = {}
        self._next = max(self.blocks, default=-1) + 1

    def reopened(self) -> MemoryStore:
        """A new store over the same blocks and records, as after a restart."""
        assert not self.contexts
        config = self.config
        return MemoryStore(
            self.spec, config.directory, config.index, self.most, self.blocks, self.records
        )

    def context(self, name=None, *, streams, landmark_dim) -> Context:
        return Context(self, name, streams=streams, landmark_dim=landmark_dim)

    def put(self, planes):
        n = len(planes[0])
        if len(self.blocks) + n > self.most:
            raise StoreFullError(f"there is room for {self.most} blocks")
        for plane, tensor in zip(self.spec.planes, planes, strict=True):
            assert tuple(tensor.shape) == (n, *plane.shape)
            assert tensor.dtype == plane.dtype
        ids = np.arange(self._next, self._next + n)
        self._next += n
        for i, block in enumerate(ids.tolist()):
            self.blocks[block] = [tensor[i].clone() for tensor in planes]
        return ids

    def fetch(self, ids):
        found = [self.blocks[i] for i in ids.tolist()]
        return [
            torch.stack([block[p] for block in found])
            if found
            else torch.empty((0, *plane.shape), dtype=plane.dtype)
            for p, plane in enumerate(self.spec.planes)
        ]

    def delete(self, ids) -> None:
        assert len(np.unique(ids)) == len(ids)
        for i in ids.tolist():
            del self.blocks[i]

    def flush(self) -> None:
        pass

    def put_record(self, key, value) -> None:
        if value is None:
            self.records.pop(key, None)
        else:
            self.records[key] = value

    def get_record(self, key):
        return self.records.get(key)

    def record_keys(self, prefix=b""):
        return sorted(key for key in self.records if key.startswith(prefix))
