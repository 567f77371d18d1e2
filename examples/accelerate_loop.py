"""Fine-tune with Hugging Face Accelerate: it prepares model and optimizer, the DropScheduler takes the loader.

    python examples/accelerate_loop.py [--toy]      pip install accelerate

`accelerator.prepare` is not given the loader: `drop.loader` brings each batch to the model's device itself. Mixed
precision comes from `accelerator.autocast()`.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch import nn

from learndrop_ext import DropScheduler
from learndrop_ext.app.datasets import load_dataset, make_loader
from learndrop_ext.app.models import build_model
from learndrop_ext.decide.policy import Fixed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--toy", action="store_true", help="128 images and two epochs")
    args = parser.parse_args()
    epochs = 2 if args.toy else 10
    split = load_dataset("digits", limit=128 if args.toy else None)

    accelerator = Accelerator()
    model = build_model("resnet10", num_classes=10, in_channels=1, width=16, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = make_loader(split.train, 32, shuffle=True, seed=0)

    # Accelerate wraps the optimizer; the scheduler reads the one inside.
    with DropScheduler(model, optimizer.optimizer, loader, policy=Fixed({1: 2}), epochs=epochs) as drop:
        for epoch in range(1, epochs + 1):
            model.train()
            for x, y in drop.loader:
                with accelerator.autocast():
                    loss = nn.functional.cross_entropy(drop.model(x), y)
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
            record = drop.step()
            accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}, {record.prefix} layers dropped")


if __name__ == "__main__":
    main()
