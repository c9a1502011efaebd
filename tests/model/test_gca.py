"""Grouped Cross Attention against an implementation that shares no code with it."""

from __future__ import annotations

import pytest
import torch

from model.config import GCAConfig
from model.gca import GroupedCrossTransformer

CONFIG = GCAConfig(
    width=16,
    heads=2,
    lower=1,
    encoder=1,
    groups=2,
    group_layers=2,
    mlp_width=24,
    block_size=4,
    window_blocks=1,
    landmark_dim=6,
    top_k=2,
    segment=2,
)
SEQUENCES, CHUNKS = 2, 5
PLACES = CONFIG.block_size + 1


def make(config=CONFIG, seed=0):
    torch.manual_seed(seed)
    model = GroupedCrossTransformer(config).double()
    with torch.no_grad():  # gains of one and small outputs would hide what is left out
        for name, weight in model.named_parameters():
            weight.add_(torch.randn_like(weight) * (0.3 if weight.dim() == 1 else 0.1))
            if "query" in name or "landmark" in name:
                weight.mul_(2.0)
    return model


def tokens(seed=0, chunks=CHUNKS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (SEQUENCES, chunks, CONFIG.block_size), generator=generator)


def norm(x, gain):
    return x / (x.pow(2).mean() + 1e-6).sqrt() * gain


def turned(x, place, config):
    """Rotate one head's vector [D] to a place."""
    half = len(x) // 2
    steps = torch.arange(half, dtype=torch.float64) * 2 / len(x)
    angle = place * config.rope_base**-steps
    low, high = x[:half], x[half:]
    return torch.cat(
        (low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin())
    )


def heads(x, config):
    return x.view(config.heads, config.head_dim)


def mlp(weights, prefix, x):
    hidden = weights[f"{prefix}.up.weight"] @ x
    hidden = torch.nn.functional.gelu(hidden, approximate="tanh")
    return weights[f"{prefix}.down.weight"] @ hidden


def self_attention(weights, prefix, inner, sees, config):
    """Attend from each place to those that it sees; inner: [places, width] after the norm."""
    width = config.width
    qkv = [weights[f"{prefix}.qkv.weight"] @ x for x in inner]
    out = []
    for i, of_place in enumerate(qkv):
        said = []
        for head in range(config.heads):
            seen = [j for j in range(len(inner)) if sees(i, j)]
            q = turned(heads(of_place[:width], config)[head], i, config)
            keys = [turned(heads(qkv[j][width : 2 * width], config)[head], j, config) for j in seen]
            values = [heads(qkv[j][2 * width :], config)[head] for j in seen]
            scores = torch.stack([q @ k for k in keys]) / config.head_dim**0.5
            shares = scores.exp() / scores.exp().sum()
            said.append(sum(s * v for s, v in zip(shares, values, strict=True)))
        out.append(weights[f"{prefix}.out.weight"] @ torch.cat(said))
    return out


