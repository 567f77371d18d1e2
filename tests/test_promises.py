"""What a loop may do to a run with dropped layers: it works, or it is refused by name before a wrong step is made.

Each test is a training loop as a user writes it. The task can be learned: the class of an image is the quarter of it
that is bright, so that a result that is wrong without a word shows as accuracy.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from learndrop_ext import CacheConfig, DropScheduler, Fixed

COUNT = 96


def quarters(count: int = COUNT) -> TensorDataset:
    """Noise of which one quarter is brighter: four classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[:, top : top + 4, left : left + 4] += 1
    return TensorDataset(images, labels)


def network(seed: int = 0) -> nn.Sequential:
    """Three layers: 0, 3 and 6."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Flatten(), nn.Linear(128, 4)),
    )


def accuracy(model: nn.Module) -> float:
    """Of the whole model, on other images; it is left in train mode."""
    images, labels = (t[:COUNT] for t in quarters(2 * COUNT).tensors)
    model.eval()
    with torch.no_grad():
        right = float((model(images).argmax(1) == labels).float().mean())
    model.train()
    return right


class Run:
    """A model, its optimizer and a scheduler that drops two of three layers before the third epoch."""

    def __init__(
        self, dataset: Dataset[Any] | None = None, drops: dict[int, int] | None = None, **options: Any
    ) -> None:
        self.model = network()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.user = self.make_loader(dataset)
        self.drop = self.scheduler({2: 2} if drops is None else drops, **options)

    @staticmethod
    def make_loader(dataset: Dataset[Any] | None = None, **options: Any) -> DataLoader[Any]:
        settings: dict[str, Any] = {"batch_size": 16, "shuffle": True, "generator": torch.Generator().manual_seed(1)}
        return DataLoader(quarters() if dataset is None else dataset, **(settings | options))

    def scheduler(self, drops: dict[int, int], **options: Any) -> DropScheduler:
        return DropScheduler(self.model, self.optimizer, self.user, **({"policy": Fixed(drops)} | options))

    def train_step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        loss = nn.functional.cross_entropy(self.drop.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def epochs(self, count: int = 1) -> Run:
        for _ in range(count):
            self.model.train()
            for x, y in self.drop.loader:
                self.train_step(x, y)
            self.drop.step()
        return self


MADE_ANEW = r"drop.loader: the rows are made anew: the weights or buffers of the dropped layer"


def test_the_task_is_learned_by_halves() -> None:
    assert accuracy(Run().epochs(8).model) > 0.95
    assert accuracy(network()) < 0.6


# Item 1: dropped weights or buffers change.


def test_the_best_checkpoint_restored_after_a_drop() -> None:
    run = Run().epochs(1)
    best = copy.deepcopy(run.model.state_dict())
    run.epochs(3)
    assert run.drop.prefix == 2
    run.model.load_state_dict(best)
    with pytest.warns(RuntimeWarning, match=MADE_ANEW):
        run.epochs(4)
    assert accuracy(run.model) > 0.95


def test_the_best_checkpoint_restored_in_mid_epoch_is_refused_by_name() -> None:
    run = Run().epochs(1)
    best = copy.deepcopy(run.model.state_dict())
    run.epochs(3)
    batches = iter(run.drop.loader)
    run.train_step(*next(batches))
    run.model.load_state_dict(best)
    with pytest.raises(RuntimeError, match=r"dropped layers must stay as they are, and those of 0 have changed"):
        run.train_step(*next(batches))
    # The way out that the message names.
    run.drop.undrop()
    assert accuracy(run.epochs(4).model) > 0.95


def test_weight_decay_by_hand_is_refused_at_the_first_step_after_it() -> None:
    run = Run().epochs(2)
    steps: list[float] = []

    def epoch() -> None:
        for x, y in run.drop.loader:
            steps.append(run.train_step(x, y))
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.mul_(1 - 1e-3)

    with pytest.raises(RuntimeError, match=r"those of 0 have changed since its rows were made.*\(weight decay by hand"):
        epoch()
    assert len(steps) == 1


def test_weight_decay_by_hand_of_what_trains_works() -> None:
    run = Run().epochs(2)
    live = [p for name, p in run.model.named_parameters() if name.startswith("6")]
    for _ in range(4):
        for x, y in run.drop.loader:
            run.train_step(x, y)
            with torch.no_grad():
                for parameter in live:
                    parameter.mul_(1 - 1e-4)
        run.drop.step()
    assert accuracy(run.model) > 0.95


def test_lookahead_by_hand_at_the_end_of_each_epoch() -> None:
    run = Run()
    slow = copy.deepcopy(run.model.state_dict())
    for _ in range(8):
        run.epochs(1)
        fast = run.model.state_dict()
        with torch.no_grad():
            for name, value in slow.items():
                if value.is_floating_point():
                    value.lerp_(fast[name], 0.5)
        run.model.load_state_dict(slow)
    assert run.drop.prefix == 2
    # Dropped layers are at their slow weights from the first epoch on.
    assert all(torch.equal(slow[name], value) for name, value in run.model[:6].state_dict().items())
    assert accuracy(run.model) > 0.95


def test_lookahead_by_hand_in_mid_epoch_is_refused() -> None:
    run = Run()
    slow = [p.detach().clone() for p in run.model.parameters()]
    run.epochs(2)

    def epoch() -> None:
        for step, (x, y) in enumerate(run.drop.loader):
            run.train_step(x, y)
            if step % 3 == 2:
                with torch.no_grad():
                    for old, parameter in zip(slow, run.model.parameters(), strict=True):
                        parameter.copy_(old.lerp_(parameter, 0.5))

    with pytest.raises(RuntimeError, match="those of 0 have changed"):
        epoch()


def test_lbfgs_that_began_before_the_drop_is_refused_or_leaves_dropped_layers_alone() -> None:
    run = Run(drops={})
    run.optimizer = torch.optim.LBFGS(run.model.parameters(), lr=0.1, max_iter=4, history_size=4)
    run.drop = run.scheduler({1: 2})

    def epoch() -> None:
        for x, y in run.drop.loader:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                run.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(run.drop.model(x), y)
                loss.backward()
                return loss

            run.optimizer.step(closure)
        run.drop.step()

    epoch()
    assert run.drop.prefix == 2
    # Its memory of steps before the drop moves the dropped layers too.
    with pytest.raises(RuntimeError, match="those of 0 have changed"):
        epoch()


def test_lbfgs_made_after_the_drop_works() -> None:
    run = Run().epochs(2)
    live = [p for name, p in run.model.named_parameters() if name.startswith("6")]
    optimizer = torch.optim.LBFGS(live, lr=0.5, max_iter=4)
    for _ in range(2):
        for x, y in run.drop.loader:

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(run.drop.model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        run.drop.step()
    assert accuracy(run.model) > 0.9


def test_layers_that_are_initialised_again_after_their_drop() -> None:
    run = Run().epochs(3)
    nn.init.kaiming_normal_(run.model[3].weight, generator=torch.Generator().manual_seed(0))
    run.model[4].reset_running_stats()
    with pytest.warns(RuntimeWarning, match=MADE_ANEW + " 3"):
        run.epochs(1)
    run.drop.undrop()
    assert accuracy(run.epochs(5).model) > 0.95


def test_a_dropped_layer_that_is_pruned() -> None:
    run = Run().epochs(4)
    prune.l1_unstructured(run.model[3], "weight", amount=0.3)
    with pytest.warns(RuntimeWarning, match=MADE_ANEW + " 3"):
        run.epochs(3)
    assert float((run.model[3].weight == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert accuracy(run.model) > 0.9
    prune.remove(run.model[3], "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the same values under another name
        run.epochs(1)
    assert accuracy(run.model) > 0.9


def test_a_grad_scaler_that_is_switched_off() -> None:
    run = Run()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(6):
        for x, y in run.drop.loader:
            run.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(run.drop.model(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            scaler.step(run.optimizer)
            scaler.update()
        run.drop.step()
    assert run.drop.prefix == 2
    assert accuracy(run.model) > 0.95


# Item 2: averages and copies.


def test_stochastic_weight_averaging_begun_after_a_drop() -> None:
    run = Run().epochs(4)
    averaged = AveragedModel(run.model)
    for _ in range(3):
        run.epochs(1)
        averaged.update_parameters(run.model)
    update_bn(run.user, averaged)
    assert accuracy(averaged) > 0.95
    assert run.drop.prefix == 2
    assert accuracy(run.epochs(1).model) > 0.95


def test_stochastic_weight_averaging_begun_before_a_drop() -> None:
    run = Run().epochs(1)
    averaged = AveragedModel(run.model)
    for _ in range(6):
        run.epochs(1)
        averaged.update_parameters(run.model)
    update_bn(run.user, averaged)
    assert accuracy(averaged) > 0.9


def test_an_exponential_average_updated_at_each_step() -> None:
    run = Run()
    ema = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(8):
        for x, y in run.drop.loader:
            run.train_step(x, y)
            ema.update_parameters(run.model)
        run.drop.step()
        accuracy(ema)
    assert run.drop.prefix == 2
    assert accuracy(ema) > 0.95


def test_a_copy_of_the_model_trains_as_any_model(tmp_path: Path) -> None:
    run = Run().epochs(3)
    torch.save(run.model, tmp_path / "model.pt")
    for other in (copy.deepcopy(run.model), torch.load(tmp_path / "model.pt", weights_only=False)):
        optimizer = torch.optim.SGD(other.parameters(), lr=0.05)
        other.train()
        before = {name: value.clone() for name, value in other.state_dict().items()}
        for x, y in run.user:
            optimizer.zero_grad()
            nn.functional.cross_entropy(other(x), y).backward()
            optimizer.step()
        after = other.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        # A bias before a norm has no gradient.
        assert set(before) - moved <= {"0.bias", "3.bias"}
    assert accuracy(run.epochs(2).model) > 0.95


# Item 3: after the run, and layers that are to train again.


def attributes(model: nn.Module) -> list[set[str]]:
    return [
        set(m.__dict__) | set(m._forward_hooks) | set(m._forward_pre_hooks) | set(m._state_dict_hooks)
        for m in model.modules()
    ]


def test_close_gives_the_model_back_as_it_was_found(tmp_path: Path) -> None:
    for how in ("close", "with"):
        config = CacheConfig(budget_bytes=0, disk_bytes=1 << 22, disk_dir=str(tmp_path))
        run = Run(cache=config)
        run.model[4].eval()  # the caller keeps one in eval mode
        before = attributes(run.model), [m.training for m in run.model.modules()]
        if how == "with":
            with run.drop as drop:
                for _ in range(4):
                    for x, y in drop.loader:
                        run.train_step(x, y)
                    drop.step()
                drop.state_dict()
                assert list(tmp_path.iterdir()) != []
        else:
            for _ in range(4):
                for x, y in run.drop.loader:
                    run.train_step(x, y)
                run.drop.step()
            assert run.drop.prefix == 2
            run.drop.close()
            run.drop.close()  # a second time does nothing
        assert (attributes(run.model), [m.training for m in run.model.modules()]) == before
        assert all(p.requires_grad for p in run.model.parameters())
        assert list(tmp_path.iterdir()) == []
        assert run.drop.rows.cache is None
        assert run.drop.model(quarters().tensors[0][:2]).shape == (2, 4)
        with pytest.raises(RuntimeError, match="must be open, and it was closed"):
            next(iter(run.drop.loader))
        with pytest.raises(RuntimeError, match="must be open, and it was closed"):
            run.drop.step()


def test_a_run_that_an_error_ends_keeps_the_file_of_its_checkpoint(tmp_path: Path) -> None:
    config = CacheConfig(disk_bytes=1 << 22, disk_dir=str(tmp_path))
    run = Run(cache=config)
    state: dict[str, Any] = {}

    def interrupted() -> None:
        with run.drop:
            run.epochs(4)
            state.update(copy.deepcopy(run.drop.state_dict()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / state["rows_file"]).exists()
    run.drop = run.scheduler({2: 2}, cache=config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.drop.load_state_dict(state)
    assert bool(run.drop.rows.cache.filled.all())


def test_a_second_scheduler_is_refused_by_name_while_layers_are_dropped_and_works_after() -> None:
    run = Run().epochs(3)
    with pytest.raises(ValueError, match=r"another DropScheduler has dropped 2: close\(\) that one first"):
        run.scheduler({1: 1})
    run.drop.close()
    run.drop = run.scheduler({1: 1})
    assert accuracy(run.epochs(4).model) > 0.95
    assert run.drop.prefix == 1


def test_a_scheduler_that_is_gone_does_not_stand_in_the_way() -> None:
    run = Run().epochs(3)
    run.drop = None  # type: ignore[assignment]
    gc.collect()
    run.drop = run.scheduler({1: 1})
    run.epochs(3)
    assert run.drop.prefix == 1


def test_undrop_stays_undone_under_a_fixed_policy() -> None:
    run = Run(drops={1: 1, 2: 2}).epochs(3)
    assert run.drop.prefix == 2
    run.drop.undrop()
    before = run.model[0].weight.detach().clone()
    run.epochs(3)
    assert run.drop.prefix == 0
    assert not torch.equal(run.model[0].weight, before)
    assert accuracy(run.epochs(2).model) > 0.95


def test_the_head_first_and_then_the_backbone() -> None:
    run = Run(drops={})
    for parameter in run.model[:6].parameters():
        parameter.requires_grad_(False)
    run.optimizer = torch.optim.SGD(run.model[6].parameters(), lr=0.05, momentum=0.9)
    run.drop = run.scheduler({0: 2})
    run.epochs(2)
    for parameter in run.model[:6].parameters():
        parameter.requires_grad_(True)
    run.optimizer.add_param_group({"params": list(run.model[:6].parameters()), "lr": 0.01})
    with pytest.raises(RuntimeError, match=r"parameters of 0 are to train .* call drop.undrop\(\)"):
        run.epochs(1)
    run.drop.undrop()
    before = run.model[0].weight.detach().clone()
    run.epochs(3)
    assert not torch.equal(run.model[0].weight, before)
    assert accuracy(run.model) > 0.9


# Item 4: the input is changed on its way to the model.


def normalise(x: torch.Tensor) -> torch.Tensor:
    return x.sub_(0.5).div_(2)


def flip_one(x: torch.Tensor) -> torch.Tensor:
    x[3] = x[3].flip(-1)
    return x


def cutout(x: torch.Tensor) -> torch.Tensor:
    x[..., 2:5] = 0
    return x


@pytest.mark.parametrize("change", [normalise, flip_one, cutout])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_batch_that_the_loop_changes_in_place_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], dropped: bool
) -> None:
    run = Run()
    if dropped:
        run.epochs(3)
    for x, y in run.drop.loader:
        run.train_step(change(x), y)
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input .*changed in place"):
        run.drop.step()


@pytest.mark.parametrize("call", [lambda x: x.flip(-1), lambda x: x + 0.1 * torch.randn_like(x)])
def test_a_second_call_of_the_step_with_another_input_is_refused(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    run = Run().epochs(3)
    for x, _ in run.drop.loader:
        run.optimizer.zero_grad()
        nn.functional.mse_loss(run.drop.model(x), run.drop.model(call(x))).backward()
        run.optimizer.step()
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input"):
        run.drop.step()


def test_noise_that_begins_with_the_second_batch_is_refused() -> None:
    run = Run()
    for i, (x, y) in enumerate(run.drop.loader):
        run.train_step(x if i == 0 else x + 0.1 * torch.randn_like(x), y)
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input"):
        run.drop.step()


def test_adversarial_examples_are_refused() -> None:
    run = Run()
    for x, y in run.drop.loader:
        x.requires_grad_(True)
        nn.functional.cross_entropy(run.drop.model(x), y).backward()
        run.train_step((x + 0.1 * x.grad.sign()).detach(), y)
    with pytest.raises(RuntimeError, match=r"drop.model must get the batch's input"):
        run.drop.step()


def test_gradient_accumulation_over_slices_of_a_batch_works() -> None:
    run = Run()
    for _ in range(6):
        for x, y in run.drop.loader:
            run.optimizer.zero_grad()
            for part, labels in zip(x.split(8), y.split(8), strict=True):
                (nn.functional.cross_entropy(run.drop.model(part), labels) / 2).backward()
            run.optimizer.step()
        run.drop.step()
    assert accuracy(run.model) > 0.95


# Item 6: randomness and coupling in collate_fn.


def mixup_half_the_time(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    if random.random() < 0.5:
        x = 0.6 * x + 0.4 * x.roll(1, 0)
    return x, y


def standardise_over_the_batch(samples: list[Any]) -> Any:
    x, y = default_collate(samples)
    return (x - x.mean()) / x.std(), y


@pytest.mark.parametrize("collate", [mixup_half_the_time, standardise_over_the_batch])
def test_a_collate_fn_that_is_no_function_of_the_sample_is_refused(collate: Callable[[list[Any]], Any]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=r"same sample for the same id at each reading and beside any others"):
        DropScheduler(model, optimizer, Run.make_loader(collate_fn=collate))


# Item 7: data that changes between epochs.


class Epochs(Dataset[Any]):
    """Another shift of the images in each epoch, as `set_epoch` asks for."""

    def __init__(self) -> None:
        self.data = quarters()
        self.epoch = 0
        self.labels = self.data.tensors[1].clone()
        self.size = 8
        self.count = COUNT

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> Any:
        x = self.data.tensors[0][index] + 0.1 * self.epoch
        if self.size != 8:
            x = nn.functional.interpolate(x[None], size=self.size)[0]
        return x, self.labels[index]


def test_augmentation_by_set_epoch_is_seen_and_rows_are_made_anew() -> None:
    dataset = Epochs()
    run = Run(dataset)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        if epoch > 2:  # the first rows are made in the third epoch
            with pytest.warns(RuntimeWarning, match="made anew: the images of some samples"):
                run.epochs(1)
        else:
            run.epochs(1)
    images = torch.stack([dataset[i][0] for i in range(COUNT)])
    with torch.no_grad():
        rows = run.drop.chain.prefix(2).eval()(images)
    got = torch.cat([x for x, _ in run.drop.loader]).float()
    assert float(torch.cdist(got.flatten(1), rows.flatten(1)).min(1).values.max()) < 0.05


def test_pseudo_labels_are_followed() -> None:
    dataset = Epochs()
    right = dataset.labels.clone()
    dataset.labels = torch.randint(0, 4, (COUNT,), generator=torch.Generator().manual_seed(0))
    run = Run(dataset, drops={0: 1}).epochs(2)
    dataset.labels = right
    with pytest.warns(RuntimeWarning, match=r"made anew: batch\[1\] of some samples are no longer"):
        run.epochs(1)
    assert accuracy(run.epochs(8).model) > 0.9


def test_labels_that_changed_between_two_runs_are_seen_at_resume(tmp_path: Path) -> None:
    config = CacheConfig(disk_bytes=1 << 22, disk_dir=str(tmp_path))
    run = Run(Epochs(), cache=config).epochs(4)
    state = run.drop.state_dict()
    run.drop.rows.file._name = None  # the process is gone: its file stays
    dataset = Epochs()
    dataset.labels = (dataset.labels + 1) % 4
    again = Run(dataset, cache=config)
    again.model.load_state_dict(run.model.state_dict())
    again.drop.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match=r"made anew: batch\[1\]"):
        labels = torch.cat([y for _, y in again.drop.loader])
    assert sorted(labels.tolist()) == sorted(dataset.labels.tolist())


def test_progressive_resizing_is_refused_after_a_drop_and_the_way_out_works() -> None:
    dataset = Epochs()
    run = Run(dataset).epochs(3)
    dataset.size = 12
    with pytest.raises(RuntimeError, match=r"images must keep their shape \[1, 8, 8\] .* got \[1, 12, 12\]"):
        run.epochs(1)
    run.drop.close()
    dataset.size = 8
    run.drop = run.scheduler({1: 1})
    assert accuracy(run.epochs(3).model) > 0.95


def test_a_stream_trains_by_replay() -> None:
    dataset = Epochs()
    dataset.count = 24
    run = Run(dataset, drops={1: 1})
    for count in (24, 48, 48, 72, 96, 96):
        dataset.count = count
        seen = []
        for x, y in run.drop.loader:
            run.train_step(x, y)
            seen.append(len(y))
        assert sum(seen) == count
        run.drop.step()
    assert accuracy(run.epochs(3).model) > 0.95


# Item 8, and loops as people write them.


def test_the_order_with_persistent_workers_is_the_one_without_a_drop() -> None:
    def order(drops: dict[int, int]) -> list[int]:
        run = Run(drops={})
        run.user = Run.make_loader(Labelled(), num_workers=1, persistent_workers=True)
        run.drop = run.scheduler(drops)
        found = []
        for _ in range(4):
            for x, y in run.drop.loader:
                run.train_step(x, y % 4)
                found += y.tolist()
            run.drop.step()
        return found

    assert order({1: 1, 3: 2}) == order({})


class Labelled(Dataset[Any]):
    """Labels that tell samples apart."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return quarters().tensors[0][index], index


