"""What the loop does to the images on their way to the model."""

from __future__ import annotations

import contextlib
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from four_quarters import COUNT, Change, Run, accuracy, losses_without_rows, quarters, rows_of
from processes import Apart
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils import _pytree as pytree

from learndrop_ext.forward.images import Images

NOT_BY_ITSELF = r"drop.loader: the loop may only do to images what keeps each sample by itself"
NOT_THE_SAME = r"drop.loader: the loop must do the same to the images of every batch"


def in_place(x: Tensor) -> Tensor:
    return x.sub_(0.5).div_(2)


def assigned(x: Tensor) -> Tensor:
    x -= 0.5
    x /= 2
    return x


def by_channel(x: Tensor) -> Tensor:
    return (x - torch.tensor([0.5]).view(1, 1, 1)) / torch.tensor([[[[2.0]]]])


#: what keeps each sample by itself and in its place
ALLOWED: dict[str, Change] = {
    "normalised": lambda x: (x - 0.5) / 2,
    "in place": in_place,
    "by +=": assigned,
    "by channel": by_channel,
    "clamped": lambda x: (2 * x).clamp(-1, 1) ** 2,
    "cast": lambda x: x.double().mul(0.5).float(),
    "channels last": lambda x: x.to("cpu", memory_format=torch.channels_last, non_blocking=True),
    "flattened and back": lambda x: x.flatten(1).view(len(x), 1, 8, 8),
    "a crop": lambda x: nn.functional.pad(x[..., 1:-1, 1:-1], [1, 1, 1, 1]),
    "a crop by an index": lambda x: nn.functional.pad(x.narrow(2, 0, 7)[:, :, :, :7], [0, 1, 0, 1], mode="replicate"),
    "coarser": lambda x: nn.functional.avg_pool2d(x, 2).repeat(1, 1, 2, 2),
    "adaptive": lambda x: nn.functional.interpolate(x, (8, 4), mode="area").repeat(1, 1, 1, 2),
    "reflected": lambda x: nn.functional.pad(x, [1, 1, 1, 1], mode="reflect")[..., :-2, 2:],
    "a choice of columns": lambda x: x[..., [7, 6, 5, 4, 3, 2, 1, 0]].index_select(1, torch.tensor([0])),
    "one channel": lambda x: x[:, 0].unsqueeze(1),
    "three channels of one": lambda x: torch.cat((torch.cat([x, x, x], 1)[:, 2:],) * 2, dim=-1)[..., 8:],
    "all of it in slices": lambda x: torch.cat([x[:5], x[5:]]),
    "mirrored, all of them": lambda x: x.flip(-1),
    "turned": lambda x: x.transpose(2, 3).rot90(1, (2, 3)),
    "joined with what was made of it": lambda x: torch.cat([x, 2 * x], 1)[:, 1:],
    "each by its own mean": lambda x: (x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1),
    "the dark parts": lambda x: torch.where(x > 0.5, x, torch.zeros(())) + (x <= 0.5) * 0.1,
    "bright ones in place": lambda x: x.masked_fill_(x > 0.9, 0.9),
    "logarithms": lambda x: torch.log1p(x.relu()).nan_to_num(),
    "blurred": lambda x: nn.functional.avg_pool2d(x, 3, stride=1, padding=1),
    "in parts of each": lambda x: torch.cat(x.split(4, 2)[::-1], 2),
    "the larger of two": lambda x: torch.stack([x, x.flip(2)], 1).max(1).values,
    "a constant over each": lambda x: 1 / (2 + x),
}


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_a_batch_that_the_loop_normalises_trains_as_without_rows(change: Change) -> None:
    run = Run(cache="fp32").epochs(5, change)
    assert run.drop.prefix == 2
    assert bool(run.drop._rows.cache.filled.all())
    assert run.losses == pytest.approx(losses_without_rows(5, change), rel=1e-5)


def flip_one(x: Tensor) -> Tensor:
    x[3] = x[3].flip(-1)
    return x


def cutout(x: Tensor) -> Tensor:
    x[..., 2:5] = 0
    return x


def shift_half(x: Tensor) -> Tensor:
    x[:8].sub_(0.5)
    return x


def darken_through_a_view(x: Tensor) -> Tensor:
    x.flatten(1).mul_(0.5)
    return x


def split_then_shift(x: Tensor) -> Tensor:
    first, second = x.split(8)
    x.sub_(0.5)
    return torch.cat([first, second])


@torch.inference_mode()
def inferred(x: Tensor) -> Tensor:
    return nn.Linear(8, 8)(x)


