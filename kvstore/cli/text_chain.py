"""What a kept context has read, as a chain of digests: to tell whether a text begins with it.

Owns the chain's form. Never keeps the text itself, but for the bytes since the last whole page.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from kvstore.errors import brief

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

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"tokens": self.tokens, "digest": self.digest.hex(), "tail": self.tail.hex()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TextChain:
        """Read what `to_json` gave; ValueError for anything else."""
        try:
            tokens = values["tokens"]
            digest, tail = (bytes.fromhex(values[key]) for key in ("digest", "tail"))
            if type(tokens) is not int or tokens < 0 or len(tail) != tokens % PAGE:
                raise ValueError(f"{tokens!r} tokens with {len(tail)} left over")
        except (ValueError, KeyError, TypeError) as error:
            said = f"the chain of what was read makes no sense: {brief(error)}"
            raise ValueError(said) from None
        return cls(tokens, digest, tail)


class TextDigests:
    """A text, and what the chain of its beginnings would be."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._pages = [b""]  # the digest after so many whole pages

    def begin_with(self, chain: TextChain) -> bool:
        """Say whether the text begins with what a chain is of."""
        pages = chain.tokens // PAGE
        if len(self._text) < chain.tokens:
            return False
        while len(self._pages) <= pages:
            start = (len(self._pages) - 1) * PAGE
            page = self._text[start : start + PAGE]
            self._pages.append(hashlib.sha256(self._pages[-1] + page).digest())
        tail = self._text[pages * PAGE : chain.tokens]
        return (self._pages[pages], tail) == (chain.digest, chain.tail)
