"""How Landmark Attention is trained: the curriculum, the loss, and what is watched on the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import LandmarkConfig
from model.corpus import Excerpts
from model.landmark import LandmarkAttention
from model.landmark_transformer import LandmarkTransformer
from model.layers import rotate
from model.recipe import Recipe, weighed_loss
from model.stages import Stage, gating_at, stage_of
from model.tasks import Sample, Tasks

CURRICULUM = (
    Stage(500, 256, 32, gating=0.0, needles=0.3, mentions=0.7, repeats=0.7, gibberish=0.5),
    Stage(1000, 256, 32, needles=0.3, mentions=0.6, repeats=0.7, gibberish=0.5),
    Stage(1000, 256, 32),
    Stage(3000, 512, 16, distractors=4, chain=6, needles=0.6),
    Stage(1500, 512, 16, distractors=8, chain=6, needles=0.6),
)
"""The landmarks come in once the attention can copy. With full gating from the beginning, copying
is not learnt in as many steps."""


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
    model: LandmarkTransformer,
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
    return weighed_loss(logits, text, weight)


@torch.no_grad()
def examine(model: LandmarkTransformer, held_out: np.ndarray, seed: int) -> dict[str, Any]:
    """Measure on text not trained on: bits a byte, needles found, and the landmarks' margin.

    margin: for each retrieving layer and head, the score of the best block that holds the key
    minus the best score of any block of other texts, all scored at one place, as search does; the
    mean over the readings and the least of all, for more and more blocks. It falls slowly with
    the number of blocks and has to stay above zero up to where the model is to be used.
    """
    config = model.config
    device = next(model.parameters()).device
    rng = np.random.default_rng([seed, 1 << 20])
    filler = Excerpts(held_out)
    tasks = Tasks(filler, needles=1.0, filler=lambda *drawn: (filler.window(*drawn), 1.0))
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


def _copying(model: LandmarkTransformer, filler: Excerpts) -> float:
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


def _margins(model: LandmarkTransformer, filler: Excerpts, samples: list[Any]) -> dict[str, Any]:
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


def _step_loss(
    forward: Any, samples: list[Sample], step: int, curriculum: tuple[Stage, ...]
) -> Tensor:
    device = next(forward.parameters()).device
    x, w, passage, apart, asking = tensors(samples, forward.config.block_size, device)
    # As a tensor, since every new number would be compiled anew.
    gating = torch.tensor(gating_at(step, curriculum), device=device)
    distractors = stage_of(step, curriculum).distractors
    return loss_of(forward, x, w, distractors, gating, passage, apart, asking)


RECIPE = Recipe(CURRICULUM, LandmarkConfig, _step_loss, examine)
