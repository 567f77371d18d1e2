"""A new training each night, on yesterday's photos and today's: only today's are read and go through the frozen layers.

    python examples/nightly.py --data-root DIR --store DIR [--weights FILE]
    python examples/nightly.py --toy

The toy has four nights, each with a tenth more images. With real photos, run it once a night: whatever the folder has then
is trained on, and the rows of the photos that were there before are in the store.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from torch import nn

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.app.datasets import Split, load_dataset, load_folder
from learndrop_ext.app.image_set import ImageSet, make_loader
from learndrop_ext.app.networks import build_network
from learndrop_ext.app.runs import evaluate


def night(
    split: Split, train: ImageSet, name: str, weights: str | None, store: str, *, epochs: int, prefix: int
) -> None:
    """Fine-tune the pretrained network and print what it took."""
    begin = time.perf_counter()
    model = build_network(
        name, num_classes=len(split.classes), in_channels=split.channels, width=16, weights=weights, seed=0
    ).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = make_loader(train, 32, shuffle=True, seed=0)
    cache = CacheConfig(store=store)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: prefix}), epochs=epochs, cache=cache) as drop:
        for _ in range(epochs):
            model.train()
            for x, y in drop.loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            drop.step()
        fill = sum(record.fill_seconds for record in drop.history)
    seconds = time.perf_counter() - begin
    accuracy = evaluate(model, split.test, batch_size=256, amp=None)
    print(f"{len(train)} images: {accuracy:.2f} % in {seconds:.2f} s, {fill:.2f} s of it for rows")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root")
    parser.add_argument("--weights")
    parser.add_argument("--store", help="folder of the rows (default for the toy: a temporary folder)")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.toy:
        split = load_dataset("digits", limit=200)
        with tempfile.TemporaryDirectory() as temporary:
            for count in (150, 165, 182, 200):
                train = split.train.subset(range(count))
                night(split, train, "resnet10", None, args.store or temporary, epochs=2, prefix=3)
        return
    split = load_folder(args.data_root, size=96)
    night(split, split.train, "timm:tf_efficientnet_lite0", args.weights, args.store, epochs=3, prefix=21)


if __name__ == "__main__":
    main()