def test_epochs_with_a_limit_of_batches() -> None:
    run = Run(drops={2: 1, 5: 2})
    for _ in range(16):
        for i, (x, y) in enumerate(run.drop.loader):
            if i == 3:
                break
            run.train_step(x, y)
        run.drop.step()
    assert run.drop.prefix == 2
    assert accuracy(run.model) > 0.95


def test_epochs_that_end_by_the_clock() -> None:
    run = Run(drops={2: 1})
    for _ in range(8):
        end = time.perf_counter() + 0.03
        for x, y in run.drop.loader:
            run.train_step(x, y)
            if time.perf_counter() > end:
                break
        run.drop.step()
    assert accuracy(run.epochs(3).model) > 0.95


def test_a_loader_zipped_with_a_shorter_one() -> None:
    run = Run(drops={2: 2})
    other = DataLoader(quarters(32), batch_size=16)
    for _ in range(9):
        for (x, y), _ in zip(run.drop.loader, other, strict=False):
            run.train_step(x, y)
        run.drop.step()
    for _ in range(3):
        for _, (x, y) in zip(other, run.drop.loader, strict=False):
            run.train_step(x, y)
        run.drop.step()
    assert run.drop.prefix == 2
    assert accuracy(run.epochs(2).model) > 0.95


def cycle(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


@pytest.mark.parametrize("every", [4, 6, 9])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_by_steps_without_epochs(every: int, workers: int) -> None:
    # Six batches an epoch: measured in mid-epoch, at its end, and across two of them.
    run = Run(drops={})
    run.user = Run.make_loader(num_workers=workers)
    run.drop = run.scheduler({1: 1, 3: 2})
    for step, (x, y) in enumerate(itertools.islice(cycle(run.drop.loader), 60), 1):
        run.train_step(x, y)
        if step % every == 0:
            run.drop.step()
    assert run.drop.prefix == 2
    assert [record.samples for record in run.drop.history][:3] == [16 * every] * 3
    assert accuracy(run.model) > 0.95


def test_itertools_cycle_keeps_the_first_epochs_batches_and_is_refused() -> None:
    run = Run(drops={1: 2})
    endless = itertools.cycle(run.drop.loader)
    for x, y in itertools.islice(endless, 6):
        run.train_step(x, y)
    run.drop.step()
    with pytest.raises(ValueError, match=r"drop.model: x must be cached rows"):
        run.train_step(*next(endless))


# Crash, damage, slowness.


def test_a_corrupt_file_that_training_never_touches_does_not_end_the_run() -> None:
    class Corrupt(Dataset[Any]):
        def __len__(self) -> int:
            return 2 * COUNT

        def __getitem__(self, index: int) -> Any:
            if index >= COUNT:
                raise OSError("corrupt")
            return quarters()[index]

    run = Run(drops={})
    run.user = DataLoader(Corrupt(), batch_size=16, sampler=torch.utils.data.SubsetRandomSampler(range(COUNT)))
    run.drop = run.scheduler({1: 1, 2: 2})
    assert accuracy(run.epochs(6).model) > 0.95
    assert int(run.drop.rows.cache.filled.sum()) == COUNT


@pytest.mark.parametrize("kept", [False, True])
def test_the_callers_modes_stay(kept: bool) -> None:
    run = Run(drops={})
    run.model[4].eval()  # a norm that the caller keeps on its statistics, set once
    run.drop = run.scheduler({1: 1}, cache="fp32" if kept else None)
    statistics = run.model[4].running_mean.clone()
    for _ in range(3):
        for x, y in run.drop.loader:
            run.train_step(x, y)
            assert not run.model[4].training
        run.drop.step()
    assert run.drop.prefix == 1
    assert torch.equal(run.model[4].running_mean, statistics)
    run.drop.undrop()
    assert [m.training for m in run.model] == [True] * 4 + [False] + [True] * 2


def test_labels_of_any_kind_are_carried() -> None:
    def ragged(samples: list[Any]) -> dict[str, Any]:
        x, y = default_collate(samples)
        ids = y.tolist()
        return {
            "x": x,
            "y": y,
            "double": y.double() / 3,
            "array": y.numpy() + 1,
            "none": None,
            "scale": 0.5,
            "boxes": [torch.full((i + 1, 4), float(i)) for i in ids],
        }

    run = Run(drops={})
    run.user = Run.make_loader(collate_fn=ragged)
    run.drop = run.scheduler({1: 2}, input="x")
    for _ in range(3):
        for batch in run.drop.loader:
            y = batch["y"]
            run.train_step(batch["x"], y)
            assert torch.equal(batch["double"], y.double() / 3)
            assert (batch["array"] == y.numpy() + 1).all()
            assert (batch["none"], batch["scale"]) == (None, 0.5)
            assert [len(box) - 1 for box in batch["boxes"]] == y.tolist()
        run.drop.step()
    assert run.drop.prefix == 2


# Overhead.


@pytest.mark.filterwarnings("ignore")
def test_a_policy_that_never_drops_takes_less_than_200_microseconds_a_step() -> None:
    # 1 % of a step of 20 ms. By CPU time, the least of several rounds: other work on the machine does not count.
    data = TensorDataset(torch.zeros(800, 4), torch.zeros(800, dtype=torch.int64))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = DataLoader(data, batch_size=4, shuffle=True)
    drop = DropScheduler(model, optimizer, DataLoader(data, batch_size=4, shuffle=True), policy=Fixed({}))

    def seconds(loader: Any, call: nn.Module) -> float:
        begin = time.process_time()
        for x, _ in loader:
            call(x)
        return time.process_time() - begin

    pairs = [(seconds(drop.loader, drop.model), seconds(plain, model)) for _ in range(7)]
    least = min(own for own, _ in pairs) - min(other for _, other in pairs)
    assert least / 200 < 200e-6
