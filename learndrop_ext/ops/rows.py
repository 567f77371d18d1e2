"""`append_rows` and `gather_rows`: store a batch of rows in a cache, and read one back.

B rows in a batch, R rows in a cache, S bytes from one cache row to the next. A row is one sample's values: [C, H, W]
(stored channels last) or any other shape. Codecs: fp32, bf16, fp16 (clamped to +-65504), uint8 (one scale and zero point
per channel of each row). They are defined in csrc/row_ops.h.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from learndrop_ext import _C

CODECS = ("fp32", "bf16", "fp16", "uint8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_ROW = 2**31 - 1

CUDA_COMPILED = bool(_C.build_info()["cuda_architectures"])


def row_bytes(values: Sequence[int], codec: str) -> int:
    """Return the bytes that one row of shape `values` takes in a cache.

    uint8 adds a header of 8 bytes per channel, padded to 16 bytes. Raises ValueError if the codec is unknown, or the shape
    has no values, or 2^31 or more.
    """
    return _geometry("row_bytes", tuple(values), codec)[2]


def row_stride(values: Sequence[int], codec: str) -> int:
    """Return the bytes from one cache row to the next: `row_bytes` rounded up to a multiple of 128. Raises as it does."""
    return -(-_geometry("row_stride", tuple(values), codec)[2] // 128) * 128


def append_rows(cache: Tensor, rows: Tensor, index: Tensor, *, codec: str = "fp16") -> None:
    """Encode row b of `rows` into row index[b] of `cache`.

    On CUDA the work is enqueued on the current stream. Bytes of a cache row beyond row_bytes(shape, codec) do not change.

    Args:
        cache: [R, S] uint8, contiguous, on the CPU or a CUDA device, with S = row_stride(shape, codec) or a larger
            multiple of 128.
        rows: [B, *shape] float32, bfloat16 or float16 on the cache's device; [B, C, H, W] in any memory format, stored
            channels last.
        index: [B] int64 without repeats, on the CPU or the cache's device. On a CUDA device it is not checked by the
            host: an index outside the cache traps in the kernel, and the result of a repeated one is undefined.
        codec: "fp16", "bf16", "fp32" or "uint8".

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if an argument has the wrong shape, layout or device, or the index contains a row twice.
        IndexError: if the index is out of range.
        RuntimeError: if the cache is on a CUDA device and the package was built without CUDA.

    All are raised before anything is written.
    """
    name = "append_rows"
    if rows.dtype not in DTYPES:
        raise TypeError(f"{name}: rows must be float32, bfloat16 or float16, got {rows.dtype}")
    if rows.ndim < 1:
        raise ValueError(f"{name}: rows must be [B, *shape], got {[*rows.shape]}")
    if rows.device != cache.device:
        raise ValueError(f"{name}: rows must be on the cache's device {cache.device}, got {rows.device}")
    shape = tuple(rows.shape[1:])
    code, image, used = _geometry(name, shape, codec)
    _check_cache(name, cache, shape, codec, used)
    index = _checked_index(name, cache, index)
    B = rows.shape[0]
    if index.shape[0] != B:
        raise ValueError(f"{name}: index must be [{B}], one for each row, got {[*index.shape]}")
    if index.is_cpu and (repeated := _C.first_repeated(index.data_ptr(), B)) >= 0:
        raise ValueError(f"{name}: index must name no row twice, got {repeated} twice")
    rows = rows.detach().resolve_neg()
    if rows.ndim > 2 and rows.ndim != 4:
        rows = rows.contiguous()
    index = _on_device(index, cache.device)
    stride_b, stride_h, stride_w, stride_c = _strides(rows, image)
    device, stream = _target(cache)
    _C.append_rows(
        cache=cache.data_ptr(),
        cache_rows=cache.shape[0],
        cache_stride_bytes=cache.shape[1],
        codec=code,
        rows=rows.data_ptr(),
        dtype=DTYPES.index(rows.dtype),
        batch=B,
        shape=image,
        stride_b=stride_b,
        stride_h=stride_h,
        stride_w=stride_w,
        stride_c=stride_c,
        index=index.data_ptr(),
        threads=torch.get_num_threads(),
        device=device,
        stream=stream,
    )


def travels_with_launch(index: Tensor, rows: int) -> bool:
    """Whether an index [B] (CPU) into `rows` rows is read when a kernel is launched, and needs no copy on the device."""
    return len(index) <= _C.HELD_ROWS and rows <= 2**31


def gather_rows(
    cache: Tensor, index: Tensor, shape: Sequence[int], *, codec: str = "fp16", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Decode rows index[b] of `cache`. On CUDA the work is enqueued on the current stream.

    Args:
        cache: [R, S] uint8, written by `append_rows` with the same shape and codec.
        index: [B] int64, on the CPU or the cache's device. On a CUDA device it is not checked by the host: an index
            outside the cache traps in the kernel.
        shape: shape of one row.
        codec: the codec that the rows were written with.
        dtype: dtype of the result, float32, bfloat16 or float16, with any codec.

    Returns:
        [B, *shape] of `dtype`, channels last for rows [C, H, W].

    Raises:
        TypeError: if an argument has the wrong dtype.
        ValueError: if an argument has the wrong shape, layout or device.
        IndexError: if the index is out of range.
        RuntimeError: if the cache is on a CUDA device and the package was built without CUDA.

    All are raised before anything is allocated or written.
    """
    name = "gather_rows"
    if dtype not in DTYPES:
        raise TypeError(f"{name}: dtype must be float32, bfloat16 or float16, got {dtype}")
    shape = tuple(shape)
    _check_cache(name, cache, shape, codec, _geometry(name, shape, codec)[2])
    index = _checked_index(name, cache, index)
    if _is_held(cache, index) and torch.cuda.is_current_stream_capturing():
        raise ValueError(f"{name}: index must be on {cache.device} while a CUDA graph is captured, got one on the CPU")
    memory_format = torch.channels_last if len(shape) == 3 else torch.contiguous_format
    out = torch.empty((len(index), *shape), dtype=dtype, device=cache.device, memory_format=memory_format)
    gather_known_rows(cache, index, shape, out, codec=codec)
    return out


