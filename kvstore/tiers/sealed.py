"""A value of LMDB behind a checksum over its key and itself (docs/format.md). Pure."""

from __future__ import annotations

import xxhash

from kvstore.errors import CorruptBlockError


def seal(key: bytes, payload: bytes) -> bytes:
    """Put a checksum over key and payload in front."""
    return _checksum(key, payload) + payload


def unseal(key: bytes, value: bytes | memoryview, name: str) -> bytes:
    """Return the payload; CorruptBlockError, which calls it by `name`, where it is another one."""
    payload = memoryview(value)[8:]
    if _checksum(key, payload) != value[:8]:
        raise CorruptBlockError(f"{name} is damaged: its checksum does not match")
    return bytes(payload)


def _checksum(key: bytes, payload: bytes | memoryview) -> bytes:
    checksum = xxhash.xxh3_64(key)
    checksum.update(payload)
    return checksum.digest()
