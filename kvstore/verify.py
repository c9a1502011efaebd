"""Whether what a store keeps is what was written, and what can be saved where it is not.

Owns the order of checks and repairs. Never changes what is whole: a damaged context goes back to
its last snapshot before the damage, or goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import CorruptBlockError
from kvstore.index import GraphFiles
from kvstore.manifest import Manifest, gone_back
from kvstore.saved_contexts import SavedContexts
from kvstore.store import Store


@dataclass
class Findings:
    """What a verification found.

    blocks, contexts: how many were looked at. damaged: what is not what was written, in words.
    broken: the damaged contexts; None where not even the manifest can be read, otherwise what it
    can go back to, or an empty dict where there is nothing. their_blocks: what they had, as far
    as that can be read. strange: keys that no save has written. records: keys of damaged records
    that are not of contexts. lost_blocks: damaged ones, by id.
    graphs: damaged index files. unreferenced: blocks that no context has: put otherwise, or left by
    a process that was killed.
    """

    blocks: int = 0
    contexts: int = 0
    damaged: list[str] = field(default_factory=list)
    broken: dict[str, Manifest | None] = field(default_factory=dict)
    strange: list[bytes] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    lost_blocks: list[int] = field(default_factory=list)
    their_blocks: list[NDArray[np.int64]] = field(default_factory=list)
    graphs: list[Path] = field(default_factory=list)
    unreferenced: int = 0


def verify(store: Store, progress: Callable[[int], None] = lambda blocks: None) -> Findings:
    """Read all that a store keeps: frames, records, manifests, the pieces they name, index files.

    Of a context that is open, what was saved last is looked at; blocks that are still to be written
    are not. Tell now and then how many blocks are read. OtherFormatError where a context is of
    another version of the format, and may be whole; ValueError for a temporary store.
    """
    if store.config.directory is None:
        raise ValueError("a temporary store keeps nothing that could be verified")
    store.kept.require_version()
    lost = store.verify(progress)
    findings = Findings(blocks=len(store), lost_blocks=sorted(lost))
    findings.damaged += [lost[block] for block in findings.lost_blocks]
    for key in store.record_keys():
        if not key.startswith((b"context/", b"piece/")):
            try:
                store.get_record(key)
            except CorruptBlockError as error:
                findings.damaged.append(str(error))
                findings.records.append(key)
    present = np.setdiff1d(store.ids(), findings.lost_blocks)
    used = [np.empty(0, np.int64), *(each.block_ids() for each in store.contexts.values())]
    for name in store.kept.names():
        findings.contexts += 1
        try:
            manifest = store.kept.require(name)
            used.append(_verify_context(store.kept, name, manifest, present, findings))
        except CorruptBlockError as error:
            findings.damaged.append(str(error))
            findings.broken[name] = None
    findings.strange = store.kept.strange_keys()
    findings.damaged += [f"record {key!r} is none of ours" for key in findings.strange]
    findings.graphs = _graph_files(store).damaged()
    findings.damaged += [f"the index file {path} is damaged" for path in findings.graphs]
    findings.unreferenced = len(np.setdiff1d(store.ids(), np.concatenate(used)))
    return findings


def repair(store: Store, findings: Findings) -> list[str]:
    """Put right what was found, as far as that can be done; return in words what was lost.

    ValueError if a context is open.
    """
    if store.contexts:
        raise ValueError("a store is repaired while no context is open")
    done = []
    for path in findings.graphs:
        _graph_files(store).remove(path)
        done.append(f"{path} was removed: it is built anew when it is needed")
    unreadable = [*findings.strange, *findings.records]
    store.put_records(dict.fromkeys(unreadable))
    done += [f"record {key!r} was removed: it says nothing that can be read" for key in unreadable]
    for name, back in findings.broken.items():
        before = None if back is None else store.kept.require(name)
        length = "" if before is None else f" of {_tokens(store, before):,} tokens"
        store.kept.replace(name, back or None)
        if not back:
            done.append(f"context {name!r}{length} was removed: none of its saves is whole")
        elif before is not None and before["saved"] == back["saved"]:
            lost = len(before["snapshots"]) - len(back["snapshots"])
            done.append(f"context {name!r} is whole, without {lost} damaged snapshots")
        else:
            left = _tokens(store, back)
            done.append(f"context {name!r}{length} was cut back to its save at {left:,}")
    store.kept.sweep()
    used = store.kept.used_ids()
    had = np.concatenate([np.empty(0, np.int64), findings.lost_blocks, *findings.their_blocks])
    unused = np.setdiff1d(np.intersect1d(had.astype(np.int64), store.ids()), used)
    store.delete(unused)
    if len(unused):
        done.append(
            f"{len(unused):,} blocks that nothing has any more were removed, "
            f"{len(np.intersect1d(unused, findings.lost_blocks)):,} of them damaged"
        )
    return done


def _tokens(store: Store, manifest: Manifest) -> int:
    """Return how many tokens a save has in its longest stream."""
    counts = zip(manifest["counts"], manifest["filled"], strict=True)
    return max(int(blocks * store.spec.block_size + filled) for blocks, filled in counts)


def _graph_files(store: Store) -> GraphFiles:
    assert store.config.directory is not None, "what is verified is kept"
    return GraphFiles(store.config.directory / "index", writable=False)


def _verify_context(
    kept: SavedContexts,
    name: str,
    manifest: Manifest,
    present: NDArray[np.int64],
    findings: Findings,
) -> NDArray[np.int64]:
    """Verify one context; return the ids that it has as far as they can be read."""
    whole, ids, fault = _whole_counts(kept, name, manifest, present)
    rest = _fault_of_rest(kept, name, manifest)
    snapshots = [_fault_of_rest(kept, name, manifest | each) for each in manifest["snapshots"]]
    faults = [each for each in (fault, rest, *snapshots) if each]
    if not faults:
        return ids
    findings.damaged += faults
    findings.their_blocks.append(ids)
    good = [
        i
        for i, each in enumerate(manifest["snapshots"])
        if not snapshots[i]
        and all(count <= stop for count, stop in zip(each["counts"], whole, strict=True))
    ]
    kept_snapshots = [manifest["snapshots"][i] for i in good]
    if not fault and not rest:
        findings.broken[name] = manifest | {"snapshots": kept_snapshots}
    elif good:
        back = gone_back(manifest, good[-1])
        findings.broken[name] = back | {"snapshots": kept_snapshots}
    else:
        findings.broken[name] = {}
    return ids


def _whole_counts(
    kept: SavedContexts, name: str, manifest: Manifest, present: NDArray[np.int64]
) -> tuple[list[int], NDArray[np.int64], str | None]:
    """Return up to which block each stream is whole, the ids that were read, and what is wrong."""
    whole = [0] * manifest["streams"]
    open_streams, found = set(range(len(whole))), [np.empty(0, np.int64)]
    fault: str | None = None
    try:
        for piece in kept.past(name, manifest):
            for s in range(len(whole)):
                if (held := piece.get(f"ids.{s}")) is None:
                    continue  # of a stream without new blocks
                ids = held.numpy()
                found.append(ids)
                lacking = np.flatnonzero(~np.isin(ids, present))
                if s in open_streams and len(lacking):
                    open_streams.discard(s)
                    block = whole[s] + int(lacking[0])
                    place = f"stream {s}, block {block} (id {ids[lacking[0]]})"
                    fault = fault or f"context {name!r}: {place} is not there"
                    whole[s] = block
                elif s in open_streams:
                    whole[s] += len(ids)
    except CorruptBlockError as error:
        fault = fault or str(error)
    return whole, np.concatenate(found), fault


def _fault_of_rest(kept: SavedContexts, name: str, manifest: Manifest) -> str | None:
    try:
        kept.rest(name, manifest)
    except CorruptBlockError as error:
        return str(error)
    return None
