"""Of a batch in which some samples have no row, these alone are read and run through the dropped layers, and training
computes what it computes behind frozen layers that run at each step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

from learndrop_ext import CacheConfig, DropScheduler, Fixed
from learndrop_ext.forward.images import Images
from learndrop_ext.guards import PROBES

SMALL, LARGE = 40, 44
NEW = set(range(SMALL, LARGE))


class Growing(Dataset[Any]):
    """Images, labels and a number for each; and what was read."""

    def __init__(self, size: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(LARGE, 3, size, size, generator=generator)
        self.scales = torch.rand(LARGE, 1, generator=generator)
        self.count = SMALL
        self.read: Counter[int] = Counter()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        self.read[i] += 1
        return self.images[i], i % 4, self.scales[i]


class Mix(nn.Module):
    """A 1x1 convolution whose results for one sample never depend on how many there are. It counts these."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, 1, 1) / inputs)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        parts = [x[:, i : i + 1] * self.weight[i] for i in range(x.shape[1])]
        return torch.stack(parts).sum(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = Mix(3, 5), Mix(5, 6), Mix(6, 6)
        self.norm, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor, *, scale: Tensor | None = None) -> Tensor:
        if x.dim() == 2:
            x = x.view(len(x), 3, 6, 6)
        count = x.shape[0]
        assert scale is None or len(scale) == count
        x = self.one(x).relu()
        x = self.norm(self.two(x).relu())
        x = self.three(x).mean((2, 3)).view(count, 6)
        return self.fc(x if scale is None else x * scale)


Loop = Callable[[Any, Tensor, Tensor], Tensor]


