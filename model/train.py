"""The training loop: `python -m model.train landmark --corpus DIR` makes the shipped weights.

Every step's batch follows from (seed, step), so a run that was stopped goes on as if it had not
been. State and log lie in --run; the finished weights go to --out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from model import checkpoint
from model.config import ModelConfig
from model.data import Corpus, Sample, Tasks, batch, read_text
from model.landmark import LandmarkAttention
from model.layers import rotate
from model.transformer import Transformer


@dataclass(frozen=True)
class Stage:
    """`steps` steps of `count` samples of `length` bytes.

    gating: the landmarks' share in the attention (see grouped_softmax_attention) at the stage's
    end; it slides there from that of the stage before. distractors: see LandmarkAttention.forward;
    chain: how many of the samples are one passage, each of which may retrieve from those before
    it; needles, mentions, repeats, gibberish: see Tasks.
    """

    steps: int
    length: int
    count: int
    gating: float = 1.0
    distractors: int = 0
    chain: int = 0
    needles: float = 0.5
    mentions: float = 0.4
    repeats: float = 0.5
    gibberish: float = 0.3


CURRICULUM = (
    Stage(500, 256, 32, gating=0.0, needles=0.3, mentions=0.7, repeats=0.7, gibberish=0.5),
    Stage(1000, 256, 32, needles=0.3, mentions=0.6, repeats=0.7, gibberish=0.5),
    Stage(1000, 256, 32),
    Stage(3000, 512, 16, distractors=4, chain=6, needles=0.6),
    Stage(1500, 512, 16, distractors=8, chain=6, needles=0.6),
)
"""The landmarks come in once the attention can copy. With full gating from the beginning, copying
is not learnt in as many steps."""


def stage_of(step: int, curriculum: tuple[Stage, ...]) -> Stage:
    """Return the stage that a step belongs to."""
    for stage in curriculum:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return curriculum[-1]


def learning_rate(step: int, total: int, peak: float, warmup: int = 200) -> float:
    """Rise linearly, then fall along a cosine to a twentieth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def gating_at(step: int, curriculum: tuple[Stage, ...]) -> float:
    """Return the landmarks' share at a step."""
    last = curriculum[0].gating
    for stage in curriculum:
        if step < stage.steps:
            return last + (stage.gating - last) * step / stage.steps
        step, last = step - stage.steps, stage.gating
    return last


