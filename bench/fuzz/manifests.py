"""Manifests, through `SavedContexts`: owns manifests that are wrong but nearly consistent."""

from __future__ import annotations

import json
import random
from typing import Any

from bench.fuzz.basis import Basis
from bench.fuzz.checks import check, refusing
from bench.fuzz.contexts import Contexts
from bench.fuzz.mutations import any_json, change_json, mangled, nested
from kvstore.errors import CorruptBlockError
from kvstore.manifest import gone_back, numbers_of

HELD = ["streams", "landmark_dim", "counts", "filled", "past", "rest", "on_device", "info"]
HELD += ["fingerprint", "snapshots"]


class Manifests:
    """Manifests, through `SavedContexts`."""

    def __init__(self, basis: Basis, contexts: Contexts) -> None:
        self._contexts = contexts
        self._texts = {name: basis.records[b"context/" + name.encode()] for name in contexts.names}

    def run(self, rng: random.Random) -> str:
        contexts = self._contexts
        name = rng.choices(["a", "fork", "wide", "empty", "large"], [30, 10, 6, 6, 1])[0]
        text = self._text(rng, self._texts[name])
        key = b"context/" + name.encode()
        contexts.records[key] = text
        try:
            with refusing(CorruptBlockError, ValueError) as raised:
                manifest = contexts.store.kept.require(name)
            if raised:
                error = raised[0]
                version = "was saved in format" in str(error)
                if type(error) is not CorruptBlockError and not version:
                    raise error
                return "refused"
            original = json.loads(self._texts[name])
            for snapshot in range(min(3, len(manifest["snapshots"]))):
                gone_back(manifest, snapshot)
            named = numbers_of(manifest)
            check(all(type(number) is int for number in named), "a piece has a strange number")
            whole = all(json.dumps(manifest[p]) == json.dumps(original[p]) for p in HELD)
            return contexts.consume(name, manifest, whole, rng)
        finally:
            contexts.records[key] = contexts.real[key]

    def _text(self, rng: random.Random, text: bytes) -> bytes:
        kind = rng.randrange(40)
        if kind < 6:
            other = self._texts[rng.choice(list(self._texts))]
            return mangled(rng, text, other)
        if kind < 7:
            return nested(rng, text.decode()).encode("utf-8", "surrogatepass")
        if kind < 8:
            return rng.choice(
                [
                    json.dumps(any_json(rng)).encode(),
                    text.decode().encode(rng.choice(["utf-16", "utf-32-be", "utf-8-sig"])),
                    b"",
                    json.dumps([json.loads(text)]).encode(),
                ]
            )
        manifest = json.loads(text)
        if kind < 11:
            _change_knowingly(rng, manifest)
        for _ in range(rng.choice([1, 1, 1, 2, 3]) if kind >= 11 else rng.randrange(2)):
            change_json(rng, manifest)
        return json.dumps(manifest).encode()


def _change_knowingly(rng: random.Random, manifest: Any) -> None:
    """Change a manifest so that it is still consistent, or nearly."""
    kind = rng.randrange(7)
    saves = [manifest, *manifest["snapshots"]]
    past = manifest["past"]
    if kind == 0:  # more streams
        more = rng.choice([1, 2, 100, 100, 1000, 50_000 if rng.random() < 0.1 else 3])
        manifest["streams"] += more
        for save in saves:
            save["counts"] += [0] * more
            save["filled"] += [0] * more
        for piece in past:
            piece["stops"] += [0] * more
    elif kind == 1:  # the same pieces of the rest, again and again
        save = rng.choice(saves)
        save["rest"] = save["rest"] * rng.choice([2, 3, 200])
    elif kind == 2 and past:  # the same piece of the past
        piece = rng.choice(past)
        often = rng.choice([1, 2, 20, 2000 if rng.random() < 0.02 else 2])
        past[past.index(piece) : past.index(piece)] = [piece] * often
    elif kind == 3:  # more blocks than there are
        stream, more = rng.randrange(manifest["streams"]), rng.choice([1, 2, 1000, 2**31, 2**47])
        manifest["counts"][stream] += more
        if past:
            past[-1]["stops"] = list(manifest["counts"])
        else:
            past.append({"number": 0, "stops": list(manifest["counts"]), "bytes": 1})
    elif kind == 4:
        manifest["landmark_dim"] = rng.choice([1, 2, 4, 6, 1000, 2**20])
    elif kind == 5:
        every = list(range(12))
        for piece in past:
            piece["number"] = rng.choice(every)
        if rng.random() < 0.5:
            manifest["rest"] = [rng.choice(every) for _ in range(rng.randrange(4))]
    else:
        index = manifest["index"]
        index["kind"] = rng.choice(["hnsw", "auto", "exact"])
        index["segment"] = rng.choice([1, 2, 3, 8, 2**31 - 1])
        index["m"] = rng.choice([2, 3, 16, 256])
        index["ef_construction"] = rng.choice([1, 2, 65536])
        index["ef_search"] = rng.choice([1, 2, 65536])