def plain(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    return model(x)


def with_a_number(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    return model(x, scale=scale)


def in_micro_batches(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(3)])


def every_second(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([model(x[::2]), model(x[1::2])])


def joined_again(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    return model(torch.cat([x[5:], x[:5]])).roll(5 - len(x), 0)


def normalised(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    return model((x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)).div_(2))


def channels_last(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    parts = x.to(memory_format=torch.channels_last).split(6)
    return torch.cat([model(part) for part in parts])


def flat(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    return model(x.unsqueeze(2).squeeze().flatten(1).expand(len(x), 108))


def twice(model: Any, x: Tensor, scale: Tensor) -> Tensor:
    with torch.no_grad():
        before = model(x)
    return model(x) + before + model(x)


LOOPS = (plain, with_a_number, in_micro_batches, every_second, joined_again, normalised, channels_last, flat, twice)


class Run:
    """A training run on a dataset that may change between its epochs."""

    def __init__(
        self, cache: Any, *, loop: Loop = plain, drops: Any = None, dataset: Any = None, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model: Any = options.pop("model", None) or Net()
        self.dataset, self.loop = dataset or Growing(), loop
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        more = {"wrap": options.pop("wrap", None)}
        if loop is with_a_number:
            more["call"] = lambda model, batch: loop(model, batch[0], batch[2])
        options = {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(1)} | options
        self.drop = DropScheduler(
            self.model,
            self.optimizer,
            DataLoader(self.dataset, **options),
            policy=Fixed(drops or {1: 2}),
            cache=cache,
            **more,
        )

    def epoch(self) -> list[float]:
        """The losses of an epoch."""
        losses = []
        self.model.train()
        self.dataset.read.clear()
        for x, y, scale in self.drop.loader:
            loss = cross_entropy(self.loop(self.drop.model, x, scale), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        self.made = self.drop._rows.counts[:2]
        self.drop.step()
        return losses

    def losses(self, *sizes: int) -> list[float]:
        """Those of one epoch on each of these numbers of samples."""
        found = []
        for size in sizes:
            self.dataset.count = size
            found += self.epoch()
        return found


def assert_read(run: Run, wanted: set[int]) -> None:
    """In the last epoch, these samples were read once, and at most a few more, which guards compare."""
    assert all(run.dataset.read[i] in (1, 2) for i in wanted)  # twice if a guard draws it
    assert len(run.dataset.read) <= len(wanted) + PROBES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_dataset_that_has_grown(loop: Loop) -> None:
    run, live = Run("fp32", loop=loop), Run(None, loop=loop)
    sizes = (SMALL, SMALL, LARGE)
    assert run.losses(*sizes[:2]) == live.losses(*sizes[:2])
    rows = run.model.one.rows
    assert run.losses(LARGE) == live.losses(LARGE)
    assert_read(run, NEW)
    calls = 3 if loop is twice else 1
    assert run.model.one.rows - rows == calls * len(NEW)
    assert run.made == ((2 if loop is twice else 1) * len(NEW), 0)
    rows = run.model.one.rows
    assert run.losses(LARGE) == live.losses(LARGE)
    assert run.made == (0, 0)
    assert run.model.one.rows == rows
    assert_read(run, set())


@pytest.mark.parametrize(
    "options",
    [{"drop_last": True}, {"num_workers": 1}, {"shuffle": False, "generator": None}, {"batch_size": 1}],
    ids=["drop_last", "a worker", "in order", "batches of one"],
)
def test_loaders_of_every_kind(options: dict[str, Any]) -> None:
    sizes = (SMALL, SMALL, LARGE, LARGE)
    options = options | ({"generator": torch.Generator().manual_seed(1)} if options.get("generator", 1) else {})
    got = Run("fp32", **options)
    wanted = got.losses(*sizes)
    options = options | ({"generator": torch.Generator().manual_seed(1)} if options["generator"] else {})
    assert wanted == Run(None, **options).losses(*sizes)
    assert got.made[0] <= len(NEW)


def test_samples_that_refresh_names() -> None:
    run, live = Run("fp32"), Run(None)
    assert run.losses(SMALL, SMALL) == live.losses(SMALL, SMALL)
    for one in (run, live):
        one.dataset.images[[3, 17]] += 1
    run.drop.refresh([3, 17])
    assert run.losses(SMALL) == live.losses(SMALL)
    assert_read(run, {3, 17})
    assert run.made == (2, 0)


def test_a_further_drop_of_a_dataset_that_has_grown() -> None:
    """The new samples are read, and meet the others at the cut where these have rows."""
    run, live = (Run(cache, drops={1: 1, 3: 2}) for cache in ("fp32", None))
    for size in (SMALL, SMALL, SMALL):
        assert run.losses(size) == live.losses(size)
    assert run.drop.prefix == 2
    rows = run.model.one.rows
    assert run.losses(LARGE) == live.losses(LARGE)
    assert_read(run, NEW)
    assert run.model.one.rows - rows == len(NEW)
    assert run.made == (len(NEW), SMALL)
    assert run.losses(LARGE) == live.losses(LARGE)
    assert run.made == (0, 0)


def test_two_views_of_each_sample() -> None:
    config = CacheConfig(codec="fp32", mirror=True)
    run = Run(config)
    run.losses(SMALL, SMALL, SMALL)
    run.losses(LARGE)
    assert_read(run, NEW)
    run.losses(LARGE)
    assert_read(run, NEW)  # their other views
    assert run.made == (len(NEW), 0)
    run.losses(LARGE)
    assert_read(run, set())


def test_samples_whose_rows_do_not_fit() -> None:
    row = 896  # bytes of 6 x 6 x 6 float32, aligned
    run, live = Run(CacheConfig(codec="fp32", budget_bytes=row * (SMALL + 1))), Run(None)
    assert run.losses(SMALL, SMALL) == live.losses(SMALL, SMALL)
    with pytest.warns(RuntimeWarning, match="do not hold the rows of all samples that are drawn"):
        assert run.losses(LARGE) == live.losses(LARGE)
    without = {i for i in NEW if not run.drop._rows.filled(torch.tensor([i]))}
    assert without
    assert run.losses(LARGE) == live.losses(LARGE)
    assert_read(run, without)
    assert run.made == (len(without), 0)


def test_samples_of_which_only_the_rest_of_the_batch_is_missing() -> None:
    run, live = Run("fp32"), Run(None)
    assert run.losses(SMALL, SMALL) == live.losses(SMALL, SMALL)
    places = run.drop._rows.places(torch.tensor([4, 5]))
    run.drop._extras.filled[places] = False
    before = run.drop.loader.relabelled
    wanted = live.losses(SMALL)
    run.model.train()
    got = []
    run.dataset.read.clear()
    for x, y, _ in run.drop.loader:
        assert y.tolist() == [i % 4 for i in x.standing.ids.tolist()]
        assert x.pixels is None
        loss = cross_entropy(run.model(x), y)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        got.append(loss.item())
    assert got == wanted
    assert_read(run, {4, 5})
    assert run.drop.loader.relabelled - before == 2
    assert run.drop._rows.counts[:2] == (0, 0)


def test_rows_that_cannot_be_read_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    run, live = Run("fp32"), Run(None)
    assert run.losses(SMALL, SMALL) == live.losses(SMALL, SMALL)
    gather, asked = run.drop._rows.gather, []

    def damaged(at: Tensor, level: int) -> Tensor:
        asked.append(at)
        if len(asked) == 2:
            raise OSError("input/output error")
        return gather(at, level)

    monkeypatch.setattr(run.drop._rows, "gather", damaged)
    with pytest.warns(
        RuntimeWarning, match="drop.loader: 8 rows are computed again, because they cannot be read: input"
    ):
        assert run.losses(SMALL) == live.losses(SMALL)
    assert run.made == (8, 0)
    assert run.losses(SMALL) == live.losses(SMALL)
    assert run.made == (0, 0)


def leaves_some_out(samples: list[Any]) -> Any:
    return default_collate([sample for sample in samples if float(sample[2]) != 2])


@pytest.mark.filterwarnings("ignore:drop.loader. some batches keep no rows")
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_batch_from_which_collate_fn_leaves_one_out_is_read_whole(shuffle: bool) -> None:
    found = []
    for cache in (None, "fp32"):
        run = Run(cache, collate_fn=leaves_some_out, shuffle=shuffle)
        found.append(run.losses(SMALL, SMALL))
        run.dataset.scales[LARGE - 1] = 2
        found[-1] += run.losses(LARGE, LARGE, LARGE)
        assert run.drop.history[-1].samples == LARGE - 1
    assert found[0] == found[1]
    assert len(run.dataset.read) <= 8 + PROBES


class BreakingOff(Sampler[int]):
    """Draws in order, until its list is gone."""

    def __init__(self) -> None:
        self.count = SMALL

    def __iter__(self) -> Iterator[int]:
        yield from range(self.count)
        if self.count < SMALL:
            raise OSError("the list is gone")

    def __len__(self) -> int:
        return SMALL


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_sampler_is_raised_where_batches_are_read_in_part(workers: int) -> None:
    sampler = BreakingOff()
    run = Run("fp32", sampler=sampler, shuffle=False, num_workers=workers)
    run.losses(SMALL, SMALL)
    run.drop.refresh(range(0, SMALL, 2))
    sampler.count = SMALL // 2
    with pytest.raises(OSError, match="the list is gone"):
        run.losses(SMALL)


def test_undrop_within_an_epoch_gives_the_images_of_whole_batches() -> None:
    run = Run("fp32", num_workers=1)
    run.losses(SMALL, SMALL)
    run.dataset.count = LARGE
    batches = iter(run.drop.loader)
    next(batches)
    run.drop.undrop()
    seen = 0
    for x, _, scale in batches:
        seen += len(x)
        found = (scale == run.dataset.scales.T).nonzero()[:, 1]
        assert torch.equal(x, run.dataset.images[found])
    assert seen == LARGE - 8


def test_the_models_own_hooks_and_a_wrapper_see_one_call() -> None:
    run, sizes = Run("fp32"), []
    run.losses(SMALL, SMALL)
    run.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    run.model.register_forward_hook(lambda *args: sizes.append(len(args[2])))
    run.losses(LARGE)
    assert [size for size in sizes if size > 1] == [8, 8] * 5 + [4, 4]  # guards call it on one image

    class Wrapped(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body
            self.calls = 0

        def forward(self, *args: Any) -> Any:
            self.calls += 1
            return self.body(*args)

    run, live = Run("fp32", wrap=Wrapped), Run(None)
    assert run.losses(SMALL, SMALL) == live.losses(SMALL, SMALL)
    assert run.losses(LARGE) == live.losses(LARGE)
    assert run.drop.model.body.calls == 5 + 6
    assert run.made == (len(NEW), 0)


def test_evaluation_on_such_a_batch_keeps_no_row() -> None:
    run, live = Run("fp16"), Run(None)
    for one in (run, live):
        one.losses(SMALL, SMALL)
        one.dataset.count = LARGE
        one.model.eval()
    filled = int(run.drop._rows.cache.filled.sum())
    mixed = 0
    for (x, y, _), (other, same, _) in zip(run.drop.loader, live.drop.loader, strict=True):
        assert torch.equal(y, same)
        torch.testing.assert_close(run.model(x), live.model(other), atol=2e-3, rtol=0)
        mixed += x.standing.some is not None
    assert mixed
    assert int(run.drop._rows.cache.filled.sum()) == filled
    assert run.drop._rows.counts[:2] == (0, 0)


def test_rows_computed_under_autocast_join_the_others() -> None:
    def loop(model: Any, x: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4))

    run, live = (Run(cache, loop=loop, model=made(), drops={1: 1}) for cache in ("fp16", None))
    sizes = (SMALL, SMALL, LARGE)
    torch.testing.assert_close(run.losses(*sizes), live.losses(*sizes), rtol=1e-2, atol=1e-2)
    assert run.drop._rows.cache.dtype == torch.bfloat16
    assert run.made == (len(NEW), 0)


def test_what_is_said_of_such_a_batch() -> None:
    run = Run("fp32", shuffle=False)
    run.losses(SMALL, SMALL)
    run.drop.refresh([1, 9])
    (x, *_), (other, *_) = list(run.drop.loader)[:2]
    assert isinstance(x, Images)
    assert repr(x) == "Images([8, 3, 6, 6], 1 of them read, for the model alone)"
    assert torch.equal(x.read(), run.dataset.images[:8])
    assert torch.equal(x[:3].read(), run.dataset.images[:3])
    whole, none = x[1:2], x[2:]
    assert (whole.standing.some, whole.standing.rows, none.standing.some, none.pixels) == (None, None, None, None)
    both = torch.cat([none, whole, other])
    assert both.standing.some.tolist() == [False] * 6 + [True] + [False, True] + [False] * 6
    assert torch.equal(both.pixels, run.dataset.images[[1, 9]])
    with pytest.raises(RuntimeError, match="images that are joined must have gone through the same operations"):
        torch.cat([x, other * 2])
    x[:2].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place through a slice or a view"):
        run.model(x)


def test_a_vision_transformer_that_reads_the_number_of_samples_before_the_cut(torchvision_stub: Any) -> None:
    def made() -> Any:
        torch.manual_seed(0)
        vit = torchvision_stub.models.vision_transformer.VisionTransformer
        return vit(image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=4)

    run, live = (Run(cache, model=made(), dataset=Growing(8), drops={1: 3}) for cache in ("fp32", None))
    assert run.losses(SMALL, SMALL) == live.losses(SMALL, SMALL)
    assert run.drop.prefix == 3
    # Matrix products of other numbers of samples may round otherwise.
    torch.testing.assert_close(run.losses(LARGE), live.losses(LARGE))
    assert_read(run, NEW)
    assert run.made == (len(NEW), 0)


class Late(Growing):
    """A sample that takes too long in a worker, once while the flag is there."""

    flag: Path

    def __getitem__(self, i: int) -> Any:
        if i == 8 and get_worker_info() is not None and self.flag.exists():
            self.flag.unlink()
            time.sleep(3)
        return super().__getitem__(i)


def test_a_loader_that_times_out_says_so_where_batches_are_read_in_part(tmp_path: Path) -> None:
    dataset = Late()
    dataset.flag = tmp_path / "flag"
    run = Run("fp32", dataset=dataset, shuffle=False, num_workers=1, timeout=1)
    run.losses(SMALL, SMALL)
    run.drop.refresh(range(0, SMALL, 4))
    dataset.flag.touch()
    with pytest.raises(RuntimeError, match="timed out"):
        run.losses(SMALL)
