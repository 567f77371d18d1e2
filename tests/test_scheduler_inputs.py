"""Training a model that is called with more than the images, by position or by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed

COUNT = 24
Call = Callable[[nn.Module, Any], Any]


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


def named(model: nn.Module, batch: Any) -> Any:
    image, meta, labels = batch
    return model(image=image, meta=meta, labels=labels)


def in_order(model: nn.Module, batch: Any) -> Any:
    return model(*batch)


def epoch(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, call: Call = named) -> list[float]:
    losses = []
    model.train()
    for batch in batches:
        loss = call(model, batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("call", [named, in_order])
@pytest.mark.parametrize("prefix", [1, 2])
def test_training_on_rows_equals_training_behind_a_frozen_prefix(call: Call, prefix: int) -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: prefix}), cache="fp32", call=call)
    assert drop.chain.names == ("conv1", "conv2", "fc")
    losses = []
    for _ in range(4):
        losses.append(epoch(model, optimizer, drop.loader))  # as `call` does, or with names
        drop.step()
    assert drop.prefix == prefix
    assert drop._rows.cut == prefix

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
    assert losses[1] == pytest.approx(wanted[1], rel=1e-5)
    assert losses[3] == pytest.approx(wanted[3], rel=1e-4)


def test_the_loop_may_call_the_model_otherwise_than_call_does() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), cache="fp32", call=named)
    for _ in range(3):  # before the drop, while rows are kept, on rows
        model.train()
        for image, meta, labels in drop.loader:
            out = model(image, meta=meta.float())
            assert set(out) == {"logits"}
            optimizer.zero_grad()
            F.cross_entropy(out["logits"], labels).backward()
            optimizer.step()
            model.eval()
            assert torch.equal(model(image, meta)["logits"], model(image, meta, labels)["logits"])
            model.train()
        drop.step()
    assert drop.prefix == 1
    assert bool(drop._rows.cache.filled.all())


def test_the_image_is_still_checked() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 1}), cache="fp32", call=named)
    epoch(model, optimizer, drop.loader)
    drop.step()
    for _ in range(2):  # while rows are kept, and on rows
        for image, meta, labels in drop.loader:
            with pytest.raises(RuntimeError, match=r"the loop may only do to images .* flip would have to see"):
                image.flip(0)
            named(model, (image, meta * 2, labels))["loss"].backward()  # meta is the loop's own
            optimizer.step()
    for image, meta, labels in drop.loader:
        with pytest.raises(
            RuntimeError, match=r"the same to the images of every batch .* wanted nothing, got add\(1\)"
        ):
            model(image.add_(1), meta, labels)
    drop.step()


def test_a_model_that_wants_more_is_refused_by_name_without_call() -> None:
    model, optimizer, loader = parts()
    with pytest.raises(ValueError, match=r"call must say .* got WithMeta.forward\(image.*\).*: missing .* 'meta'"):
        DropScheduler(model, optimizer, loader)
    with pytest.raises(TypeError, match="call must be a function of the model and a batch, got 'named'"):
        DropScheduler(model, optimizer, loader, call="named")  # type: ignore[arg-type]
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_cannot_be_called_so_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, torch.zeros(16, dtype=torch.int64)), 4)
    with pytest.raises(
        RuntimeError,
        match=r"call must call the model as the training loop does .* images torch.uint8 \[2, 3, 8, 8\] it raised",
    ):
        DropScheduler(model, optimizer, loader)
    DropScheduler(model, optimizer, loader, call=lambda model, batch: model(batch[0] / 255)).close()

    def too_large(model: nn.Module, batch: Any) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        DropScheduler(model, optimizer, loader, call=too_large)


@pytest.mark.parametrize("call", [lambda model, batch: batch[0], lambda model, batch: model.fc(batch[0].mean((2, 3)))])
def test_a_call_that_does_not_call_the_model_on_images_is_refused(call: Call) -> None:
    model, optimizer, loader = parts()
    model.fc = nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"model must have a cut, .* WithMeta has none"):
        DropScheduler(model, optimizer, loader, call=call)


def test_what_live_layers_read_may_change() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, policy=Fixed({1: 2}), call=named)
    for _ in range(2):
        epoch(model, optimizer, drop.loader)
        drop.step()
    epoch(model, optimizer, drop.loader)
    model.scale = 0.5
    drop.step()  # the rows stay, and a warning that they do not would be an error
    assert drop._rows.cache is not None
    assert bool(drop._rows.cache.filled.all())
    image, meta, labels = next(iter(drop.loader))
    rows: list[Tensor] = []
    hook = model.conv2.register_forward_hook(lambda module, args, row: rows.append(row))
    out = model(image, meta, labels)["logits"]
    hook.remove()
    torch.testing.assert_close(out, model.fc(torch.cat([rows[0].relu().mean((2, 3)), meta.float() * 0.5], 1)))
    drop.undrop()
    assert epoch(model, optimizer, drop.loader)[0] > 0
    drop.close()
    x, m, _ = dataset().tensors
    assert set(model.eval()(x, m)) == {"logits"}


def test_forecasts_and_budgets_time_steps_with_all_inputs() -> None:
    model, optimizer, loader = parts()
    seen: list[int] = []

    def call(model: nn.Module, batch: Any) -> Any:
        seen.append(len(batch[2]))
        return named(model, batch)

    drop = DropScheduler(model, optimizer, loader, policy=Fixed({}), epochs=4, call=call)
    assert set(seen) == {2}  # to find the layers
    assert drop.forecast().full_seconds > 0
    assert set(seen) == {2, 8}  # whole steps of a batch
    model, optimizer, loader = parts()
    DropScheduler(model, optimizer, loader, policy=Budget(speedup=1.01), epochs=20, call=named)


def test_batches_of_one_sample_and_of_dicts() -> None:
    class Dicts(TensorDataset):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            image, meta, label = super().__getitem__(index)
            return {"image": image, "meta": meta, "labels": label}

    model = WithMeta().eval()  # batch norm over one sample
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.05)
    loader = DataLoader(Dicts(*(t[:1] for t in dataset().tensors)), batch_size=1)
    drop = DropScheduler(
        model, optimizer, loader, policy=Fixed({1: 2}), input="image", call=lambda m, batch: m(**batch), cache="fp32"
    )
    for number in range(3):
        epoch(model, optimizer, drop.loader, lambda m, batch: m(**batch))
        drop.step()
        assert drop.prefix == 2, number
    assert drop._rows.cut == 2


@dataclass
class Output:
    """What a model of the Hugging Face kind returns; torch knows nothing of it."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class Photos(nn.Module):
    """Called by keyword, each of which has a default."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.ReLU(), nn.Conv2d(8, 8, 3))
        self.head = nn.Linear(8, 4)

    def forward(self, pixel_values: Tensor | None = None, labels: Tensor | None = None) -> Output:
        assert pixel_values is not None
        logits = self.head(self.body(pixel_values).mean((2, 3)))
        return Output(None if labels is None else F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize(
    "call",
    [None, lambda model, batch: model(**batch), lambda model, batch: model(pixel_values=batch["pixel_values"])],
    ids=["none", "all", "one"],
)
def test_a_model_with_defaults_is_called_by_keyword(call: Call | None) -> None:
    def run(**options: Any) -> list[float]:
        images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        samples = [{"pixel_values": image, "labels": i % 4} for i, image in enumerate(images)]
        model = Photos()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader: DataLoader[Any] = DataLoader(samples, 8)  # type: ignore[arg-type]
        drop = DropScheduler(model, optimizer, loader, input="pixel_values", policy=Fixed({1: 1}), call=call, **options)
        assert drop.chain.names == ("body.0", "body.2", "head")
        losses = []
        for _ in range(3):
            losses += epoch(model, optimizer, drop.loader, lambda model, batch: model(**batch))
            drop.step()
        assert drop.prefix == 1
        return losses

    assert run(cache="fp32") == pytest.approx(run(cache=None), rel=1e-6)
