"""digests in its three forms (plain torch, C++, Triton) against a hand-written sum and against each other.

Without a GPU the Triton form runs under its interpreter.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from learndrop_ext import ops
from learndrop_ext.kernels import reference
from learndrop_ext.kernels.digest_table import BLOCK_WORDS, CHUNK_BYTES, DigestTable, mix64
from learndrop_ext.ops import TensorDigests

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.complex32, torch.complex64, torch.complex128),
)
MASK_64 = (1 << 64) - 1

Form = Callable[[Sequence[Tensor]], Tensor]


def torch_form(tensors: Sequence[Tensor]) -> Tensor:
    return reference.digests(DigestTable(tensors))


def triton_form() -> Form:
    triton = pytest.importorskip("triton")
    if DEVICE == "cpu" and triton.__version__.startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 makes loop bounds from arrays as numpy no longer allows")
    from learndrop_ext.kernels import digests

    return lambda tensors: digests.digests(DigestTable(tensors))


@pytest.fixture(params=["torch", "cpp", "triton"])
def form(request: pytest.FixtureRequest) -> tuple[Form, str]:
    """A form, and the device it runs on."""
    if request.param == "triton":
        return triton_form(), DEVICE
    return {"torch": torch_form, "cpp": ops.digests}[request.param], "cpu"


def random_bytes(count: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bits: NaN with a payload, -0.0 and subnormals among them."""
    if dtype == torch.bool:
        return (random_bytes(math.prod(shape), seed) & 1).bool().view(shape)
    return random_bytes(math.prod(shape) * dtype.itemsize, seed).view(dtype).view(shape)


def by_hand(data: bytes, layout: Sequence[int] = ()) -> int:
    """The definition, word by word in Python's numbers."""
    total = 0
    for i in range(-(-len(data) // 4)):
        word = int.from_bytes(data[4 * i : 4 * i + 4], "little")
        x = i % 4096 + 1
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        x = (x ^ x >> 16) | 1
        total += word * x * (mix64(i // 4096) | 1)
    seed = mix64(len(data))
    for value in layout:
        seed = mix64(seed ^ value)
    total = (total + seed) & MASK_64
    return total - 2**64 if total >> 63 else total


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 63, 16384, 16385, 32767, 32768, 32771, 100_002])
def test_digests_are_as_defined(form: tuple[Form, str], count: int) -> None:
    measure, device = form
    data = random_bytes(count)
    found = measure([data.to(device)])
    assert found.dtype == torch.int64
    assert found.device.type == device
    assert found.tolist() == [by_hand(bytes(data.tolist()))]


def test_digests_keep_their_values(form: tuple[Form, str]) -> None:
    """Digests may be stored: these are of version 0.1."""
    measure, device = form
    tensors = [torch.zeros(0), torch.zeros(1), torch.arange(10_000), torch.tensor([1.5, -0.0])]
    assert measure([tensor.to(device) for tensor in tensors]).tolist() == [
        *(-2152535657050944081, 7958955049054603978),
        *(-6884262934705403726, -2126139637677869514),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_digests_of_every_dtype(form: tuple[Form, str], dtype: torch.dtype) -> None:
    measure, device = form
    tensors = [random(dtype, *shape) for shape in [(), (1,), (3,), (0, 4), (4097,), (2, 5, 7)]]
    found = measure([tensor.to(device) for tensor in tensors])
    data = [bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) for tensor in tensors]
    assert found.tolist() == list(map(by_hand, data))


def test_digests_of_tensors_of_mixed_sizes_and_dtypes(form: tuple[Form, str]) -> None:
    measure, device = form
    sizes = [0, 1, 70_000, 3, 8192, 0, 40_001, 16_384, 5]
    tensors = [random(DTYPES[i % len(DTYPES)], size, seed=i) for i, size in enumerate(sizes)]
    alone = [int(torch_form([tensor])) for tensor in tensors]
    assert measure([tensor.to(device) for tensor in tensors]).tolist() == alone


@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8, 15, 16])
@pytest.mark.parametrize("count", [1, 30, 40_001])
def test_digests_of_views_with_an_offset(form: tuple[Form, str], offset: int, count: int) -> None:
    measure, device = form
    data = random_bytes(count + 20)
    view = data.to(device)[offset : offset + count]
    assert measure([view]).tolist() == [by_hand(bytes(data[offset : offset + count].tolist()))]


