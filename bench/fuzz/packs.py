"""Values of the disk tier's tables: owns the transaction that finds what it is given."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import xxhash

from bench.fuzz.basis import COLD, SMALL, Basis, tree_rows
from bench.fuzz.checks import Fault, check, refusing
from bench.fuzz.mutations import EXTREMES, any_json, change_json, mangled
from kvstore.errors import CorruptBlockError
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.pack import frame_at


class Held:
    """A transaction that finds what it is given: values by table and key."""

    def __init__(self, values: dict[tuple[Any, bytes], bytes]) -> None:
        self.values = values

    def get(self, key: bytes, default: bytes = b"", db: Any = None) -> bytes:
        return self.values.get((db, key), default)

    def put(self, key: bytes, value: bytes, db: Any = None) -> None:
        raise Fault("something was written")

    def cursor(self, db: Any = None) -> list[tuple[bytes, bytes]]:
        return sorted((key, value) for (table, key), value in self.values.items() if table is db)

    def stat(self, db: Any = None) -> dict[str, int]:
        return {"entries": 5}


class Packs:
    """Values of the disk tier's tables: packs, directories, records, the format."""

    def __init__(self, basis: Basis, place: Path) -> None:
        shutil.copytree(basis.tree, place)
        self._tier: Any = DiskTier(place, SMALL, COLD)
        self._ids, self._locations = self._tier.scan()
        with self._tier._file.snapshot() as transaction:
            tables = (None, self._tier._packs, self._tier._directory, self._tier._records)
            self._values = {
                (table, bytes(key)): bytes(value)
                for table in tables
                for key, value in transaction.cursor(**{} if table is None else {"db": table})
            }
        for name in (b"packs", b"directory", b"records"):
            self._values.pop((None, name), None)
        self._held = Held(dict(self._values))
        held = self._held

        @contextlib.contextmanager
        def snapshot(buffers: bool = False) -> Iterator[Held]:
            yield held

        mock.patch.object(self._tier._file, "snapshot", snapshot).start()

    def run(self, rng: random.Random) -> str:
        tier, kind = self._tier, rng.randrange(10)
        table = [tier._packs] * 5 + [tier._directory] * 3 + [tier._records, None]
        place = rng.choice([each for each in self._values if each[0] is table[kind]])
        before = self._values[place]
        other = rng.choice([v for (t, _), v in self._values.items() if t is place[0]])
        value = mangled(rng, before, other, head=40)
        sealed = place[0] is not tier._packs and rng.random() < 0.5
        if sealed:
            payload = mangled(rng, before[8:], other[8:])
            if place[0] is None and rng.random() < 0.7:
                payload = self._format(rng, before[8:])
            value = xxhash.xxh3_64(place[1] + payload).digest() + payload
        self._held.values[place] = value
        try:
            return self._read(rng, place, before, value, sealed)
        finally:
            self._held.values[place] = before

    def _format(self, rng: random.Random, payload: bytes) -> bytes:
        if not payload.startswith(b"{"):
            return rng.randbytes(rng.choice([0, 8, 15, 16, 17, 24]))
        found = json.loads(payload)
        change_json(rng, found)
        return json.dumps(rng.choice([found, any_json(rng)])).encode()

    def _read(
        self,
        rng: random.Random,
        place: tuple[Any, bytes],
        before: bytes,
        value: bytes,
        sealed: bool,
    ) -> str:
        tier, whole = self._tier, value == before
        documented: tuple[type[Exception], ...] = (CorruptBlockError,)
        call: Callable[[], Any]
        if place[0] is tier._packs:
            self._check_table(rng, value)
            inside = self._locations >> 16 == int.from_bytes(place[1], "big")
            ids, locations = self._ids[inside], self._locations[inside]
            many = rng.random() < 0.5
            pick = slice(None) if many else rng.randrange(len(ids)) if len(ids) else slice(0)
            ids, locations = np.atleast_1d(ids[pick]), np.atleast_1d(locations[pick])
            out = [np.zeros((len(ids), p.nbytes), np.uint8) for p in SMALL.planes]
            with refusing(CorruptBlockError) as raised:
                tier.read(ids, locations, out)
                right = tree_rows(ids)
                same = all((a == b).all() for a, b in zip(out, right, strict=True))
                check(same, "another block was read")
            check(not (whole and raised), f"a whole pack is refused: {raised}")
            with refusing(CorruptBlockError):
                tier.frame_bytes(locations)
            if rng.random() < 0.1:
                found = tier.damaged(ids, locations)
                check(bool(found) == bool(raised), "verification says otherwise")
            return "refused" if raised else "passed"
        if place[0] is tier._directory:
            call = tier.scan
        elif place[0] is tier._records:
            call = lambda: tier.get_meta(place[1])  # noqa: E731
        else:
            state = tier._next_pack, tier._blocks
            documented += (ValueError,)  # as it is opened
            call = lambda: tier._check_format(self._held)  # noqa: E731
        with refusing(*documented) as raised:
            found = call()
        if place[0] is None:
            tier._next_pack, tier._blocks = state
        check(not (whole and raised), f"a whole value is refused: {raised}")
        if raised:
            return "refused"
        check(whole or sealed, "a value with a wrong checksum is taken for whole")
        if place[0] is tier._records:
            check(found == value[8:], "another record was read")
        return "passed"

    def _check_table(self, rng: random.Random, value: bytes) -> None:
        for at in (0, rng.choice(EXTREMES[:20]), rng.randrange(len(value) + 9)):
            with refusing(CorruptBlockError):
                check(len(frame_at(memoryview(value), at)) <= len(value), "a frame from nowhere")
