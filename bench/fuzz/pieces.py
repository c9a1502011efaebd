"""Pieces of contexts, through `SavedContexts`: owns changes to safetensors and their headers."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from bench.fuzz.basis import Basis
from bench.fuzz.checks import check, refusing
from bench.fuzz.contexts import Contexts
from bench.fuzz.mutations import EXTREMES, change_json, mangled, nested
from kvstore.errors import CorruptBlockError


class Pieces:
    """Pieces of contexts, through `SavedContexts`."""

    def __init__(self, basis: Basis, contexts: Contexts) -> None:
        self._contexts = contexts
        self._manifests = {
            name: json.loads(basis.records[b"context/" + name.encode()])
            for name in ("a", "fork", "wide", "empty")
        }

    def run(self, rng: random.Random) -> str:
        contexts = self._contexts
        name = rng.choice(["a", "a", "fork", "wide", "empty"])
        manifest = self._manifests[name]
        numbers = [piece["number"] for piece in manifest["past"]]
        of_past = bool(numbers) and rng.random() < 0.6
        keys = [
            b"piece/%012d" % n for n in ([rng.choice(numbers)] if of_past else manifest["rest"])
        ]
        before = b"".join(contexts.real[key] for key in keys)
        others = [b"piece/%012d" % n for n in numbers + manifest["rest"]]
        value = self._value(rng, before, contexts.real[rng.choice(others)])
        try:
            # What is joined anyway may as well lie in the first.
            contexts.records |= dict.fromkeys(keys, b"")
            contexts.records[keys[0]] = value
            if rng.random() < 0.01:
                del contexts.records[keys[0]]
                value = b""
            whole = value == before
            if rng.random() < 0.3:
                with refusing(CorruptBlockError) as raised:
                    if of_past:
                        for _ in contexts.store.kept.past(name, manifest):
                            pass
                    else:
                        contexts.store.kept.rest(name, manifest)
                check(not (whole and raised), f"what is whole is refused: {raised}")
                return "refused" if raised else "passed"
            return contexts.consume(name, manifest, whole, rng)
        finally:
            for key in keys:
                contexts.records[key] = contexts.real[key]

    def _value(self, rng: random.Random, value: bytes, other: bytes) -> bytes:
        kind = rng.randrange(10)
        if kind < 3:
            return mangled(rng, value, other, head=300)
        if kind == 3:
            return self._rebuilt(rng, value)
        size = int.from_bytes(value[:8], "little")
        text, data = value[8 : 8 + size], value[8 + size :]
        if kind == 4:
            return rng.choice(EXTREMES).to_bytes(8, "little") + value[8:]
        if kind == 5:
            text = nested(rng, text.decode()).encode()
        elif kind == 6:
            text = mangled(rng, text, other[8:])
        else:
            header = json.loads(text)
            for _ in range(rng.choice([1, 1, 2])):
                if rng.random() < 0.5 and header:
                    self._change_tensor(rng, header[rng.choice(list(header))])
                else:
                    change_json(rng, header)
            text = json.dumps(header).encode()
        if rng.random() < 0.3:
            data = mangled(rng, data, other)
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + data

    def _rebuilt(self, rng: random.Random, value: bytes) -> bytes:
        """The same tensors but one, which is another in its shape, dtype or numbers."""
        tensors = load_tensors(value)
        if not tensors:
            return value
        name = rng.choice(sorted(tensors))
        tensor, kind = tensors.pop(name), rng.randrange(8)
        if kind == 0:
            tensor = torch.tensor(rng.choice([0, -1, 2**40]))
        elif kind == 1:
            dtypes = [torch.float64, torch.int32, torch.bool, torch.bfloat16, torch.uint64]
            tensor = tensor.to(rng.choice(dtypes))
        elif kind == 2:
            tensor = tensor[None] if rng.random() < 0.5 else tensor.flatten()
        elif kind == 3 and tensor.dim():
            tensor = rng.choice([tensor[:-1], tensor[:0], torch.cat((tensor, tensor))])
        elif kind == 4 and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([-1, 0, 1, 100, 1000])
        elif kind == 5 and tensor.is_floating_point() and tensor.numel():
            number = rng.choice([float("nan"), float("inf"), -1e30, 3e38])
            tensor.view(-1)[rng.randrange(tensor.numel())] = number
        elif kind == 6:
            name = rng.choice(["", "ids.7", "state.", "state.z", "open.0", "index.z"])
        if kind < 7:
            tensors[name] = tensor.contiguous()
        return save_tensors(tensors)

    def _change_tensor(self, rng: random.Random, tensor: Any) -> None:
        """Change what is said of a tensor so that it may well fit its bytes."""
        if not isinstance(tensor, dict) or not isinstance(tensor.get("shape"), list):
            return
        kind, shape = rng.randrange(5), tensor["shape"]
        if kind == 0:
            tensor["dtype"] = rng.choice(
                ["F64", "F32", "I64", "U64", "C64", "I32", "BF16", "BOOL", "F8_E4M3", "F4"]
            )
        elif kind == 1:
            tensor["shape"] = rng.choice([[], [*shape, 1], [1, *shape], shape[::-1], [0, 2**63]])
        elif kind == 2:
            tensor["shape"] = [0, rng.choice(EXTREMES)]
            if isinstance(tensor.get("data_offsets"), list):
                tensor["data_offsets"] = tensor["data_offsets"][:1] * 2
        elif kind == 3:
            tensor["shape"] = [rng.choice(EXTREMES) for _ in range(rng.randrange(3))]
        else:
            tensor["dtype"], tensor["shape"] = "U8", [-1]
