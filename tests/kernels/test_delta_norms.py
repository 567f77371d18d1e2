"""delta_norms in its three forms (plain torch, C++, Triton) against hand-written sums and against each other.

Without a GPU the Triton form runs under its interpreter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from learndrop_ext import _C, ops
from learndrop_ext.kernels import chunks, reference
from learndrop_ext.kernels.chunks import DeltaTable, build_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN, INF = math.nan, math.inf

# numpy, on which Triton's interpreter runs, warns of arithmetic that makes an infinity or NaN.
makes_nonfinite = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

Form = Callable[..., Tensor]


def triton_form() -> Form:
    triton = pytest.importorskip("triton")
    if DEVICE == "cpu" and triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 makes loop bounds from arrays as numpy no longer allows")
    from learndrop_ext.kernels import delta_norms

    return delta_norms.delta_norms


def form_named(name: str) -> tuple[Form, str, float]:
    """A form, the device it runs on, and how far its sums may be from the reference's, relative to their terms."""
    if name == "triton":
        return triton_form(), DEVICE, 8 * 2.0**-24
    return {"torch": reference.delta_norms, "cpp": ops.delta_norms}[name], "cpu", 1e-13


@pytest.fixture(params=["torch", "cpp", "triton"])
def form(request: pytest.FixtureRequest) -> tuple[Form, str, float]:
    return form_named(request.param)


