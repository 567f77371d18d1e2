"""A sweep of ten fine-tuning trials that share the rows of their frozen layers. Requires optuna.

    python examples/optuna_sweep.py --data-root DIR --cache DIR [--weights FILE]
    python examples/optuna_sweep.py --toy

The first layers, and so their outputs on the same images, are equal in all trials. Trial 1 computes the rows and writes
them to the folder; trials 2 to 10 read them and never run these layers: they read the images in their first epoch only,
for the labels. `learndrop cache DIR` lists the files in the folder and removes old ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import optuna
import torch
from torch import nn

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.app.datasets import Split, load_dataset, load_folder
from learndrop_ext.app.image_set import make_loader
from learndrop_ext.app.networks import build_network
from learndrop_ext.app.runs import evaluate


def fine_tune(
    split: Split, name: str, weights: str | None, folder: str, *, epochs: int, prefix: int, lr: float, decay: float
) -> tuple[float, float]:
    """Train once and return the accuracy in percent and the training time in seconds."""
    begin = time.perf_counter()
    # The same seed in every trial: rows are shared only between equal weights of the frozen layers.
    model = build_network(
        name, num_classes=len(split.classes), in_channels=split.channels, width=16, weights=weights, seed=0
    ).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    loader = make_loader(split.train, 32, shuffle=True, seed=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    cache = CacheConfig(disk_dir=folder, disk_bytes="auto", shared=True)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: prefix}), epochs=epochs, cache=cache) as drop:
        for _ in range(epochs):
            model.train()
            for x, y in drop.loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            drop.step()
    seconds = time.perf_counter() - begin
    validation = split.validation if split.validation is not None else split.test
    return evaluate(model, validation, batch_size=256, amp=None), seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root")
    parser.add_argument("--weights")
    parser.add_argument("--cache", help="folder that the trials share (default: a temporary folder)")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.toy:
        split, name, epochs, prefix, args.trials = load_dataset("digits", limit=128), "resnet10", 2, 3, 3
    else:
        split = load_folder(args.data_root, size=96).map(lambda images: images.decoded())
        name, epochs, prefix = "timm:tf_efficientnet_lite0", 3, 12

    with tempfile.TemporaryDirectory() as temporary:
        seconds: list[float] = []

        def objective(trial: optuna.Trial) -> float:
            lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
            decay = trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True)
            folder = args.cache or temporary
            accuracy, elapsed = fine_tune(
                split, name, args.weights, folder, epochs=epochs, prefix=prefix, lr=lr, decay=decay
            )
            seconds.append(elapsed)
            return accuracy

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
        study.optimize(objective, n_trials=args.trials)

    print(f"best: {study.best_value:.2f} % with {study.best_params}")
    print(f"trial 1:           {seconds[0]:6.2f} s")
    print(f"trials 2 to {args.trials:<6} {statistics.fmean(seconds[1:]):6.2f} s each")


if __name__ == "__main__":
    main()
