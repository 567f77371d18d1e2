from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from made_networks import Net, abc, assert_equal_in_both_modes, conv
from torch import Tensor, nn

from learndrop_ext.app.models import build_model
from learndrop_ext.graph.chain import split_layers


def functional_dropout(net: Any, x: Tensor) -> Tensor:
    x = F.relu(net.a(x))
    x = F.dropout(x, 0.5, net.training)
    x = F.relu(net.b(x))
    return net.c(F.dropout2d(x, 0.5, training=net.training))


def dropout_in_training_only(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    if net.training:
        x = F.dropout(x, 0.5)
    return net.c(net.b(x))


def another_scale_by_mode(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    x = net.b(x) * 2 if net.training else net.b(x) * 3
    return net.c(x)


def extra_weights_in_training(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    if net.training:
        x = x + net.b(x)
    return net.c(x)


def long_skip(net: Any, x: Tensor) -> Tensor:
    a = net.a(x)
    return net.d(net.c(net.b(a)) + a)


def concatenation(net: Any, x: Tensor) -> Tensor:
    a = net.a(x)
    return net.c(torch.cat([a, net.b(a)], 1))


def pre_activation(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    x = x + net.b(F.relu(net.norm_b(x)))
    x = x + net.c(F.relu(net.norm_c(x)))
    return net.d(F.relu(x))


def called_twice(net: Any, x: Tensor) -> Tensor:
    return net.d(net.b(net.c(net.b(net.a(x)))))


def chain_of_four(net: Any, x: Tensor) -> Tensor:
    return net.d(net.c(net.b(net.a(x))))


def in_place_after_a_cut(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    x.mul_(net.b.weight.sum())
    return net.c(x)


def rows_folded_into_the_batch(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    x = net.d(net.b(x.reshape(-1, 1, 8, 8))).reshape(-1, 3, 8, 8)
    return net.c(x)


def rows_as_long_as_the_batch(net: Any, x: Tensor) -> Tensor:
    x = net.a(x).flatten(1)
    x = net.d(net.b((x @ x.T)[:, None]))
    return net.c(x.mean(2))


def batch_size_read_late(net: Any, x: Tensor) -> Tensor:
    x = net.b(net.a(x))
    return net.c(x.view(x.size(0), -1))


def batch_size_read_early(net: Any, x: Tensor) -> Tensor:
    b = x.size(0)
    x = net.b(net.a(x))
    return net.c(x.view(b, -1))


def sizes_of_the_input(net: Any, x: Tensor) -> Tensor:
    size = x.shape[-2:]
    x = net.b(F.max_pool2d(net.a(x), 2))
    return F.interpolate(net.c(x), size=size)


def product_of_sizes(net: Any, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    x = net.b(net.a(x).view(b * c, h * w).view(b, c, h, w))
    return net.c(x.reshape(x.shape[0], x.shape[1], -1).reshape(b, c, h, w))


def same_shapes(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    assert x.shape == y.shape
    assert len(y.shape) == y.dim() == 4
    return net.c(net.b(y))


def view_written_in_place(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    y = x.view(x.size(0), 3, 64)
    y.add_(1)
    return net.c(net.b(y.view(-1, 3, 8, 8)))


def tied() -> dict[str, nn.Module]:
    parts = abc(d=conv())
    parts["c"].weight = parts["a"].weight
    return parts


HANDLED: list[tuple[Callable[[Any, Tensor], Any], Callable[[], dict[str, nn.Module]], tuple[str, ...]]] = [
    (functional_dropout, abc, ("a", "b", "c")),
    (dropout_in_training_only, abc, ("a", "b", "c")),
    # Both modes have a product there: the cut behind it is shared.
    (another_scale_by_mode, abc, ("a", "b", "c")),
    # b is used in train mode only: the two modes share no cut between it and c.
    (extra_weights_in_training, abc, ("a", "b")),
    (long_skip, lambda: abc(d=conv()), ("a", "b", "d")),
    (concatenation, lambda: abc(c=conv(6)), ("a", "b", "c")),
    (
        pre_activation,
        lambda: abc(norm_b=nn.BatchNorm2d(3), norm_c=nn.BatchNorm2d(3), d=conv()),
        ("a", "b", "c", "d"),
    ),
    (called_twice, lambda: abc(d=conv()), ("a", "b", "d")),
    (chain_of_four, tied, ("a", "d")),
    (in_place_after_a_cut, abc, ("a", "c")),
    (rows_folded_into_the_batch, lambda: abc(b=conv(1, 1), d=conv(1, 1)), ("a", "b", "c")),
    (
        rows_as_long_as_the_batch,
        lambda: abc(b=nn.Conv1d(1, 1, 1), c=nn.Linear(1, 2), d=nn.Conv1d(1, 1, 1)),
        ("a", "b", "c"),
    ),
    (batch_size_read_late, lambda: abc(c=nn.Linear(192, 5)), ("a", "b", "c")),
    (batch_size_read_early, lambda: abc(c=nn.Linear(192, 5)), ("a", "b", "c")),
    (sizes_of_the_input, abc, ("a", "b", "c")),
    (product_of_sizes, abc, ("a", "b", "c")),
    (same_shapes, abc, ("a", "b", "c")),
    (view_written_in_place, abc, ("a", "b", "c")),
]


@pytest.mark.parametrize(("forward", "parts", "names"), HANDLED, ids=[case[0].__name__ for case in HANDLED])
def test_split_layers_handles(
    forward: Callable[[Any, Tensor], Any], parts: Callable[[], dict[str, nn.Module]], names: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    model = Net(forward, **parts())
    x = torch.rand(3, 3, 8, 8)
    chain = split_layers(model, x)
    assert chain.names == names
    assert_equal_in_both_modes(model, chain, x)


def test_split_layers_keeps_equal_bits_through_batch_norm_dropout_and_in_place_activations() -> None:
    for name in ("vgg11", "resnet18"):
        model = build_model(name, num_classes=5, stem="imagenet", width=4, seed=0)
        x = torch.randn(3, 3, 32, 32)
        assert_equal_in_both_modes(model, split_layers(model, x), x)


@pytest.mark.parametrize("forward", [functional_dropout, dropout_in_training_only])
def test_split_layers_leaves_dropout_to_the_layer_after_it(forward: Callable[[Any, Tensor], Tensor]) -> None:
    model = Net(forward, **abc())
    x = torch.rand(2, 3, 8, 8)
    chain = split_layers(model, x).train()
    assert torch.equal(chain.prefix(1)(x), chain.prefix(1)(x))
    assert not torch.equal(chain(x), chain(x))


def test_split_layers_leaves_dropout_modules_to_the_layer_after_them() -> None:
    model = nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Dropout(), nn.MaxPool2d(2), conv(), nn.Dropout2d())
    x = torch.rand(2, 3, 8, 8)
    chain = split_layers(model, x)
    assert chain.names == ("0", "4")
    # The pool stands behind the dropout, so it goes with the second layer too.
    assert chain.layer(0).shape == (3, 8, 8)
    chain.train()
    assert torch.equal(chain.prefix(1)(x), chain.prefix(1)(x))
    assert not torch.equal(chain(x), chain(x))


def test_split_layers_numbers_layers_of_one_name() -> None:
    twice = Net(lambda net, x: net.b(F.relu(x * net.a.weight.mean()) * net.a.bias.mean()), a=conv(), b=conv())
    assert split_layers(twice, torch.rand(2, 3, 8, 8)).names == ("a", "a#2", "b")


def test_split_layers_takes_images_in_bytes() -> None:
    model = Net(lambda net, x: net.c(net.b(net.a(x.float() / 255))), **abc())
    x = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    chain = split_layers(model, x)
    assert chain.names == ("a", "b", "c")
    assert_equal_in_both_modes(model, chain, x)


def test_split_layers_takes_an_example_of_one_sample() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert split_layers(model, torch.rand(1, 4)).names == ("1", "3")


class Optional(nn.Module):
    """One required input, two that may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 2.0) -> Tensor:
        x = self.a(x)
        if mask is not None:
            x = x * mask
        return self.b(x) * scale


def test_split_layers_leaves_optional_arguments_at_their_defaults() -> None:
    model = Optional()
    x = torch.rand(2, 3, 8, 8)
    chain = split_layers(model, x)
    assert chain.names == ("a", "b")
    assert_equal_in_both_modes(model, chain, x)


def test_chain_refuses_images_of_another_size_where_the_forward_reads_sizes() -> None:
    torch.manual_seed(0)
    model = Net(sizes_of_the_input, **abc())
    chain = split_layers(model, torch.rand(2, 3, 8, 8))
    assert chain(torch.rand(5, 3, 8, 8)).shape == (5, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"input of layer a must be \[B, 3, 8, 8\] as in the example, .*got \[2, 3, 6, 6\]"
    ):
        chain(torch.rand(2, 3, 6, 6))
    free = split_layers(Net(batch_size_read_early, **abc(c=nn.Linear(192, 5))), torch.rand(2, 3, 8, 8))
    assert free.prefix(1)(torch.rand(2, 3, 6, 6)).shape == (2, 3, 6, 6)


def test_rows_survive_a_layer_that_writes_into_its_input_through_a_view() -> None:
    torch.manual_seed(0)
    chain = split_layers(Net(view_written_in_place, **abc()), torch.rand(2, 3, 8, 8)).eval()
    for k in range(1, 3):
        rows = chain.prefix(k)(torch.rand(2, 3, 8, 8)).detach()
        before = rows.clone()
        chain.suffix(k)(rows)
        assert torch.equal(rows, before)


class Branching(nn.Module):
    """Control flow on values: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.isfinite().all() else x


def test_split_layers_keeps_named_layers_whole_and_starts_layers_with_them_only() -> None:
    model = nn.Sequential(OrderedDict(a=conv(), b=Branching(), c=conv(), d=conv()))
    x = torch.rand(2, 3, 8, 8)
    assert split_layers(model, x).names == ("a", "b", "c", "d")
    chain = split_layers(model, x, layers=["a", "b", "d"])
    assert chain.names == ("a", "b", "d")
    assert {id(p) for p in chain.layer(1).parameters()} == {id(p) for m in (model.b, model.c) for p in m.parameters()}
    assert_equal_in_both_modes(model, chain, x)


def test_split_layers_takes_modules_without_weights_as_layers() -> None:
    model = nn.Sequential(OrderedDict(a=conv(), first=nn.ReLU(), b=conv(), second=nn.ReLU(), c=conv()))
    x = torch.rand(2, 3, 8, 8)
    chain = split_layers(model, x, layers=["first", "second"])
    assert len(chain) == 2
    assert {id(p) for p in chain.layer(0).parameters()} == {
        id(p) for p in (*model.a.parameters(), *model.b.parameters())
    }