#: what makes another sample, or needs the others of its batch
REFUSED: dict[str, Change] = {
    "flip of one": flip_one,
    "cutout": cutout,
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "noise by shape": lambda x: x + 0.1 * torch.randn(x.shape),
    "a factor for each sample": lambda x: x * torch.rand(len(x), 1, 1, 1),
    "mixup": lambda x: 0.7 * x + 0.3 * x[torch.randperm(len(x))],
    "roll": lambda x: x.roll(1, 0),
    "roll by three": lambda x: x.roll(3, 0),
    "roll by eleven": lambda x: x.roll(11, 0),
    "roll by pixels of five images": lambda x: x.roll(5 * 64),
    "a shuffled batch": lambda x: x[torch.randperm(len(x))],
    "another channel for each sample": lambda x: x[torch.arange(len(x)), :1],
    "samples shifted by a pad": lambda x: nn.functional.pad(x, [0, 0, 0, 0, 0, 0, 1, -1]),
    "repeated along a new dimension": lambda x: x.repeat(len(x), 1, 1, 1, 1)[:, 0],
    "two indices at once": lambda x: x[:, torch.zeros(len(x), dtype=torch.long), :, torch.zeros(len(x)).long()],
    "a mask for each": lambda x: torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x),
    "dropout": lambda x: nn.functional.dropout(x, 0.1),
    "the batch in reverse": lambda x: 0.5 * (x + x.flip(0)),
    "the batch's norm": lambda x: nn.functional.batch_norm(x, None, None, training=True),
    "sorted samples": lambda x: x.sort(0).values,
    "the largest so far": lambda x: x.cummax(0).values,
    "flags of other samples": lambda x: x * (x.amax((1, 2, 3), keepdim=True) > 1).roll(1, 0),
    "two halves of a batch": lambda x: x[:8] + x[8:],
    "another network": lambda x: nn.Conv2d(1, 1, 3, padding=1).eval().requires_grad_(requires_grad=False)(x),
    "another network in inference mode": inferred,
    "a buffer that is written to": lambda x: torch.zeros(x.shape).copy_(x),
    "a result that is written elsewhere": lambda x: torch.sub(x, 0.5, out=torch.empty(x.shape)),
    "turned in place": lambda x: x.transpose_(2, 3),
    "values of some pixels": lambda x: x[x > 0.5],
    "a choice by all values": lambda x: x if torch.equal(x, x) else 2 * x,
    "a choice by close values": lambda x: x if torch.allclose(x, x) else 2 * x,
    "the batch's mean": lambda x: x - x.mean(),
    "a choice by value": lambda x: x if x.max() > 1 else 2 * x,
    "half of a batch in place": shift_half,
    "in place through a view": darken_through_a_view,
    "in place after a split": split_then_shift,
}


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_batch_that_the_loop_makes_another_one_of_is_refused_at_once(change: Change, epochs: int) -> None:
    run = Run().epochs(epochs)
    x, y = next(iter(run.drop.loader))
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(RuntimeError, match=NOT_BY_ITSELF):
        run.train_step(change(x), y)
    assert all(map(torch.equal, before, run.model.parameters()))
    assert accuracy(run.epochs(5).model) > 0.95  # the loop is put right


def test_the_operation_that_is_refused_is_named() -> None:
    run = Run().epochs(2)
    x, _ = next(iter(run.drop.loader))
    with pytest.raises(
        RuntimeError, match=r"roll would have to see 64 values of each sample; move it into the dataset"
    ):
        x.roll(1, 0)


def test_a_whole_number_and_a_fraction_make_other_dtypes() -> None:
    run = Run(drops={0: 1})
    x, _ = next(iter(run.drop.loader))
    whole = x.to(torch.uint8)
    assert [(whole * two).dtype for two in (2, 2.0, 2)] == [torch.uint8, torch.float32, torch.uint8]


def set_data(x: Tensor) -> None:
    x.data = x.data - 0.5


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda x: x.numpy(), "a numpy array"),
        (np.asarray, "a numpy array"),
        (np.from_dlpack, "given to another library"),
        (pickle.dumps, "saved or sent"),
        (lambda x: x.share_memory_(), "shared"),
        (lambda x: x.data_ptr(), "read at its address"),
        (lambda x: x.apply_(lambda value: value / 2), "changed by a function of Python"),
        (set_data, "given other values"),
    ],
)
def test_images_not_read_give_no_values_but_by_operations(act: Callable[[Tensor], Any], what: str) -> None:
    x, _ = next(iter(Run(drops={0: 1}).drop.loader))
    with pytest.raises(
        TypeError, match=rf"Images\(.*\) cannot be {what}: it has no values; images.read\(\) gives them"
    ):
        act(x)


