"""How a kept context lies in a store's records: a manifest and parts, in pieces.

Owns the keys and the order of writing. Never looks into a part.

Keys are `context/NAME/manifest` and `context/NAME/GENERATION/PART/PIECE`. A save writes the parts
under a new generation, then the manifest that names it, then forgets the old ones: what is read is
always one whole save, the last that ended.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from kvstore.errors import CorruptBlockError

if TYPE_CHECKING:
    from kvstore.store import Store

FORMAT = 1
PIECE = 4 * 2**20
"""Bytes of a record at most."""

LONGEST_NAME = 300
"""Bytes of a name in its key; LMDB's keys have at most 511."""

_PREFIX = b"context/"
_MANIFEST = b"/manifest"


def saved_names(store: Store) -> list[str]:
    """Return the names of the contexts that a store keeps."""
    return [
        unquote(key[len(_PREFIX) : -len(_MANIFEST)].decode())
        for key in store.record_keys(_PREFIX)
        if key.endswith(_MANIFEST)
    ]


class SavedContext:
    """The records of the context with this name, be there any or not."""

    def __init__(self, store: Store, name: str) -> None:
        quoted = quote(name, safe="").encode()
        if not name or len(quoted) > LONGEST_NAME:
            raise ValueError(f"a context's name has 1 to {LONGEST_NAME} bytes, not {len(quoted)}")
        self.name = name
        self._store = store
        self._root = _PREFIX + quoted

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest; None if there is none. ValueError if it is of another version."""
        value = self._store.get_record(self._root + _MANIFEST)
        if value is None:
            return None
        manifest: dict[str, Any] = json.loads(value)
        if manifest["format"] != FORMAT:
            raise ValueError(
                f"context {self.name!r} was saved in format {manifest['format']}, this version "
                f"reads format {FORMAT}; delete it, or use the version that wrote it"
            )
        return manifest

    def part(self, manifest: dict[str, Any], part: str) -> bytes:
        """Return a part's bytes. CorruptBlockError if a piece is not there."""
        pieces = []
        for i in range(manifest["pieces"][part]):
            piece = self._store.get_record(self._key(manifest["generation"], part, i))
            if piece is None:
                raise CorruptBlockError(f"context {self.name!r} lacks piece {i} of its {part}")
            pieces.append(piece)
        return b"".join(pieces)

    def write(self, manifest: dict[str, Any], parts: Iterable[tuple[str, bytes]]) -> None:
        """Save parts and the manifest, in place of what there was."""
        last = self.manifest()
        generation = 0 if last is None else last["generation"] + 1
        self._forget_all_but(None if last is None else last["generation"])
        pieces: dict[str, int] = {}
        for part, value in parts:
            pieces[part] = -(-len(value) // PIECE)
            for i in range(pieces[part]):
                key = self._key(generation, part, i)
                self._store.put_record(key, value[i * PIECE : (i + 1) * PIECE])
        manifest = manifest | {"format": FORMAT, "generation": generation, "pieces": pieces}
        self._store.put_record(self._root + _MANIFEST, json.dumps(manifest).encode())
        self._forget_all_but(generation)

    def forget(self) -> None:
        """Remove the manifest, then everything else."""
        self._store.put_record(self._root + _MANIFEST, None)
        self._forget_all_but(None)

    def _key(self, generation: int, part: str, piece: int) -> bytes:
        return b"%s/%d/%s/%06d" % (self._root, generation, part.encode(), piece)

    def _forget_all_but(self, generation: int | None) -> None:
        keep = None if generation is None else b"%s/%d/" % (self._root, generation)
        for key in self._store.record_keys(self._root + b"/"):
            if not key.endswith(_MANIFEST) and (keep is None or not key.startswith(keep)):
                self._store.put_record(key, None)
