"""Models that take more than the image: the other tensors go to the live layers, and no cut comes after their first use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from learndrop_ext.graph.call import ModelCall, arguments_of
from learndrop_ext.graph.chain import Chain, split_layers

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(4, 3, 8, 8, generator=GENERATOR)
META = torch.rand(4, 2, generator=GENERATOR)
Y = torch.randint(0, 5, (4,), generator=GENERATOR)
MASK = torch.rand(4, 5, generator=GENERATOR) < 0.5
WEIGHT = torch.rand(5, generator=GENERATOR)


class Net(nn.Module):
    """Two convolutions, which need the image alone, and a classifier, which `function` makes the output with."""

    def __init__(self, function: Callable[..., Any], wide: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.embed = nn.Linear(2, wide)
        self.fc = nn.Linear(8 + (wide if wide != 8 else 0), 5)
        self.function = function

    def features(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.conv1(x)).relu()).relu().mean((2, 3))


class Positional(Net):
    def forward(self, image: Tensor, meta: Tensor) -> Any:
        return self.function(self, image, meta)


class Labelled(Net):
    def forward(self, image: Tensor, labels: Tensor | None = None, scale: float = 1.0) -> Any:
        scores = self.fc(self.features(image)) * scale
        if labels is None:
            return {"logits": scores}
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


class Batched(Net):
    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.function(self, batch["image"], batch["meta"])


class Paired(Net):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        image, meta = pair
        return self.function(self, image, meta)


class Open(Net):
    def forward(self, image: Tensor, **more: Tensor) -> Any:
        return self.function(self, image, more["meta"]) * more["weight"]


@dataclass
class Output:
    logits: Tensor
    meta: Tensor


def added(net: Any, image: Tensor, meta: Tensor) -> Any:
    return net.fc(net.features(image) + net.embed(meta))


def prepared_first(net: Any, image: Tensor, meta: Tensor) -> Any:
    """What is made of the other input stands before the convolutions."""
    batch = meta.shape[0]
    held = net.embed(meta.float() * 2).relu()
    return net.fc(net.features(image) + held.view(batch, -1))


def passed_on(net: Any, image: Tensor, meta: Tensor) -> Any:
    return Output(net.fc(net.features(image)), meta)


def dropped_out(net: Any, image: Tensor, meta: Tensor) -> Any:
    return net.fc(F.dropout(net.features(image) + net.embed(meta), 0.5, net.training))


def unused(net: Any, image: Tensor, meta: Tensor) -> Any:
    return net.fc(net.features(image))


def masked(net: Any, image: Tensor, mask: Tensor) -> Any:
    return net.fc(net.features(image)).masked_fill(mask, -1e4)


def weighted(net: Any, image: Tensor, weight: Tensor) -> Any:
    return net.fc(net.features(image)) * weight


CASES: list[tuple[str, Net, tuple[Any, ...], dict[str, Any], tuple[Tensor, ...]]] = [
    ("positional", Positional(added), (X, META), {}, (META,)),
    ("keywords", Positional(added), (), {"meta": META, "image": X}, (META,)),
    ("prepared first", Positional(prepared_first), (X, META), {}, (META,)),
    ("passed on", Positional(passed_on), (X, META), {}, (META,)),
    ("dropout", Positional(dropped_out), (X, META), {}, (META,)),
    ("unused", Positional(unused), (X, META), {}, (META,)),
    ("mask", Positional(masked), (X, MASK), {}, (MASK,)),
    ("not per sample", Positional(weighted), (X, WEIGHT), {}, (WEIGHT,)),
    ("labels", Labelled(unused), (X,), {"labels": Y}, (Y,)),
    ("no labels", Labelled(unused), (X,), {}, ()),
    ("a constant", Labelled(unused), (X,), {"scale": 2.0}, ()),
    ("a dict", Batched(added), ({"image": X, "meta": META},), {}, (META,)),
    ("a tuple", Paired(added), ((X, META),), {}, (META,)),
    ("any keywords", Open(added), (X,), {"weight": torch.ones(()), "meta": META}, (META, torch.ones(()))),
]


@pytest.mark.parametrize(("model", "args", "kwargs", "others"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_chain_equals_a_model_with_several_inputs(
    model: Net, args: tuple[Any, ...], kwargs: dict[str, Any], others: tuple[Tensor, ...]
) -> None:
    before = copy.deepcopy(model.state_dict())
    chain = split_layers(model, X, inputs=(args, kwargs))
    assert chain.names[:2] == ("conv1", "conv2")
    assert len(chain) == 3
    assert chain.kept_whole == {}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for training in (True, False):
        model.train(training)
        chain.train(training)
        torch.manual_seed(1)
        wanted = model(*args, **kwargs)
        torch.manual_seed(1)
        got = chain(X, *others)
        torch.manual_seed(1)
        again = chain.suffix(2)(chain.prefix(2)(X), *others)
        leaves = [vars(found) if isinstance(found, Output) else found for found in (wanted, got, again)]
        torch.testing.assert_close(leaves[1], leaves[0], rtol=0, atol=0)
        if training is False:
            torch.testing.assert_close(leaves[2], leaves[0], rtol=0, atol=0)


def test_other_samples_and_another_number_of_them() -> None:
    model = Positional(prepared_first)
    chain = split_layers(model, X, inputs=((X, META), {}))
    x, meta = torch.rand(7, 3, 8, 8), torch.rand(7, 2)
    assert torch.equal(chain.eval()(x, meta), model.eval()(x, meta))


def test_no_cut_comes_after_the_first_use_of_another_input() -> None:
    class Modulated(Net):
        def forward(self, image: Tensor, meta: Tensor) -> Tensor:
            x = self.bn(self.conv1(image)).relu() * meta.sum(1)[:, None, None, None]
            return self.fc(self.conv2(x).relu().mean((2, 3)))

    model = Modulated(added)
    chain = split_layers(model, X, inputs=((X, META), {}))
    assert len(chain) == 2
    assert [chain.layer(i).others for i in range(len(chain))] == [0, 1]
    assert torch.equal(chain.eval()(X, META), model.eval()(X, META))


def test_random_draws_keep_their_order() -> None:
    def drawn_first(net: Any, image: Tensor, meta: Tensor) -> Any:
        held = F.dropout(F.relu(net.embed(meta), inplace=True), 0.5, net.training)
        return net.fc(F.dropout(net.features(image), 0.5, net.training) + held)

    model = Positional(drawn_first)
    chain = split_layers(model, X, inputs=((X, META), {}))
    assert chain.names == ("conv1", "conv2", "embed")  # what is made of meta first is in the last layer
    model.train()
    chain.train()
    torch.manual_seed(3)
    wanted = model(X, META)
    torch.manual_seed(3)
    assert torch.equal(chain(X, META), wanted)


def test_use_before_the_first_weights_leaves_no_cut() -> None:
    def at_once(net: Any, image: Tensor, meta: Tensor) -> Any:
        return net.fc(net.features(image * meta.sum()))

    with pytest.raises(ValueError, match=r"cut point, .*; Positional has none before its first use of meta"):
        split_layers(Positional(at_once), X, inputs=((X, META), {}))


def test_several_required_inputs_are_refused_by_name_unless_they_are_given() -> None:
    with pytest.raises(ValueError, match=r"one input, got 2: image, meta; say with inputs= what it is called with"):
        split_layers(Positional(added), X)


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((X,), {}, TypeError, r"inputs must be arguments of Positional.forward\(image.*got \(Tensor\): missing .*'meta'"),
    ((X, META), {"labels": Y}, TypeError, r"got \(Tensor, Tensor, labels=Tensor\): got an unexpected .*'labels'"),
    ((X.clone(), META), {}, ValueError, r"have the batch's image itself among them, once, .* got it 0 times"),
    ((X, X), {}, ValueError, r"got it 2 times in \(Tensor, Tensor\)"),
    ((X, META.numpy()), {}, TypeError, r"tensors, plain values, .* got a ndarray as meta"),
    ((X, [META, object()]), {}, TypeError, r"got a object as meta\[1\]"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), REFUSED)
def test_inputs_that_cannot_be_followed_are_refused(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        split_layers(Positional(added), X, inputs=(args, kwargs))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, r"inputs must be a function batch -> \(args, kwargs\), got 3"),
        (lambda batch: batch, r"inputs must return \(args, kwargs\), a tuple and a dict, got Tensor"),
        (lambda batch: (batch, {}), r"a tuple and a dict, got \(Tensor, dict\)"),
        (lambda batch: ((batch,), None), r"a tuple and a dict, got \(tuple, NoneType\)"),
    ],
)
def test_what_inputs_returns_is_refused_unless_it_is_arguments(inputs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        arguments_of(inputs, X)


def test_a_call_is_split_by_parameter_names() -> None:
    call = ModelCall(Labelled(unused), X, (X,), {"labels": Y})
    assert call.names == ("labels",)
    assert call.shapes == ((None,),)
    for args, kwargs in (((X, Y), {}), ((), {"labels": Y, "image": X}), ((X,), {"labels": Y, "scale": 1.0})):
        image, (labels,) = call.split(args, kwargs)
        assert image is X
        assert labels is Y
    image, (labels,) = call.first(6)
    assert torch.equal(image, X[[0, 1, 2, 3, 0, 1]])
    assert torch.equal(labels, Y[[0, 1, 2, 3, 0, 1]])
    weighing = ModelCall(Positional(weighted), X, (X, WEIGHT), {})
    assert weighing.first(2)[1][0] is WEIGHT
    assert weighing.shapes == ((5,),)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X,), {}, r"wanted labels as inputs= gives it, a int64 tensor of 1 dimensions, got None"),
        ((X, Y.float()), {}, r"wanted labels .* got a float32 tensor of 1 dimensions"),
        ((X, [Y]), {}, r"wanted the arguments that inputs= gives, image, labels, scale, in their structure"),
        ((X, Y), {"scale": 3.0}, r"wanted scale as inputs= gives it, 1.0, got 3.0; only tensors may have other values"),
        ((X, Y), {"mask": Y}, r".*got others: .*'mask'"),
    ],
)
def test_another_call_is_refused_by_name(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    call = ModelCall(Labelled(unused), X, (X,), {"labels": Y})
    with pytest.raises(TypeError, match=f"drop.model: {message}"):
        call.split(args, kwargs)


def test_layers_refuse_other_shapes_where_the_forward_reads_sizes() -> None:
    def sized(net: Any, image: Tensor, meta: Tensor) -> Any:
        return net.fc(net.features(image)) * meta.shape[1]

    chain = split_layers(Positional(sized), X, inputs=((X, META), {}))
    with pytest.raises(
        ValueError, match=r"further input 1 of layer fc must be \[B, 2\] as in the example.*got \[4, 3\]"
    ):
        chain(X, torch.rand(4, 3))
    with pytest.raises(TypeError, match=r"layer fc takes 1 inputs of the model beside its own, got 0"):
        chain(X)


def test_copies_of_the_chain_take_the_other_inputs_too() -> None:
    model = Positional(added)
    chain = split_layers(model, X, inputs=((X, META), {})).eval()
    wanted = model.eval()(X, META)
    for copied in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert isinstance(copied, Chain)
        assert copied.call is None
        assert torch.equal(copied(X, META), wanted)
