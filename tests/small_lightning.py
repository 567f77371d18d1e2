"""A LightningModule, its Trainer and its loader, and the same training in a loop by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from learndrop_ext import DropScheduler, Fixed
from small_training import Net, data

#: Of the framework, about the smallness of the test and about its own use of torch.
IGNORED = (
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    r"ignore:.*(does not have many workers|logging interval|no `val_dataloader`|in eval mode at the start):",
    "ignore:You're resuming from a checkpoint that ended before the epoch",
    r"ignore:Checkpoint directory .* exists and is not empty",
    "ignore:GPU available but not used",
    r"ignore:.*callbacks used to create the checkpoint need to be provided",
)


class ByEpoch:
    """An order that is a function of the epoch, which the Trainer sets."""

    def __init__(self, size: int = 24) -> None:
        self.size = size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())


class Counted(Dataset[Any]):
    """The small data, with the ids that were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return data()[index]


def loader(dataset: Dataset[Any] | None = None, **options: Any) -> DataLoader[Any]:
    return DataLoader(dataset or data(), **{"batch_size": 8, "sampler": ByEpoch(), **options})


def classifier(pl: Any) -> Any:
    """A LightningModule that keeps what it saw: losses, shapes of the training inputs, weights at each epoch's end."""

    class Classifier(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = Net()
            self.losses: list[float] = []
            self.val_shapes: list[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.val_shapes.append(list(x.shape))
            self.log("val_loss", nn.functional.cross_entropy(self.net(x), y), on_epoch=True)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Classifier()


def trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "enable_checkpointing": False, "max_epochs": 4, **options}, callbacks=list(callbacks))


def callback(**options: Any) -> Any:
    from learndrop_ext.lightning import LearnDropCallback

    return LearnDropCallback("net", **{"policy": Fixed({1: 2, 2: 3}), "cache": "fp32", **options})


def by_hand(
    epochs: int, *, limit: int | None = None, accumulate: int = 1, bf16: bool = False
) -> tuple[list[float], Net]:
    """The same training in a loop of one's own."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = loader()
    drop = DropScheduler(model, optimizer, batches, policy=Fixed({1: 2, 2: 3}), cache="fp32")
    losses = []
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        total = limit or len(batches)
        for i, (x, y) in enumerate(drop.loader):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(drop.model(x), y)
            losses.append(loss.item())
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0 or i + 1 == total:
                optimizer.step()
                optimizer.zero_grad()
            if i + 1 == total:
                break
        drop.step()
    return losses, model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    wanted = other.state_dict()
    assert one.state_dict().keys() == wanted.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, wanted[name]), name