def gather_known_rows(cache: Tensor, index: Tensor, shape: tuple[int, ...], out: Tensor, *, codec: str) -> None:
    """Do the same as `gather_rows` with arguments that the caller knows to be right: nothing is checked.

    Writes to `out`, B rows without gaps, whose values lie in the order in which they are stored; `shape` is that of a stored
    row. With the index on the device, the call can be captured in a CUDA graph.
    """
    code, image, _ = _geometry("gather_rows", shape, codec)
    index = index.contiguous()
    R, S = cache.shape
    held = _is_held(cache, index)
    if cache.is_cuda and not held:
        index = _on_device(index, cache.device)
    device, stream = _target(cache)
    _C.gather_rows(
        cache=cache.data_ptr(),
        cache_rows=R,
        cache_stride_bytes=S,
        codec=code,
        out=out.data_ptr(),
        dtype=DTYPES.index(out.dtype),
        batch=index.shape[0],
        shape=image,
        index=index.data_ptr(),
        index_on_host=held,
        threads=torch.get_num_threads(),
        device=device,
        stream=stream,
    )


def _is_held(cache: Tensor, index: Tensor) -> bool:
    """Whether an index into a cache on a GPU travels there with the launch of the kernel."""
    return cache.is_cuda and not index.is_cuda and travels_with_launch(index, cache.shape[0])


@functools.lru_cache(maxsize=256)
def _geometry(name: str, shape: tuple[int, ...], codec: str) -> tuple[int, _C.RowShape, int]:
    """Return the codec's number, a row's shape as in csrc/row_ops.h, and its bytes.

    A row that is no image has one channel. So has, for uint8, an image of one pixel: a scale and a zero point for each
    value would take more bytes than the values.
    """
    if codec not in CODECS:
        raise ValueError(f"{name}: codec must be one of {', '.join(CODECS)}, got {codec!r}")
    D = math.prod(shape)
    if min(shape, default=1) < 1 or D > LARGEST_ROW:
        raise ValueError(f"{name}: a row must have 1 to {LARGEST_ROW} values, got shape {shape}")
    image = _C.RowShape(height=1, width=D, channels=1)
    if len(shape) == 3 and not (codec == "uint8" and shape[1] * shape[2] == 1):
        image = _C.RowShape(height=shape[1], width=shape[2], channels=shape[0])
    code = CODECS.index(codec)
    return code, image, _C.row_bytes(code, image)


def _strides(rows: Tensor, image: _C.RowShape) -> tuple[int, int, int, int]:
    """Strides of batch, height, width and channel, in values, of rows that are [B], [B, D], [B, C, H, W] or contiguous."""
    if rows.ndim == 4 and (image.channels, image.height, image.width) == rows.shape[1:]:
        return rows.stride(0), rows.stride(2), rows.stride(3), rows.stride(1)
    return rows.stride(0), 0, rows.stride(1) if rows.ndim in (2, 4) else 1, 1


def _check_cache(name: str, cache: Tensor, shape: tuple[int, ...], codec: str, used: int) -> None:
    if cache.dtype != torch.uint8:
        raise TypeError(f"{name}: cache must be uint8, got {cache.dtype}")
    if cache.ndim != 2 or not cache.is_contiguous():
        raise ValueError(f"{name}: cache must be contiguous [R, S], got {[*cache.shape]} with strides {cache.stride()}")
    place = cache.device.type
    if place not in ("cpu", "cuda"):
        raise ValueError(f"{name}: cache must be on the CPU or a CUDA device, got {cache.device}")
    if place == "cuda" and not CUDA_COMPILED:
        raise RuntimeError(
            f"{name}: cache is on {cache.device}, but learndrop_ext was built without CUDA: install the CUDA toolkit "
            "and build it again with LEARNDROP_CUDA=1"
        )
    R, S = cache.shape
    if used > S or S % 128:
        raise ValueError(
            f"{name}: S must be {-(-used // 128) * 128} or a larger multiple of 128 for {codec} rows of shape {shape}, "
            f"got {S}"
        )
    if R and cache.data_ptr() % 16:
        raise ValueError(f"{name}: cache must lie at a multiple of 16 bytes, got address {cache.data_ptr():#x}")


def _checked_index(name: str, cache: Tensor, index: Tensor) -> Tensor:
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: index must be int64, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"{name}: index must be [B], got {[*index.shape]}")
    if not index.is_cpu and index.device != cache.device:
        raise ValueError(f"{name}: index must be on the CPU or {cache.device}, got {index.device}")
    index = index.contiguous()
    R = cache.shape[0]
    if index.is_cpu and (bad := _C.first_outside(index.data_ptr(), index.shape[0], R)) >= 0:
        raise IndexError(f"{name}: index must be in [0, {R}), got {int(index[bad])} at position {bad}")
    return index


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Return `values` on the device. They have been read when the call returns.

    Pageable memory is read at once, without waiting for the device's other work. Pinned memory is read later, when its
    owner may have changed it, so that copy is waited for.
    """
    if values.device == device:
        return values
    return values.to(device, non_blocking=not values.is_pinned())


def _target(cache: Tensor) -> tuple[int, int]:
    """Number of the device, -1 for the CPU, and its current stream."""
    if not cache.is_cuda:
        return -1, 0
    return cache.get_device(), torch.cuda.current_stream(cache.device).cuda_stream
