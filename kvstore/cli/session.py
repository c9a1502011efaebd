"""One sitting: a model, a store and a stream put together; texts are read, prompts are answered.

Owns the order in which they are made and closed, and what is measured on the way. Prints nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from kvstore import KVStoreError, Store, StoreConfig
from kvstore.cli import options
from kvstore.cli.memory import PeakMemory
from kvstore.cli.report import Index, Report, Tier
from kvstore.cli.text_chain import TextChain, TextDigests
from kvstore.cli.usage import checking_input
from kvstore.errors import CorruptBlockError, OtherBlocksError, OtherFormatError, brief
from kvstore.saved_contexts import SavedContexts
from kvstore.tiers.spec_file import read_spec
from model import checkpoint
from model.families import family_of
from model.generate import Sampling, generate, prefill
from model.stream import Stream

SNAPSHOT = 2**16
"""Tokens after which a kept context is saved while it is read, at most: what an interruption or
damage may cost. It is saved whenever an eighth more is read, and at least 4,096 tokens."""


class Session:
    """Reads texts into a context and answers prompts on it, in one thread.

    Made by `begin` or `resume`, and ended by what they put on their stack. A kept context that is
    left by an error is as it was saved last.
    """

    def __init__(
        self,
        stream: Stream,
        sampling: Sampling,
        memory: PeakMemory,
        chain: TextChain,
        began: float | None = None,
    ) -> None:
        """chain: of what the stream has read; began: when the first answer was wanted."""
        self._stream = stream
        self._context = stream.context
        self._store = stream.store
        self._sampling = sampling
        self._memory = memory
        self._chain = chain
        self._began = began
        self._kept = self._context.name is not None and not self._store.config.read_only
        self._read_tokens, self._reused_tokens = 0, stream.position
        self._prefill_seconds = 0.0
        self._first_token_seconds: float | None = None
        self._reads: list[tuple[int, float]] = []  # tokens and seconds, of forks too
        stream.clock = lambda tokens, seconds: self._reads.append((tokens, seconds))

    def fills(self) -> dict[str, float]:
        """How full each tier is, 0 to 1."""
        usage = self._store.usage()
        return {n: t.used_bytes / t.capacity_bytes for n, t in usage.items() if t.capacity_bytes}

    @property
    def tokens(self) -> int:
        """How many tokens the context has read."""
        return self._stream.position

    def read(self, text: bytes, progress: Callable[[int], None] = lambda tokens: None) -> None:
        """Read a text, or go on with one that the context begins; tell how much of it is read.

        A kept context is saved every so many tokens, and at the end; each save can be gone back to.
        """
        began = time.perf_counter()
        self._reused_tokens = saved = self._stream.position
        text = text[saved:]
        kept_to = 0

        def note(tokens: int) -> None:
            nonlocal kept_to
            step = min(SNAPSHOT, max(2**12, (saved + kept_to) // 8))
            if self._kept and tokens - kept_to >= step:
                self._save(text[kept_to:tokens], snapshot=True)
                kept_to = tokens
            progress(saved + tokens)

        if text:
            prefill(self._stream, text, note)
        if self._kept:
            self._save(text[kept_to:], snapshot=kept_to < len(text))
        self._prefill_seconds += time.perf_counter() - began
        self._read_tokens += len(text)

    def ask(self, prompt: str) -> Iterator[bytes]:
        """Yield the answer byte by byte. Prompt and answer leave the reading as it is."""
        self._reads.clear()
        began = time.perf_counter() if self._began is None else self._began
        self._began = self._first_token_seconds = None
        for piece in generate(self._stream, prompt, self._sampling):
            if self._first_token_seconds is None:
                self._first_token_seconds = time.perf_counter() - began
            yield piece

    def append(self, text: bytes) -> None:
        """Read more, behind all that was read, and keep it."""
        prefill(self._stream, text)
        self._save(text)

    def _save(self, text: bytes, snapshot: bool = False) -> None:
        """Keep what was read, of which this text is new."""
        self._chain = self._chain.extended(text)
        self._context.info["text"] = self._chain.to_json()
        self._stream.save_state()
        self._context.save(snapshot=snapshot)

    def report(
        self, answer: str | None, expected: str | None = None, correct: bool | None = None
    ) -> Report:
        """Sum up what was read, and the answer to the last prompt."""
        self._memory.sample()
        figures = self._store.stats.snapshot()
        usage = self._store.usage()
        on_disk = usage["cold"]
        decode = [seconds for tokens, seconds in self._reads[1:] if tokens == 1]
        spec = self._store.spec
        sealed = self.tokens // spec.block_size * self._context.streams
        return Report(
            tokens=self.tokens,
            reused_tokens=self._reused_tokens,
            answer=answer,
            expected=expected,
            correct=correct,
            prefill_seconds=self._prefill_seconds,
            prefill_tokens_per_s=(
                self._read_tokens / self._prefill_seconds if self._read_tokens else None
            ),
            first_token_seconds=self._first_token_seconds,
            decode_ms_per_token=1e3 * sum(decode) / len(decode) if decode else None,
            peak_memory_bytes=self._memory.peak_bytes,
            cache_bytes=sealed * spec.nbytes,
            tiers={
                name: Tier(**asdict(usage[name]), **counted)
                for name, counted in figures["tiers"].items()
            },
            lookups=figures["lookups"],
            not_found=figures["not_found"],
            prefetch=figures["prefetch"],
            index=Index(**asdict(self._context.index.stats)),
            compression_ratio=(
                on_disk.blocks * spec.nbytes / on_disk.used_bytes if on_disk.blocks else None
            ),
        )


def begin(args: argparse.Namespace, stack: ExitStack, text: bytes = b"") -> Session:
    """Make a session on an empty context, or on what a kept one has read of this text.

    args: of options.add_model, add_store, add_directory and add_answer; `context` and `reuse` are
    `run`'s own. Everything that can be wrong with them is found here, as ValueError, or
    HotTierTooSmallError where hot holds less than a selection, before anything is read: both are
    wrong usage.
    """
    config = options.store_config(args)
    sampling = options.sampling(args)
    model = checkpoint.load(args.model).to(config.torch_device)
    read_with = family_of(model).stream
    retrieval = read_with.retrieval_of(model.config, args.top_k)
    layout = read_with.layout(model.config)
    memory = stack.enter_context(PeakMemory())
    try:
        store = stack.enter_context(Store(layout.spec, config))
    except OtherBlocksError as error:
        raise ValueError(
            f"--store {args.store} holds other blocks than {args.model} makes: a store is for "
            "models of one kind and size, so give another --store"
        ) from error
    name: str | None = getattr(args, "context", None)
    chain, fingerprint = TextChain(), None
    if name is not None:
        fingerprint = checkpoint.fingerprint(model)
        made = {
            "model": checkpoint.full_name(args.model),
            "retrieval": asdict(retrieval),
            "index": config.index.kind,
            "precision": config.precision,
        }
        chain = _read_before(store.kept, name, text, fingerprint, made, args.reuse)
    context = store.context(
        name,
        streams=layout.streams,
        landmark_dim=layout.landmark_dim,
        fingerprint=fingerprint,
    )
    if name is not None:
        context.info |= made
    return Session(read_with(model, context, retrieval), sampling, memory, chain)


def _read_before(
    kept: SavedContexts,
    name: str,
    text: bytes,
    fingerprint: str,
    made: dict[str, Any],
    reuse: bool,
) -> TextChain:
    """Return what of a text the context of this name has read, or can have from another one."""
    digests = TextDigests(text)
    longest, source, at = TextChain(), name, None
    for each in kept.names():
        try:
            manifest = kept.require(each)
        except (CorruptBlockError, OtherFormatError):
            if each == name:
                raise
            continue  # what another one has read cannot be had
        info = manifest["info"]
        by_us = manifest["fingerprint"] == fingerprint and "text" in info
        alike = by_us and all(
            {"precision": "exact", **info}.get(key) == made[key]
            for key in ("retrieval", "index", "precision")
        )
        if each == name:
            reason = "has read another text"
            if not reuse:
                reason = "is kept already"
            elif not by_us:
                reason = f"was read by another model ({info.get('model', 'of another program')})"
            elif not alike:
                reason = "was read with another --top-k, --index or --precision"
            elif digests.begin_with(chain := TextChain.from_json(info["text"])):
                return chain
            elif chain.tokens > len(text):
                reason = f"has read {chain.tokens:,} tokens, more than the {len(text):,} of this"
            raise ValueError(
                f"context {name!r} {reason}: choose another name, or remove it with "
                "`kvstore contexts DIR rm`"
            )
        if not (reuse and alike):
            continue
        places: list[tuple[dict[str, Any], int | None]] = [(info, None)]
        places += [(snap["info"], i) for i, snap in enumerate(manifest["snapshots"])]
        for of_place, snapshot in places:
            chain = TextChain.from_json(of_place["text"])
            if chain.tokens > longest.tokens and digests.begin_with(chain):
                longest, source, at = chain, each, snapshot
    if longest.tokens:
        kept.fork(source, name, at)
        kept.note(name, asked=None)
    return longest


def resume(args: argparse.Namespace, stack: ExitStack, began: float | None = None) -> Session:
    """Make a session on a kept context, with the model that made it.

    args: of options.add_asking. began: when the first question was asked,
    if it was before. KeyError where there is no such context.
    """
    # Only to read, so that several may ask at once, beside one who writes.
    config = replace(options.store_config(args), read_only=not args.append)
    sampling = options.sampling(args)
    memory = stack.enter_context(PeakMemory())
    store = stack.enter_context(Store.open(args.store, config))
    manifest = store.kept.require(args.context)
    info = manifest["info"]
    if "model" not in info:
        raise ValueError(f"context {args.context!r} says no model: `kvstore run` has not made it")
    read_by = f"context {args.context!r} was read by {brief(info['model'])}"
    try:
        model = checkpoint.load(args.model or info["model"]).to(config.torch_device)
    except ValueError as error:
        if args.model or Path(info["model"]).exists():
            raise
        hint = "if it was moved, say with --model FILE where to"
        raise ValueError(f"{read_by}, which is not there: {hint}") from error
    if checkpoint.fingerprint(model) != manifest["fingerprint"]:
        hint = f"{args.model} is another model" if args.model else "its weights have changed since"
        raise ValueError(f"{read_by}: {hint}")
    context = store.context(args.context)
    read_with = family_of(model).stream
    retrieval = read_with.way(**info["retrieval"])
    chain = TextChain.from_json(info["text"])
    return Session(read_with(model, context, retrieval), sampling, memory, chain, began)


def note_asked(args: argparse.Namespace) -> None:
    """Let a kept context say when it was asked last, unless somebody else has the store."""
    with suppress(ValueError, KeyError, KVStoreError):
        spec = read_spec(Path(args.store))
        config = StoreConfig(hot=spec.nbytes, warm=1, cold=args.cold, device="cpu")
        with Store.open(args.store, config) as store:
            store.kept.note(args.context, asked=time.time())


@contextmanager
def opened(
    args: argparse.Namespace, make: Callable[[argparse.Namespace, ExitStack], Session]
) -> Iterator[Session]:
    """Make a session and close it in the end, whatever happens.

    UsageError for bad input, MemoryError where torch finds no room.
    """
    try:
        with ExitStack() as stack:
            with checking_input():
                session = make(args, stack)
            yield session
    except RuntimeError as error:
        # torch has no exception of its own for a CPU's memory.
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(str(error).splitlines()[0]) from error
        raise
