"""Draw training runs from their logs: loss, bits a byte, what is found, and the landmarks' margin.

Several runs are drawn over one another, to compare them.

python -m bench.training runs/landmark/log.jsonl --plot docs/training.png
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from bench.arguments import Parser, picture

Point = tuple[int, float]  # a step, and what was measured at it


def load(path: Path) -> list[dict[str, Any]]:
    """Return a log's lines. Raises ValueError if it is none."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if lines and all({"step", "length", "loss"} <= line.keys() for line in lines):
            return lines
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is not the log of a training: give the log.jsonl of its --run folder")


def curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Return the curves of each panel by name, in the panels' order; only those with points."""
    panels: dict[str, dict[str, list[Point]]] = {
        "training loss, weighted, nats": {},
        "validation, bits a byte": {},
        "share found": {},
        "mean margin against 4,096 blocks": {},
    }
    loss, bits, found, margin = panels.values()
    for line in lines:
        step = line["step"]
        loss.setdefault("", []).append((step, line["loss"]))
        for key, value in line.items():
            if key.startswith("bits_per_byte_"):
                bits.setdefault(f"{key.rpartition('_')[2]} bytes", []).append((step, value))
            elif key.startswith("found_"):
                name = key.removeprefix("found_")
                name = f"pass key, {name} bytes" if name.isdecimal() else name.replace("_", " ")
                found.setdefault(name, []).append((step, value))
        for name, value in line.get("margin", {}).items():
            margin.setdefault(name, []).append((step, value["mean"][-1]))
    return {label: drawn for label, drawn in panels.items() if drawn}


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw runs by name, a panel above the other; a dotted line where the length changes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {name: curves(lines) for name, lines in runs.items()}
    labels = list(dict.fromkeys(label for panels in drawn.values() for label in panels))
    figure, axes = plt.subplots(
        len(labels), 1, figsize=(8, 3 * len(labels)), sharex=True, squeeze=False
    )
    lines = next(iter(runs.values()))
    stages = [
        (a["step"], b["length"]) for a, b in itertools.pairwise(lines) if a["length"] != b["length"]
    ]
    for label, axis in zip(labels, axes[:, 0], strict=True):
        for style, (name, panels) in zip(itertools.cycle(("-", "--", ":")), drawn.items()):
            axis.set_prop_cycle(None)  # a curve has the same colour in every run
            for curve, points in panels.get(label, {}).items():
                parts = [part for part in (name if len(runs) > 1 else "", curve) if part]
                axis.plot(*zip(*points, strict=True), style, label=", ".join(parts) or None)
        axis.set_ylabel(label)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        for step, _ in stages:
            axis.axvline(step, color="grey", lw=0.5, ls=":")
    written = 0
    for step, length in stages:
        if step - written > lines[-1]["step"] / 30:  # or they would cover each other
            at = (step, axes[0, 0].get_ylim()[1])
            axes[0, 0].annotate(f" {length} B", at, fontsize=8, va="bottom", rotation=60)
            written = step
    axes[-1, 0].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Draw the curves; the last line is JSON: where each run ended."""
    parser = Parser("training", __doc__)
    parser.add_argument("logs", type=Path, nargs="+", help="log.jsonl of the runs' folders")
    parser.add_argument("--plot", type=picture, required=True, help="write the picture here")
    a = parser.parse_args()
    try:
        runs = {path.resolve().parent.name: load(path) for path in a.logs}
        if len(runs) < len(a.logs):
            raise ValueError("runs need folders of different names")
        draw(runs, a.plot)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    last = {name: lines[-1] for name, lines in runs.items()}
    print(json.dumps({"bench": "training", "plot": str(a.plot), "last": last}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
