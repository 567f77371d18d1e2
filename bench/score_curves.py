"""Trains one model without dropping and draws how its layers change: docs/scores.svg and docs/scores.json.

    python bench/score_curves.py --data-root DIR [--dataset mnist] [--model resnet10] [--width 16] ...

From top to bottom: the change of each layer's weights per epoch, the cosine between successive changes, and the score
computed from both (`learndrop_ext/decide/scores.py`).
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from learndrop_ext import Fixed
from learndrop_ext.app import runs
from learndrop_ext.app.datasets import load_dataset
from learndrop_ext.app.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
PANELS = (
    ("relative", "relative change\n‖Δw‖ / ‖w‖"),
    ("cosine", "cosine to the\nchange before"),
    ("scores", "score"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--model", default="resnet10")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--limit", type=int, default=6000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()
    split = load_dataset(args.dataset, args.data_root, limit=args.limit)
    recipe = Recipe(model=args.model, stem="small", width=args.width, epochs=args.epochs, batch_size=64, lr=args.lr)
    records: list[dict[str, Any]] = []

    def show(record: dict[str, Any]) -> None:
        records.append(record)
        print(record["epoch"], f"{record['accuracy']:.2f} %", flush=True)

    result, _ = runs.train("learndrop", split, recipe, policy=Fixed({}), on_epoch=show)
    kept = ("epoch", "lr", "train_loss", "accuracy", *(key for key, _ in PANELS))
    config = {"dataset": args.dataset, "limit": args.limit, "model": args.model, "width": args.width, "lr": args.lr}
    text = {
        "config": config | {"epochs": args.epochs, "schedule": "one-cycle", "batch_size": 64, "seed": 0},
        "accuracy": result.accuracy,
        "records": [{key: record[key] for key in kept} for record in records],
    }
    (ROOT / "docs" / "scores.json").write_text(json.dumps(text, indent=1) + "\n")
    (ROOT / "docs" / "scores.svg").write_text(draw(text))


def draw(text: dict[str, Any]) -> str:

    rcParams["svg.hashsalt"] = "learndrop_ext"
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(3, 1, sharex=True)
    records = text["records"]
    layers = list(records[0]["scores"])
    for (key, label), axis in zip(PANELS, axes, strict=True):
        for i, layer in enumerate(layers):
            points = [(r["epoch"], r[key][layer]) for r in records if r[key][layer] is not None]
            shade = 0.85 * i / max(1, len(layers) - 1)
            axis.plot(*zip(*points, strict=True), color=(shade, 0.35, 0.85 - shade), marker=".", label=layer)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[2].set_xlabel("epoch")
    axes[2].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(title="layer, from the input", fontsize="small", ncols=2)
    config = text["config"]
    axes[0].set_title(f"{config['model']}, width {config['width']}, {config['limit']} images of {config['dataset']}")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


if __name__ == "__main__":
    main()
