"""Learn & Drop in a Hugging Face Accelerate loop: `accelerate launch examples/accelerate_loop.py --out runs/toy`.

The images are synthetic (a bright square whose corner is the class), so that the example runs anywhere in seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, TensorDataset

from learndrop_ext import DropScheduler, Fixed

CLASSES = 4


def images(count: int, seed: int) -> TensorDataset:
    """Return noise images [count, 3, 16, 16] with a bright square in one of four corners, and the corners as labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 16, 16, generator=generator)
    y = torch.randint(0, CLASSES, (count,), generator=generator)
    for i, corner in enumerate(y.tolist()):
        top, left = 8 * (corner // 2), 8 * (corner % 2)
        x[i, :, top : top + 8, left : left + 8] += 1.0
    return TensorDataset(x, y)


def network() -> nn.Module:
    """Return a network of three convolutions and a classifier."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, CLASSES)),
    )


def main(arguments: list[str] | None = None) -> list[float]:
    """Train, print one line per epoch, and return the loss of the last batch of each epoch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--accumulate", type=int, default=1, help="batches per optimizer step")
    parser.add_argument("--codec", default="fp16", choices=["fp16", "bf16", "fp32", "uint8"])
    parser.add_argument("--out", type=Path, help="folder for the checkpoint, written after each epoch")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --out")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate)
    torch.manual_seed(0)
    model = network().to(accelerator.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    data = images(options.samples, seed=1)
    # The loader is not prepared: the batches of drop.loader are on the device, and each process has its share.
    several = accelerator.num_processes > 1
    sampler = DistributedSampler(data) if several else RandomSampler(data, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    drop = DropScheduler(
        model,
        optimizer,
        loader,
        policy=Fixed({2: 1, 4: 2}),  # without it: drop layers that have stopped learning
        epochs=options.epochs,
        cache=options.codec,
        # Not accelerator.prepare: a model wrapped before a drop would wait for the gradients of the dropped layers.
        wrap=DistributedDataParallel if several else None,
    )
    prepared = accelerator.prepare(optimizer)
    accelerator.register_for_checkpointing(model, optimizer, drop)
    start = 0
    if options.resume:
        accelerator.load_state(str(options.out))
        start = drop.epoch

    losses = []
    model.train()
    for epoch in range(start, options.epochs):
        # The order depends on the epoch alone, so that a resumed run sees the same batches.
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        else:
            sampler.generator.manual_seed(epoch)
        for x, y in drop.loader:
            with accelerator.accumulate(drop.model):  # the model itself, or DistributedDataParallel of its live part
                with accelerator.autocast():
                    loss = nn.functional.cross_entropy(drop.model(x), y)
                accelerator.backward(loss)
                prepared.step()
                prepared.zero_grad()
        record = drop.step()
        losses.append(loss.item())
        accelerator.print(
            f"epoch {record.epoch}: loss {losses[-1]:.3f}, {record.prefix} layers dropped: {record.reason}"
        )
        if options.out is not None:
            accelerator.save_state(str(options.out))

    drop.close()
    held_out = images(256, seed=3)
    model.eval()
    with torch.no_grad():
        right = model(held_out.tensors[0].to(accelerator.device)).argmax(1).cpu() == held_out.tensors[1]
    accelerator.print(f"held-out accuracy: {100 * right.float().mean():.1f} %")
    return losses


if __name__ == "__main__":
    main()
