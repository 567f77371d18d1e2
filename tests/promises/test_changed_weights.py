"""Weights or buffers of dropped layers change: the rows are computed again, or the step is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from four_quarters import COUNT, MADE_ANEW, Run, accuracy, quarters, rows_of
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import Dataset


class Long(Dataset[Any]):
    """Each image four times."""

    def __len__(self) -> int:
        return 4 * COUNT

    def __getitem__(self, index: int) -> Any:
        return quarters()[index % COUNT]


def test_the_best_checkpoint_restored_after_a_drop() -> None:
    run = Run().epochs(1)
    best = copy.deepcopy(run.model.state_dict())
    run.epochs(3)
    assert run.drop.prefix == 2
    run.model.load_state_dict(best)
    with pytest.warns(RuntimeWarning, match=MADE_ANEW):
        run.epochs(4)
    assert accuracy(run.model) > 0.95


def test_a_warning_that_is_an_error_comes_after_the_rows_are_gone() -> None:
    run = Run(cache="fp32").epochs(4)
    with torch.no_grad():
        run.model[0].weight.neg_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=MADE_ANEW):
            next(iter(run.drop.loader))
        run.epochs(2)
    x, _ = next(iter(run.drop.loader))
    wanted = run.drop.chain.prefix(2).eval()(x.read()).detach()
    torch.testing.assert_close(rows_of(x), wanted, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("name", ["0.weight", "3.bias", "4.running_var", "4.num_batches_tracked"])
def test_one_tensor_that_is_written_to_in_mid_epoch_is_refused_by_name(name: str) -> None:
    run = Run(Long()).epochs(3)
    said = rf"those of {'0' if name[0] == '0' else '3'} have changed since its rows"
    with pytest.raises(RuntimeError, match=said):  # noqa: PT012
        for i, (x, y) in enumerate(run.drop.loader):
            run.train_step(x, y)
            if i == 4:
                with torch.no_grad():
                    run.model.state_dict()[name].add_(1)
    assert i <= 4 + 8  # the tensors take turns


@pytest.mark.parametrize("name", ["0.weight", "3.bias", "4.running_var"])
@pytest.mark.parametrize("kind", ["in place", "data", "another tensor's data"])
def test_one_tensor_that_is_written_to_between_two_epochs(name: str, kind: str) -> None:
    run = Run(cache="fp32").epochs(3)
    tensor = dict([*run.model.named_parameters(), *run.model.named_buffers()])[name]
    with torch.no_grad():
        if kind == "in place":
            tensor.mul_(1.5)
        elif kind == "data":
            tensor.data.mul_(1.5)
        else:
            tensor.data = tensor.data * 1.5
    with pytest.warns(RuntimeWarning, match=MADE_ANEW + (" 0" if name[0] == "0" else " 3")):
        run.epochs(1)
    images = quarters().tensors[0]
    with torch.no_grad():
        rows = run.model[:6].eval()(images)
    run.model.train()
    got = torch.cat([rows_of(x) for x, _ in run.drop.loader]).flatten(1)
    assert float((got[:, None] - rows.flatten(1)).abs().amax(2).amin(1).max()) < 1e-5


def test_weight_decay_by_hand_is_refused_at_the_first_step_after_it() -> None:
    run = Run().epochs(2)
    steps: list[float] = []

    def epoch() -> None:
        for x, y in run.drop.loader:
            steps.append(run.train_step(x, y))
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.mul_(1 - 1e-3)

    with pytest.raises(
        RuntimeError, match=r"those of 0 have changed since its rows were computed.*\(weight decay by hand"
    ):
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
                loss = nn.functional.cross_entropy(run.model(x), y)
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
                loss = nn.functional.cross_entropy(run.model(x), y)
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


def test_a_pruned_layer_in_a_checkpoint_and_after_undrop() -> None:
    run = Run(cache="fp32").epochs(3)
    prune.l1_unstructured(run.model[3], "weight", amount=0.3)
    with pytest.warns(RuntimeWarning, match=MADE_ANEW + " 3"):
        run.epochs(1)
    weights = run.drop.state_dict()["weights"]
    with torch.no_grad():
        run.model[3].weight_orig.mul_(2)
    with pytest.warns(RuntimeWarning, match=MADE_ANEW + " 3"):
        run.epochs(1)
    assert run.drop.state_dict()["weights"] != weights
    run.drop.undrop()
    before = run.model[3].weight_orig.detach().clone()
    assert len(run.epochs(1).drop.history[-1].changes) == 3
    assert not torch.equal(run.model[3].weight_orig, before)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_a_dropped_layer_that_is_parametrized() -> None:
    run = Run(cache="fp32").epochs(3)
    parametrize.register_parametrization(run.model[3], "weight", Doubled())
    with pytest.warns(RuntimeWarning, match=MADE_ANEW + " 3"):
        run.epochs(1)
    with torch.no_grad():
        run.model[3].parametrizations.weight.original.mul_(2)
    with pytest.warns(RuntimeWarning, match=MADE_ANEW + " 3"):
        run.epochs(1)
    with warnings.catch_warnings(action="error"):
        assert accuracy(run.epochs(3).model) > 0.9
