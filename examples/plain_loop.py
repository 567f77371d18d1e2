"""Fine-tune a network in a plain PyTorch loop in half the time.

python examples/plain_loop.py --data-root DIR [--weights FILE]     photos in DIR/train/CLASS and DIR/test/CLASS
python examples/plain_loop.py --toy                                the digits of scikit-learn, in seconds
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from learndrop_ext import Budget, DropScheduler, Fixed
from learndrop_ext.app.datasets import load_dataset, load_folder
from learndrop_ext.app.image_set import make_loader
from learndrop_ext.app.networks import build_network


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root")
    parser.add_argument("--weights")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    if args.toy:
        split, name, args.epochs, policy = load_dataset("digits", limit=128), "resnet10", 2, Fixed({0: 2})
    else:
        split = load_folder(args.data_root, size=96).map(lambda images: images.decoded())
        name, policy = "timm:tf_efficientnet_lite0", Budget(2.0)

    # Use any model, optimizer and DataLoader here.
    model = build_network(
        name, num_classes=len(split.classes), in_channels=split.channels, width=16, weights=args.weights
    ).model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = make_loader(split.train, 32, shuffle=True, seed=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.epochs * len(loader))

    with DropScheduler(model, optimizer, loader, policy=policy, epochs=args.epochs) as drop:
        for epoch in range(1, args.epochs + 1):
            model.train()
            for x, y in drop.loader:  # images, or what stands for images that were not read
                loss = nn.functional.cross_entropy(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            record = drop.step()
            print(f"epoch {epoch}: {record.epoch_seconds:.2f} s, {record.prefix} layers dropped: {record.reason}")

    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in make_loader(split.test, 256))
    print(f"test accuracy: {100 * right / len(split.test):.1f} %")


if __name__ == "__main__":
    main()
