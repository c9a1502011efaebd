"""One sitting: a model, a store and a stream put together; a text is read, a prompt is answered.

Owns the order in which they are made and closed, and what is measured on the way. Prints nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import TracebackType

import torch
from torch import Tensor

from kvstore import BlockSpec, Context, Store
from kvstore.cli import options
from kvstore.cli.memory import PeakMemory
from kvstore.cli.report import Index, Report, Tier
from kvstore.cli.usage import checking_input
from model import checkpoint
from model.generate import generate, prefill
from model.stream import Retrieval, Stream
from model.transformer import Transformer


class ClockedStream(Stream):
    """A stream that notes every read of its own and of its forks: (tokens, seconds)."""

    def __init__(
        self,
        model: Transformer,
        context: Context,
        retrieval: Retrieval,
        reads: list[tuple[int, float]] | None = None,
    ) -> None:
        super().__init__(model, context, retrieval)
        self.reads: list[tuple[int, float]] = [] if reads is None else reads

    def fork(self) -> ClockedStream:
        """Return a stream on a fork of the context, on the same clock."""
        self.save_state()
        return ClockedStream(self.model, self.context.fork(), self.retrieval, self.reads)

    def read(self, tokens: Tensor) -> Tensor:
        """Read bytes [T] and return the logits [256] of the byte that follows."""
        began = time.perf_counter()
        logits = super().read(tokens)
        self.reads.append((len(tokens), time.perf_counter() - began))
        return logits


class Session:
    """Reads one text and answers prompts on it. A context manager; not safe in two threads.

    args: of options.add_shared. Everything that can be wrong with them is found here, as
    ValueError, or HotTierTooSmallError where hot holds less than a selection, before anything is
    read.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        config = options.store_config(args)
        self._sampling = options.sampling(args)
        model = checkpoint.load(args.model).to(config.torch_device)
        sizes = model.config
        self._spec = BlockSpec.kv(sizes.block_size, sizes.head_dim, torch.bfloat16)
        retrieval = Retrieval(args.top_k or sizes.top_k, sizes.near, sizes.segment)
        self._streams = sizes.retrieving * sizes.heads
        self._tokens = 0
        self._prefill_seconds = 0.0
        with ExitStack() as stack:
            self._memory = stack.enter_context(PeakMemory())
            self._store = stack.enter_context(Store(self._spec, config))
            context = self._store.context(None, streams=self._streams, landmark_dim=sizes.head_dim)
            self._stream = ClockedStream(model, context, retrieval)
            self._open = stack.pop_all()

    def fills(self) -> dict[str, float]:
        """How full each tier is, 0 to 1."""
        usage = self._store.usage()
        return {n: t.used_bytes / t.capacity_bytes for n, t in usage.items() if t.capacity_bytes}

    def read(self, text: bytes, progress: Callable[[int], None]) -> None:
        """Read a text; tell after each piece how many tokens of it are read."""
        began = time.perf_counter()
        prefill(self._stream, text, progress)
        self._prefill_seconds += time.perf_counter() - began
        self._tokens += len(text)

    def ask(self, prompt: str) -> Iterator[bytes]:
        """Yield the answer byte by byte. Prompt and answer leave the reading as it is."""
        self._stream.reads.clear()
        return generate(self._stream, prompt, self._sampling)

    def report(self, answer: str, expected: str | None, correct: bool | None) -> Report:
        """Sum up what was read, and the answer to the last prompt."""
        self._memory.sample()
        figures = self._store.stats.snapshot()
        usage = self._store.usage()
        on_disk = usage["cold"]
        decode = [seconds for tokens, seconds in self._stream.reads[1:] if tokens == 1]
        sealed = self._stream.position // self._spec.block_size * self._streams
        return Report(
            tokens=self._tokens,
            answer=answer,
            expected=expected,
            correct=correct,
            prefill_seconds=self._prefill_seconds,
            prefill_tokens_per_s=self._tokens / max(self._prefill_seconds, 1e-9),
            decode_ms_per_token=1e3 * sum(decode) / len(decode) if decode else None,
            peak_memory_bytes=self._memory.peak_bytes,
            cache_bytes=sealed * self._spec.nbytes,
            tiers={
                name: Tier(**asdict(usage[name]), **counted)
                for name, counted in figures["tiers"].items()
            },
            lookups=figures["lookups"],
            not_found=figures["not_found"],
            prefetch=figures["prefetch"],
            index=Index(**asdict(self._stream.context.index.stats)),
            compression_ratio=(
                on_disk.blocks * self._spec.nbytes / on_disk.used_bytes if on_disk.blocks else None
            ),
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, traceback)


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Session]:
    """Make a session and close it in the end, whatever happens.

    UsageError for bad input, MemoryError where torch finds no room.
    """
    try:
        with checking_input():
            session = Session(args)
        with session:
            yield session
    except RuntimeError as error:
        # torch has no exception of its own for a CPU's memory.
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(f"not enough memory: {str(error).splitlines()[0]}") from error
        raise
