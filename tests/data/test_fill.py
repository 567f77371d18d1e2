from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.data.fill import Stages, check_purity, frozen_pass, rounding, rows_agree
from learndrop_ext.graph.chain import Chain, split_layers

CPU = torch.device("cpu")


def network() -> nn.Sequential:
    """Three layers, starting at 0, 3 and 6."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 2, 3, padding=1),
        nn.BatchNorm2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def split(model: nn.Module) -> Chain:
    return split_layers(model, torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize("training", [True, False])
def test_frozen_pass_is_eval_without_gradients(training: bool) -> None:
    model = network().train(training)
    segment = split(model).prefix(2)
    before = model[1].running_mean.clone()
    with frozen_pass(segment, None, CPU):
        rows = segment(torch.rand(3, 3, 4, 4))
    assert not rows.requires_grad
    assert torch.equal(model[1].running_mean, before)
    assert all(m.training is training for m in model)
    with pytest.raises(RuntimeError), frozen_pass(segment, None, CPU):
        segment(torch.rand(3, 9, 4, 4))
    assert all(m.training is training for m in model)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_frozen_pass_has_the_autocast_of_the_training_step(dtype: torch.dtype | None) -> None:
    segment = split(network()).prefix(1)
    # An autocast around it does not count.
    with torch.autocast("cpu", dtype=torch.bfloat16), frozen_pass(segment, dtype, CPU):
        rows = segment.layers[0].train_graph.model.get_submodule("0")(torch.rand(3, 3, 4, 4))
    assert rows.dtype == (dtype or torch.float32)


class AlwaysDropout(nn.Module):
    """Dropout that forgets to ask for self.training."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class OverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Kept(nn.Module):
    """Holds a module whole: `layers=` stops the tracer there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 3, 3, padding=1)


def named(**parts: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


IMPURE: list[tuple[str, Callable[[], nn.Module], tuple[str, ...] | None, str]] = [
    (
        "batch norm on batch statistics",
        lambda: named(a=conv(), norm=nn.BatchNorm2d(3, track_running_stats=False), b=conv()),
        None,
        r"those of norm \(BatchNorm2d\) change",
    ),
    (
        "functional dropout always on",
        lambda: named(a=conv(), noise=AlwaysDropout(), b=conv(), c=conv()),
        None,
        r"those of noise \(AlwaysDropout\) change",
    ),
    (
        "a whole module with dropout always on",
        lambda: named(a=conv(), noise=Kept(AlwaysDropout()), b=conv()),
        ("a", "noise", "b"),
        r"those of noise.inner \(AlwaysDropout\) change",
    ),
    (
        "a mean over the batch",
        lambda: named(a=conv(), centre=OverTheBatch(), b=conv()),
        None,
        r"those of centre \(OverTheBatch\) change",
    ),
]


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize(("build", "layers", "message"), [c[1:] for c in IMPURE], ids=[c[0] for c in IMPURE])
def test_check_purity_names_the_guilty_module(
    build: Callable[[], nn.Module], layers: tuple[str, ...] | None, message: str, count: int
) -> None:
    torch.manual_seed(0)
    model = build()
    chain = split_layers(model, torch.rand(2, 3, 4, 4), layers=layers)
    flags = [m.training for m in model.modules()]
    with pytest.raises(
        ValueError, match=f"DropScheduler: .*{message} .* in eval mode too; drop only the layers before"
    ):
        check_purity(chain.prefix(len(chain) - 1), torch.rand(count, 3, 4, 4), model, None)
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_check_purity_passes_the_layers_before_the_guilty_one() -> None:
    model = named(a=conv(), b=conv(), noise=AlwaysDropout(), c=conv())
    chain = split_layers(model, torch.rand(2, 3, 4, 4))
    check_purity(chain.prefix(2), torch.rand(4, 3, 4, 4), model, None)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_check_purity_passes_clean_layers(count: int, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = named(
        a=conv(),
        norm=nn.BatchNorm2d(3),
        drop=nn.Dropout(),
        b=conv(),
        group=nn.GroupNorm(3, 3),
        act=nn.RReLU(inplace=True),
        c=conv(),
        instance=nn.InstanceNorm2d(3),
        d=conv(),
    )
    chain = split_layers(model, torch.rand(2, 3, 4, 4))
    x = torch.rand(count, 3, 4, 4)
    noise = torch.get_rng_state()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    check_purity(chain.prefix(3), x, model, autocast)
    assert torch.equal(torch.get_rng_state(), noise)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_stages_run_the_segments_from_any_of_them_on(autocast: torch.dtype | None) -> None:
    model = network()
    chain = split(model)
    x = torch.rand(5, 3, 4, 4)
    stages = Stages(CacheConfig(codec="fp32"), CPU)
    stages.segments = [chain.segment(0, 1), chain.segment(1, 2)]
    stages.autocast = autocast
    model.train()
    statistics = model[1].running_mean.clone()
    got = stages.run(x, 0)
    with frozen_pass(chain.prefix(2), autocast, CPU):
        first = chain.prefix(1)(x)
        wanted = chain.segment(1, 2)(first)
    assert torch.equal(got, wanted)
    assert torch.equal(stages.run(first, 1), wanted)
    assert torch.equal(model[1].running_mean, statistics)
    assert all(m.training for m in model)


def test_stages_store_rows_between_two_drops_as_the_first_drop_did() -> None:
    chain = split(network())
    x = torch.rand(5, 3, 4, 4)
    stages = Stages(CacheConfig(codec="uint8"), CPU)
    stages.segments = [chain.segment(0, 1), chain.segment(1, 2)]
    with frozen_pass(chain.prefix(2), None, CPU):
        exact = chain.prefix(1)(x)
        rounded = stages._as_stored(exact)
        wanted = chain.segment(1, 2)(rounded)
    assert not torch.equal(rounded, exact)
    assert torch.equal(stages.run(x, 0), wanted)


ONES = torch.ones(4, 3)
# rows, the same rows again, autocast, a further error, whether they agree
AGREE = [
    (ONES, ONES, None, 0.0, True),
    (ONES, ONES * 1.0005, None, 0.0, True),
    (ONES, ONES * 1.002, None, 0.0, False),
    (ONES, ONES * 1.002, None, 0.002, True),
    (ONES, ONES * 1.01, torch.bfloat16, 0.0, True),
    (ONES.half(), ONES.half() * 1.01, None, 0.0, True),
    (ONES, ONES * 1.03, torch.bfloat16, 0.0, False),
    (ONES, ONES[:, :2], None, 0.0, False),
    (ONES * float("nan"), ONES * float("nan"), None, 0.0, True),
    (ONES * float("inf"), ONES * float("inf"), None, 0.0, True),
    (ONES * float("inf"), ONES, None, 0.0, False),
    (ONES * float("nan"), ONES, None, 0.0, False),
    (ONES.long(), ONES.long(), None, 0.0, True),
    (ONES.long(), ONES.long() + 1, None, 1.0, False),
]


@pytest.mark.parametrize(("wanted", "got", "autocast", "error", "agree"), AGREE)
def test_rows_agree(wanted: Tensor, got: Tensor, autocast: torch.dtype | None, error: float, agree: bool) -> None:
    assert rows_agree(wanted, got, autocast, error=error) is agree


@pytest.mark.parametrize(
    ("dtype", "device_type", "autocast", "share"),
    [
        (torch.float32, "cpu", None, 1e-3),
        (torch.float32, "cuda", None, 2e-2),
        (torch.float64, "cuda", None, 1e-3),
        (torch.float32, "cpu", torch.bfloat16, 2e-2),
        (torch.float16, "cpu", None, 2e-2),
    ],
)
def test_rounding(dtype: torch.dtype, device_type: str, autocast: torch.dtype | None, share: float) -> None:
    assert rounding(dtype, device_type, autocast) == share
