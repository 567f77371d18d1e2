"""Training a model that takes more than the image: what the loop passes beside it goes to the live layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed
from learndrop_ext.decide.probes import probe_training_step

COUNT = 24


class WithMeta(nn.Module):
    """Two convolutions of the image; what is measured beside it joins before the classifier, which gives the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.fc = nn.Linear(8, 5)
        self.scale = 1.0

    def forward(self, image: Tensor, meta: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        meta = meta.float() * self.scale
        x = self.conv2(self.bn(self.conv1(image)).relu()).relu().mean((2, 3))
        scores = self.fc(torch.cat([x, meta], 1))
        out = {"logits": scores}
        if labels is not None:
            out["loss"] = F.cross_entropy(scores, labels)
        return out


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(COUNT, 3, 8, 8, generator=generator),
        torch.randn(COUNT, 2, generator=generator, dtype=torch.float64),
        torch.randint(0, 5, (COUNT,), generator=generator),
    )


def parts() -> tuple[WithMeta, torch.optim.Optimizer, DataLoader[Any]]:
    model = WithMeta()
    loader = DataLoader(dataset(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(1))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), loader


def named(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    image, meta, labels = batch
    return (), {"image": image, "meta": meta, "labels": labels}


def in_order(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(batch), {}


def epoch(drop: DropScheduler, optimizer: torch.optim.Optimizer, inputs: Callable[[Any], Any] = named) -> list[float]:
    losses = []
    drop.base_model.train()
    for batch in drop.loader:
        args, kwargs = inputs(batch)
        loss = drop.model(*args, **kwargs)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("inputs", [named, in_order])
@pytest.mark.parametrize("prefix", [1, 2])
def test_training_on_rows_equals_training_behind_a_frozen_prefix(inputs: Callable[[Any], Any], prefix: int) -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: prefix}), cache="fp32", inputs=inputs)
    assert drop.chain.names == ("conv1", "conv2", "fc")
    losses = []
    for _ in range(4):
        losses.append(epoch(drop, optimizer, named))  # as `inputs` says, or with other names for it
        drop.step()
    assert drop.prefix == prefix
    assert drop.cut == prefix

    same, other, order = parts()
    wanted = []
    frozen = [same.conv1, same.bn, same.conv2][: 2 if prefix == 1 else 3]
    for number in range(4):
        same.train()
        for module in frozen if number else ():
            module.eval().requires_grad_(False)
        seen = []
        for image, meta, labels in order:
            loss = same(image, meta, labels)["loss"]
            other.zero_grad()
            loss.backward()
            other.step()
            seen.append(loss.item())
        wanted.append(seen)
    assert losses[0] == wanted[0]
    # Later epochs draw the order from the ids of the same sampler.
    assert losses[1] == pytest.approx(wanted[1], rel=1e-5)
    assert losses[3] == pytest.approx(wanted[3], rel=1e-4)


def test_the_loop_must_call_the_model_as_inputs_says() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), inputs=named)
    for _ in range(2):
        image, meta, labels = next(iter(drop.loader))
        model.train()
        with pytest.raises(
            TypeError, match=r"drop.model: wanted labels as inputs= gives it, a int64 tensor .* got None"
        ):
            drop.model(image, meta)
        with pytest.raises(TypeError, match=r"drop.model: wanted meta as inputs= gives it, a float64 tensor"):
            drop.model(image, meta.float(), labels)
        if drop.prefix == 0:
            # The whole model is the caller's own: in eval mode it is called as they like.
            drop.model.eval()
            assert set(drop.model(image, meta)) == {"logits"}
            drop.model.train()
        epoch(drop, optimizer)
        drop.step()
    assert drop.prefix == 1


def test_the_image_is_still_checked() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), inputs=named)
    model.train()
    for image, meta, labels in drop.loader:
        drop.model(image.add_(1), meta, labels)["loss"].backward()
    with pytest.raises(
        RuntimeError, match=r"must get the batch's input as drop.loader gave it, got one that was changed"
    ):
        drop.step()
    epoch(drop, optimizer)
    drop.step()
    for image, meta, labels in drop.loader:
        drop.model(image.flip(-1), meta * 2, labels)["loss"].backward()  # meta is the loop's own
    with pytest.raises(RuntimeError, match=r"must get the batch's input as drop.loader gave it"):
        drop.step()


def test_a_model_that_wants_more_is_refused_by_name_without_inputs() -> None:
    model, optimizer, loader = parts()
    with pytest.raises(ValueError, match="one input, got 2: image, meta; say with inputs="):
        DropScheduler(model, optimizer, loader)
    with pytest.raises(TypeError, match="inputs must return"):
        DropScheduler(model, optimizer, loader, inputs=lambda batch: batch)
    with pytest.raises(ValueError, match="have the batch's image itself among them"):
        DropScheduler(model, optimizer, loader, inputs=lambda batch: ((batch[0] * 2, batch[1]), {}))


def test_resplit_undrop_and_close_with_several_inputs() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), inputs=named)
    epoch(drop, optimizer)
    drop.step()
    epoch(drop, optimizer)
    model.scale = 0.5
    before = drop.chain
    drop.step()  # what live layers read: the model is split again, and the rows stay
    assert drop.chain is not before
    assert drop.rows.cache is not None
    assert bool(drop.rows.cache.filled.all())
    image, meta, labels = next(iter(drop.loader))
    assert image.shape[1:] == (6,)
    got = drop.model(image, meta, labels)["logits"]
    torch.testing.assert_close(got, model.fc(torch.cat([image, meta.float() * 0.5], 1)))
    drop.undrop()
    assert epoch(drop, optimizer)[0] > 0
    drop.close()
    x, m, _ = dataset().tensors
    assert set(model.eval()(x, m)) == {"logits"}


def test_forecasts_and_budgets_time_steps_with_all_inputs() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({}), epochs=4, inputs=named)
    assert drop.forecast().full_seconds > 0
    assert drop.ledger.costs.optimizer_seconds > 0  # only where a whole step could be timed
    model, optimizer, loader = parts()
    DropScheduler(model, optimizer, loader, policy=Budget(speedup=1.01), epochs=20, inputs=named)
    batch = next(iter(loader))
    assert probe_training_step(model, optimizer, batch[0], inputs=named(batch), repeats=1) is not None


def test_batches_of_one_sample_and_of_dicts() -> None:
    class Dicts(TensorDataset):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            image, meta, label = super().__getitem__(index)
            return {"image": image, "meta": meta, "labels": label}

    model = WithMeta().eval()  # batch norm over one sample
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.05)
    loader = DataLoader(Dicts(*(t[:1] for t in dataset().tensors)), batch_size=1)
    drop = DropScheduler(
        model, optimizer, loader, policy=Fixed({1: 2}), input="image", inputs=lambda batch: ((), batch), cache="fp32"
    )
    for number in range(3):
        for batch in drop.loader:
            drop.model.train()
            loss = drop.model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        drop.step()
        assert drop.prefix == 2, number