def test_digests_of_dense_tensors_are_of_their_memory_and_order(form: tuple[Form, str]) -> None:
    measure, device = form
    plain = random(torch.float32, 6, 3, 5, 4)
    last = plain.to(memory_format=torch.channels_last)
    data = bytes(last.permute(0, 2, 3, 1).contiguous().view(-1).view(torch.uint8).tolist())
    table = DigestTable([last])
    assert table.memory[0].data_ptr() == last.data_ptr()
    strided = torch.empty_strided(last.shape, last.stride(), device=device).copy_(last)
    found = measure([strided, plain.to(device), plain.to(device).permute(1, 0, 2, 3)]).tolist()
    assert found[0] == by_hand(data, [4, *last.shape, *last.stride()])
    assert len(set(found)) == 3


def test_digests_of_a_dimension_of_one_do_not_depend_on_its_stride(form: tuple[Form, str]) -> None:
    measure, device = form
    weight = random(torch.float32, 8, 5, 1, 1).to(device)
    last = weight.to(memory_format=torch.channels_last)
    turned = weight.view(8, 5).t()
    found = measure([weight, last, weight.view(40), turned, turned.unsqueeze(1)])
    assert found[0] == found[1] == found[2]
    assert found[3] == found[4]
    assert found[0] != found[3]


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[:, ::2],
        lambda x: x[1:5, 2:3],
        lambda x: x[0].expand(4, -1),
        lambda x: x[:, :1].expand(-1, 9),
        lambda x: x.as_strided((4, 6), (2, 1)),
    ],
)
def test_digests_of_gaps_and_overlap_are_those_of_a_copy(
    form: tuple[Form, str], take: Callable[[Tensor], Tensor]
) -> None:
    measure, device = form
    view = take(random(torch.float32, 50, 60).to(device))
    assert not view.is_contiguous()
    assert torch.equal(measure([view]), measure([view.contiguous()]))


def test_digests_of_lazy_conjugates_and_negatives_are_of_their_values(form: tuple[Form, str]) -> None:
    measure, device = form
    z = torch.view_as_complex(random(torch.float32, 30, 2)).to(device)
    lazy, negative = z.conj(), z.conj().imag
    assert lazy.is_conj()
    assert negative.is_neg()
    found = measure([lazy, negative, z])
    assert torch.equal(found[:2], measure([lazy.resolve_conj(), negative.resolve_neg().contiguous()]))
    assert found[0] != found[2]


def test_digests_see_the_number_of_zeros(form: tuple[Form, str]) -> None:
    measure, device = form
    sizes = [0, 1, 2, 3, 4, 5, 8, 100, 101, CHUNK_BYTES, CHUNK_BYTES + 1]
    found = measure([torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes])
    assert len(set(found.tolist())) == len(sizes)


def test_digests_see_bits_and_not_values(form: tuple[Form, str]) -> None:
    measure, device = form
    bits = torch.tensor([0, 1 << 31, 0x7FC00000, 0x7FC00001, 0xFFC00000], dtype=torch.uint32).to(device)
    found = measure([one.view(torch.float32) for one in bits.view(5, 1)])
    assert len(set(found.tolist())) == 5


@pytest.mark.parametrize("count", [1, 7, 33, 20_000])
def test_digests_see_every_single_flip(count: int) -> None:
    data = random_bytes(count)
    digests = TensorDigests([data])
    before = digests.measure()
    places = range(count) if count < 100 else [0, 1, 16_383, 16_384, 19_999]
    for i in places:
        for bit in range(8):
            data[i] ^= 1 << bit
            assert digests.measure() != before
            data[i] ^= 1 << bit
    assert digests.measure() == before


