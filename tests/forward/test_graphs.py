"""Live layers replayed as CUDA graphs train as they do without; what a replay could not do is not replayed."""

from __future__ import annotations

import contextlib
import gc
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from forward.taped_graphs import Tape, taped  # noqa: F401
from torch import nn
from torch.nn.parallel import DataParallel

from learndrop_ext import DropScheduler, Fixed, cuda_graphs
from learndrop_ext.forward import graphs
from small_training import Net, data, parts

Step = Callable[[Any, Any, torch.optim.Optimizer, Any, Any], torch.Tensor]


def plain_step(drop: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
    loss = nn.functional.cross_entropy(drop.model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def trained(
    wrap: Any,
    *,
    make: Callable[[], nn.Module] = Net,
    step: Step = plain_step,
    between: Callable[[nn.Module, int], None] = lambda model, epoch: None,
    images: int = 24,
    epochs: int = 4,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run that drops one layer after an epoch, and two after two, and the state that it ends with."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    _, _, loader = parts(data(images))
    losses = []
    with DropScheduler(model, optimizer, loader, policy=Fixed({1: 1, 2: 2}), cache="fp32", wrap=wrap) as drop:
        for epoch in range(epochs):
            between(model, epoch)
            model.train()
            losses += [step(drop, model, optimizer, x, y).item() for x, y in drop.loader]
            drop.step()
    return losses, model.state_dict()


def same(step: Step = plain_step, **options: Any) -> None:
    """Assert that a run on graphs equals one without, to the bit."""
    random.seed(0)
    losses, state = trained(lambda module: nn.Sequential(module), step=step, **options)
    random.seed(0)
    replayed, others = trained(cuda_graphs, step=step, **options)
    assert replayed == losses
    for name, value in state.items():
        assert torch.equal(others[name], value), name


def replays() -> list[int]:
    """How often each graph was replayed in training: once more when it is made."""
    return [tape.replays - 1 for tape in Tape.captured]


@contextlib.contextmanager
def eager(reason: str) -> Iterator[None]:
    """Assert that a warning says why training goes on eagerly."""
    with pytest.warns(RuntimeWarning, match=f"cuda_graphs: training goes on eagerly until the next drop: .*{reason}"):
        yield


@pytest.mark.usefixtures("taped")
def test_steps_are_captured_after_each_drop_and_replayed() -> None:
    same()
    # Forward and backward of each of three live parts: one epoch of three batches, another, and two.
    assert replays() == [3, 3, 3, 3, 6, 6]


@pytest.mark.usefixtures("taped")
def test_other_batch_sizes_run_eagerly() -> None:
    same(images=20)
    assert replays() == [2, 2, 2, 2, 4, 4]


def accumulating(drop: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
    loss = nn.functional.cross_entropy(drop.model(x), y)
    loss.backward()
    if drop.loader.counts[0] % 2:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def zeroing(drop: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=False)
    loss = nn.functional.cross_entropy(drop.model(x), y)
    loss.backward()
    optimizer.step()
    return loss


def two_forwards(drop: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
    first, second = drop.model(x), drop.model(x * 0.5 if drop.prefix == 0 else x)
    loss = nn.functional.cross_entropy(first, y) + nn.functional.cross_entropy(second, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def skipping(drop: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
    drop.model(x)  # without a backward pass
    return plain_step(drop, model, optimizer, x, y)


def scaled(drop: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(drop.model(x), y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    return loss


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize("step", [accumulating, zeroing, two_forwards, skipping, scaled])
def test_loops_that_people_write(step: Step) -> None:
    same(step)
    assert min(replays()) >= 3


@pytest.mark.usefixtures("taped")
def test_outputs_of_earlier_steps_stay() -> None:
    kept: dict[str, list[torch.Tensor]] = {}

    def keeping(name: str) -> Step:
        def step(drop: Any, model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Any) -> torch.Tensor:
            output = drop.model(x)
            loss = nn.functional.cross_entropy(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.setdefault(name, []).append(output.detach())
            return loss

        return step

    trained(None, step=keeping("eager"))
    trained(cuda_graphs, step=keeping("replayed"))
    assert torch.equal(torch.cat(kept["replayed"]), torch.cat(kept["eager"]))


@pytest.mark.usefixtures("taped")
def test_capturing_leaves_everything_as_it_was() -> None:
    model, optimizer, loader = parts()
    drop = DropScheduler(model, optimizer, loader, wrap=cuda_graphs)
    model.train()
    x, _ = next(iter(drop.loader))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [torch.randn_like(p) for p in model.parameters()]
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        p.grad = gradient
    drawn = torch.get_rng_state()
    graphed: Any = drop.model.body
    form = [x.clone()]
    assert graphed._captured(graphs._Part(model, *graphs.pytree.tree_flatten(((x,), {}))), form) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert "forward" not in vars(model)


@pytest.mark.usefixtures("taped")
def test_memory_of_an_earlier_graph_is_free_before_the_next_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[weakref.ref[Any], Any]] = []
    make = torch.cuda.make_graphed_callables

    def noted(part: Any, samples: Any, **options: Any) -> Any:
        assert all(one() is None for one, _ in seen)
        seen.append((weakref.ref(samples[0]), options["pool"]))
        return make(part, samples, **options)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", noted)

    def forgetting(module: nn.Module) -> nn.Module:
        Tape.captured.clear()
        return cuda_graphs(module)

    gc.disable()  # as it may happen to be
    try:
        trained(forgetting)
    finally:
        gc.enable()
    assert len(seen) == 3
    assert len({id(pool) for _, pool in seen}) == 1  # of one model


class Waiting(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.conv3(x).relu()
        if x.mean().item() > 1e9:  # waits
            x = x / 2
        return self.fc(x.mean((2, 3)))


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Storing(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        self.feature = self.conv3(x).relu()
        return self.fc(self.feature.mean((2, 3)))


class Drawing(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.conv3(x).relu() * (1.0 if random.random() < 0.5 else 2.0)
        return self.fc(x.mean((2, 3)))


def hooked() -> nn.Module:
    model = Net()
    model.conv3.register_forward_hook(lambda module, args, output: output * 2)
    return model


def hooked_parameter() -> nn.Module:
    model = Net()
    model.fc.weight.register_hook(lambda gradient: gradient * 0.5)
    return model


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Waiting, r"called a synchronizing CUDA operation \(.*\.py:\d+\)"),
        (Counting, "each forward changes calls, which a replay would not"),
        (Storing, "each forward changes feature, which a replay would not"),
        (Drawing, "each forward draws random numbers on the CPU"),
        (hooked, "a replay would not run the hooks of conv3"),
        (hooked_parameter, "a replay would not run the hooks of .*fc"),
    ],
)
def test_what_a_replay_would_not_do_runs_eagerly(make: Callable[[], nn.Module], reason: str) -> None:
    with eager(reason):
        same(make=make)
    assert not any(tape.replays for tape in Tape.captured)


def test_a_warning_names_the_line_that_waits() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2).reshape(3)
    line = caught.traceback[0].lineno + 1
    assert graphs._where(caught.value) == f"{__file__}:{line}"


class Tempered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / self.temperature


def cooler(model: Any, epoch: int) -> None:
    model.temperature = 1.0 if epoch < 3 else 0.5


def frozen_norm(model: Any, epoch: int) -> None:
    model.fc.weight.requires_grad_(epoch < 3)


def moved(model: Any, epoch: int) -> None:
    if epoch == 3:
        model.fc.bias.data = model.fc.bias.data.clone() + 1


@pytest.mark.usefixtures("taped")
@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (cooler, "temperature has changed since the step was captured"),
        (frozen_norm, "a parameter lies elsewhere, or has begun or ceased to train"),
        (moved, "a parameter lies elsewhere, or has begun or ceased to train"),
    ],
)
def test_what_was_exchanged_since_is_followed(between: Callable[[nn.Module, int], None], reason: str) -> None:
    with eager(reason):
        same(make=Tempered, between=between)
    assert replays()[-1] == 3  # those of the epoch before


@pytest.mark.usefixtures("taped")
def test_evaluation_runs_eagerly() -> None:
    model, optimizer, loader = parts()
    with DropScheduler(model, optimizer, loader, policy=Fixed({}), wrap=cuda_graphs) as drop:
        model.train()
        for x, y in drop.loader:
            plain_step(drop, model, optimizer, x, y)
        count = sum(replays())
        x = data().tensors[0][:8]
        with torch.no_grad():
            whole = drop.model(x)
        model.eval()
        assert not torch.equal(drop.model(x), whole)
        assert sum(replays()) == count


def test_what_cannot_be_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"cuda_graphs: module must be on a GPU, got parameters on cpu"):
        DropScheduler(*parts(), wrap=cuda_graphs)
    with pytest.raises(TypeError, match=r"cuda_graphs: module must be of one process, got a DataParallel"):
        cuda_graphs(DataParallel(Net()))
    monkeypatch.setattr(graphs, "several_processes", lambda: True)
    with pytest.raises(RuntimeError, match=r"cuda_graphs: wants a single process, got one of several"):
        cuda_graphs(Net())


@pytest.mark.cuda
@pytest.mark.parametrize("step", [plain_step, accumulating, zeroing, two_forwards])
def test_graphs_on_a_gpu(step: Step) -> None:
    def on_gpu() -> nn.Module:
        return Net().cuda()

    captured: list[graphs.GraphedModule] = []

    def wrap(module: nn.Module) -> nn.Module:
        captured.append(cuda_graphs(module))
        return captured[-1]

    losses, _ = trained(None, make=on_gpu, step=step)
    replayed, _ = trained(wrap, make=on_gpu, step=step)
    torch.testing.assert_close(replayed, losses, rtol=1e-4, atol=1e-5)
    assert [one._part is not None for one in captured] == [True] * 3
