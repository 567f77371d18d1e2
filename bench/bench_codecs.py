"""Measures the error of each codec: writes docs/codecs.json, and the table of docs/codecs.md between its markers.

    python bench/bench_codecs.py --data-root DIR [--epochs 2] [--width 16] [--limit 5000] [--samples 512]

Trains a ResNet-18 on CIFAR-10, then stores the activations of test images at every cut with each codec and reads them back.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from learndrop_ext import ops, split_layers
from learndrop_ext.app.datasets import Split, load_dataset
from learndrop_ext.app.image_set import make_loader
from learndrop_ext.app.models import build_model
from learndrop_ext.rows.config import CODECS

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table:codecs -->\n).*?(<!-- /table:codecs -->)", re.DOTALL)
WANTED_DB = 45.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--limit", type=int, default=5000, help="training images")
    parser.add_argument("--samples", type=int, default=512, help="test images whose activations are measured")
    args = parser.parse_args()
    torch.manual_seed(0)
    split = load_dataset("cifar10", args.data_root, limit=args.limit)
    model = build_model("resnet18", num_classes=10, width=args.width, seed=0)
    train(model, split, args.epochs)
    images = next(iter(make_loader(split.test, args.samples)))[0]
    accuracy = accuracy_on_test(model, split)
    result = {
        "model": "resnet18",
        "dataset": "cifar10",
        **{name: getattr(args, name) for name in ("width", "epochs", "limit", "samples")},
        "accuracy": accuracy,
        "cuts": cuts(model, images),
    }
    (ROOT / "docs" / "codecs.json").write_text(json.dumps(result, indent=1) + "\n")
    page = ROOT / "docs" / "codecs.md"
    page.write_text(MARKED.sub(lambda found: f"{found[1]}{table(result)}{found[2]}", page.read_text()))
    print(table(result))


def train(model: nn.Module, split: Split, epochs: int) -> None:
    """SGD with a one-cycle learning rate."""
    loader = make_loader(split.train, 128, shuffle=True, seed=0, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    criterion = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy_on_test(model: nn.Module, split: Split) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in make_loader(split.test, 500))
    return 100 * right / len(split.test)


@torch.no_grad()
def cuts(model: nn.Module, images: Tensor) -> list[dict[str, Any]]:
    """For each cut behind a layer: its row's shape, and the errors of each codec."""
    model.eval()
    chain = split_layers(model, images[:2])
    found = []
    for k in range(1, len(chain)):
        x = chain.prefix(k)(images)
        found.append(
            {
                "layer": chain.names[k - 1],
                "shape": list(x.shape[1:]),
                "zeros": float((x == 0).double().mean()),
                "codecs": {codec: errors(x, codec) for codec in CODECS},
            }
        )
    return found


def errors(x: Tensor, codec: str) -> dict[str, float]:
    """What is left of rows [B, *shape] after a codec, each row measured by its own peak (largest |x|).

    psnr_db, worst_psnr_db: 20 log10(peak / root of the mean squared error), mean and smallest over the rows.
    largest: max |error| / peak. mean: sum |error| / sum |x|.
    """
    shape = tuple(x.shape[1:])
    cache = torch.zeros(len(x), ops.row_stride(shape, codec), dtype=torch.uint8)
    slots = torch.arange(len(x))
    ops.append_rows(cache, x, slots, codec=codec)
    rows = x.double().flatten(1)
    error = (ops.gather_rows(cache, slots, shape, codec=codec).double().flatten(1) - rows).abs()
    peak = rows.abs().amax(1)
    psnr = 20 * torch.log10(peak / error.square().mean(1).sqrt())
    return {
        "psnr_db": float(psnr.mean()),
        "worst_psnr_db": float(psnr.min()),
        "largest": float((error.amax(1) / peak).max()),
        "mean": float(error.sum() / rows.abs().sum()),
    }


def table(result: dict[str, Any]) -> str:
    codecs = [codec for codec in CODECS if codec != "fp32"]
    lines = [
        f"{result['model']} of width {result['width']} on {result['dataset']}, {result['epochs']} epochs of "
        f"{result['limit']:,} images, {result['accuracy']:.1f} % right; activations of {result['samples']} test images.",
        "",
        "| rows after | shape | zeros | "
        + " | ".join(f"{codec}: PSNR, worst row; max, mean" for codec in codecs)
        + " |",
        "|---|---|---|" + "---|" * len(codecs),
    ]
    for cut in result["cuts"]:
        cells = [cut["layer"], "x".join(map(str, cut["shape"])), f"{100 * cut['zeros']:.0f} %"]
        for codec in codecs:
            found = cut["codecs"][codec]
            cells.append(
                f"{found['psnr_db']:.1f} dB, {found['worst_psnr_db']:.1f} dB; "
                f"{found['largest']:.1e}, {found['mean']:.1e}"
            )
        lines.append(f"| {' | '.join(cells)} |")
    exact = all(cut["codecs"]["fp32"]["largest"] == 0 for cut in result["cuts"])
    lines += ["", f"fp32 is {'exact' if exact else 'NOT exact'} at every cut. {below(result)}", ""]
    return "\n".join(lines)


def below(result: dict[str, Any]) -> str:
    """Where uint8 does not reach WANTED_DB."""
    reached = [cut["codecs"]["uint8"]["psnr_db"] for cut in result["cuts"]]
    lowest = f"{min(reached):.1f} dB"
    under = [cut["layer"] for cut, db in zip(result["cuts"], reached, strict=True) if db < WANTED_DB]
    if under:
        return f"uint8 does not reach {WANTED_DB:g} dB after {', '.join(under)} (lowest: {lowest})."
    return f"uint8 reaches {WANTED_DB:g} dB at every cut (lowest: {lowest})."


if __name__ == "__main__":
    main()