def test_digests_in_triton_see_single_flips() -> None:
    measure = triton_form()
    data = random_bytes(40_001).to(DEVICE)
    flipped = [data.clone() for _ in range(6)]
    for tensor, i, bit in zip(flipped, [0, 3, 16_384, 32_767, 39_999, 40_000], range(1, 7), strict=True):
        tensor[i] ^= 1 << bit
    found = measure([data, *flipped])
    assert len(set(found.tolist())) == 7


def test_keys_of_a_block_all_differ() -> None:
    """So two different words of a block that swap their places always change the sum."""
    keys = reference.word_keys(torch.arange(BLOCK_WORDS))
    assert len(keys.unique()) == BLOCK_WORDS
    assert bool((keys % 2 == 1).all())
    assert 0 < int(keys.min()) < int(keys.max()) < 2**32


def test_digests_see_permuted_words() -> None:
    words = random(torch.int32, 3 * BLOCK_WORDS)
    swapped = []
    for i, j in [(0, 1), (5, 4095), (4095, 4096), (7, 7 + BLOCK_WORDS), (0, 3 * BLOCK_WORDS - 1)]:
        other = words.clone()
        other[[i, j]] = words[[j, i]]
        swapped.append(other)
    blocks = words.view(3, BLOCK_WORDS)[[1, 0, 2]].reshape(-1)
    found = ops.digests([words, *swapped, blocks, words.flip(0), words.roll(1)])
    assert len(set(found.tolist())) == len(found)