def random(shape: Sequence[int] | int, dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_close(sums: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Maxima and counts exactly, the other sums to `tolerance` of the magnitudes of their terms."""
    sums, wanted = sums.cpu(), wanted.cpu()
    assert sums.shape == wanted.shape
    assert sums.dtype == torch.float64
    terms = wanted.abs()
    if wanted.shape[1] == 8:
        terms[:, 6] = (wanted[:, 1] * wanted[:, 7]).sqrt()
    assert torch.equal(sums[:, [2, 5]], wanted[:, [2, 5]])
    assert bool(((sums - wanted).abs() <= tolerance * terms).all()), (sums - wanted).abs() / terms


def step(layers: Sequence[Sequence[Tensor]], seed: int) -> None:
    """Moves every parameter in place, the same way on every device."""
    for i, layer in enumerate(layers):
        for j, tensor in enumerate(layer):
            tensor += random(tensor.shape, tensor.dtype, seed + 1000 * i + j, str(tensor.device)) / 8


def compare(
    form: tuple[Form, str, float],
    make: Callable[[str], Sequence[Sequence[Tensor]]],
    *,
    persistence: bool,
    refreshes: Sequence[bool] = (True, True),
) -> None:
    """The form against the reference over several measurements of the same layers, sums and anchors."""
    measure, device, tolerance = form
    layers, twins = make(device), make("cpu")
    table, twin = (build_table(some, persistence=persistence) for some in (layers, twins))
    for i, refresh in enumerate(refreshes):
        step(layers, i)
        step(twins, i)
        sums = measure(table, refresh=refresh)
        assert_close(sums, reference.delta_norms(twin, refresh=refresh), tolerance)
        assert table.role == twin.role
        assert torch.equal(table.anchors.cpu(), twin.anchors)
        assert not table.counters[:-1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_norms_of_two_numbers(form: tuple[Form, str, float], dtype: torch.dtype) -> None:
    measure, device, _ = form
    w = torch.tensor([1.0, -1.0], dtype=dtype, device=device)
    table = build_table([[w]])
    w.copy_(torch.tensor([3.0, -4.0]))
    row = [5.0, 13.0, 3.0, 7.0, 25.0, 0.0]
    assert measure(table, refresh=False).tolist() == [row]
    assert measure(table, refresh=True).tolist() == [row]
    assert measure(table, refresh=True).tolist() == [[0.0, 0.0, 0.0, 7.0, 25.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_norms_with_persistence_swap_the_anchors(form: tuple[Form, str, float], dtype: torch.dtype) -> None:
    measure, device, _ = form
    w = torch.tensor([1.0, -1.0], dtype=dtype, device=device)
    table = build_table([[w]], persistence=True)
    expected = [
        # w, refresh, and what the previous anchors make of it
        ([3.0, -4.0], True, [5.0, 13.0, 3.0, 7.0, 25.0, 0.0, 0.0, 0.0]),
        ([4.0, -2.0], False, [3.0, 5.0, 2.0, 6.0, 20.0, 0.0, -4.0, 13.0]),
        ([4.0, -5.0], True, [2.0, 2.0, 1.0, 9.0, 41.0, 0.0, 5.0, 13.0]),
        ([4.0, -5.0], True, [0.0, 0.0, 0.0, 9.0, 41.0, 0.0, 0.0, 2.0]),
        ([0.0, -5.0], True, [4.0, 16.0, 4.0, 5.0, 25.0, 0.0, 0.0, 0.0]),
        ([1.0, -5.0], True, [1.0, 1.0, 1.0, 6.0, 26.0, 0.0, -4.0, 16.0]),
    ]
    for values, refresh, row in expected:
        w.copy_(torch.tensor(values))
        assert measure(table, refresh=refresh).tolist() == [row]


@pytest.mark.parametrize("persistence", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_norms_of_odd_sizes(form: tuple[Form, str, float], dtype: torch.dtype, persistence: bool) -> None:
    def make(device: str) -> list[list[Tensor]]:
        sizes = [[0], [1, 15], [4095, 0, 4097]]
        return [[random(n, dtype, n, device) for n in layer] for layer in sizes]

    compare(form, make, persistence=persistence)


@pytest.mark.parametrize("persistence", [False, True])
def test_delta_norms_of_mixed_dtypes_and_empty_layers(form: tuple[Form, str, float], persistence: bool) -> None:
    def make(device: str) -> list[list[Tensor]]:
        return [[], [random(300, dtype, 3, device) for dtype in DTYPES], [], [random((2, 3), DTYPES[1], 4, device)]]

    compare(form, make, persistence=persistence, refreshes=(True, False, True))


def test_delta_norms_over_several_chunks_and_groups(
    form: tuple[Form, str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "GROUP_CHUNKS", 2)
    if form[0] not in (reference.delta_norms, ops.delta_norms):
        monkeypatch.setattr("learndrop_ext.kernels.delta_norms.GROUP_CHUNKS", 2)

    def make(device: str) -> list[list[Tensor]]:
        return [[random(100, torch.float32, 1, device)], [random(5 * 8192 - 3, torch.float32, 2, device)]]

    assert build_table(make("cpu")).starts.tolist() == [[0, 0], [1, 1], [6, 4]]
    compare(form, make, persistence=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_norms_at_odd_addresses(form: tuple[Form, str, float], dtype: torch.dtype) -> None:
    def make(device: str) -> list[list[Tensor]]:
        return [[random(4200, dtype, 1, device)[1:]], [random(40, dtype, 2, device)[3:]]]

    assert not (build_table(make("cpu")).chunks[:, chunks.FLAGS] & chunks.ALIGNED).any()
    compare(form, make, persistence=True)


def test_delta_norms_of_channels_last_and_transposed_weights(form: tuple[Form, str, float]) -> None:
    def make(device: str) -> list[list[Tensor]]:
        conv = random((8, 3, 5, 5), torch.float32, 1, device).to(memory_format=torch.channels_last)
        return [[conv], [random((7, 9), torch.float32, 2, device).t()]]

    compare(form, make, persistence=True)


def test_delta_norms_count_shared_parameters_once(form: tuple[Form, str, float]) -> None:
    measure, device, _ = form
    w, other = torch.zeros(2, device=device), torch.zeros(1, device=device)
    table = build_table([[w, w], [w, other], [other.view(1, 1)]])
    w += 1
    other += 3
    assert measure(table, refresh=True)[:, 0].tolist() == [2.0, 3.0, 3.0]
    assert not measure(table, refresh=True)[:, 0].any()


def test_delta_norms_of_fp16_whose_squares_overflow(form: tuple[Form, str, float]) -> None:
    measure, device, _ = form
    w = torch.zeros(100, dtype=torch.float16, device=device)
    table = build_table([[w]])
    w += 1024
    assert measure(table, refresh=True).tolist() == [[102400.0, 104857600.0, 1024.0, 102400.0, 104857600.0, 0.0]]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 2.0**-149),
        (torch.float32, 2.0**-130),
        (torch.float32, 2.0**100),
        (torch.float32, 2.0**127),
        (torch.bfloat16, 2.0**-133),
        (torch.bfloat16, 2.0**120),
        (torch.float16, 2.0**-24),
        (torch.float64, 2.0**-500),
        (torch.float64, 2.0**500),
    ],
)
def test_delta_norms_of_the_smallest_and_largest_numbers(
    form: tuple[Form, str, float], dtype: torch.dtype, value: float
) -> None:
    measure, device, _ = form
    w = torch.zeros(6, dtype=dtype, device=device)
    table = build_table([[w]], persistence=True)
    w[1] = value
    row = [value, value**2, value, value, value**2, 0.0]
    assert measure(table, refresh=True).tolist() == [[*row, 0.0, 0.0]]
    w[1] = 0
    assert measure(table, refresh=True).tolist() == [[*row[:3], 0.0, 0.0, 0.0, -(value**2), value**2]]


@makes_nonfinite
@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_norms_count_nan_and_infinity_and_do_not_hide_them(
    form: tuple[Form, str, float], dtype: torch.dtype
) -> None:
    measure, device, _ = form
    layers = [[torch.zeros(70, dtype=dtype, device=device), torch.zeros(2, dtype=dtype, device=device)] for _ in "abc"]
    table = build_table(layers)
    layers[0][0][[3, 17, 69]] = torch.tensor([INF, -INF, 5.0], dtype=dtype, device=device)
    layers[1][0][[3, 17, 69]] = torch.tensor([INF, NAN, 5.0], dtype=dtype, device=device)
    layers[2][1][0] = 2
    rows = measure(table, refresh=True).tolist()
    assert rows[0] == [INF, INF, INF, INF, INF, 2.0]
    assert all(map(math.isnan, rows[1][:5]))
    assert rows[1][5] == 2
    assert rows[2] == [2.0, 4.0, 2.0, 2.0, 4.0, 0.0]
    # The anchor holds them now: inf - inf is NaN, and a value that came back is infinitely far.
    layers[0][0][3] = 1
    rows = measure(table, refresh=True).tolist()
    assert math.isnan(rows[0][2])
    assert rows[0][3:] == [INF, INF, 2.0]


@makes_nonfinite
def test_delta_norms_count_a_difference_that_overflows(form: tuple[Form, str, float]) -> None:
    measure, device, _ = form
    w = torch.full((3,), -3e38, device=device)
    table = build_table([[w]])
    w[0] = 3e38
    row = measure(table, refresh=False)[0].tolist()
    assert (row[2], row[5]) == (INF, 1.0)
    assert row[3] == pytest.approx(9e38)


@pytest.mark.parametrize("persistence", [False, True])
def test_delta_norms_give_the_same_bits_twice(form: tuple[Form, str, float], persistence: bool) -> None:
    measure, device, _ = form

    def run() -> list[Tensor]:
        layers = [[random(2100, dtype, 5, device) for dtype in DTYPES]]
        table = build_table(layers, persistence=persistence)
        results = []
        for i in range(2):
            step(layers, i)
            results.append(measure(table, refresh=True))
        return results

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def simd() -> Iterator[None]:
    """Puts back the instruction set that a test selects."""
    name = str(_C.build_info()["cpu_simd"])
    yield
    _C.select_simd(name)


def available_simd() -> list[str]:
    best = str(_C.build_info()["cpu_simd"])
    order = ["portable", "avx2", "avx512"]
    return order[: order.index(best) + 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_norms_in_cpp_give_the_same_bits_for_all_threads_and_instructions(dtype: torch.dtype, simd: None) -> None:
    threads = torch.get_num_threads()
    results = []
    for name in available_simd():
        _C.select_simd(name)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            layers = [[random(300_001, dtype, 1), random(77, dtype, 2)]]
            layers[0][0][5] = 2.0**-24
            table = build_table(layers, persistence=True)
            for i in range(2):
                step(layers, i)
                sums = ops.delta_norms(table, refresh=True)
            results.append((sums, table.anchors))
    torch.set_num_threads(threads)
    assert all(torch.equal(sums, results[0][0]) and torch.equal(anchors, results[0][1]) for sums, anchors in results)


def test_delta_norms_write_into_out(form: tuple[Form, str, float]) -> None:
    measure, device, _ = form
    w = torch.ones(3, device=device)
    table = build_table([[w]])
    w += 1
    out = torch.full((1, 6), NAN, dtype=torch.float64, device=device)
    assert measure(table, refresh=True, out=out) is out
    assert out.tolist() == [[3.0, 3.0, 1.0, 6.0, 12.0, 0.0]]


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(1, 8, dtype=torch.float64),
        torch.empty(1, 6),
        torch.empty(6, 2, dtype=torch.float64).t()[:1],
        torch.empty(1, 6, dtype=torch.float64, device="meta"),
    ],
)
def test_delta_norms_refuse_another_out(form: tuple[Form, str, float], out: Tensor) -> None:
    w = torch.ones(3)
    table = build_table([[w]])
    w += 1
    with pytest.raises(ValueError, match=r"delta_norms: out must be a contiguous \[1, 6\] float64 tensor on cpu, got"):
        form[0](table, refresh=True, out=out)
    assert table.anchors.view(torch.float32)[0, 0] == 1


def test_delta_norms_of_no_layers(form: tuple[Form, str, float]) -> None:
    assert form[0](build_table([]), refresh=True).shape == (0, 6)


def test_ops_delta_norms_follow_a_parameter_that_moved() -> None:
    w = torch.nn.Parameter(torch.zeros(4))
    table: DeltaTable = build_table([[w]])
    w.data = torch.ones(4)
    assert ops.delta_norms(table, refresh=True)[0, 0] == 4
    w.data += 1
    assert ops.delta_norms(table, refresh=True)[0, 0] == 4
    assert table.builds == 2
