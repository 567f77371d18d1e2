"""Five folds that share the rows of their frozen layers: each photo goes through these layers once, not in four folds.

python examples/folds.py --data-root DIR [--weights FILE] [--store DIR]
python examples/folds.py --toy
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from torch import nn

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.app.datasets import load_dataset, load_folder
from learndrop_ext.app.image_set import make_loader
from learndrop_ext.app.networks import build_network
from learndrop_ext.app.runs import evaluate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root")
    parser.add_argument("--weights")
    parser.add_argument("--store", help="folder of the rows (default: a temporary folder)")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.toy:
        split, name, epochs, prefix = load_dataset("digits", limit=200), "resnet10", 2, 3
    else:
        split, name, epochs, prefix = load_folder(args.data_root, size=96), "timm:tf_efficientnet_lite0", 3, 21

    accuracies = []
    with tempfile.TemporaryDirectory() as temporary:
        for fold in range(5):
            begin = time.perf_counter()
            train = split.train.subset([i for i in range(len(split.train)) if i % 5 != fold])
            left_out = split.train.subset(range(fold, len(split.train), 5))
            # The same seed in every fold: rows are shared only between equal weights of the frozen layers.
            model = build_network(
                name, num_classes=len(split.classes), in_channels=split.channels, width=16, weights=args.weights, seed=0
            ).model
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            loader = make_loader(train, 32, shuffle=True, seed=fold)
            cache = CacheConfig(store=args.store or temporary)
            with DropScheduler(model, optimizer, loader, policy=Fixed({0: prefix}), epochs=epochs, cache=cache) as drop:
                for _ in range(epochs):
                    model.train()
                    for x, y in drop.loader:
                        loss = nn.functional.cross_entropy(model(x), y)
                        optimizer.zero_grad()
                        loss.backward()
                        optimizer.step()
                    drop.step()
            seconds = time.perf_counter() - begin
            accuracies.append(evaluate(model, left_out, batch_size=256, amp=None))
            print(f"fold {fold + 1}: {accuracies[-1]:.2f} % in {seconds:.2f} s")
    print(f"mean: {statistics.fmean(accuracies):.2f} %")


if __name__ == "__main__":
    main()
