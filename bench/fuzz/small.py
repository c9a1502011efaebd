"""The small targets, a class each: owns spec.json, graphs' sums, traces and chains of texts."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import xxhash

from bench.fuzz.basis import Basis
from bench.fuzz.checks import check, refusing
from bench.fuzz.mutations import any_json, change_json, mangled, nested
from kvstore.cli.text_chain import TextChain, TextDigests
from kvstore.codec import Codec
from kvstore.errors import CorruptBlockError, KVStoreError
from kvstore.index.graph_files import GraphFiles
from kvstore.tiers import spec_file
from kvstore.trace import read_trace, read_trace_header


class Specs:
    """The file spec.json, and the short form of a specification."""

    def __init__(self, basis: Basis, place: Path) -> None:
        self._place = place
        self._specs = [spec for spec, _ in basis.blocks]
        self._files = []
        for spec in self._specs:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            spec_file.write_spec(place, spec)
            self._files.append((place / spec_file.NAME).read_bytes())

    def run(self, rng: random.Random) -> str:
        which = rng.randrange(len(self._files))
        if rng.random() < 0.3:
            return self._short(rng, Codec(self._specs[which]).description)
        value, sealed = self._files[which], rng.random() < 0.6
        other = rng.choice(self._files)
        if not sealed:
            value = mangled(rng, value, other, head=20)
        else:
            text = value.splitlines()[1]
            if rng.random() < 0.4:
                text = mangled(rng, text, other[17:])
            elif rng.random() < 0.2:
                text = nested(rng, text.decode()).encode()
            else:
                found = json.loads(text)
                change_json(rng, found)
                text = json.dumps(rng.choice([found, found, any_json(rng)])).encode()
            value = xxhash.xxh3_64_hexdigest(text).encode() + b"\n" + text + b"\n"
        (self._place / spec_file.NAME).write_bytes(value)
        with refusing(CorruptBlockError, ValueError) as raised:
            spec = spec_file.read_spec(self._place)
        if raised:
            check(value != self._files[which], f"a whole file is refused: {raised[0]}")
            return "refused"
        same = spec == self._specs[which] or value == other
        # Its lines may end otherwise.
        check(same or sealed, "another specification was read")
        with refusing(ValueError):
            Codec(spec)
        return "passed"

    def _short(self, rng: random.Random, text: str) -> str:
        mutated = mangled(rng, text.encode()).decode("utf-8", "replace")
        with refusing(CorruptBlockError, ValueError) as raised:
            spec = spec_file.described(mutated)
            with refusing(ValueError):
                Codec(spec)
        check(not (raised and mutated == text), f"what is whole is refused: {raised}")
        return "refused" if raised else "passed"


class Graphs:
    """Index files and their sums."""

    def __init__(self, place: Path) -> None:
        self._files, self._place = GraphFiles(place), place
        self._graph = random.Random(0).randbytes(3000)
        self._files.keep("k", self._write)
        self._sum = (place / "k.sum").read_bytes()

    def _write(self, path: str) -> None:
        Path(path).write_bytes(self._graph)

    def run(self, rng: random.Random) -> str:
        graph, total = self._graph, self._sum
        if rng.random() < 0.6:
            graph = mangled(rng, graph, total)
        else:
            total = mangled(rng, total, graph)
        (self._place / "k.hnsw").write_bytes(graph)
        (self._place / "k.sum").write_bytes(total)
        if rng.random() < 0.02:
            (self._place / "k.sum").unlink()
            total = b""
        found = self._files.find("k")
        whole = (graph, total) == (self._graph, self._sum)
        check(bool(found) == whole, "a damaged graph is found" if found else "a whole one is not")
        damaged = self._files.damaged()
        check(bool(damaged) != whole, "verification says otherwise")
        return "passed" if found else "refused"


class Traces:
    """Traces of accesses."""

    def __init__(self, basis: Basis, place: Path) -> None:
        self._path, self._data = place, basis.trace
        self._whole = self._events(self._data)

    def _events(self, data: bytes) -> list[Any]:
        self._path.write_bytes(data)
        found = []
        for event in read_trace(self._path):
            parts = (event.ids, event.tiers, event.weights)
            lists = [None if part is None else part.tolist() for part in parts]
            found.append((event.time_ns, event.kind, event.tier, *lists))
        return found

    def run(self, rng: random.Random) -> str:
        sealed = rng.random() < 0.5
        data = self._sealed(rng) if sealed else mangled(rng, self._data, self._data, head=200)
        with refusing(ValueError, KVStoreError) as raised:
            found = self._events(data)
            check(sealed or found == self._whole[: len(found)], "other events were read")
        with refusing(ValueError) as refused:
            read_trace_header(self._path)
        check(not (data == self._data and (raised or refused)), "a whole trace is refused")
        return "refused" if raised or refused else "passed"

    def _sealed(self, rng: random.Random) -> bytes:
        """One chunk, or the header, mutated and with its checksum made right."""
        size = struct.unpack_from("<I", self._data, 8)[0]
        header = self._data[: 12 + size]
        at = self._data.index(b"KVTC")
        chunk = self._data[at : self._data.index(b"KVTC", at + 4) - 8]
        if rng.random() < 0.3:
            text = json.loads(header[12:])
            change_json(rng, text)
            made = json.dumps(text).encode()
            header = header[:8] + struct.pack("<I", len(made)) + made
        else:
            chunk = mangled(rng, chunk, chunk, head=40)
        parts = [
            part + struct.pack("<Q", xxhash.xxh3_64_intdigest(part)) for part in (header, chunk)
        ]
        return b"".join(parts)


class Chains:
    """The chains of texts that a manifest has for `kvstore run`."""

    def __init__(self, basis: Basis) -> None:
        info = json.loads(basis.records[b"context/a"])["info"]
        self._values = info["text"]
        self._text = b"some text " * 100_000

    def run(self, rng: random.Random) -> str:
        values = {"text": json.loads(json.dumps(self._values))}
        change_json(rng, values)
        # What the command line says of bad input (kvstore.cli.usage.checking_input).
        with refusing(ValueError, KeyError) as raised:
            chain = TextChain.from_json(values["text"])
            begins = TextDigests(self._text).begin_with(chain)
            check(chain.tokens >= 0, f"a text of {chain.tokens} bytes")
            if begins:
                right = TextChain().extended(self._text[: chain.tokens])
                check(right == chain, "a text begins with another one")
        return "refused" if raised else "passed"
