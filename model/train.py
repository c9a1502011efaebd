"""The training loop: `python -m model.train landmark --corpus DIR` makes the shipped weights.

Every step's batch follows from (seed, step), so a run that was stopped goes on as if it had not
been. State and log lie in --run; the finished weights go to --out. Nothing that is shipped is
replaced unless --out says so.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from model import checkpoint, train_gca, train_landmark
from model.corpus import Corpus, read_text, text_named
from model.families import family_of
from model.module_parser import ModuleParser, device
from model.recipe import Recipe
from model.stages import Stage, learning_rate, stage_of
from model.tasks import Tasks, batch
from model.training_state import check_identity, load_state, save_state

RECIPES = {"landmark": train_landmark.RECIPE, "gca": train_gca.RECIPE}
STATE = "state.safetensors"
TEST = "great_expectations"
"""The text that quality is reported on; never trained on."""
SHORTEST = 2048
"""Bytes that a text must have to be examined on."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Have the C library keep what is freed, where it can be told (glibc, mallopt(3)).

    Each step takes the same memory again; to fault its pages in anew took 11 to 30% of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def optimizers_of(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan et al. 2024) for the layers' matrices and AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        outside = name.startswith(("embedding.", "head."))
        (others if outside or weight.dim() != 2 else matrices).append(weight)
    return [
        torch.optim.Muon(matrices, lr=1.5 * rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Plan:
    """A training whose settings have been checked: what it follows from, and where it goes."""

    arguments: argparse.Namespace
    recipe: Recipe
    config: Any
    curriculum: tuple[Stage, ...]
    corpus: Corpus
    validation: NDArray[np.uint8]

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the weights follow from, besides the code."""
        a = self.arguments
        texts = zip(self.corpus.paths, self.corpus.texts, strict=True)
        return {
            "config": self.config.to_dict(),
            "seed": a.seed,
            "lr": a.lr,
            "share": a.share,
            "corpus": {path.name: len(text) for path, text in texts},
            "curriculum": [asdict(stage) for stage in self.curriculum],
        }


def planned(arguments: argparse.Namespace) -> Plan:
    """Check a training's settings; raise ValueError for what cannot be done."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"training needs torch 2.9 or newer, this is {torch.__version__}")
    for name in arguments.leave_out:
        text_named(arguments.corpus, name)
    validation = read_text(text_named(arguments.corpus, arguments.validation))
    if len(validation) < SHORTEST:
        raise ValueError(f"{arguments.validation!r} has {len(validation)} bytes, not {SHORTEST:,}")
    recipe = RECIPES[arguments.family]
    if not 0 < arguments.share <= 1:
        raise ValueError(f"--share must be above 0 and at most 1, not {arguments.share:g}")
    if not 0 < arguments.lr < math.inf:
        raise ValueError(f"--lr must be above 0, not {arguments.lr:g}")
    if arguments.threads < 1:
        raise ValueError(f"--threads must be at least 1, not {arguments.threads}")
    if arguments.run.exists() and not arguments.run.is_dir():
        raise ValueError(f"--run {arguments.run} is not a folder")
    sizes = recipe.config()
    known = [field.name for field in fields(sizes)]
    for name, _ in arguments.set:
        if name not in known:
            raise ValueError(f"--set: there is no {name!r}; there are {', '.join(known)}")
    config = replace(sizes, **dict(arguments.set))
    for stage in recipe.curriculum:
        if stage.length % config.block_size:
            raise ValueError(f"block_size {config.block_size} must divide {stage.length} bytes")
    curriculum = tuple(
        replace(stage, steps=max(1, round(stage.steps * arguments.share)))
        for stage in recipe.curriculum
    )
    corpus = Corpus(arguments.corpus, (arguments.validation, TEST, *arguments.leave_out))
    plan = Plan(arguments, recipe, config, curriculum, corpus, validation)
    if (arguments.run / STATE).exists():
        check_identity(arguments.run / STATE, plan.identity)
    return plan


def train(plan: Plan) -> None:
    """Run the curriculum from where --run stands to its end, then write --out."""
    arguments, recipe, curriculum = plan.arguments, plan.recipe, plan.curriculum
    device = torch.device(arguments.device)
    tasks = Tasks(plan.corpus)
    torch.manual_seed(arguments.seed)
    model = family_of(plan.config).network(plan.config).to(device)
    optimizers = optimizers_of(model, arguments.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    # A graph for each length and rhythm; beyond the limit, 8, it would run without.
    torch._dynamo.config.recompile_limit = 64
    forward = torch.compile(model, dynamic=False) if arguments.compile else model
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)
    state, log = run / STATE, run / "log.jsonl"
    step, seconds = 0, 0.0
    if state.exists():
        step = load_state(state, model, optimizers)
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        lines = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
        log.write_text("".join(lines))  # without what a stopped run did after this state
        seconds = json.loads(lines[-1])["seconds"] if lines else 0.0
    total = sum(stage.steps for stage in curriculum)
    losses: list[float] = []
    began = time.monotonic() - seconds
    while step < total:
        stage = stage_of(step, curriculum)
        tasks.needles, tasks.mentions = stage.needles, stage.mentions
        tasks.repeats, tasks.gibberish = stage.repeats, stage.gibberish
        tasks.named, tasks.hops, tasks.aloud = stage.named, stage.hops, stage.aloud
        samples = batch(tasks, arguments.seed, step, stage.count, stage.length, stage.chain)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, curriculum, peak)
            optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(arguments.seed << 32 | step)  # of the noise, whatever was run before
        loss = recipe.loss(forward, samples, step, curriculum)
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
                line |= recipe.examine(model, plan.validation, arguments.seed)
                model.train()
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            save_state(state, model, optimizers, step, plan.identity)
            print(json.dumps(line), flush=True)
    info = {
        "corpus": [p.name for p in plan.corpus.paths],
        "seed": arguments.seed,
        "steps": total,
        "bytes": sum(s.steps * s.count * s.length for s in curriculum),
        "hours": round((time.monotonic() - began) / 3600, 2),
        "threads": torch.get_num_threads(),
        "share": arguments.share,
    }
    out = arguments.out or run / f"{arguments.family}.safetensors"
    checkpoint.save(model, out, info, recipe.written)
    print(json.dumps({"out": str(out), **info}))


def setting(given: str) -> tuple[str, Any]:
    """Read KEY=VALUE, the value as JSON."""
    key, _, value = given.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(f"{given!r} is not KEY=VALUE, like groups=1") from None


def main() -> int:
    """Read the command line and train."""
    parser = ModuleParser(
        prog="python -m model.train",
        description=__doc__,
        epilog="example: python -m model.train landmark --corpus texts",
    )
    parser.add_argument("family", choices=sorted(RECIPES))
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.txt or *.txt.gz")
    parser.add_argument("--validation", default="moby_dick", help="text to watch, not trained on")
    parser.add_argument(
        "--leave-out", nargs="*", default=[], metavar="NAME",
        help=f"texts not to be trained on, besides {TEST}",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="state and log (default: runs/FAMILY)")
    parser.add_argument("--out", type=Path, help="the weights (default: in --run)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--share", type=float, default=1.0, help="of each stage's steps: for comparisons"
    )
    parser.add_argument(
        "--set",
        type=setting,
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="sizes of the model that differ from the shipped one's, like groups=1",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false",
        help="do without torch.compile, which needs a C++ compiler and is 1.8 times as fast",
    )  # fmt: skip
    arguments = parser.parse_args()
    arguments.run = arguments.run or Path("runs") / arguments.family
    keep_memory()
    try:
        plan = planned(arguments)
    except ValueError as error:  # later ones would be bugs, and keep their traceback
        parser.error(str(error))
    torch.set_num_threads(arguments.threads)
    train(plan)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
