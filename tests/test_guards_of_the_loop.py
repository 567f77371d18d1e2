"""The digests of images, and what the loop does to them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learndrop_ext.forward.images import Images, Standing, form_of
from learndrop_ext.guards import LoopGuard, describe_operations, image_digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (3, 1, 1), (2, 4)])
def test_image_digests_see_every_single_value(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (4, *shape), generator=generator).to(dtype)
    before = image_digests(images)
    assert (before.shape, before.dtype) == ((4,), torch.int64)
    assert torch.equal(image_digests(images.clone()), before)
    flat = images.flatten(1)
    for i in range(flat.shape[1]):
        changed = flat.clone()
        changed[2, i] += 1
        now = image_digests(changed.view(4, *shape))
        assert now[2] != before[2]
        assert torch.equal(now[[0, 1, 3]], before[[0, 1, 3]])


def test_image_digests_are_of_each_image_and_see_the_order_of_its_values() -> None:
    images = torch.arange(48, dtype=torch.float32).view(4, 3, 2, 2)
    digests = image_digests(images)
    assert len(set(digests.tolist())) == 4
    assert torch.equal(image_digests(images[[2, 0]]), digests[[2, 0]])
    assert bool((image_digests(images.flip(-1)) != digests).all())
    assert bool((image_digests(images.roll(1, 1)) != digests).all())


def test_image_digests_are_of_the_values_and_not_of_the_memory() -> None:
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    wanted = image_digests(images)
    assert torch.equal(image_digests(images.to(memory_format=torch.channels_last)), wanted)
    assert torch.equal(image_digests(images.repeat(1, 1, 1, 2)[..., :6]), wanted)
    assert torch.equal(image_digests(images.requires_grad_()), wanted)
    zeros = torch.zeros(1, 3)
    assert not torch.equal(image_digests(zeros), image_digests(-zeros))  # by bits


OWNER = SimpleNamespace(inside=None)


def images(count: int = 4) -> Images:
    """A batch in the loop that was read."""
    pixels = torch.ones(count, 3, 8, 8)
    return Images(form_of(pixels), pixels.device, Standing(OWNER, torch.arange(count), None, 0, None), pixels)


MEAN, STD = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 2.0)


def normalised(x: Any, mean: torch.Tensor = MEAN) -> Any:
    return (x - mean) / STD


#: what the loop does -> in words
LOOPS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda x: x,
    "sub([0.5, 0.5, 0.5]), then div([2.0, 2.0, 2.0])": normalised,
    "mul(2)": lambda x: x * 2,
    "_to_copy(('dtype', torch.float16))": lambda x: x.half(),
    "permute((0, 2, 3, 1))": lambda x: x.permute(0, 2, 3, 1),
    "div([255.0, 255.0, 255.0, 255.0, 255.0, 255.0, 255.0, 255.0] of [3, 8, 8])": lambda x: (
        x / torch.full((3, 8, 8), 255.0)
    ),
}


@pytest.mark.parametrize(("said", "loop"), LOOPS.items())
def test_the_loop_may_do_the_same_to_all_batches(said: str, loop: Callable[[Any], Any]) -> None:
    guard = LoopGuard()
    assert guard.describe() == ""
    for count in (4, 4, 3):
        assert guard.check(loop(images(count))) is None
        assert guard.describe() == f"{said} under None"
    assert describe_operations(loop(images()).operations) == said
    for other, change in LOOPS.items():
        if other != said:
            with pytest.raises(RuntimeError) as told:
                guard.check(change(images()))
            assert "the loop must do the same to the images of every batch while layers" in str(told.value)
            assert f"wanted {said}, got {other}; move what changes into the dataset or the model" in str(told.value)


def test_constants_are_compared_by_value() -> None:
    guard = LoopGuard()
    mean = MEAN.clone()
    assert guard.check(normalised(images(), mean)) is None
    assert guard.check(normalised(images(), mean.clone())) is None
    for other in (mean + 0.1, mean.double(), mean.flatten()[:1].view(1, 1, 1)):
        with pytest.raises(RuntimeError, match=r"wanted sub\(\[0.5, 0.5, 0.5\]\).*, got sub\("):
            guard.check(normalised(images(), other))
    mean.add_(1)  # the same tensor with another value
    with pytest.raises(RuntimeError, match=r"wanted sub\(\[0.5, 0.5, 0.5\]\).*, got sub\(\[1.5, 1.5, 1.5\]\)"):
        guard.check(normalised(images(), mean))
    mean.sub_(1)
    assert guard.check(normalised(images(), mean)) is None


def test_the_order_of_operations_counts() -> None:
    guard = LoopGuard()
    guard.check(images() * 2 + 1)
    with pytest.raises(RuntimeError, match=r"wanted mul\(2\), then add\(1\), got add\(1\), then mul\(2\)"):
        guard.check((images() + 1) * 2)


def test_images_that_ask_for_gradients_are_refused() -> None:
    with pytest.raises(RuntimeError, match="images must not require gradients while layers are dropped"):
        LoopGuard().check(images().requires_grad_())


def test_another_autocast_asks_for_other_rows() -> None:
    guard = LoopGuard()
    assert guard.check(images()) is None
    with torch.autocast("cpu", torch.bfloat16):
        wanted = "computed under no autocast, and the loop now trains under autocast of torch.bfloat16"
        assert wanted in guard.check(images())
        assert guard.check(images()) is None
        assert guard.describe() == "nothing under torch.bfloat16"
    assert "computed under autocast of torch.bfloat16, and the loop now trains under no autocast" in guard.check(
        images()
    )
    assert guard.check(images()) is None


def test_a_loop_that_resumes_is_compared_with_the_one_before() -> None:
    before = LoopGuard()
    before.check(normalised(images()))
    same, other = LoopGuard(), LoopGuard()
    for guard in (same, other):
        guard.resume(before.describe())
        assert guard.describe() == before.describe()
    assert same.check(normalised(images())) is None
    reason = other.check(images())
    assert reason == f"the loop did {before.describe()} to images when they were, and does nothing under None"
    assert other.check(images()) is None
    other.forget()
    assert other.check(normalised(images())) is None
