"""What a kept context has read, as a chain of digests: to tell whether a text begins with it.

Owns the chain's form. Never keeps the text itself, but for the bytes since the last whole page.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

PAGE = 4096


@dataclass(frozen=True)
class TextChain:
    """A text read so far: its length, the digest of its whole pages, and the bytes after them.

    A page's digest is the SHA-256 of the digest of those before it and its bytes.
    """

    tokens: int = 0
    digest: bytes = b""
    tail: bytes = b""

    def extended(self, text: bytes) -> TextChain:
        """Return the chain of this text and then another one."""
        digest, rest = self.digest, self.tail + text
        whole = len(rest) - len(rest) % PAGE
        for start in range(0, whole, PAGE):
            digest = hashlib.sha256(digest + rest[start : start + PAGE]).digest()
        return TextChain(self.tokens + len(text), digest, rest[whole:])

    def begins(self, text: bytes) -> bool:
        """Say whether another text begins with this one."""
        return len(text) >= self.tokens and TextChain().extended(text[: self.tokens]) == self

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"tokens": self.tokens, "digest": self.digest.hex(), "tail": self.tail.hex()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TextChain:
        """Read what `to_json` gave."""
        digest, tail = (bytes.fromhex(values[key]) for key in ("digest", "tail"))
        return cls(int(values["tokens"]), digest, tail)
