"""The cost of a scheduler that drops nothing, and of its loader per batch once it has dropped.

    python bench/bench_overhead.py [--step-ms 20] [--epochs 16] [--threads 1] [--step-on-rows [--device cuda]]

On Linux with glibc the program restarts itself with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ set so that freed
memory stays with the process. Otherwise page faults vary by a twentieth of a step between epochs.

Prints one JSON record per line, suite "overhead":

- "never drops": an epoch with a policy that never drops and a plain one, in turn; `share` is the median of the pairs'
  differences over the plain median. Seconds are this process's CPU time, so that other work on the machine does not
  count; `wall_share` is the same in wall-clock time.
- "batch of rows": the loader's own time for a batch after a drop, with all rows in memory, compared with a DataLoader over
  a TensorDataset of the same rows; and the extra time to begin an epoch, when weights, code and some samples are compared.
- "step on rows": a training step of a deep network of which only the last layer is live, compared with the same step of
  that layer alone, fed by index_select from a tensor, epochs of both in turn, in wall-clock time: what dropping costs the
  host at each step, whatever the layers cost; and the time to begin an epoch. `same_optimizer_us_per_step` is that of the
  layer alone with the loop's own optimizer, which walks over the dropped parameters too. `parts_us` and `head_parts_us`,
  of that layer with that optimizer, say where the host's time goes. `--step-on-rows` measures this and the next one alone,
  also on a GPU.
- "constructor": the time to make a scheduler, in training steps of the same batch, for `Budget` and for a policy that asks
  for no costs.

`PYTHONPATH` of another version of the package measures that one.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from learndrop_ext import Budget, DropScheduler, Fixed, StoppedLearning
from learndrop_ext.app.models import build_model
from learndrop_ext.decide.policy import Decision

BATCH = 32
BATCHES = 50
#: Of a step on the host: after its begin, the batch is there, then the loss, the gradients, and the new weights.
PARTS = ("loader", "forward", "backward", "optimizer")


@dataclass(frozen=True)
class _Steps:
    """The steps of an epoch behind the first. Seconds of the clock but for `cpu`."""

    beginning: float  # to the first batch
    whole: list[float]  # of each step, the device awaited at its end
    parts: list[list[float]]  # of each step on the host, see PARTS
    cpu: float  # of this process, a step


def images(count: int, size: int = 32) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, 3, size, size, generator=generator), torch.randint(0, 10, (count,), generator=generator)
    )


def network(width: int) -> nn.Module:
    return build_model("resnet10", num_classes=10, in_channels=3, width=width, seed=0)


def loader_of(dataset: Any) -> DataLoader[Any]:
    return DataLoader(dataset, BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))


def train(batches: Iterable[Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of CPU time and of the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def width_for(step_ms: float) -> int:
    """The width of the network whose training step takes about `step_ms` here."""
    for width in (4, 8, 12, 16, 24, 32, 48):
        model = network(width)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        batches = list(loader_of(images(4 * BATCH)))
        train(batches, model, optimizer)
        if timed(lambda b=batches, m=model, o=optimizer: train(b, m, o))[0] / len(batches) * 1e3 >= step_ms:
            return width
    return 48


def never_drops(step_ms: float, epochs: int) -> dict[str, Any]:
    width = width_for(step_ms)
    data = images(BATCH * BATCHES)
    # One model on both sides: where the weights of two lie in memory makes more of a difference than what is measured.
    model = network(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    plain_loader = loader_of(data)
    drop = DropScheduler(model, optimizer, loader_of(data), policy=Fixed({}))

    def watched() -> None:
        train(drop.loader, model, optimizer)
        drop.step()

    pairs = []
    for i in range(epochs + 1):
        runs = [lambda: train(plain_loader, model, optimizer), watched]
        # Each is first in half of the pairs.
        first, second = (timed(runs[j]) for j in ((0, 1) if i % 2 else (1, 0)))
        pairs.append((first, second) if i % 2 else (second, first))
    pairs = pairs[1:]
    cpu, wall = ([(one[k], other[k]) for one, other in pairs] for k in (0, 1))

    def share(times: list[tuple[float, float]]) -> float:
        return statistics.median(b - a for a, b in times) / statistics.median(a for a, _ in times)

    return {
        "suite": "overhead",
        "run": "never drops",
        "model": f"resnet10, width {width}",
        "batch": BATCH,
        "step_ms": statistics.median(a for a, _ in cpu) / BATCHES * 1e3,
        "epochs": epochs,
        "share": share(cpu),
        "wall_share": share(wall),
        "us_per_step": statistics.median(b - a for a, b in cpu) / BATCHES * 1e6,
    }


def batch_of_rows(epochs: int, codec: str) -> dict[str, Any]:
    model = network(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = images(BATCH * 40)
    drop = DropScheduler(model, optimizer, loader_of(data), policy=Fixed({0: 2}), cache=codec)
    with torch.no_grad():
        for x, _ in drop.loader:
            model.train()(x)  # keeps the rows
    rows = drop.chain.prefix(2)(data.tensors[0]).detach()
    plain = loader_of(TensorDataset(rows, data.tensors[1]))

    def run_through(batches: Iterable[Any]) -> tuple[float, float]:
        """Seconds of CPU time to the first batch, and for each that follows."""
        left = iter(batches)
        first = timed(lambda: next(left))[0]
        return first, timed(lambda: [None for _ in left])[0] / (len(plain) - 1)

    times = [(*run_through(drop.loader), *run_through(plain)) for _ in range(epochs)]
    begin, own, plain_begin, beside = (statistics.median(t[k] for t in times) for k in range(4))
    return {
        "suite": "overhead",
        "run": "batch of rows",
        "codec": codec,
        "batch": BATCH,
        "us_per_batch": own * 1e6,
        "tensor_dataset_us_per_batch": beside * 1e6,
        "epoch_begin_ms": (begin - plain_begin) * 1e3,
    }


#: Networks whose last layer alone is live: name, image size, how it is made.
DEEP: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "resnet50": (64, lambda: build_model("resnet50", num_classes=10, in_channels=3, stem="imagenet", seed=0)),
    "tf_efficientnet_lite0": (96, lambda: _timm("tf_efficientnet_lite0")),
}


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=10)
    return model


def step_on_rows(name: str, batch: int, epochs: int, device: str, steps: int = 40) -> dict[str, Any]:
    """A step of which all layers but the last are dropped, beside the same layer fed by index_select from a tensor."""
    size, make = DEEP[name]
    count = batch * steps
    model = make().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = images(256, size)
    repeated = _Repeated(data, count)
    loader = DataLoader(repeated, batch, shuffle=True, generator=torch.Generator().manual_seed(0))
    drop = DropScheduler(model, optimizer, loader, policy=lambda now: Decision(len(now.layers) - 1, "all but one"))
    layers = len(drop.chain)
    model.train()
    train(drop.loader, drop.model, optimizer)  # keeps the rows
    classifier: Any = model.fc if hasattr(model, "fc") else model.classifier
    head = nn.Sequential(nn.Flatten(), classifier)
    beside = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9)
    with torch.no_grad():
        shape = drop.chain.prefix(layers - 1).eval()(data.tensors[0][:2].to(device)).shape[1:]
    rows = torch.randn(count, *shape, device=device)
    labels = torch.randint(0, 10, (count,), device=device)

    def plain() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in torch.randperm(count, device=device).split(batch):
            yield rows.index_select(0, part), labels.index_select(0, part)

    def synchronized() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()

    def steps_of(batches: Iterable[Any], net: nn.Module, optimizer: torch.optim.Optimizer) -> _Steps:
        begin = time.perf_counter()
        left = iter(batches)
        first = next(left)
        beginning = time.perf_counter() - begin
        train([first], net, optimizer)
        whole, parts = [], []
        middle, cpu = synchronized(), time.process_time()
        for x, y in left:
            at = [middle, time.perf_counter()]
            loss = nn.functional.cross_entropy(net(x), y)
            at.append(time.perf_counter())
            optimizer.zero_grad()
            loss.backward()
            at.append(time.perf_counter())
            optimizer.step()
            at.append(time.perf_counter())
            middle = synchronized()
            whole.append(middle - at[0])
            parts.append([end - start for start, end in itertools.pairwise(at)])
        return _Steps(beginning, whole, parts, (time.process_time() - cpu) / len(whole))

    ours, alone, walking = [], [], []
    for i in range(epochs + 1):
        times = (
            steps_of(drop.loader, drop.model, optimizer),
            steps_of(plain(), head, beside),
            steps_of(plain(), head, optimizer),
        )
        if i:
            for side, one in zip((ours, alone, walking), times, strict=True):
                side.append(one)

    def middle_step(sides: list[_Steps]) -> float:
        return statistics.median(seconds for one in sides for seconds in one.whole)

    def middle_parts(sides: list[_Steps]) -> dict[str, float]:
        found = zip(*(parts for one in sides for parts in one.parts), strict=True)
        return {name: statistics.median(seconds) * 1e6 for name, seconds in zip(PARTS, found, strict=True)}

    def four_samples() -> float:
        begin = time.perf_counter()
        _ = [repeated[i] for i in range(4)]
        return time.perf_counter() - begin

    return {
        "suite": "overhead",
        "run": "step on rows",
        "model": f"{name}, {layers - 1} of {layers} layers dropped, {size} px",
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "batch": batch,
        "us_per_step": middle_step(ours) * 1e6,
        "head_us_per_step": middle_step(alone) * 1e6,
        "same_optimizer_us_per_step": middle_step(walking) * 1e6,
        "ratio": middle_step(ours) / middle_step(alone),
        "parts_us": middle_parts(ours),
        "head_parts_us": middle_parts(walking),
        "cpu_us_per_step": statistics.median(one.cpu for one in ours) * 1e6,
        "head_cpu_us_per_step": statistics.median(one.cpu for one in alone) * 1e6,
        "epoch_begin_ms": statistics.median(one.beginning for one in ours) * 1e3,
        "four_samples_ms": four_samples() * 1e3,
    }


def constructor(name: str, batch: int, tries: int, device: str) -> dict[str, Any]:
    """Making a scheduler, beside a training step of the same batch."""
    size, make = DEEP[name]
    data = images(4 * batch, size)
    seconds: dict[str, list[float]] = {"step": [], "Budget": [], "StoppedLearning": []}
    for i in range(tries + 1):
        model = make().to(device).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        loader = DataLoader(data, batch, shuffle=True)
        on_device = [(x.to(device), y.to(device)) for x, y in loader]
        calls: dict[str, Callable[[], Any]] = {
            "step": lambda m=model, o=optimizer, b=on_device: train(b[:1], m, o),
            "Budget": lambda m=model, o=optimizer, x=loader: DropScheduler(m, o, x, policy=Budget(1.5), epochs=100),
            "StoppedLearning": lambda m=model, o=optimizer, x=loader: DropScheduler(m, o, x, policy=StoppedLearning()),
        }
        for what, call in calls.items():
            taken = timed(call)[1]
            if i:  # what a process does once is not counted
                seconds[what].append(taken)
    middle = {what: statistics.median(taken) for what, taken in seconds.items()}
    return {
        "suite": "overhead",
        "run": "constructor",
        "model": f"{name}, {size} px",
        "device": torch.cuda.get_device_name() if device != "cpu" else "cpu",
        "batch": batch,
        "step_s": middle["step"],
        "budget_steps": middle["Budget"] / middle["step"],
        "steps": middle["StoppedLearning"] / middle["step"],
    }


class _Repeated(torch.utils.data.Dataset[Any]):
    """A few images under many ids, so that rows are as many as in a real run and images take no memory."""

    def __init__(self, data: TensorDataset, count: int) -> None:
        self._data, self._count = data, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        return self._data[index % len(self._data)]


def _is_there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):  # torchvision beside a torch of another build raises the latter
        return False
    return True


def deep(epochs: int, device: str, steps: int, batches: Sequence[int]) -> None:
    for name in DEEP:
        if name != "resnet50" and not _is_there("timm"):
            print(f"{name}: not measured, timm is not there", file=sys.stderr)
            continue
        for batch in batches:
            print(json.dumps(step_on_rows(name, batch, epochs, device, steps)), flush=True)
        print(json.dumps(constructor(name, batches[0], min(3, epochs), device)), flush=True)


def keep_memory() -> None:
    """Restart the program with an allocator that returns no memory, unless it was started that way."""
    wanted = {name: str(1 << 30) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--step-ms", type=float, default=20.0, help="what a training step should take (default: 20)")
    parser.add_argument("--epochs", type=int, default=16, help="pairs of epochs (default: 16)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--steps", type=int, default=40, help="in an epoch of steps on rows (default: 40)")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 256], help="of steps on rows (default: 32 256)")
    parser.add_argument(
        "--step-on-rows", action="store_true", help="measure the step on rows and the constructor alone"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the step on rows (default: cpu)")
    args = parser.parse_args()
    if args.device != "cpu" and not args.step_on_rows:
        parser.error("--device is for --step-on-rows, the rest runs on the CPU")
    torch.set_num_threads(args.threads)
    # The few images are learned by heart, and arithmetic with the denormal gradients that follow takes up to three times as
    # long, on whichever side has them.
    torch.set_flush_denormal(True)
    if args.step_on_rows:
        deep(args.epochs, args.device, args.steps, args.batches)
        return
    print(json.dumps(never_drops(args.step_ms, args.epochs)), flush=True)
    for codec in ("fp32", "fp16", "uint8"):
        print(json.dumps(batch_of_rows(args.epochs, codec)), flush=True)
    deep(args.epochs, "cpu", args.steps, args.batches)


if __name__ == "__main__":
    keep_memory()
    main()
