"""Deltas: what a measurement says of each layer, what it follows, and what a resumed run keeps."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import pytest
import torch
from torch import nn

from learndrop_ext.decide.deltas import Deltas, LayerChange, layer_change


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False), nn.Linear(6, 5))
    return net.to(memory_format=torch.channels_last)


def layers_of(net: nn.Sequential) -> list[list[nn.Parameter]]:
    return [[*net[0].parameters(), *net[1].parameters()], list(net[2].parameters()), list(net[3].parameters())]


def move(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 10


def test_measure_gives_norms_and_the_cosine_of_successive_deltas() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    deltas = Deltas([[w]])
    assert deltas.measure() == (LayerChange(0.0, 0.0, 0.0, 7.0, 5.0, 0, 0.0, None),)
    expected = [
        ([3.0, 8.0], LayerChange(4.0, 4.0, 4.0, 11.0, math.sqrt(73), 0, 4 / math.sqrt(73), None)),
        ([6.0, 8.0], LayerChange(3.0, 3.0, 3.0, 14.0, 10.0, 0, 0.3, 0.0)),
        ([8.0, 8.0], LayerChange(2.0, 2.0, 2.0, 16.0, math.sqrt(128), 0, 2 / math.sqrt(128), 1.0)),
        ([8.0, 8.0], LayerChange(0.0, 0.0, 0.0, 16.0, math.sqrt(128), 0, 0.0, None)),
        ([0.0, 0.0], LayerChange(16.0, math.sqrt(128), 8.0, 0.0, 0.0, 0, 0.0, None)),
        ([3.0, 4.0], LayerChange(7.0, 5.0, 4.0, 7.0, 5.0, 0, 1.0, -56 / (5.0 * math.sqrt(128)))),
    ]
    for values, change in expected:
        w.data.copy_(torch.tensor(values))
        (measured,) = deltas.measure()
        assert measured == change


def test_measure_without_refresh_keeps_the_anchor() -> None:
    w = nn.Parameter(torch.zeros(2))
    deltas = Deltas([[w]])
    for total in (1.0, 2.0, 3.0):
        w.data += 1
        assert deltas.measure(refresh=False)[0].maximum == total


def test_measure_without_persistence_has_no_cosine() -> None:
    w = nn.Parameter(torch.zeros(2))
    deltas = Deltas([[w]], persistence=False)
    for _ in range(2):
        w.data += 1
        assert deltas.measure()[0] == LayerChange(2.0, math.sqrt(2), 1.0, *measured_w(w), None)


def measured_w(w: nn.Parameter) -> tuple[float, float, int, float]:
    l1, l2 = w.abs().sum().item(), math.sqrt(w.double().square().sum().item())
    return l1, l2, 0, math.sqrt(2) / l2


def test_measure_counts_nonfinite_values_and_gives_no_cosine() -> None:
    one, two = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    deltas = Deltas([[one], [two]])
    for _ in range(2):
        one.data += 1
        two.data += torch.tensor([1.0, math.nan, math.inf])
        good, bad = deltas.measure()
    assert (good.nonfinite, good.cosine) == (0, 1.0)
    assert (bad.nonfinite, bad.cosine) == (2, None)
    assert math.isnan(bad.maximum)
    assert math.isnan(bad.relative)


def test_layer_change_holds_the_cosine_to_its_range() -> None:
    assert layer_change([1, 1, 1, 1, 1, 0, 1 + 1e-15, 1]).cosine == 1
    assert layer_change([1, 1, 1, 1, 1, 0, -1 - 1e-15, 1]).cosine == -1
    # Squares at both ends of the range of a double: their product is 0 or infinite, the cosine is not.
    assert layer_change([1, 1e-200, 1, 1, 1, 0, 1e-200, 1e-200]).cosine == pytest.approx(1)
    assert layer_change([1, 1e200, 1, 1, 1, 0, 1e200, 1e200]).cosine == pytest.approx(1)


def test_measure_follows_parameters_that_were_assigned_anew() -> None:
    net = network()
    deltas = Deltas(layers_of(net), model=net)
    state = {name: value.clone() + 1 for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    assert [change.maximum for change in deltas.measure()] == pytest.approx([1.0] * 3, abs=1e-6)
    net[3].weight = nn.Parameter(net[3].weight.detach() + 2)
    assert [change.maximum for change in deltas.measure()] == pytest.approx([0.0, 0.0, 2.0], abs=1e-6)


def test_measure_follows_memory_that_moved() -> None:
    net = network()
    deltas = Deltas(layers_of(net))
    for parameter in net.parameters():
        parameter.data = parameter.data + 1
    assert [change.maximum for change in deltas.measure()] == pytest.approx([1.0] * 3, abs=1e-6)


def test_measure_of_a_compiled_network() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    compiled = torch.compile(net, backend="eager")
    deltas = Deltas([list(compiled.parameters())[:2], list(compiled.parameters())[2:]], model=compiled)
    for parameter in net[2].parameters():
        parameter.requires_grad_(False)
    before = net[0].weight.detach().clone()
    compiled(torch.ones(5, 3)).square().sum().backward()
    torch.optim.SGD(net[0].parameters(), lr=0.5).step()
    first, last = deltas.measure()
    moved = (net[0].weight - before).abs().max().item()
    assert moved > 0
    assert first.maximum >= moved
    assert last.l2 == 0


def test_drop_first_keeps_the_anchors_of_the_rest() -> None:
    nets, results = [network(), network()], []
    for k, net in enumerate(nets):
        deltas = Deltas(layers_of(net), model=net)
        for i in range(4):
            if i == 2:
                deltas.drop_first(k)
            move(net, i)
            changes = deltas.measure()
        results.append((len(deltas), changes))
    assert [length for length, _ in results] == [3, 2]
    assert results[1][1] == results[0][1][1:]


def test_drop_first_hands_a_shared_parameter_to_the_layer_that_stays() -> None:
    w = nn.Parameter(torch.zeros(2))
    deltas = Deltas([[w], [w]])
    w.data += 1
    deltas.drop_first(1)
    assert deltas.measure()[0].l1 == 2


@pytest.mark.parametrize("k", [-1, 4])
def test_drop_first_refuses_a_number_of_layers_that_are_not_there(k: int) -> None:
    with pytest.raises(ValueError, match=f"drop_first: k must be from 0 to 3, got {k}"):
        Deltas(layers_of(network())).drop_first(k)


def test_drop_first_of_all_layers_leaves_nothing_to_measure() -> None:
    deltas = Deltas(layers_of(network()))
    deltas.drop_first(3)
    assert deltas.measure() == ()


@pytest.mark.parametrize("persistence", [False, True])
def test_state_dict_resumes_to_the_bit(persistence: bool) -> None:
    net = network()
    net[3].weight = nn.Parameter(net[3].weight.double())
    deltas = Deltas(layers_of(net), persistence=persistence)
    for i in range(3):
        move(net, i)
        deltas.measure()
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "deltas": deltas.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    resumed = network()
    resumed[3].weight = nn.Parameter(resumed[3].weight.double())
    other = Deltas(layers_of(resumed), persistence=persistence)
    resumed.load_state_dict(saved["net"])
    other.load_state_dict(saved["deltas"])
    for i in range(3, 6):
        move(net, i)
        move(resumed, i)
        assert other.measure() == deltas.measure()


def test_state_dict_is_a_copy_and_holds_a_shared_parameter_once() -> None:
    w, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(0))
    deltas = Deltas([[w, other], [w]])
    state = deltas.state_dict()
    w.data += 1
    deltas.measure()
    assert {key: len(values) for key, values in state["anchors"].items()} == {"0.0": 2, "0.1": 2}
    assert state["layers"] == [2, 1]
    assert not state["anchors"]["0.0"][0].any()
    deltas.load_state_dict(state)
    assert deltas.measure()[0].maximum == 1


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != key}


def test_load_state_dict_refuses_another_state_and_changes_nothing() -> None:
    net = network()
    deltas = Deltas(layers_of(net))
    good = deltas.state_dict()
    anchors = good["anchors"]
    six, two = "'[6, 4, 3, 3] torch.float32'", "'[2] torch.float32'"
    bad = [
        (
            without(good, "anchors"),
            "anchors[0.0]=['[4, 3, 3, 3] torch.float32', '[4, 3, 3, 3] torch.float32'], got None",
        ),
        (good | {"persistence": False}, "persistence=True, got False"),
        (good | {"layers": [4, 1]}, "layers=[4, 1, 2], got [4, 1]"),
        (good | {"anchors": without(anchors, "1.0")}, f"anchors[1.0]=[{six}, {six}], got None"),
        (good | {"anchors": anchors | {"7.0": [torch.zeros(2)]}}, f"anchors[7.0]=None, got [{two}]"),
        (good | {"anchors": anchors | {"1.0": anchors["1.0"][:1]}}, f"anchors[1.0]=[{six}, {six}], got [{six}]"),
        (
            good | {"anchors": anchors | {"1.0": [torch.zeros(2)] * 2}},
            f"anchors[1.0]=[{six}, {six}], got [{two}, {two}]",
        ),
        (
            good | {"anchors": anchors | {"1.0": [value.double() for value in anchors["1.0"]]}},
            f"anchors[1.0]=[{six}, {six}], got ['[6, 4, 3, 3] torch.float64', '[6, 4, 3, 3] torch.float64']",
        ),
    ]
    for state, message in bad:
        changed = copy.deepcopy(state)
        if "0.0" in changed.get("anchors", {}):
            changed["anchors"]["0.0"][0] += 1
        with pytest.raises(ValueError, match=re.escape(f"load_state_dict: state must have {message}")):
            deltas.load_state_dict(changed)
    assert [change.maximum for change in deltas.measure()] == [0.0, 0.0, 0.0]


def test_deltas_refuse_a_parameter_that_the_model_does_not_hold() -> None:
    net = network()
    with pytest.raises(ValueError, match=r"Deltas: layers\[0\]\[1\] must be a parameter of the model, got .* \[2\]"):
        Deltas([[net[0].weight, nn.Parameter(torch.zeros(2))]], model=net)


def test_measure_refuses_a_parameter_that_its_module_lost() -> None:
    net = network()
    deltas = Deltas(layers_of(net), model=net)
    del net[2].weight
    with pytest.raises(RuntimeError, match=r"layers\[1\]\[0\] must stay a parameter .* got a module without 'weight'"):
        deltas.measure()


@pytest.mark.cuda
def test_measure_follows_parameters_to_a_gpu_and_back() -> None:
    net = network()
    deltas = Deltas(layers_of(net))
    for device in ("cuda", "cpu", "cuda"):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 1
        net.to(device)
        assert [change.maximum for change in deltas.measure()] == pytest.approx([1.0] * 3, abs=1e-6)
