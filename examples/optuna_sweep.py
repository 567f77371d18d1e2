"""A sweep of fine-tuning trials that share the rows of their frozen layers. Requires optuna.

    python examples/optuna_sweep.py --data-root DIR --store DIR [--weights FILE]
    python examples/optuna_sweep.py --toy

The first layers, and so their outputs on the same images, are equal in all trials. The number of layers to drop is one more
hyper-parameter: the first trial with a number computes the rows and leaves them in the store; later ones read the images of
one batch, to compare. Trials that fall behind are pruned. `learndrop store DIR` lists what is in the folder.
"""

from __future__ import annotations

import argparse
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
    trial: optuna.Trial, split: Split, name: str, weights: str | None, store: str, *, epochs: int, depths: list[int]
) -> float:
    """Train once and return the accuracy in percent."""
    lr = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    decay = trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True)
    dropped = trial.suggest_categorical("dropped", depths)
    # The same seed in every trial: rows are shared only between equal weights of the frozen layers.
    model = build_network(
        name, num_classes=len(split.classes), in_channels=split.channels, width=16, weights=weights, seed=0
    ).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
    loader = make_loader(split.train, 32, shuffle=True, seed=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(loader))
    validation = split.validation if split.validation is not None else split.test
    accuracy = 0.0
    cache = CacheConfig(store=store)
    with DropScheduler(model, optimizer, loader, policy=Fixed({0: dropped}), epochs=epochs, cache=cache) as drop:
        for epoch in range(epochs):
            model.train()
            for x, y in drop.loader:
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            drop.step()
            accuracy = evaluate(model, validation, batch_size=256, amp=None)
            trial.report(accuracy, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root")
    parser.add_argument("--weights")
    parser.add_argument("--store", help="folder of the rows (default: a temporary folder)")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.toy:
        split, name, epochs, depths, args.trials = load_dataset("digits", limit=128), "resnet10", 2, [2, 3], 4
    else:
        split, name, epochs = load_folder(args.data_root, size=96), "timm:tf_efficientnet_lite0", 3
        depths = [12, 21, 27]

    with tempfile.TemporaryDirectory() as temporary:

        def objective(trial: optuna.Trial) -> float:
            begin = time.perf_counter()
            try:
                return fine_tune(
                    trial, split, name, args.weights, args.store or temporary, epochs=epochs, depths=depths
                )
            finally:
                print(f"trial {trial.number + 1}: {time.perf_counter() - begin:.2f} s with {trial.params}", flush=True)

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.MedianPruner(3)
        )
        study.optimize(objective, n_trials=args.trials)
    print(f"best: {study.best_value:.2f} % with {study.best_params}")


if __name__ == "__main__":
    main()
