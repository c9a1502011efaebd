"""Draw a training run: loss, needles found, and the landmarks' margin, from its log.

python -m bench.training runs/landmark/log.jsonl --plot docs/training.png
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path


def main() -> None:
    """Draw the curves; the last line is JSON: where the run ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path)
    parser.add_argument("--plot", type=Path, default=Path("docs/training.png"))
    a = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = [json.loads(line) for line in a.log.read_text().splitlines()]
    examined = [line for line in lines if "margin" in line]
    steps = [line["step"] for line in lines]
    figure, (loss, found, margin) = plt.subplots(3, 1, figsize=(8, 9), sharex=True)
    loss.plot(steps, [line["loss"] for line in lines], label="training loss, weighted, nats")
    at = [line["step"] for line in examined]
    loss.plot(at, [e["bits_per_byte_512"] for e in examined], "o-", label="validation bits/byte")
    for length in (512, 1024):
        key = f"found_{length}"
        has = [e for e in examined if key in e]
        found.plot([e["step"] for e in has], [e[key] for e in has], "o-", label=f"{length} bytes")
    found.set_ylabel("pass keys found")
    for name in examined[-1]["margin"]:
        margin.plot(at, [e["margin"][name]["mean"][-1] for e in examined], "o-", label=name)
    margin.axhline(0, color="grey", lw=0.5)
    margin.set_ylabel("mean margin against 4,096 blocks")
    margin.set_xlabel("step")
    for earlier, line in itertools.pairwise(lines):
        if earlier["length"] != line["length"]:
            for axis in (loss, found, margin):
                axis.axvline(earlier["step"], color="grey", lw=0.5, ls=":")
            loss.annotate(f" {line['length']} B", (earlier["step"], loss.get_ylim()[1] * 0.9))
    for axis in (loss, found, margin):
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(a.plot, dpi=110)
    print(json.dumps({"bench": "training", "plot": str(a.plot), "last": examined[-1]}))


if __name__ == "__main__":
    main()
