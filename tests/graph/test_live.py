from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from three_layers import add, copied, frozen, images, network, split
from torch import Tensor, nn

from learndrop_ext.graph.chain import split_layers
from learndrop_ext.graph.freeze import FrozenPrefix
from learndrop_ext.graph.live import FULLY_COMPARED, LiveModel, live_body


class SharedDropout(nn.Module):
    """One dropout module for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c(self.dropout(self.b(self.dropout(self.a(x))))))


def test_live_body_runs_frozen_layers_in_eval_mode_even_where_the_suffix_shares_their_dropout() -> None:
    model = SharedDropout()
    x = torch.rand(3, 6)
    chain = split_layers(model, x)
    assert chain.names == ("a", "b", "c")
    FrozenPrefix(model, chain, 2, torch.optim.SGD(model.parameters(), lr=0.1))
    wanted = model.b(model.a(x))
    seen: list[Tensor] = []
    model.b.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.dropout.p = 1.0
    rest = live_body(model, chain, 0, 2, None).train()
    # The dropouts before and behind c take all, that before b nothing.
    assert torch.equal(rest(x), torch.zeros(3, 6))
    assert torch.equal(seen[0], wanted)
    assert model.dropout.training


def test_live_body_is_the_model_then_the_suffix() -> None:
    model = network().eval()
    chain = split(model)
    x = images()
    wanted = model(x)
    assert live_body(model, chain, 0, 0, None) is model
    for cut in (0, 1, 2):
        body = live_body(model, chain, cut, 2, None).eval()
        assert torch.equal(body(chain.prefix(cut)(x)), wanted)


def test_live_body_runs_what_is_frozen_without_gradients() -> None:
    model = network()
    chain = split(model)
    FrozenPrefix(model, chain, 2, torch.optim.SGD(model.parameters(), lr=0.1))
    statistics = copied(model.state_dict())
    body = live_body(model, chain, 1, 2, None).train()
    body(torch.randn(4, 4, 8, 8)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["7.weight", "7.bias"]
    torch.testing.assert_close(dict(model.state_dict()), dict(statistics), rtol=0, atol=0)


def test_live_body_wraps_what_is_trained() -> None:
    model = network()
    chain = split(model)
    wrapped: list[nn.Module] = []

    def wrap(module: nn.Module) -> nn.Module:
        wrapped.append(module)
        return nn.Sequential(module)

    assert isinstance(live_body(model, chain, 0, 0, wrap), nn.Sequential)
    live_body(model, chain, 1, 2, wrap)
    assert wrapped[0] is model
    # DistributedDataParallel must not see a parameter that gets no gradient.
    assert list(map(id, wrapped[1].parameters())) == list(map(id, model[7].parameters()))


def test_live_body_refuses_a_wrap_that_gives_no_module() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"DropScheduler: wrap must return a torch.nn.Module, got function"):
        live_body(model, split(model), 0, 1, lambda module: lambda x: x)  # type: ignore[arg-type,return-value]


def test_live_model_refuses_images_where_rows_are_wanted() -> None:
    live = LiveModel(nn.Flatten(), nn.Identity(), "x")
    live.row_shape = (4, 8, 8)
    assert live(torch.zeros(2, 4, 8, 8)).shape == (2, 256)
    with pytest.raises(
        ValueError, match=r"drop.model: x must be cached rows \[B, 4, 8, 8\] .*, got \[2, 3, 8, 8\]; to"
    ):
        live(images(2))


# autocast of the call, what a fill has to repeat
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_live_model_notes_the_autocast_of_training(dtype: torch.dtype | None) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        live(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live.eval()(images())
    assert live.autocast == dtype
    assert live.calls == 1


OWN = images(4)

# what the training step gives to the model, what is said of it
GIVEN = [
    (OWN, None),
    (OWN[:2], None),
    (OWN[2:], None),
    (OWN.contiguous(memory_format=torch.channels_last), None),
    (OWN.half(), None),
    (OWN.clone()[:3], None),
    (OWN.flip(0), "[4, 3, 8, 8]"),
    (OWN + 0.5, "[4, 3, 8, 8]"),
    (OWN + 1e-3, "[4, 3, 8, 8]"),
    (torch.cat([OWN, OWN]), "[8, 3, 8, 8]"),
    (OWN[:, :, ::2], "[4, 3, 4, 8]"),
    (OWN.flatten(1), "[4, 192]"),
]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("given", "foreign"), GIVEN)
def test_live_model_notes_inputs_that_are_not_the_batchs_own(given: Tensor, foreign: str | None, later: bool) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    for _ in range(2 * FULLY_COMPARED if later else 0):
        live.expect(OWN)
        live(OWN.clone())
    live.expect(OWN)
    # A second call in the step is looked at as the first is.
    live(OWN)
    live(given)
    assert live.take_foreign() == foreign
    assert live.take_foreign() is None


@pytest.mark.parametrize(
    "call", [lambda x: x.sub_(1), lambda x: x[1].copy_(x[1].flip(-1)), lambda x: x[0, :, :2].zero_()]
)
def test_live_model_notes_a_batch_that_is_changed_in_place(call: Callable[[Tensor], Any]) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    x = images(4)
    live.expect(x)
    live(x)
    call(x)
    live(x)
    assert live.take_foreign() == "one that was changed in place"


def test_live_model_looks_at_one_sample_of_later_batches_another_each_time() -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    changed = OWN.clone()
    changed[2] += 1
    for _ in range(FULLY_COMPARED):
        live.expect(OWN)
        live(OWN.clone())
    seen = []
    for _ in range(8):
        live.expect(OWN)
        live(changed)
        seen.append(live.take_foreign() is not None)
    assert seen == [False, False, True, False, False, False, True, False]


def test_live_model_does_not_look_where_it_was_told_not_to() -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    live.check_input = False
    live.expect(OWN)
    live(OWN + 1)
    assert live.take_foreign() is None


def test_live_model_refuses_a_call_with_frozen_weights_that_have_changed() -> None:
    model = network()
    live = LiveModel(nn.Identity(), nn.Identity(), "x")
    live.frozen = frozen(model, 2)
    live(OWN)
    add(model)
    with pytest.raises(RuntimeError, match=r"of the dropped layers must stay .* those of 3 have changed"):
        live(OWN)


@pytest.mark.parametrize(
    ("args", "kwargs", "got"),
    [
        ((), {}, r"got \(\)"),
        ((OWN, OWN), {}, r"got \(Tensor, Tensor\)"),
        ((OWN,), {"labels": OWN}, r"got \(Tensor, labels=Tensor\)"),
        ((), {"image": OWN}, r"got \(image=Tensor\)"),
        (({"x": OWN},), {}, r"got \(dict\)"),
    ],
)
def test_live_model_refuses_anything_but_one_tensor(args: Any, kwargs: Any, got: str) -> None:
    live = LiveModel(nn.Identity(), nn.Identity(), "pixels")
    assert live(OWN) is live(pixels=OWN) is OWN
    with pytest.raises(TypeError, match=f"drop.model: wanted one tensor, pixels, .* {got}"):
        live(*args, **kwargs)
