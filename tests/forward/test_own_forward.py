"""Everything that a forward may do works behind dropped layers: losses and gradients are equal, to the bit, to those of the
same loop on a copy of the model whose first layers run frozen at each step, without this package."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import DropScheduler, Fixed

COUNT, SIZE = 24, 8


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(COUNT, 3, SIZE, SIZE, generator=generator),
        torch.arange(COUNT) % 4,
        torch.rand(COUNT, 1, generator=generator),
    )


class Scaled(torch.autograd.Function):
    """Doubles its input, and triples its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * grad


class Block(nn.Module):
    """A convolution, a norm, an activation, and what `extra` does to them. The first block is dropped."""

    def __init__(self, i: int, extra: Callable[[Block, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.i = i
        self.conv = nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.extra = extra
        self.temperature = 1.0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return x if self.extra is None else self.extra(self, x)


class Net(nn.Module):
    def __init__(self, extra: Callable[[Block, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, extra) for i in range(3))
        self.fc = nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.features(x).mean((2, 3)))


def temperature(block: Block, x: Tensor) -> Tensor:
    return x / block.temperature


def counts(block: Block, x: Tensor) -> Tensor:
    block.calls += 1
    return x * (1 + 0.01 * block.calls) if block.i else x


def skips(block: Block, x: Tensor) -> Tensor:
    return x if block.i == 0 or not block.training or random.random() < 0.5 else 0.5 * x


def noisy(block: Block, x: Tensor) -> Tensor:
    return dropout(x, 0.3, block.training) if block.i else x


def function(block: Block, x: Tensor) -> Tensor:
    out: Tensor = Scaled.apply(x)  # type: ignore[no-untyped-call]
    return out


def without_gradient(block: Block, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().mean((1, 2, 3), keepdim=True)
    return x / (1 + scale)


def in_bf16(block: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x + block.conv(torch.cat([x, x], 1)[:, : block.conv.in_channels]).float() if block.i else x


def stores(block: Block, x: Tensor) -> Tensor:
    block.stored = x
    return x


class StoredLoss(Net):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return out + self.blocks[1].stored.square().mean()


class Stem(Net):
    """The first block runs without gradients, in a block of the model's own."""

    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.blocks[0](x)
        x = self.blocks[2](self.blocks[1](x))
        return self.fc(x.mean((2, 3)))


class Checkpointed(Net):
    reentrant = False

    def features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class InSegments(Net):
    def features(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint_sequential(nn.Sequential(*self.blocks), 1, x, use_reentrant=False)
        return out


class Tuples(Net):
    def forward(self, x: Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        return {"logits": self.fc(features), "features": (features, 2)}


class Keywords(Net):
    def forward(self, image: Tensor | None = None, *, age: Tensor, scale: float = 1.0) -> Any:
        assert image is not None
        return self.fc(self.features(image).mean((2, 3)) * scale + age)


class Normalising(Net):
    """Normalises, adds a position to every pixel, and reads sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.1))
        self.position = nn.Parameter(torch.zeros(6, SIZE, SIZE))

    def forward(self, x: Tensor) -> Any:
        B, _, H, W = x.shape
        x = self.blocks[0]((x - self.mean) * 2) + self.position
        x = self.blocks[2](self.blocks[1](x))
        return self.fc(x.view(B, 6, H * W).mean(2))


def weight_normed() -> Net:
    net = Net()
    parametrizations.weight_norm(net.blocks[1].conv)
    parametrizations.weight_norm(net.blocks[0].conv)
    parametrizations.spectral_norm(net.blocks[2].conv)
    return net


def hooked() -> Net:
    net = Net()
    net.register_forward_hook(lambda module, inputs, out: 2 * out)
    net.blocks[1].register_forward_hook(lambda module, inputs, out: out + 0.1)
    net.blocks[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    net.fc.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
    return net


def reentrant() -> Net:
    net = Checkpointed()
    net.reentrant = True
    return net


Call = Callable[[Any, Tensor, Tensor], Any]


def plain(model: Any, x: Tensor, age: Tensor) -> Any:
    return model(x)


def twice(model: Any, x: Tensor, age: Tensor) -> Any:
    return model(x) + 0.5 * model(x)


def normalised(model: Any, x: Tensor, age: Tensor) -> Any:
    return model(
        ((x - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5).contiguous(memory_format=torch.channels_last)
    )


def in_place(model: Any, x: Tensor, age: Tensor) -> Any:
    return model(x.sub_(0.1).mul_(2))


def in_parts(model: Any, x: Tensor, age: Tensor) -> Any:
    return torch.cat([model(part) for part in (x[:2], *x[2:].split(2))])


def joined(model: Any, x: Tensor, age: Tensor) -> Any:
    return model(torch.cat([x[4:], x[:4]])).roll(4, 0)


def of_dict(model: Any, x: Tensor, age: Tensor) -> Any:
    out = model(x)
    return out["logits"] + out["features"][0].mean()


def by_keyword(model: Any, x: Tensor, age: Tensor) -> Any:
    return model(image=x, age=age, scale=2.0)


def under_autocast(model: Any, x: Tensor, age: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x).float()


CASES: dict[str, tuple[Callable[[], Net], Call]] = {
    "plain": (Net, plain),
    "custom autograd function": (lambda: Net(function), plain),
    "no_grad inside": (lambda: Net(without_gradient), plain),
    "no_grad around the dropped layer": (Stem, plain),
    "autocast inside": (lambda: Net(in_bf16), plain),
    "a number that changes at each step": (lambda: Net(temperature), plain),
    "a state in Python": (lambda: Net(counts), plain),
    "random draws in Python": (lambda: Net(skips), plain),
    "dropout": (lambda: Net(noisy), plain),
    "features stored behind the cut": (lambda: StoredLoss(stores), plain),
    "checkpoints": (Checkpointed, plain),
    "reentrant checkpoints": (reentrant, plain),
    "a checkpoint around the cut": (InSegments, plain),
    "outputs in a dict": (Tuples, of_dict),
    "keywords and another tensor": (Keywords, by_keyword),
    "buffers, sizes and a position": (Normalising, plain),
    "weight and spectral norm": (weight_normed, plain),
    "hooks": (hooked, plain),
    "two calls in a step": (lambda: Net(noisy), twice),
    "a loop that normalises": (Net, normalised),
    "a loop that normalises in place": (Net, in_place),
    "a loop that takes parts": (Net, in_parts),
    "a loop that joins parts": (Net, joined),
    "autocast": (Net, under_autocast),
}


def freeze(model: Net) -> None:
    """The first block as the oracle has it: in eval mode and without gradients. The position behind it stays live."""
    for module in model.blocks[0].modules():
        module.training = False
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)


def train(model: Net, batches: Any, call: Call, *, oracle: bool) -> Iterator[Any]:
    """Three epochs; gives the loss and all gradients of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(1)
    random.seed(1)
    step = 0
    for _ in range(3):
        model.train()
        if oracle:
            freeze(model)
        for x, y, age in batches:
            loss = cross_entropy(call(model, x, age), y)
            optimizer.zero_grad()
            loss.backward()
            yield loss.item(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            optimizer.step()
            step += 1
            for block in model.blocks[1:]:
                block.temperature = 1 + 0.1 * step


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=CASES)
def test_it_trains_as_with_a_frozen_live_prefix(make: Callable[[], Net], call: Call) -> None:
    torch.manual_seed(0)
    model = make()
    oracle = copy.deepcopy(model)

    def loader() -> DataLoader[Any]:
        return DataLoader(images(), 8, shuffle=True, generator=torch.Generator().manual_seed(2))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    options: dict[str, Any] = {}
    if call in (by_keyword, under_autocast, in_place):  # how the loop calls the model matters before the first step
        options["call"] = lambda model, batch: call(model, batch[0], batch[2])
    drop = DropScheduler(model, optimizer, loader(), policy=Fixed({0: 1}), cache="fp32", **options)
    assert drop.prefix == 1
    assert all(name.startswith("blocks.0") for name in drop.chain[0].tensors)
    wanted = list(train(oracle, loader(), call, oracle=True))
    got = list(train(model, drop.loader, call, oracle=False))
    assert [loss for loss, _ in got] == [loss for loss, _ in wanted]
    for (_, ours), (_, theirs) in zip(got, wanted, strict=True):
        for name, one, other in zip(dict(model.named_parameters()), ours, theirs, strict=True):
            same = one is other is None or (one is not None and other is not None and torch.equal(one, other))
            assert same or (one is None and not bool(other.any())), name
    assert drop._rows.cut == 1
    drop.close()
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_loss_on_a_feature_of_a_dropped_layer_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = Net(stores)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drop = DropScheduler(model, optimizer, DataLoader(images(), 8), policy=Fixed({0: 2}))
    for x, _, _ in drop.loader:
        model(x)
    for x, y, _ in drop.loader:
        loss = cross_entropy(model(x), y)
        with pytest.raises(RuntimeError, match=r"would have to see the output of .*dropped layer"):
            loss + model.blocks[0].stored.square().mean()
        break


def test_live_layers_may_be_changed_between_epochs_without_a_word() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    drop = DropScheduler(model, optimizer, DataLoader(images(), 8), policy=Fixed({0: 1}), cache="fp32")
    for _ in range(2):
        for x, _, _ in drop.loader:
            model(x)
    model.blocks[2] = Block(2, lambda block, x: 3 * x)
    x, _, _ = next(iter(drop.loader))
    row = x.standing.rows
    model.eval()
    with torch.no_grad():
        wanted = model.fc(model.blocks[2](model.blocks[1](row)).mean((2, 3)))
        assert torch.equal(model(x), wanted)


@pytest.mark.parametrize("held", [True, False])
def test_what_stands_for_a_dropped_layers_output_is_used_again_unless_somebody_holds_it(held: bool) -> None:
    """Making another takes time; but what is held stays that of its batch."""
    model, outputs, numbers = Net(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(*images().tensors[:2])
    with DropScheduler(model, optimizer, DataLoader(data, 8), policy=Fixed({0: 1}), cache="fp32") as drop:
        for x, _ in drop.loader:
            model(x)

        def hook(module: nn.Module, inputs: Any, out: Any) -> None:
            numbers.append(id(out))
            outputs.extend([out] if held else [])

        model.blocks[0].conv.register_forward_hook(hook)
        for x, _ in drop.loader:
            model(x)
    assert len({*numbers[-3:]}) == (3 if held else 1)
    assert [out.standing.ids.tolist() for out in outputs[-3:]] == [[*range(i, i + 8)] for i in (0, 8, 16) if held]


def test_a_module_that_was_exchanged_at_the_cut_is_named() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(*images().tensors[:2])
    with DropScheduler(model, optimizer, DataLoader(data, 8), policy=Fixed({0: 1})) as drop:
        for x, _ in drop.loader:
            model(x)
        model.blocks[0] = copy.deepcopy(model.blocks[0])
        with pytest.raises(RuntimeError, match=r"must pass blocks\.0, and did not; another module is in its place"):
            next(iter(drop.loader))


def test_the_live_parameters_are_those_with_gradients() -> None:
    """So that a loop may free their gradients alone, as docs/my-own-loop.md says."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = TensorDataset(*images().tensors[:2])
    with DropScheduler(model, optimizer, DataLoader(data, 8), policy=Fixed({0: 2})) as drop:
        live = list(drop.chain.parameters(drop.prefix, len(drop.chain)))
        for _ in range(2):
            for x, y in drop.loader:
                cross_entropy(model(x), y).backward()
                assert {id(p) for p in model.parameters() if p.grad is not None} == {*map(id, live)}
                for parameter in live:
                    parameter.grad = None
            drop.step()
