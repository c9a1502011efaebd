"""Grouped Cross Attention against an implementation that shares no code with it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from model.config import GCAConfig
from model.gca_transformer import GroupedCrossTransformer, Selection, _allowed

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
    near=0,
    top_k=2,
    segment=2,
    lag=0,
    softmax="chunk",
    grams=(2, 5),
    buckets=32,
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
    """One sequence, place by place: logits, what each group asks at each, the landmarks, and of
    each layer what each token takes of each chunk: {place: [(weight, share of each head), ...]}.

    found_of: (group, place, scores of the chunks before) -> the chunks that are taken.
    """
    size = config.block_size
    flat = text.flatten().tolist()
    table = weights["embedding.weight"].view(config.reach, 257, config.width)
    state = []
    for i, _ in enumerate(flat):
        recent = [flat[i - back] if i >= back else 256 for back in range(config.reach)]
        state.append(sum(table[back, byte] for back, byte in enumerate(recent)))
        for n, size_of_string in enumerate(config.grams):
            string = [flat[j] if j >= 0 else 256 for j in range(i - size_of_string + 1, i + 1)]
            value = sum(x * 1103515245**power for power, x in enumerate(reversed(string)))
            row = n * config.buckets + value % (2**31 - 1) % config.buckets
            state[-1] = state[-1] + weights["embedding.grams"][row]
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
        lagged = [torch.zeros_like(pairs[0])] * config.lag + pairs
        pairs = [
            torch.cat((key[: config.width], value[config.width :]))
            for key, value in zip(lagged, pairs, strict=False)
        ]
        landmark = weights["encoder.landmark.weight"] @ own[-1]
        chunks.append((pairs, landmark))

    queries, takings = [], []
    for g in range(config.groups):
        gain, query = weights[f"groups.{g}.norm.gain"], weights[f"groups.{g}.query.weight"]
        asks = [query @ norm(x, gain) / config.landmark_dim**0.5 for x in state]
        queries.append(asks)
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
            scores = [asks[asker] @ chunks[c][1] for c in range(chunk)]
            taken = found_of(g, i, scores)
            chosen = torch.stack([scores[c] for c in taken])
            selected.append((taken, chosen.exp() / chosen.exp().sum()))

        def cross(prefix, i, x, selected=selected):
            taken, shares = selected[i]
            takings[-1][i] = [(share, []) for share in shares]
            inner = norm(x, weights[f"{prefix}.cross_norm.gain"])
            q = heads(weights[f"{prefix}.cross.query.weight"] @ inner, config)
            out = torch.zeros(config.heads, config.head_dim, dtype=torch.float64)
            for head in range(config.heads):
                raised = [
                    [
                        (q[head] @ heads(pair[: config.width], config)[head])
                        .div(config.head_dim**0.5)
                        .exp()
                        for pair in chunks[chunk][0]
                    ]
                    for chunk in taken
                ]
                every = 1 + sum(s * sum(of) for s, of in zip(shares, raised, strict=True))
                for n, (chunk, share, of) in enumerate(zip(taken, shares, raised, strict=True)):
                    total = every if config.softmax == "found" else 1 + sum(of)
                    takings[-1][i][n][1].append(share * sum(of) / total)
                    for e, pair in zip(of, chunks[chunk][0], strict=True):
                        value = heads(pair[config.width :], config)[head]
                        out = out + torch.zeros_like(out).index_put(
                            (torch.tensor(head),), share * e / total * value
                        )
            return weights[f"{prefix}.cross.out.weight"] @ out.flatten()

        for i in range(config.group_layers):
            takings.append({})
            state = layer(f"groups.{g}.layers.{i}", state, cross)

    logits = []
    for i, x in enumerate(state):
        if i % (size + 1) < size:
            logits.append(weights["head.weight"] @ norm(x, weights["norm.gain"]))
    logits = torch.stack(logits).view(*text.shape, 256)
    return logits, queries, [chunk[1] for chunk in chunks], takings


def best(config):
    def found_of(group, place, scores):
        older = range(max(0, len(scores) - config.near))
        order = sorted(older, key=lambda c: -float(scores[c].detach()))
        return [*range(len(older), len(scores)), *order[: config.top_k]]

    return found_of


VARIANTS = {
    "published": CONFIG,
    "lag": replace(CONFIG, lag=1),
    "found": replace(CONFIG, softmax="found"),
    "both": replace(CONFIG, lag=2, softmax="found"),
    "near": replace(CONFIG, near=2, top_k=1),
    "near alone": replace(CONFIG, near=2, top_k=0),
}


def divergence_of(runs, segment):
    """Of the weights from what is taken of each chunk, which has no gradient, over all layers."""
    divergence = 0.0
    for layers in zip(*runs, strict=True):
        lost = total = 0.0
        for takings in layers:
            tokens = [i for i in sorted(takings) if i % PLACES < PLACES - 1]
            for first in range(0, len(tokens), segment):
                rows = [takings[i] for i in tokens[first : first + segment]]
                taken = []
                for chunk in zip(*rows, strict=True):
                    shares = [share.detach() for _, of_heads in chunk for share in of_heads]
                    taken.append(sum(shares) / len(shares))
                for each, (weight, _) in zip(taken, rows[0], strict=True):
                    lost = lost + each * ((each / sum(taken)).log() - weight.log())
                total += sum(taken)
        divergence = divergence + lost / total
    return divergence


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("segment", [0, 1, 2, 4])
def test_the_training_form_is_the_definition(segment, variant):
    config = VARIANTS[variant]
    model, text = make(config), tokens()
    weights = dict(model.named_parameters())
    out, missed, misjudged = model(text, segment)
    assert missed == 0  # nothing is meant
    runs = [run_one(weights, t, config, segment, best(config)) for t in text]
    wanted = torch.stack([run[0] for run in runs])
    assert (out - wanted).abs().max() < 1e-9
    divergence = divergence_of([run[3] for run in runs], segment or config.block_size)
    assert (misjudged - divergence).abs() < 1e-9
    of_search = [w for name, w in weights.items() if "landmark" in name or "groups" in name]
    got = torch.autograd.grad(misjudged, of_search, allow_unused=True, retain_graph=True)
    true = torch.autograd.grad(divergence, of_search, allow_unused=True, retain_graph=True)
    assert sum(b is not None and b.abs().max() > 1e-6 for b in true) >= 3
    for a, b in zip(got, true, strict=True):
        assert (0 if a is None else a) == pytest.approx(0 if b is None else b, abs=1e-9)

    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((out * probe).sum(), list(weights.values()))
    true = torch.autograd.grad((wanted * probe).sum(), list(weights.values()))
    for name, a, b in zip(weights, got, true, strict=True):
        assert (a - b).abs().max() < 1e-9 * max(1.0, float(b.abs().max())), name
        assert b.abs().max() > 1e-6, f"{name} is not in it"


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize("segment", [0, 2])
def test_what_is_missed_is_the_definition(segment, foreign):
    """Each token that should find something, as if it asked for itself."""
    model, text = make(), tokens()
    weights = dict(model.named_parameters())
    size = CONFIG.block_size
    drawn = torch.rand(*text.shape, CHUNKS, generator=torch.Generator().manual_seed(2))
    meant = drawn < 0.25  # some of chunks that come later, which nobody can find
    meant[0, 3] = False
    if foreign:  # the reference finds none of another text, so what is found must not count
        for name, weight in weights.items():
            if name.endswith("cross.out.weight"):
                weight.data.zero_()
    missed = model(text, segment, foreign=foreign, meant=meant).missed
    runs = [run_one(weights, t, CONFIG, segment, best(CONFIG)) for t in text]
    wanted = 0.0
    for g in range(CONFIG.groups):
        lost = []
        for b, n, s in itertools.product(range(SEQUENCES), range(CHUNKS), range(size)):
            right = [c for c in range(n) if meant[b, n, s, c]]
            if right:
                query = runs[b][1][g][n * PLACES + s]
                every = [query @ landmark for landmark in runs[b][2][:n]]
                if foreign:
                    every += [query @ landmark for landmark in runs[1 - b][2]]
                shares = torch.stack(every).softmax(0)
                lost.append(-shares[right].sum().log())
        assert 10 < len(lost) < SEQUENCES * CHUNKS * size
        wanted = wanted + sum(lost) / len(lost)
    assert (missed - wanted).abs() < 1e-9
    of_search = [w for name, w in weights.items() if "landmark" in name or "query" in name]
    got = torch.autograd.grad(missed, of_search, allow_unused=True)
    true = torch.autograd.grad(wanted, of_search, allow_unused=True)
    assert sum(b is not None and bool(b.any()) for b in true) >= 3
    for a, b in zip(got, true, strict=True):
        assert (0 if a is None else a) == pytest.approx(0 if b is None else b, abs=1e-9)


FOREIGN = {"foreign": True, "passage": torch.tensor([0, 0, 1]), "apart": torch.zeros(3, 4).bool()}


def texts(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 4, CONFIG.block_size), generator=generator)


@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("foreign", [{}, FOREIGN])
@pytest.mark.parametrize("sizes", [{}, {"near": 2}, {"softmax": "found"}], ids=str)
@torch.no_grad()
def test_what_comes_later_changes_nothing_before(segment, noise, foreign, sizes):
    """Neither the rest of a text, nor what follows it in its passage."""
    model, text = make(replace(CONFIG, **sizes)), texts()
    logits = []
    for change in (False, True):
        changed = text.clone()
        if change:
            changed[0, 2:] = texts(1)[0, 2:]
            changed[1] = texts(1)[1]  # of the same passage as 0, and behind it
        torch.manual_seed(5)
        logits.append(model(changed, segment, noise, **foreign).logits)
    assert torch.equal(logits[0][0, :2], logits[1][0, :2])
    assert not torch.equal(logits[0][0, 2:], logits[1][0, 2:])


def test_which_chunks_may_be_found():
    text = texts()
    apart = torch.zeros(3, 4, dtype=torch.bool)
    apart[0, 1] = apart[2, 3] = True
    passage = torch.tensor([7, 7, 9])
    for foreign in (False, True):
        seen = _allowed(text, foreign, passage, apart).view(3, 4, 3, 4)
        for b, n, c, m in itertools.product(range(3), range(4), range(3), range(4)):
            if b == c:
                wanted = m < n
            else:
                later = {b, c} == {0, 1} and c > b
                wanted = foreign and not later and not bool(apart[c, m])
            assert bool(seen[b, n, c, m]) == wanted, (foreign, b, n, c, m)


@torch.no_grad()
def test_noise_draws_by_the_softmax_and_leaves_the_weights_alone():
    """Gumbel noise: the first choice falls by the softmax of the scores."""
    config = replace(CONFIG, top_k=2)
    torch.manual_seed(0)
    model = GroupedCrossTransformer(config).double()
    group = model.stacks[0]
    x = torch.randn(1, 6, PLACES, config.width, dtype=torch.float64)
    landmarks = torch.randn(1, 6, config.landmark_dim, dtype=torch.float64) * 3
    allowed = _allowed(torch.zeros(1, 6, 4), False, None, None)
    scores = group.ask(x[0, 5, 0]) @ landmarks[0, :5].T
    last = 5 * (config.block_size // 2)  # the first segment of the last chunk
    counts = torch.zeros(5)
    for _ in range(6000):
        found = model._select(group, x, landmarks, allowed, 2, True)
        chunks = found.chunks[last]
        counts[chunks[0]] += 1
        wanted = scores[chunks].softmax(0)
        assert (found.weights[last] - wanted).abs().max() < 1e-12
    shares = counts / 6000
    assert (shares - scores.softmax(0)).abs().max() < 0.025  # four standard deviations
    assert scores.softmax(0).max() - scores.softmax(0).min() > 0.2  # or else anything would do
    without = model._select(group, x, landmarks, allowed, 2, False).chunks[last]
    assert without.tolist() == scores.topk(2).indices.tolist()


def test_the_search_is_trained_through_the_weights_alone():
    model, text = make(), tokens()
    select = model._select

    def detached(*given):
        found = select(*given)
        return Selection(found.chunks, found.weights.detach())

    for cut in (False, True):
        model._select = detached if cut else select
        model.zero_grad()
        model(text).logits.square().sum().backward()
        for group in model.stacks:
            gradient = group.query.weight.grad
            assert (gradient is None or not gradient.any()) == cut
        landmark = model.encoder.landmark.weight.grad
        assert (landmark is None or not landmark.any()) == cut


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"lag": 4}, "lag 4 must be below the block size 4"),
        ({"lag": -1}, "lag must be at least 0, not -1"),
        ({"near": -1}, "near must be at least 0, not -1"),
        ({"lag": True}, "lag must be a whole number, not True"),
        ({"near": 1.5}, "near must be a whole number, not 1.5"),
        ({"softmax": "all"}, "softmax is 'all': use 'chunk' or 'found'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        replace(CONFIG, **sizes)


@pytest.mark.parametrize("sizes", [{"lag": 0}, {}], ids=["published", "lag"])
@torch.no_grad()
def test_a_new_model_looks_up_what_came_next(sizes):
    """Of a passage said twice, where the second one is the attention is on the first one's next."""
    torch.manual_seed(0)
    config = GCAConfig(**sizes)
    model = GroupedCrossTransformer(config)
    text = torch.randint(97, 123, (1, 4, config.block_size))
    text[0, 2, 8:56] = text[0, 0, 4:52]  # so that no place helps
    state = model.embedding(text, model.embedding.nothing()[None], landmarks=True)
    for layer in model.below:
        state = state + layer.attention(layer.attention_norm(state), model.rotary)
        state = state + layer.mlp(layer.mlp_norm(state))
    keys, _, _ = model.encoder(state, model.rotary)
    cross = model.stacks[0].stack[0].cross
    queries = cross.query(model.stacks[0].stack[0].cross_norm(state[0, 2, 16:55]))
    first = keys[0, :2].flatten(0, 1)  # [2 * S, width]
    scores = torch.einsum(
        "qhd,khd->hqk", *(t.unflatten(-1, (config.heads, -1)) for t in (queries, first))
    )
    shares = (scores * config.head_dim**-0.5).softmax(dim=-1)
    right = shares[:, torch.arange(39), torch.arange(13, 52)].mean()
    assert right > (0.9 if config.lag else 0.1)