def call_what_is_no_operation() -> None:
    warnings.simplefilter("ignore")
    run = Run(drops={0: 1})
    run.epochs(1)
    x, _ = next(iter(run.drop.loader))
    operands: list[Any] = [(), (1,), (x,), (lambda value: value,), (x, lambda value, other: value)]
    for name in dir(Tensor):
        if name.startswith("__") or name in {"new", "new_tensor"} or hasattr(torch.ops.aten, name):
            continue
        for some in operands:
            with contextlib.suppress(Exception):
                method = getattr(x, name)
                for made in pytree.tree_leaves(method(*some) if callable(method) else method):
                    if isinstance(made, Tensor | np.ndarray) and not isinstance(made, Images):
                        print(f"{name} makes values")
    print("all called")


def test_no_method_of_a_tensor_ends_the_process_or_makes_values_of_images_not_read() -> None:
    assert Apart(call_what_is_no_operation).printed() == "all called\n"


def test_a_stream_that_uses_images_is_noted_where_there_is_memory() -> None:
    run, noted = Run(drops={0: 1}), []
    stream = torch.Stream(stream_id=0, device_index=0, device_type=1)  # of a GPU, which need not be there
    library = torch.library.Library("aten", "IMPL")
    library.impl("record_stream", lambda tensor, stream: noted.append(tensor), "CPU")
    try:
        for _ in range(2):
            x, _ = next(iter(run.drop.loader))
            x.record_stream(stream)
            assert [t.data_ptr() for t in noted] == [(rows_of(x) if x.pixels is None else x.pixels).data_ptr()]
            noted.clear()
            run.epochs(1)
    finally:
        library._destroy()


def test_images_of_another_size_than_call_says_are_told_of() -> None:
    run = Run(drops={0: 1})
    with pytest.raises(
        RuntimeError, match=r"call= does .* rows behind 1 layers are \[\d+, 10, 10\] in the loop, and \["
    ):
        run.epochs(1, lambda x: nn.functional.pad(x, [1, 1, 1, 1]))


def test_before_a_drop_the_loop_may_do_what_it_likes() -> None:
    generator = torch.Generator().manual_seed(0)
    run = Run().epochs(2, lambda x: (x + 0.1 * torch.randn(x.shape, generator=generator))[torch.arange(16)])
    assert accuracy(run.epochs(4).model) > 0.95


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 0.1 * torch.randn(1, 8, 8),
        lambda x: x + 0.1 * torch.randn(1, *x.shape[1:]),
        lambda x: x * (1 + random.random()),
        lambda x: x * torch.rand(()),
        lambda x: x - 0.5 if random.random() < 0.5 else x,
        lambda x: x.flip(-1) if random.random() < 0.5 else x,
        lambda x: torch.where(torch.rand(8, 8) < 0.5, x, torch.zeros(())),
    ],
)
@pytest.mark.parametrize("epochs", [2, 4])
def test_a_number_that_is_another_one_in_each_batch_is_refused(change: Change, epochs: int) -> None:
    random.seed(0)
    run = Run().epochs(2)
    if epochs > 2:
        run.epochs(epochs - 2)
    with pytest.raises(RuntimeError, match=NOT_THE_SAME):
        run.epochs(1, change)


def test_a_normalisation_that_begins_when_rows_are_there_is_refused() -> None:
    run = Run().epochs(4)
    with pytest.raises(RuntimeError, match=NOT_THE_SAME + r".* wanted nothing, got sub\(0.5\)"):
        run.epochs(1, in_place)


def test_images_of_another_size_are_followed_where_call_says_so() -> None:
    def cropped(x: Tensor) -> Tensor:
        return x[..., 1:, :-1]

    run = Run(cache="fp32", call=lambda model, batch: model(cropped(batch[0]))).epochs(5, cropped)
    assert bool(run.drop._rows.cache.filled.all())
    assert run.losses == pytest.approx(losses_without_rows(5, cropped), rel=1e-5)


def test_a_choice_that_is_another_one_is_refused_by_its_values() -> None:
    columns = torch.arange(8)
    run = Run().epochs(4, lambda x: x[..., columns])
    columns.copy_(columns.flip(0))
    with pytest.raises(
        RuntimeError, match=NOT_THE_SAME + r".* \[0, 1, 2, 3, 4, 5, 6, 7\].* \[7, 6, 5, 4, 3, 2, 1, 0\]"
    ):
        run.epochs(1, lambda x: x[..., columns])


def test_a_constant_that_is_written_to_is_another_one() -> None:
    mean = torch.full((1, 1, 1), 0.5)
    run = Run().epochs(4, lambda x: x - mean)
    mean.fill_(0.4)
    with pytest.raises(RuntimeError, match=NOT_THE_SAME):
        run.epochs(1, lambda x: x - mean)


