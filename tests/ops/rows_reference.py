"""`ops.append_rows` and `ops.gather_rows` in plain torch: the same arguments and the same bits, but slow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def append_rows(cache: Tensor, rows: Tensor, index: Tensor, *, codec: str = "fp16") -> None:
    """Encode row b of `rows` into row index[b] of `cache`. Arguments as in `ops.append_rows`."""
    values = _channels_last(rows)
    if codec == "uint8":
        encoded = _encode_uint8(values.float())
    else:
        if codec == "fp16":
            values = _convert(values, torch.float32).clamp(-65504, 65504)
        encoded = _convert(values, STORED[codec]).reshape(len(rows), -1).view(torch.uint8)
    cache[index, : encoded.shape[1]] = encoded


def gather_rows(
    cache: Tensor,
    index: Tensor,
    shape: Sequence[int],
    *,
    codec: str = "fp16",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Decode rows index[b] of `cache` to [B, *shape] of `dtype`. Arguments as in `ops.gather_rows`."""
    B, D = len(index), math.prod(shape)
    bytes_ = cache[index]
    channels = shape[0] if len(shape) == 3 else 1
    if codec == "uint8":
        values = _decode_uint8(bytes_, D, _uint8_channels(shape))
    else:
        stored = STORED[codec]
        values = bytes_[:, : D * stored.itemsize].contiguous().view(stored)
    rows = _convert(values, dtype).reshape(B, D // channels, channels).transpose(1, 2).reshape(B, *shape)
    return rows.contiguous(memory_format=torch.channels_last) if len(shape) == 3 else rows


def _channels_last(rows: Tensor) -> Tensor:
    """[B, pixels, channels] of a batch. A row that is not an image has one channel."""
    if rows.ndim == 4:
        return rows.permute(0, 2, 3, 1).reshape(len(rows), -1, rows.shape[1])
    return rows.reshape(len(rows), math.prod(rows.shape[1:]), 1)


def _uint8_channels(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == 3 and shape[1] * shape[2] > 1 else 1


def _encode_uint8(values: Tensor) -> Tensor:
    """Header and bytes of [B, pixels, channels] values: zero = min, scale = (max - min) / 255."""
    B, pixels, channels = values.shape
    if pixels == 1:
        values, pixels, channels = values.reshape(B, channels, 1), channels, 1
    low, high = values.amin(1), values.amax(1)
    span = high - low
    finite = span.isfinite()
    constant = span < 2.0**-100
    zero = torch.where(finite, low + 0.0, 0.0)
    # Divided by a tensor: torch multiplies by the reciprocal of a scalar, which rounds twice.
    steps_in_span = torch.full_like(span, 255.0)
    scale = torch.where(finite, torch.where(constant, 0.0, span / steps_in_span), torch.nan)
    inverse = torch.where(finite & ~constant, steps_in_span / span, 0.0)
    steps = ((values - zero[:, None]) * inverse[:, None]).nan_to_num(0.0).round().clamp(0, 255)
    header = torch.zeros(B, -(-8 * channels // 16) * 16, dtype=torch.uint8)
    header[:, : 8 * channels] = torch.cat([scale, zero], 1).view(torch.uint8)
    return torch.cat([header, steps.to(torch.uint8).reshape(B, -1)], 1)


def _decode_uint8(bytes_: Tensor, D: int, channels: int) -> Tensor:
    """fp32 values [B, D], channels last: zero + scale * step."""
    header = -(-8 * channels // 16) * 16
    table = bytes_[:, : 8 * channels].contiguous().view(torch.float32)
    scale, zero = table[:, :channels], table[:, channels:]
    steps = bytes_[:, header : header + D].reshape(len(bytes_), -1, channels).float()
    return (zero[:, None] + scale[:, None] * steps).reshape(len(bytes_), D)


def _convert(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`.to(dtype)` with one bit pattern for all NaNs, except for copies and bf16 to fp32, which keep theirs."""
    if values.dtype == dtype or (values.dtype, dtype) == (torch.bfloat16, torch.float32):
        return values.to(dtype)
    converted: Tensor = torch.where(values.isnan(), torch.nan, values.to(dtype))
    return converted
