"""An open store whose records are in a dict: owns what is done with a manifest that passed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash

from bench.fuzz.basis import SMALL, Basis
from bench.fuzz.checks import check, refusing
from kvstore.config import StoreConfig
from kvstore.errors import CorruptBlockError
from kvstore.store import Store
from kvstore.verify import verify


class Contexts:
    """One open store whose records are taken from a dict."""

    def __init__(self, basis: Basis, place: Path) -> None:
        shutil.copytree(basis.store, place)
        config = StoreConfig(
            hot=600 * SMALL.nbytes, warm=400 * SMALL.nbytes, cold="32MiB", device="cpu"
        )
        self.store = Store.open(place, config)
        self._graphs = place / "index"
        self.real = basis.records
        self.records = dict(basis.records)
        self.names = self.store.kept.names()
        self.whole = {name: self._content(name) for name in self.names}
        # A context that is closed asks what the others have: there is one at a time, for speed.
        self.shown = ""
        store: Any = self.store
        store.get_record = self.records.get
        store.record_keys = self._keys

    def _keys(self, prefix: bytes = b"") -> list[bytes]:
        hidden = [b"context/" + name.encode() for name in self.names if name != self.shown]
        return sorted(k for k in self.records if k.startswith(prefix) and k not in hidden)

    def _content(self, name: str) -> Any:
        context = self.store.context(name)
        streams = range(context.streams)
        content = (
            [context.block_ids().tobytes()],
            [context.index.landmarks(s).contiguous().numpy().tobytes() for s in streams],
            [context.tokens(s) for s in streams],
            [plane.contiguous().view(torch.uint8).numpy().tobytes() for plane in context._open],
            {
                k: (t.dtype, t.shape, xxhash.xxh3_64_digest(t.numpy().tobytes()))
                for k, t in context.get_state().items()
            },
            json.dumps(context.info),
            context.fingerprint,
        )
        context.close(save=False)
        return content

    def consume(self, name: str, manifest: Any, whole: bool, rng: random.Random) -> str:
        """Do what is done with a manifest that passed; say what became of it."""
        self.shown = name
        kind = rng.randrange(4)
        if kind == 0:
            with refusing(CorruptBlockError) as raised:
                known = self.store.kept.describe(name)
                check(known.blocks == sum(manifest["counts"]), "another number of blocks")
            check(not (whole and raised), f"what is whole is refused: {raised}")
            return "refused" if raised else "passed"
        if kind == 1 and rng.random() < 0.5:
            damaged = verify(self.store).damaged
            check(not (whole and damaged), f"what is whole is damaged: {damaged}")
            return "refused" if damaged else "passed"
        try:
            with refusing(CorruptBlockError) as raised:
                context = self.store.context(name)
            if raised:
                check(not whole, f"what is whole is refused: {raised}")
                check(name not in self.store.contexts, "a context that was refused is open")
                return "refused"
            try:
                counts = [context.sealed(s) for s in range(context.streams)]
                check(counts == manifest["counts"], "it has other blocks than it says")
                check(len(context.block_ids()) == sum(counts), "it has other ids")
                tokens = [context.tokens(s) - 4 * n for s, n in enumerate(counts)]
                check(tokens == manifest["filled"], "it has other tokens than it says")
                check(0 <= min(tokens) <= max(tokens) < 4, "an open block is not what it can be")
                query = torch.ones(context.streams, 1, context.landmark_dim)
                if context.streams < 100 and rng.random() < 0.2:
                    found, _ = context.search(slice(None), query, 3)
                    most = torch.tensor(counts)[:, None, None]
                    check(bool((found < most).all()), "a block is found that is not there")
            finally:
                context.close(save=False)
            if whole:
                check(self._content(name) == self.whole[name], "another context was opened")
        finally:
            for left in list(self.store.contexts.values()):
                left.close(save=False)
            if self._graphs.exists():  # a cache, which would grow
                shutil.rmtree(self._graphs, ignore_errors=True)
        return "passed"