def run_one(weights, text, config, segment, found_of):
    """One sequence, place by place: logits, and what each group chose for each place.

    found_of: (group, place, scores of the chunks before) -> the chunks that are taken.
    """
    size = config.block_size
    flat = text.flatten().tolist()
    table = weights["embedding.weight"].view(config.reach, 257, config.width)
    state = []
    for i, _ in enumerate(flat):
        recent = [flat[i - back] if i >= back else 256 for back in range(config.reach)]
        state.append(sum(table[back, byte] for back, byte in enumerate(recent)))
        if i % size == size - 1:
            state.append(table[0, 256])
    window = config.window_blocks * (size + 1)

    def near(i, j):
        return j % (size + 1) < size and 0 <= i - j < window

    def layer(prefix, state, cross=None):
        inner = [norm(x, weights[f"{prefix}.attention_norm.gain"]) for x in state]
        said = self_attention(weights, f"{prefix}.attention", inner, near, config)
        state = [x + s for x, s in zip(state, said, strict=True)]
        out = []
        for i, x in enumerate(state):
            from_chunks = cross(prefix, i, x) if cross else 0.0
            inner = norm(x + from_chunks, weights[f"{prefix}.mlp_norm.gain"])
            out.append(x + mlp(weights, f"{prefix}.mlp", inner))
        return out

    for i in range(config.lower):
        state = layer(f"lower.{i}", state)

    chunks = []
    for start in range(0, len(state), size + 1):
        own = state[start : start + size + 1]
        for i in range(config.encoder):
            prefix = f"encoder.layers.{i}"
            inner = [norm(x, weights[f"{prefix}.attention_norm.gain"]) for x in own]
            said = self_attention(weights, f"{prefix}.attention", inner, lambda i, j: True, config)
            own = [x + s for x, s in zip(own, said, strict=True)]
            inner = [norm(x, weights[f"{prefix}.mlp_norm.gain"]) for x in own]
            own = [x + mlp(weights, f"{prefix}.mlp", y) for x, y in zip(own, inner, strict=True)]
        own = [norm(x, weights["encoder.norm.gain"]) for x in own]
        pairs = [weights["encoder.keys_values.weight"] @ x for x in own[:-1]]
        landmark = weights["encoder.landmark.weight"] @ own[-1]
        chunks.append((pairs, landmark))

    choices = {}
    for g in range(config.groups):
        at_group = state
        selected = []
        for i in range(len(state)):
            chunk, place = divmod(i, size + 1)
            if segment:
                place = min(place, size - 1)
                asker = chunk * (size + 1) + place - place % segment
            else:
                asker = chunk * (size + 1) - 1
            if chunk == 0:
                selected.append(([], []))
                continue
            asking = norm(at_group[asker], weights[f"groups.{g}.norm.gain"])
            query = weights[f"groups.{g}.query.weight"] @ asking
            scores = [query @ chunks[c][1] / config.landmark_dim**0.5 for c in range(chunk)]
            taken = found_of(g, i, scores)
            chosen = torch.stack([scores[c] for c in taken])
            selected.append((taken, chosen.exp() / chosen.exp().sum()))
        choices[g] = [taken for taken, _ in selected]

        def cross(prefix, i, x, selected=selected):
            taken, shares = selected[i]
            inner = norm(x, weights[f"{prefix}.cross_norm.gain"])
            q = heads(weights[f"{prefix}.cross.query.weight"] @ inner, config)
            out = torch.zeros(config.heads, config.head_dim, dtype=torch.float64)
            for chunk, share in zip(taken, shares, strict=True):
                for head in range(config.heads):
                    scores = [
                        q[head] @ heads(pair[: config.width], config)[head] / config.head_dim**0.5
                        for pair in chunks[chunk][0]
                    ]
                    total = 1 + sum(s.exp() for s in scores)
                    for s, pair in zip(scores, chunks[chunk][0], strict=True):
                        value = heads(pair[config.width :], config)[head]
                        out = out + torch.zeros_like(out).index_put(
                            (torch.tensor(head),), share * s.exp() / total * value
                        )
            return weights[f"{prefix}.cross.out.weight"] @ out.flatten()

        for i in range(config.group_layers):
            state = layer(f"groups.{g}.layers.{i}", state, cross)

    logits = []
    for i, x in enumerate(state):
        if i % (size + 1) < size:
            logits.append(weights["head.weight"] @ norm(x, weights["norm.gain"]))
    return torch.stack(logits).view(*text.shape, 256), choices


def best(config):
    def found_of(group, place, scores):
        order = sorted(range(len(scores)), key=lambda c: -float(scores[c].detach()))
        return order[: config.top_k]

    return found_of


@pytest.mark.parametrize("segment", [0, 1, 2, 4])
def test_the_training_form_is_the_definition(segment):
    model, text = make(), tokens()
    weights = dict(model.named_parameters())
    out = model(text, segment)
    wanted = torch.stack([run_one(weights, t, CONFIG, segment, best(CONFIG))[0] for t in text])
    assert (out - wanted).abs().max() < 1e-9

    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((out * probe).sum(), list(weights.values()))
    true = torch.autograd.grad((wanted * probe).sum(), list(weights.values()))
    for name, a, b in zip(weights, got, true, strict=True):
        assert (a - b).abs().max() < 1e-9 * max(1.0, float(b.abs().max())), name
        assert b.abs().max() > 1e-6, f"{name} is not in it"
