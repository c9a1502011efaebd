"""The training loop on a tiny model: stopping anywhere and going on changes nothing."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from model import checkpoint, train, train_landmark
from model.config import GCAConfig, LandmarkConfig
from model.corpus import Excerpts
from model.gca_transformer import Reading
from model.landmark_transformer import LandmarkTransformer
from model.stages import Stage, gating_at, learning_rate, stage_of
from model.tasks import Clue, Sample, Tasks
from model.train_gca import meant_by
from model.train_landmark import loss_of

SHIPPED = train.RECIPES["landmark"].curriculum
CURRICULUM = (
    Stage(70, 128, 2, gating=0.5, needles=0.6, mentions=0.0),
    Stage(50, 160, 3, distractors=1, chain=2, needles=0.5, mentions=0.5, aloud=True),
)
TINY = {"width": 16, "heads": 2, "layers": "lr", "mlp_width": 16, "top_k": 2}


RECIPE = replace(
    train.RECIPES["landmark"],
    curriculum=CURRICULUM,
    config=lambda: LandmarkConfig(**TINY),  # type: ignore[arg-type]
)
QUICK = replace(RECIPE, examine=lambda model, text, seed: {"examined": True})


class StoppedError(Exception):
    """Stands for the power going out."""


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.RECIPES, "landmark", RECIPE)
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name in ("learnt", "moby_dick", "great_expectations"):
        words = rng.choice([b"whale ", b"sea ", b"Queequeg ", name.encode() + b" "], 900)
        (folder / f"{name}.txt").write_bytes(b"".join(words.tolist()))
    return folder


def setting(texts: Path, folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        family="landmark", corpus=texts, validation="moby_dick", leave_out=[],
        run=folder / "run", out=folder / "out.safetensors", seed=3, lr=1e-2, threads=1,
        device="cpu", compile=False, share=1.0, set=[],
    )  # fmt: skip


@pytest.fixture
def arguments(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setitem(train.RECIPES, "landmark", QUICK)
    return setting(texts, tmp_path)


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """A run from beginning to end in one go."""
    arguments = setting(texts, tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.RECIPES, "landmark", QUICK)
        train.train(train.planned(arguments))
    return arguments


def lines(arguments: argparse.Namespace) -> list[dict[str, object]]:
    return [json.loads(line) for line in (arguments.run / "log.jsonl").read_text().splitlines()]


def train_until(step: int, arguments: argparse.Namespace) -> None:
    drawn = train.batch

    def batch(tasks: Tasks, seed: int, at: int, *sizes: int) -> object:
        if at == step:
            raise StoppedError
        return drawn(tasks, seed, at, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch", batch)
        with pytest.raises(StoppedError):
            train.train(train.planned(arguments))


def losses(arguments: argparse.Namespace) -> list[tuple[object, object]]:
    return [(line["step"], line["loss"]) for line in lines(arguments)]


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for name, weights in ours.items():
        assert torch.equal(weights, theirs[name]), name


def test_a_run_leaves_a_checkpoint_and_a_log(whole: argparse.Namespace) -> None:
    assert checkpoint.load(str(whole.out)).config == LandmarkConfig(**TINY)  # type: ignore[arg-type]
    log = lines(whole)
    assert [line["step"] for line in log] == [50, 100, 120]
    assert [line["length"] for line in log] == [128, 160, 160]
    assert log[-1]["examined"] is True
    with safe_open(whole.out, framework="pt") as file:
        info = json.loads(file.metadata()["info"])
    assert info["corpus"] == ["learnt.txt"]  # what is held out was not trained on
    assert (info["seed"], info["steps"], info["bytes"]) == (3, 120, 70 * 256 + 50 * 480)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    whole: argparse.Namespace, arguments: argparse.Namespace
) -> None:
    for stop in (60, 110):
        train_until(stop, arguments)
        assert not arguments.out.exists()
    torch.manual_seed(99)  # what other code draws in between does not matter
    train.train(train.planned(arguments))
    assert_same_weights(whole.out, arguments.out)
    assert losses(arguments) == losses(whole)

    arguments.out.unlink()
    train.train(train.planned(arguments))  # at its end a run only writes its weights once more
    assert_same_weights(whole.out, arguments.out)
    assert losses(arguments) == losses(whole)


@pytest.mark.parametrize("kept", [0, 9])
def test_a_run_that_died_between_log_and_state_goes_on_too(
    whole: argparse.Namespace, arguments: argparse.Namespace, kept: int
) -> None:
    """The state says by itself how far it is; the log may lag behind it, or end in mid-line."""
    train_until(101, arguments)
    log = arguments.run / "log.jsonl"
    first, second = log.read_text().splitlines(keepends=True)
    log.write_text(first + second[:kept])
    train_until(102, arguments)  # goes on at 100 and leaves a whole log
    assert losses(arguments) == losses(whole)[:1]


def test_a_log_ahead_of_the_state_is_cut(
    whole: argparse.Namespace, arguments: argparse.Namespace
) -> None:
    train_until(51, arguments)
    log = arguments.run / "log.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 100, "seconds": 9.0}) + "\n")
    train.train(train.planned(arguments))
    assert losses(arguments) == losses(whole)
    assert_same_weights(whole.out, arguments.out)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", 4, "seed"),
        ("lr", 2e-2, "lr"),
        ("share", 0.5, "share and curriculum"),
        ("set", [("near", 3)], "config"),
    ],
)
def test_a_run_with_other_settings_is_not_gone_on_with(
    whole: argparse.Namespace, name: str, value: object, said: str
) -> None:
    assert train.planned(whole)
    arguments = argparse.Namespace(**vars(whole) | {name: value})
    with pytest.raises(ValueError, match=f"in {whole.run} was begun with another {said}:"):
        train.planned(arguments)


def test_a_run_on_other_texts_is_not_gone_on_with(
    whole: argparse.Namespace, tmp_path: Path
) -> None:
    corpus = shutil.copytree(whole.corpus, tmp_path / "texts")
    (corpus / "other.txt").write_text("Call me Ishmael. ")
    arguments = argparse.Namespace(**vars(whole) | {"corpus": corpus})
    with pytest.raises(ValueError, match="was begun with another corpus:"):
        train.planned(arguments)
    arguments.leave_out = ["other"]
    assert train.planned(arguments)


def test_what_is_no_state_is_refused(arguments: argparse.Namespace) -> None:
    arguments.run.mkdir()
    (arguments.run / train.STATE).write_text("nonsense")
    with pytest.raises(ValueError, match="is not the state of a training"):
        train.planned(arguments)


def test_without_out_the_weights_lie_in_the_run(arguments: argparse.Namespace) -> None:
    arguments.out = None
    train_until(119, arguments)
    shipped = {path: path.stat().st_mtime_ns for path in checkpoint.SHIPPED.iterdir()}
    train.train(train.planned(arguments))
    assert checkpoint.load(str(arguments.run / "landmark.safetensors"))
    assert {path: path.stat().st_mtime_ns for path in checkpoint.SHIPPED.iterdir()} == shipped


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("lr", -1.0, "--lr must be above 0, not -1"),
        ("lr", math.nan, "--lr must be above 0, not nan"),
        ("threads", 0, "--threads must be at least 1, not 0"),
        ("share", 1.5, "--share must be above 0 and at most 1, not 1.5"),
        ("set", [("block_size", 48), ("segment", 48)], "block_size 48 must divide 128 bytes"),
        ("set", [("tops", 4)], "--set: there is no 'tops'; there are family, width, "),
    ],
)
def test_wrong_settings_are_refused(
    arguments: argparse.Namespace, name: str, value: object, says: str
) -> None:
    setattr(arguments, name, value)
    with pytest.raises(ValueError, match=re.escape(says)):
        train.planned(arguments)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--device", "nowhere"), "argument --device: 'nowhere' cannot be"),
        (("--threads", "0"), "--threads must be at least 1, not 0"),
    ],
)
def test_wrong_usage_is_one_line(
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: tuple[str, str],
    says: str,
) -> None:
    monkeypatch.setattr(train, "keep_memory", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train", "landmark", "--corpus", str(texts), *option])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    said = capsys.readouterr().err
    assert said.startswith(f"python -m model.train: error: {says}")
    assert said.count("\n") == 1


def test_a_run_that_is_a_file_is_refused(arguments: argparse.Namespace) -> None:
    arguments.run.write_text("")
    with pytest.raises(ValueError, match=r"--run .* is not a folder"):
        train.planned(arguments)


def test_training_learns_and_another_seed_learns_otherwise(
    whole: argparse.Namespace, arguments: argparse.Namespace
) -> None:
    first, second, _ = (float(str(loss)) for _, loss in losses(whole))
    assert second < first
    arguments.seed = 4
    train_until(51, arguments)
    assert losses(arguments)[0] != losses(whole)[0]


def test_each_stage_draws_its_own_mixture(arguments: argparse.Namespace) -> None:
    drawn, mixtures = train.batch, []

    def batch(tasks: Tasks, seed: int, at: int, *sizes: int) -> object:
        mixtures.append((at, tasks.needles, tasks.mentions, tasks.aloud, *sizes))
        if at == 71:
            raise StoppedError
        return drawn(tasks, seed, at, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "batch", batch)
        with pytest.raises(StoppedError):
            train.train(train.planned(arguments))
    assert [at for at, *_ in mixtures] == list(range(72))
    assert mixtures[69] == (69, 0.6, 0.0, False, 2, 128, 0)
    assert mixtures[70] == (70, 0.5, 0.5, True, 3, 160, 2)


def test_wrong_corpora_are_refused(arguments: argparse.Namespace, tmp_path: Path) -> None:
    arguments.corpus = shutil.copytree(arguments.corpus, tmp_path / "texts")
    (arguments.corpus / "short.txt").write_text("It was. " * 10)
    for name, says in (("unknown", r"no unknown.txt or unknown.txt.gz in "), ("short", "80 bytes")):
        arguments.validation = name
        with pytest.raises(ValueError, match=says):
            train.train(train.planned(arguments))
    arguments.validation = "moby_dick"
    arguments.leave_out = ["mobby_dick"]
    with pytest.raises(ValueError, match=r"no mobby_dick.txt or mobby_dick.txt.gz in "):
        train.train(train.planned(arguments))
    arguments.corpus = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="nowhere"):
        train.train(train.planned(arguments))


def test_the_learning_rate_rises_and_falls() -> None:
    curriculum = (Stage(1500, 128, 4), Stage(700, 256, 2))
    rates = [learning_rate(step, curriculum, 2e-3) for step in range(2201)]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[99] == pytest.approx(1e-3)
    assert rates[199] == rates[200] == pytest.approx(2e-3)
    assert rates[1200] == pytest.approx(2e-3 * (0.05 + 0.95 / 2))
    assert rates[2200] == pytest.approx(1e-4)
    assert rates[:200] == sorted(set(rates[:200]))
    assert rates[200:] == sorted(set(rates[200:]), reverse=True)


def test_a_new_cycle_of_the_learning_rate() -> None:
    """Of its own peak, and the one before as if there were none."""
    first, second = (Stage(400, 128, 4),), (Stage(60, 128, 4, restart=0.5), Stage(40, 128, 4))
    rates = [learning_rate(step, first + second, 2e-3) for step in range(500)]
    assert rates[:400] == [learning_rate(step, first, 2e-3) for step in range(400)]
    assert rates[400:] == [learning_rate(step, second, 2e-3) for step in range(100)]
    assert rates[39] == pytest.approx(2e-3)  # a tenth of the steps, if there are few
    assert max(rates[400:]) == rates[409] == pytest.approx(1e-3)


def test_stages_follow_one_another() -> None:
    first, second = Stage(2, 128, 4), Stage(3, 256, 2, distractors=1)
    assert [stage_of(step, (first, second)) for step in range(6)] == 2 * [first] + 4 * [second]


def test_landmarks_slide_in() -> None:
    stages = (Stage(2, 128, 4, gating=0.0), Stage(4, 128, 4), Stage(2, 256, 2))
    shares = [gating_at(step, stages) for step in range(9)]
    assert shares == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert gating_at(0, SHIPPED) == 0
    assert gating_at(10**6, SHIPPED) == 1


def test_the_curriculum_holds_whole_blocks_and_distractors_enough() -> None:
    size = LandmarkConfig().block_size
    for stage in SHIPPED:
        assert stage.length % size == 0
        assert 0 <= stage.mentions <= 1
        assert 0 < stage.needles <= 1
        assert (stage.count - 1) * (stage.length // size) >= stage.distractors


def test_the_loss_counts_weights() -> None:
    torch.manual_seed(0)
    model = LandmarkTransformer(LandmarkConfig(**TINY))  # type: ignore[arg-type]
    text = torch.randint(0, 256, (2, 64))
    only = torch.zeros(2, 64)
    only[1, 40] = 1.0
    single = loss_of(model, text, only, 0).item()
    assert math.isfinite(single)
    assert loss_of(model, text, 5 * only, 0).item() == pytest.approx(single)
    changed = text.clone()
    changed[1, 41:] ^= 1  # what comes after the byte that counts
    changed[0] ^= 1
    assert loss_of(model, changed, only, 0).item() == pytest.approx(single)


def test_blocks_that_speak_of_needles_are_set_apart() -> None:
    said = np.zeros((3, 96), bool)
    said[1, 40] = said[2, 95] = True
    text = np.arange(96, dtype=np.uint8)
    samples = [
        Sample(text + i, np.full(96, 0.5 * i, np.float32), row, None, asked, passage=7 - i)
        for i, (row, asked) in enumerate(zip(said, (None, slice(30, 33), None), strict=True))
    ]
    x, weight, passage, apart, asking = train_landmark.tensors(samples, 32, torch.device("cpu"))
    assert x.dtype == torch.int64
    assert x[2].tolist() == list(range(2, 98))
    assert weight[:, 0].tolist() == [0.0, 0.5, 1.0]
    assert passage.tolist() == [7, 6, 5]
    assert apart.int().tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert asking.nonzero().tolist() == [[1, 0, 30], [1, 0, 31], [1, 1, 0]]


@pytest.mark.slow
def test_the_examination_reports_bits_needles_and_margins() -> None:
    torch.manual_seed(0)
    model = LandmarkTransformer(LandmarkConfig(**TINY)).eval()  # type: ignore[arg-type]
    held_out = np.frombuffer(
        b"It was the best of times, it was the worst of times. " * 60, np.uint8
    )
    report = train_landmark.examine(model, held_out, 0)
    assert report == train_landmark.examine(model, held_out, 0)
    assert 7 < report["bits_per_byte_512"] < 12  # of an untrained model
    assert report["found_512"] == report["found_1024"] == 0
    assert set(report["margin"]) == {"layer0.head0", "layer0.head1"}
    margin = report["margin"]["layer0.head0"]
    assert margin["mean"] == sorted(margin["mean"], reverse=True)  # more blocks, more rivals
    assert all(a <= b for a, b in zip(margin["least"], margin["mean"], strict=True))
    json.dumps(report)
    assert not math.isnan(sum(margin["mean"]))


def test_a_needle_said_right_before_the_question_has_no_margin() -> None:
    """No block before the question holds it, so there is nothing to compare."""
    torch.manual_seed(0)
    model = LandmarkTransformer(LandmarkConfig(**TINY)).eval()  # type: ignore[arg-type]
    text = np.frombuffer(b"It was the best of times, it was the worst of times. " * 60, np.uint8)
    told, late = text[:512].copy(), text[:512].copy()
    question = b" The pass key is 12345."
    for sample, at in ((told, 100), (late, 400)):
        sample[at : at + 24] = np.frombuffer(b" The pass key is 12345. ", np.uint8)
        sample[424 : 424 + len(question)] = np.frombuffer(question, np.uint8)
    answer = slice(441, 446)
    samples = [
        Sample(sample, np.ones(512, np.float32), np.zeros(512, bool), answer)
        for sample in (told, late)
    ]
    held_out = Excerpts(text)
    with torch.no_grad():
        both = train_landmark._margins(model, held_out, samples)
        assert both == train_landmark._margins(model, held_out, samples[:1])


def test_grouped_cross_attention_is_trained_by_the_same_loop(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With noise in what it selects, and stopped midway."""
    config = GCAConfig(
        width=16, heads=2, lower=1, groups=2, mlp_width=32, block_size=16, landmark_dim=8, top_k=2,
        segment=8, buckets=64,
    )  # fmt: skip
    mixture = {"needles": 0.6, "named": 0.5, "hops": 0.5, "aloud": True}
    curriculum = (
        Stage(40, 256, 2, **mixture),  # type: ignore[arg-type]
        Stage(10, 320, 2, distractors=1, **mixture),  # type: ignore[arg-type]
        Stage(15, 320, 2, distractors=1, clues=0.5, restart=0.5, **mixture),  # type: ignore[arg-type]
    )
    recipe = replace(train.RECIPES["gca"], curriculum=curriculum, config=lambda: config)
    quick = replace(recipe, examine=QUICK.examine)
    monkeypatch.setitem(train.RECIPES, "gca", quick)
    runs = []
    for name, stop in (("whole", None), ("stopped", 57)):
        arguments = setting(texts, tmp_path / name)
        arguments.family = "gca"
        if stop:
            train_until(stop, arguments)
            torch.randn(7)
        train.train(train.planned(arguments))
        runs.append(arguments)
    assert losses(runs[0]) == losses(runs[1])
    assert_same_weights(runs[0].out, runs[1].out)
    model = checkpoint.load(str(runs[0].out))
    assert model.config == config
    held_out = np.frombuffer((texts / "moby_dick.txt").read_bytes(), np.uint8)
    report = recipe.examine(model, held_out, 0)
    assert report == recipe.examine(model, held_out, 0)
    assert report["bits_per_byte_1024"] < 8.5
    assert {"found_pass_key", "found_named", "found_two_hops"} <= report.keys()


