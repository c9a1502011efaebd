"""Mutations of bytes and of JSON, which all targets share: owns the extremes they are made with."""

from __future__ import annotations

import json
import random
from typing import Any

EXTREMES = [0, 1, 2, 3, 7, 8, 15, 16, 39, 40, 41, 127, 128, 255, 256, 32767, 32768, 65535, 65536]
EXTREMES += [2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**48, 2**63 - 1, 2**63, 2**64 - 1]


def mangled(rng: random.Random, data: bytes, other: bytes = b"", head: int = 0) -> bytes:
    """Return data changed in one to four places, or else random bytes.

    other: to splice with. head: how many bytes at the beginning deserve half of the changes.
    """
    if rng.random() < 0.02:
        return rng.randbytes(rng.choice([0, 1, 8, 39, 40, 41, 100, rng.randrange(1000)]))
    value = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 4])):
        size = len(value)
        if not size:
            return bytes(value)
        at = rng.randrange(min(head, size) if head and rng.random() < 0.5 else size)
        length = rng.choice([1, 1, 2, 4, 8, 16, rng.randrange(1, size + 1)])
        kind = rng.randrange(12)
        if kind < 3:
            value[at] ^= 1 << rng.randrange(8)
        elif kind < 5:
            value[at] = rng.choice([0, 1, 127, 128, 254, 255, rng.randrange(256)])
        elif kind == 5:
            width = rng.choice([1, 2, 4, 8])
            extreme = rng.choice(EXTREMES) & (1 << 8 * width) - 1
            value[at : at + width] = extreme.to_bytes(width, rng.choice(["little", "big"]))
        elif kind == 6:
            del value[at:]
        elif kind == 7:
            del value[at : at + length]
        elif kind == 8:
            value[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8, 100]))
        elif kind == 9:
            value[at:at] = value[at : at + length]
        elif kind == 10:
            value[at : at + length] = bytes(min(length, size - at))
        elif other:
            value[at:] = other[rng.choice([at, rng.randrange(len(other) + 1)]) :]
        else:
            value += rng.randbytes(rng.choice([1, 8, 40, 1000]))
    return bytes(value)


STRINGS = ["", "0", "a", "hnsw", "exact", "auto", "ids.0", "F64", "BOOL", "C64", "torch.bfloat16"]
STRINGS += ["float32", "\ud800", "\0", "a" * 300, "00", "zz", "é"]
SCALARS: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 4, 5, 64, 2**20, 2**20 + 1, 2**31]
SCALARS += [2**48, 2**48 + 1, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, -0.0, 0.5]
SCALARS += [1e308, float("nan"), float("inf"), float("-inf"), 1.0, 2.0]


def any_json(rng: random.Random, depth: int = 0) -> Any:
    """A random JSON value."""
    kind = rng.randrange(9)
    if kind < 4 or depth > 3:
        return rng.choice(SCALARS)
    if kind < 6:
        return rng.choice(STRINGS)
    if kind == 6:
        return rng.randrange(-5, 100)
    if kind == 7:
        return [any_json(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(STRINGS): any_json(rng, depth + 1) for _ in range(rng.randrange(4))}


def any_place(rng: random.Random, root: Any) -> tuple[Any, Any] | None:
    """A place in a JSON value, each as likely: what holds it, and its key or number there."""
    holders: list[Any] = []
    todo = [root]
    while todo:
        holder = todo.pop()
        holders.append(holder)
        values = holder.values() if isinstance(holder, dict) else holder
        todo += [value for value in values if isinstance(value, (dict, list))]
    sizes = [len(holder) for holder in holders]
    if not any(sizes):
        return None
    holder = rng.choices(holders, sizes)[0]
    return holder, rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))


def change_json(rng: random.Random, root: Any) -> None:
    """Change a JSON object or list in one place."""
    holder: Any
    key: Any
    # Half of the time from the top down, where one place of few is chosen: lists are long.
    if rng.random() < 0.5:
        holder, key = any_place(rng, root) or ({"": 0}, "")
    else:
        holder, key = {"": root}, ""
        while isinstance(holder[key], (dict, list)) and holder[key]:
            holder = holder[key]
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if rng.random() < 0.4:
                break
    kind = rng.randrange(9)
    value = holder[key] if (isinstance(holder, list) or key in holder) else None
    if kind < 3:
        holder[key] = any_json(rng)
    elif kind == 3 and type(value) is int:
        holder[key] = value + rng.choice([-1, 1, 2, -2, 2**31, -(2**31), 2**48])
    elif kind == 4 and value is not root and (isinstance(holder, list) or key in holder):
        del holder[key]
    elif kind == 5 and isinstance(holder, list):
        holder[key:key] = [value] * rng.choice([1, 2, 10, 1000])
    elif kind == 5:
        holder[rng.choice(STRINGS)] = any_json(rng)
    elif kind == 6 and isinstance(value, list):
        value.extend(any_json(rng) for _ in range(rng.randrange(1, 5)))
    elif kind == 7:
        a, b = any_place(rng, root) or (holder, key)
        holder[key] = json.loads(json.dumps(a[b])) if value is not root else value
    elif isinstance(value, list) and len(value) > 1:
        rng.shuffle(value)
    else:
        holder[key] = rng.choice([[], {}, "", [value], {"": value}])


def nested(rng: random.Random, text: str) -> str:
    """Put something deep or long in place of a value of a JSON text."""
    deep = rng.choice([10, 100, 990, 3000, 100_000])
    what = rng.choice(
        ["[" * deep + "]" * deep, '{"":' * deep + "1" + "}" * deep, "[" * deep, "9" * deep]
    )
    at = [i for i, c in enumerate(text) if c in ":,["]
    start = rng.choice(at) + 1 if at else 0
    return text[:start] + what + text[start + rng.randrange(3) :]