def test_digests_of_neighbouring_changes_do_not_meet() -> None:
    """Swaps and pairs of small steps, each unlike all others."""
    i = torch.arange(1 << 13)
    tensors = torch.zeros(len(i), 20, dtype=torch.int32)
    tensors[i, i % 20] += 1 + i // 20 % 20
    tensors[i, i // 400 % 20] -= 1 + i // 3000
    distinct = tensors.unique(dim=0)
    assert len(distinct) > 6000
    assert len(ops.digests(distinct.unbind()).unique()) == len(distinct)


def test_digests_in_cpp_are_the_same_for_all_threads() -> None:
    threads = torch.get_num_threads()
    tensors = [random(torch.float32, n, seed=n) for n in (1_000_003, 5, 0, 77, 300_001, 8192)]
    wanted = torch_form(tensors)
    digests = TensorDigests(tensors)
    found = []
    for count in (1, 2, 8):
        torch.set_num_threads(count)
        found += [digests.measure() for _ in range(5)]
    torch.set_num_threads(threads)
    assert all(torch.equal(one, wanted) for one in found)


def test_digests_in_cpp_from_several_threads_at_once() -> None:
    tensors = [random(torch.float32, 500_003), random(torch.bfloat16, 77)]
    digests = [TensorDigests(tensors) for _ in range(4)]
    found: list[Tensor] = []
    workers = [threading.Thread(target=lambda d=d: found.extend(d.measure() for _ in range(5))) for d in digests]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wanted = torch_form(tensors)
    assert len(found) == 20
    assert all(torch.equal(one, wanted) for one in found)


def test_digests_of_no_tensors(form: tuple[Form, str]) -> None:
    found = form[0]([])
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_digests_take_any_iterable_and_parameters() -> None:
    w = torch.nn.Parameter(torch.ones(3))
    found = ops.digests(tensor for tensor in [w, w.data])
    assert found[0] == found[1]
    assert not found.requires_grad


def test_measure_returns_new_tensors() -> None:
    w = torch.ones(3)
    digests = TensorDigests([w])
    assert len(digests) == 1
    before = digests.measure()
    w += 1
    after = digests.measure()
    assert before != after
    assert torch.equal(before, ops.digests([torch.ones(3)]))


def changed_shape(w: Tensor) -> None:
    w.resize_(2, 3)


def changed_strides(w: Tensor) -> None:
    w.t_()


def changed_data(w: Tensor) -> None:
    w.data = torch.full((4, 4), 7.0)


def changed_dtype(w: Tensor) -> None:
    w.data = w.data.view(torch.int32)


def changed_offset(w: Tensor) -> None:
    w.data = w.data[1:]


@pytest.mark.parametrize("change", [changed_shape, changed_strides, changed_data, changed_dtype, changed_offset])
def test_measure_follows_a_tensor_that_changed_its_memory(change: Callable[[Tensor], None]) -> None:
    w, other = random(torch.float32, 4, 4), torch.ones(2)
    digests = TensorDigests([w, other])
    digests.measure()
    change(w)
    assert torch.equal(digests.measure(), ops.digests([w, other]))
    assert digests._table.builds == 2


def test_measure_follows_a_tensor_that_becomes_lazy() -> None:
    z = torch.view_as_complex(random(torch.float32, 4, 2))
    digests = TensorDigests([z])
    before = digests.measure()
    z.data = z.data.conj()
    assert digests.measure() == ops.digests([z.resolve_conj()]) != before


def test_measure_copies_gaps_again() -> None:
    base = random(torch.float32, 4, 10)
    digests = TensorDigests([base[:, ::2]])
    before = digests.measure()
    with torch.inference_mode():
        base[1, 1] = 0
        assert digests.measure() == before
        base[1, 2] += 1
        assert digests.measure() != before
    assert digests.measure() == ops.digests([base[:, ::2].contiguous()])
    assert digests._table.builds == 1


def test_table_of_an_inference_tensor_and_in_inference_mode() -> None:
    with torch.inference_mode():
        w = torch.arange(6.0).view(2, 3)
        digests = TensorDigests([w, w[:, ::2]])
    assert torch.equal(digests.measure(), ops.digests([torch.arange(6.0), torch.tensor([0.0, 2.0, 3.0, 5.0])]))


def test_table_is_cut_at_blocks() -> None:
    table = DigestTable([torch.zeros(0), random_bytes(2 * CHUNK_BYTES + 5), torch.zeros(0), torch.zeros(3)])
    assert table.chunks[:, 1:].tolist() == [[CHUNK_BYTES, 0, 1], [CHUNK_BYTES, 2, 1], [5, 4, 1], [12, 0, 3]]
    start = table.memory[1].data_ptr()
    assert table.chunks[:3, 0].tolist() == [start, start + CHUNK_BYTES, start + 2 * CHUNK_BYTES]


def freed() -> Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (torch.ones(3), TypeError, r"digests: tensors must be an iterable of tensors, got Tensor"),
        (None, TypeError, r"digests: tensors must be an iterable of tensors, got NoneType"),
        ([torch.ones(1), 3.0], TypeError, r"digests: tensors\[1\] must be a tensor, got float"),
        (
            [torch.eye(2).to_sparse()],
            ValueError,
            r"digests: tensors\[0\] must be a dense tensor, got layout torch.sparse",
        ),
        (
            [torch.ones(1, device="meta")],
            ValueError,
            r"digests: tensors\[0\] must lie on a CPU or a CUDA device, got meta",
        ),
        ([freed()], ValueError, r"digests: tensors\[0\] must have memory, got 3 elements with none"),
    ],
)
def test_digests_refuse_what_they_cannot_read(tensors: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.digests(tensors)


@pytest.mark.filterwarnings("ignore")
def test_digests_refuse_quantized_tensors() -> None:
    try:
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    except (AttributeError, RuntimeError):
        pytest.skip("this torch has no quantized tensors")
    with pytest.raises(TypeError, match=r"digests: tensors\[0\] must have a dtype without a scale of its own, got"):
        ops.digests([quantized])


def test_measure_refuses_a_tensor_whose_memory_was_freed() -> None:
    w = torch.ones(3)
    digests = TensorDigests([torch.ones(1), w])
    digests.measure()
    w.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"digests: tensors\[1\] must have memory, got 3 elements with none"):
        digests.measure()