def test_a_model_of_other_sizes_for_a_share_of_the_steps(
    arguments: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments.share, arguments.set = 0.25, [train.setting("top_k=1"), train.setting("near=3")]
    train.train(train.planned(arguments))
    model = checkpoint.load(str(arguments.out))
    assert (model.config.top_k, model.config.near, model.config.width) == (1, 3, TINY["width"])
    steps = sum(max(1, round(stage.steps / 4)) for stage in CURRICULUM)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["steps"], told["share"]) == (steps, 0.25)
    for given, says in (
        ("none=1", "there is no 'none'"),
        ("top_k=0", "at least 1"),
        ("grams=[0]", "each of grams must be at least 1"),
    ):
        arguments.set = [train.setting(given)]
        with pytest.raises(ValueError, match=says):
            train.train(train.planned(arguments))
    arguments.set, arguments.share = [], 0.0
    with pytest.raises(ValueError, match="--share must be above 0"):
        train.train(train.planned(arguments))
    with pytest.raises(argparse.ArgumentTypeError, match="is not KEY=VALUE"):
        train.setting("top_k")


def test_in_turn_segments_short_ones_and_chunks_ask() -> None:
    """Chunks as published: for the next one."""
    tasks = Tasks(Excerpts(np.full(5000, 46, np.uint8)), named=0.0)
    samples = [tasks.hide_named(np.random.default_rng(0), 1024)]
    asked = []

    class Network(torch.nn.Module):
        config = GCAConfig()

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, chunks, segment, noise, foreign, passage, apart, meant):  # type: ignore
            asked.append((segment, noise, foreign, meant is not None))
            logits = torch.zeros(*chunks.shape, 256) + self.weight
            missed = self.weight.sum() + (1000.0 if meant is not None else 0.0)
            return Reading(logits, missed, self.weight.sum() + 10.0)

    curriculum = (
        Stage(10, 1024, 1), Stage(10, 1024, 1, distractors=1), Stage(5, 1024, 1, clues=0.5)
    )  # fmt: skip
    losses = [
        train.RECIPES["gca"].loss(Network(), samples, step, curriculum).item() for step in range(25)
    ]
    assert [segment for segment, *_ in asked] == [None, None, 4, None, 0] * 5
    assert [foreign for _, _, foreign, _ in asked] == [False] * 10 + [True] * 10 + [False] * 5
    assert all(noise for _, noise, *_ in asked)
    assert [clued for *_, clued in asked] == [False] * 20 + [True] * 5
    assert losses[:20] == pytest.approx([math.log(256) + 0.3 * 10] * 20)
    assert losses[20:] == pytest.approx([loss + 500 for loss in losses[:5]])


def test_which_chunks_are_meant() -> None:
    clues = (
        Clue(slice(100, 110), (slice(14, 17), slice(40, 41))),
        Clue(slice(120, 121), (slice(30, 33),)),
    )
    text, weight = np.zeros(128, np.uint8), np.ones(128, np.float32)
    samples = [Sample(text, weight, np.zeros(128, bool), None, clues=each) for each in ((), clues)]
    meant = meant_by(samples, GCAConfig(block_size=16, segment=16))
    assert meant.shape == (2, 8, 16, 8)
    assert not meant[0].any()
    by_byte = meant[1].reshape(128, 8)
    assert by_byte.sum() == 10 * 3 + 2
    assert by_byte[100:110].nonzero()[1].tolist() == [0, 1, 2] * 10
    assert by_byte[120].nonzero()[0].tolist() == [1, 2]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has none")
def test_memory_is_kept() -> None:
    """What is freed is not given back, to be faulted in page by page at the next step."""
    script = """
import resource, torch
from model.train import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_memory()
print(given_back, faults())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    given_back, kept = map(int, done.stdout.split())
    assert kept < 0.5 * given_back