def optimizers_of(model: Transformer, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al. 2024) for the layers' matrices and AdamW for everything else."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"training needs torch 2.9 or newer, this is {torch.__version__}")
    named = list(model.layers.named_parameters())
    matrices = [p for _, p in named if p.dim() == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=1.5 * rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def tensors(samples: list[Sample], block_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return texts, weights, passages, blocks set apart and asking bytes, as `loss_of` has them."""
    said = torch.from_numpy(np.stack([s.said for s in samples]))
    asking = torch.zeros(said.shape, dtype=torch.bool)
    for row, sample in zip(asking, samples, strict=True):
        if sample.asked:
            row[sample.asked] = True
    parts = (
        torch.from_numpy(np.stack([s.text for s in samples]).astype(np.int64)),
        torch.from_numpy(np.stack([s.weight for s in samples])),
        torch.tensor([s.passage for s in samples]),
        said.unflatten(1, (-1, block_size)).any(dim=-1),
        asking.unflatten(1, (-1, block_size)),
    )
    return tuple(part.to(device) for part in parts)


def loss_of(
    model: Transformer,
    text: Tensor,  # int64 [B, length]
    weight: Tensor,  # float32 [B, length]
    distractors: int = 0,
    gating: float | Tensor = 1.0,
    passage: Tensor | None = None,  # int64 [B], see LandmarkAttention.forward
    apart: Tensor | None = None,  # bool [B, N]
    asking: Tensor | None = None,  # bool [B, N, block_size]
) -> Tensor:
    """Return the weighted mean cross entropy, nats a byte."""
    blocks = text.unflatten(1, (-1, model.config.block_size))
    with torch.autocast(text.device.type, torch.bfloat16):
        logits = model(blocks, distractors, gating, passage, apart, asking)
    logits = logits.float().flatten(1, 2)[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    return (loss * weight).sum() / weight.sum()


@torch.no_grad()
def examine(model: Transformer, held_out: np.ndarray, seed: int) -> dict[str, Any]:
    """Measure on text not trained on: bits a byte, needles found, and the landmarks' margin.

    margin: for each retrieving layer and head, the score of the best block that holds the key
    minus the best score of any block of other texts, all scored at one place, as search does; the
    mean over the readings and the least of all, for more and more blocks. It falls slowly with
    the number of blocks and has to stay above zero up to where the model is to be used.
    """
    config = model.config
    device = next(model.parameters()).device
    rng = np.random.default_rng([seed, 1 << 20])
    filler = _Excerpts(held_out)
    tasks = Tasks(filler, needles=1.0)  # type: ignore[arg-type]
    tasks.filler = lambda rng, length: (  # type: ignore[method-assign]
        filler.window(rng, length),
        1.0,
    )
    report: dict[str, Any] = {}
    for length, count in ((1024, 16), (512, 32)):
        text = np.stack([filler.window(rng, length) for _ in range(count)]).astype(np.int64)
        x = torch.from_numpy(text).to(device)
        nats = loss_of(model, x, torch.ones(x.shape, device=device))
        report[f"bits_per_byte_{length}"] = round(float(nats) / math.log(2), 4)
        samples: list[Any] = []
        while len(samples) < count:
            sample: Any = tasks.hide(rng, length)
            if b" pass key is" in bytes(sample.text[: sample.answer.start][-14:]):
                samples.append(sample)
        x = torch.from_numpy(np.stack([s.text for s in samples]).astype(np.int64)).to(device)
        guess = model(x.unflatten(1, (-1, config.block_size))).flatten(1, 2).argmax(-1)
        right = sum(
            bool((guess[i, s.answer.start - 1 : s.answer.stop - 1] == x[i, s.answer]).all())
            for i, s in enumerate(samples)
        )
        report[f"found_{length}"] = right / count
    report["margin"] = _margins(model, filler, samples)
    report["copying"] = _copying(model, filler)
    return report


def _copying(model: Transformer, filler: _Excerpts) -> float:
    """Bits a byte that are saved on a passage of 100 bytes said again 200 bytes later."""
    rng = np.random.default_rng(0)
    size, first, again = 100, 40, 340
    text = np.stack([filler.window(rng, 512) for _ in range(24)]).astype(np.int64)
    text[:, again : again + size] = text[:, first : first + size]
    x = torch.from_numpy(text).to(next(model.parameters()).device)
    logits = model(x.unflatten(1, (-1, model.config.block_size))).flatten(1, 2)
    nats = F.cross_entropy(logits[:, :-1].mT, x[:, 1:], reduction="none")
    saved = nats[:, first + 8 : first + size - 1] - nats[:, again + 8 : again + size - 1]
    return round(float(saved.mean()) / math.log(2), 4)


class _Excerpts:
    """A held-out text, as a corpus."""

    def __init__(self, text: np.ndarray) -> None:
        self.text = text

    def window(self, rng: np.random.Generator, length: int) -> np.ndarray:
        start = rng.integers(0, len(self.text) - length)
        return self.text[start : start + length]


def _margins(model: Transformer, filler: _Excerpts, samples: list[Any]) -> dict[str, Any]:
    config = model.config
    device = next(model.parameters()).device
    stride, near = config.block_size + 1, config.near
    offsets = torch.arange(stride, device=device)
    still = model.rotary.table(offsets, torch.float32)
    moved = model.rotary.table(offsets + (near + 1) * stride, torch.float32)

    def projections(text: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """Return each retrieving layer's queries and landmarks of text [B, length]."""
        seen: list[tuple[Tensor, Tensor]] = []

        def look(module: LandmarkAttention, inputs: tuple[Tensor, ...]) -> None:
            q, k, _ = module.project(inputs[0])  # [B, H, N, P, D]
            seen.append((rotate(q, moved), rotate(k, still)[..., -1, :]))

        hooks = [
            layer.attention.register_forward_pre_hook(look)
            for layer in model.stack
            if isinstance(layer.attention, LandmarkAttention)
        ]
        x = torch.from_numpy(text.astype(np.int64)).to(device)
        model.hidden(x.unflatten(1, (-1, config.block_size)))
        for hook in hooks:
            hook.remove()
        return seen

    rng = np.random.default_rng(0)
    pools: list[list[Tensor]] = []
    for _ in range(8):
        text = np.stack([filler.window(rng, 1024) for _ in range(16)])
        pools.append([k.transpose(0, 1).flatten(1, 2) for _, k in projections(text)])
    pool = [torch.cat(parts, dim=1) for parts in zip(*pools, strict=True)]  # [H, M, D] a layer
    asked = projections(np.stack([s.text for s in samples]))
    margins: dict[str, Any] = {}
    for layer, (q, k) in enumerate(asked):
        for head in range(config.heads):
            rows = []
            for i, sample in enumerate(samples):
                at = sample.answer.start - 1
                query = q[i, head, at // config.block_size, at % config.block_size]
                query = query * config.head_dim**-0.5
                digits = bytes(sample.text[sample.answer])
                gold = _blocks_with(bytes(sample.text[: at - 40]), digits, config.block_size)
                if not gold:  # said right before it is asked for
                    continue
                best = (k[i, head, gold] @ query).max()
                scores = pool[layer][head] @ query
                rows.append([float(best - scores[:n].max()) for n in (64, 512, scores.shape[0])])
            table = np.array(rows)
            margins[f"layer{layer}.head{head}"] = {
                "mean": table.mean(0).round(2).tolist(),
                "least": table.min(0).round(2).tolist(),
            }
    return margins


def _blocks_with(text: bytes, digits: bytes, block_size: int) -> list[int]:
    found, at = [], text.find(digits)
    while at >= 0:
        found += [at // block_size, (at + len(digits) - 1) // block_size]
        at = text.find(digits, at + 1)
    return sorted(set(found))


def save_state(
    path: Path, model: Transformer, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    """Write everything that a later run needs to go on after `step` steps."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    for o, optimizer in enumerate(optimizers):
        for i, entry in optimizer.state_dict()["state"].items():
            named = {f"optimizer.{o}.{i}.{k}": torch.as_tensor(v) for k, v in entry.items()}
            tensors |= named
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def load_state(path: Path, model: Transformer, optimizers: list[torch.optim.Optimizer]) -> int:
    """Read back what `save_state` wrote; return after how many steps that was."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    weights: dict[str, Tensor] = {}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, value in load_file(path).items():
        if key.startswith("optimizer."):
            _, o, i, name = key.split(".")
            states[int(o)].setdefault(int(i), {})[name] = value
        else:
            weights[key.removeprefix("model.")] = value
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return step


def train(arguments: argparse.Namespace) -> None:
    """Run the curriculum from where --run stands to its end, then write --out."""
    device = torch.device(arguments.device)
    held_out = [n for n in (arguments.validation, *arguments.leave_out) if n]
    corpus = Corpus(arguments.corpus, tuple(held_out))
    paths = [p for p in arguments.corpus.iterdir() if p.name.split(".")[0] == arguments.validation]
    if not paths:
        raise ValueError(f"no text named {arguments.validation!r} in {arguments.corpus}")
    validation = read_text(paths[0])
    tasks = Tasks(corpus)
    torch.manual_seed(arguments.seed)
    model = Transformer(ModelConfig(family=arguments.family)).to(device)
    optimizers = optimizers_of(model, arguments.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    forward = cast(Transformer, torch.compile(model, dynamic=False)) if arguments.compile else model
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    state, log = run / "state.safetensors", run / "log.jsonl"
    step, seconds = 0, 0.0
    if state.exists():
        step = load_state(state, model, optimizers)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        lines = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
        log.write_text("".join(lines))  # without what a stopped run did after this state
        seconds = json.loads(lines[-1])["seconds"] if lines else 0.0
    total = sum(stage.steps for stage in CURRICULUM)
    losses: list[float] = []
    began = time.monotonic() - seconds
    while step < total:
        stage = stage_of(step, CURRICULUM)
        tasks.needles, tasks.mentions = stage.needles, stage.mentions
        tasks.repeats, tasks.gibberish = stage.repeats, stage.gibberish
        samples = batch(tasks, arguments.seed, step, stage.count, stage.length, stage.chain)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, peak)
            optimizer.zero_grad(set_to_none=True)
        x, w, passage, apart, asking = tensors(samples, model.config.block_size, device)
        # As a tensor, since every new number would be compiled anew.
        gating = torch.tensor(gating_at(step, CURRICULUM), device=device)
        loss = loss_of(forward, x, w, stage.distractors, gating, passage, apart, asking)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0 or step == total:
            line: dict[str, Any] = {
                "step": step,
                "length": stage.length,
                "loss": round(float(np.mean(losses)), 4),
                "seconds": round(time.monotonic() - began, 1),
            }
            losses.clear()
            if step % 250 == 0 or step == total:
                model.eval()
                line |= examine(model, validation, arguments.seed)
                model.train()
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            save_state(state, model, optimizers, step)
            print(json.dumps(line), flush=True)
    info = {
        "corpus": [p.name for p in corpus.paths],
        "seed": arguments.seed,
        "steps": total,
        "bytes": sum(s.steps * s.count * s.length for s in CURRICULUM),
        "hours": round((time.monotonic() - began) / 3600, 2),
        "threads": torch.get_num_threads(),
    }
    checkpoint.save(model, arguments.out, info)
    print(json.dumps({"out": str(arguments.out), **info}))


def main() -> int:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        prog="python -m model.train",
        description=__doc__,
        epilog="example: python -m model.train landmark --corpus texts",
    )
    parser.add_argument("family", choices=["landmark"])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt or *.txt.gz")
    parser.add_argument("--validation", default="moby_dick", help="text to watch, not trained on")
    parser.add_argument("--leave-out", nargs="*", default=["great_expectations"], metavar="NAME")
    parser.add_argument("--run", type=Path, default=Path("runs/landmark"), help="state and log")
    parser.add_argument("--out", type=Path, default=checkpoint.SHIPPED / "landmark.safetensors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false",
        help="do without torch.compile, which needs a C++ compiler and is 1.8 times as fast",
    )  # fmt: skip
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        train(arguments)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