@pytest.mark.parametrize("call", [lambda x: x.flip(-1), lambda x: x + 0.1 * torch.randn_like(x)])
def test_a_second_call_of_the_step_with_another_input_is_refused(call: Change) -> None:
    run = Run().epochs(3)
    x, _ = next(iter(run.drop.loader))
    with pytest.raises(RuntimeError, match=f"{NOT_BY_ITSELF}|{NOT_THE_SAME}"):
        nn.functional.mse_loss(run.model(x), run.model(call(x))).backward()


def test_a_second_call_of_the_step_with_the_same_input_works() -> None:
    run = Run()
    for _ in range(6):
        for x, y in run.drop.loader:
            run.optimizer.zero_grad()
            one, other = run.model(x), run.model(x)
            (nn.functional.cross_entropy(one, y) + nn.functional.mse_loss(one, other)).backward()
            run.optimizer.step()
        run.drop.step()
    assert run.drop.prefix == 2
    assert accuracy(run.model) > 0.95


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("epochs", [2, 4])
def test_a_target_without_gradients_is_of_the_rows_of_its_images(mode: bool, epochs: int) -> None:
    run = Run(cache="fp32").epochs(2, in_place)
    if epochs > 2:
        run.epochs(epochs - 2, in_place)
    x, y = next(iter(run.drop.loader))
    run.train_step(x := in_place(x), y)
    run.model.train(mode)
    with torch.no_grad():
        got = run.model(x)
        torch.testing.assert_close(got, run.model(in_place(x.read())))
        with pytest.raises(RuntimeError, match=NOT_THE_SAME):
            run.model(x * 0.5)
    run.model.train()
    assert accuracy(run.epochs(4, in_place).model, in_place) > 0.95


def test_statistics_of_norms_by_another_loop_leave_no_rows() -> None:
    run = Run(cache="fp32").epochs(2, in_place)
    update_bn(run.drop.loader, run.model)  # without the normalisation
    assert not bool(run.drop._rows.cache.filled.any())
    assert accuracy(run.epochs(4, in_place).model, in_place) > 0.95


@pytest.mark.parametrize("epochs", [2, 4])
def test_images_that_are_read_are_the_datasets_and_the_loops_own(epochs: int) -> None:
    run = Run(drops={0: 2}, cache="fp32").epochs(epochs)
    images, labels = quarters().tensors
    for x, y in run.drop.loader:
        picture = x.read()
        at = torch.cdist(picture.flatten(1), images.flatten(1)).argmin(1)
        assert torch.equal(picture, images[at])
        assert torch.equal(y, labels[at])
        picture.mul_(0.3).add_(0.1)  # for a log
        assert torch.equal(x.read(), images[at])
        assert x.shape == (16, 1, 8, 8)
        run.train_step(x, y)
    # Two images a sample: one of them is not of the loader, and runs through the dropped layers.
    x, y = next(iter(run.drop.loader))
    run.train_step(x.read().flip(-1), y)


def test_adversarial_examples_work_before_a_drop_and_are_refused_after_it() -> None:
    run = Run(drops={1: 2})

    def epoch() -> None:
        for x, y in run.drop.loader:
            x.requires_grad_(True)
            nn.functional.cross_entropy(run.model(x), y).backward()
            run.train_step((x + 0.1 * x.grad.sign()).detach(), y)
        run.drop.step()

    epoch()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"images must not require gradients .* call drop.undrop\(\)"):
            epoch()
        run.epochs(1)
    run.drop.undrop()
    epoch()
    assert accuracy(run.epochs(2).model) > 0.95


def test_gradient_accumulation_over_slices_of_a_batch_works() -> None:
    run = Run(cache="fp32")
    for _ in range(6):
        for x, y in run.drop.loader:
            run.optimizer.zero_grad()
            for part, labels in zip(x.sub_(0.5).split(8), y.split(8), strict=True):
                (nn.functional.cross_entropy(run.model(part), labels) / 2).backward()
            run.optimizer.step()
        run.drop.step()
    assert accuracy(run.model, lambda x: x - 0.5) > 0.95
    got = torch.cat([rows_of(x) for x, _ in run.drop.loader])
    with torch.no_grad():
        rows = run.model[:6].eval()(quarters().tensors[0] - 0.5).reshape(COUNT, *got.shape[1:])
    order = torch.cdist(got.flatten(1), rows.flatten(1)).argmin(1)
    assert len(order.unique()) == COUNT
    torch.testing.assert_close(got, rows[order])


def test_slices_by_position_and_chunks_work() -> None:
    run = Run()
    for _ in range(6):
        for x, y in run.drop.loader:
            assert run.drop.prefix == 0 or type(x) is Images
            for part, labels in ((x[:6], y[:6]), (x[6:-2], y[6:-2]), *zip(x[-2:].chunk(1), [y[-2:]], strict=True)):
                run.train_step(part, labels)
        run.drop.step()
    assert accuracy(run.model) > 0.9
