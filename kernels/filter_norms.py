"""Filter norms in Triton: one launch for all filters of a table, those that need the whole layer's largest value included.

Program i of the first F sums one filter; program F + i counts the zeros of the same filter, once all filters of its layer
are summed. It waits only for programs of lower numbers, which a GPU starts before it and which wait for nothing. What it
reads again is in the second-level cache as long as a layer fits there.

Prefixes: `i_` index, `o_` offsets, `m_` mask, `p_` pointer, `b_` values in registers, `s_` sums.
Letters: L weights, F filters.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import DTYPE_CODES
from .filter_table import FilterTable

# A filter of 3x3 over 64 to 512 channels has 576 to 4,608 weights: one to five tiles of a vector of 16 bytes for each of
# 256 threads.
TILE = 1024
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}

SEGMENT_COLUMNS = tl.constexpr(4)
FP32 = tl.constexpr(DTYPE_CODES[torch.float32])
BF16 = tl.constexpr(DTYPE_CODES[torch.bfloat16])
FP16 = tl.constexpr(DTYPE_CODES[torch.float16])


@triton.jit
def _bits(x):
    """The bits of |x| of an fp64 number, ordered like |x|, NaN above infinity."""
    return x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF


@triton.jit
def _sizes(address, code, i, length, TILE: tl.constexpr):
    """The absolute values of elements i to i + TILE - 1 of a filter in fp64, 0 behind its end; [TILE]."""
    o = i + tl.arange(0, TILE)
    m = o < length
    if code == FP32:
        b_w = tl.load(address.to(tl.pointer_type(tl.float32), bitcast=True) + o, mask=m, other=0.0).to(tl.float64)
    elif code == BF16:
        # By its bits, because Triton's interpreter flushes subnormals of bf16 to 0.
        b_half = tl.load(address.to(tl.pointer_type(tl.int16), bitcast=True) + o, mask=m, other=0)
        b_w = (b_half.to(tl.int32) << 16).to(tl.float32, bitcast=True).to(tl.float64)
    elif code == FP16:
        b_w = tl.load(address.to(tl.pointer_type(tl.float16), bitcast=True) + o, mask=m, other=0.0).to(tl.float64)
    else:
        b_w = tl.load(address.to(tl.pointer_type(tl.float64), bitcast=True) + o, mask=m, other=0.0)
    return tl.abs(b_w)


@triton.jit(do_not_specialize=["F"])
def filter_norms_kernel(
    p_segments,  # [F, 4] int64
    p_starts,  # [L + 1] int64
    p_maxima,  # [L] int64
    p_counters,  # [L, 2] int32
    p_share,  # [1] float64
    p_out,  # [F, 4] float64
    F,
    TILE: tl.constexpr,
):
    i_program = tl.program_id(0).to(tl.int64)
    counts = i_program >= F
    i_filter = tl.where(counts, i_program - F, i_program)
    p_segment = p_segments + i_filter * SEGMENT_COLUMNS
    address = tl.load(p_segment)
    length = tl.load(p_segment + 1)
    layer = tl.load(p_segment + 2)
    code = tl.load(p_segment + 3)
    filters = (tl.load(p_starts + layer + 1) - tl.load(p_starts + layer)).to(tl.int32)
    p_summed = p_counters + layer * 2
    p_row = p_out + i_filter * 4
    if counts:
        while tl.atomic_add(p_summed, 0, sem="acquire") < filters:
            pass
        # .cg: other programs wrote it, and the first-level cache may hold an older value.
        largest = tl.load(p_maxima + layer, cache_modifier=".cg").to(tl.float64, bitcast=True)
        limit = tl.load(p_share) * largest
        s_zeros = tl.zeros([TILE], tl.int32)
        for i in range(0, length, TILE):
            b_size = _sizes(address, code, i, length, TILE)
            s_zeros += ((b_size <= limit) & (i + tl.arange(0, TILE) < length)).to(tl.int32)
        tl.store(p_row + 3, tl.sum(s_zeros, axis=0).to(tl.float64))
        tl.debug_barrier()
        if tl.atomic_add(p_summed + 1, 1, sem="acq_rel") == filters - 1:
            tl.store(p_summed, 0)
            tl.store(p_summed + 1, 0)
            tl.store(p_maxima + layer, 0)
    else:
        s_l1 = tl.zeros([TILE], tl.float64)
        s_l2 = tl.zeros([TILE], tl.float64)
        s_top = tl.zeros([TILE], tl.int64)
        for i in range(0, length, TILE):
            b_size = _sizes(address, code, i, length, TILE)
            s_l1 += b_size
            s_l2 += b_size * b_size
            s_top = tl.maximum(s_top, _bits(b_size))
        top = tl.max(s_top, axis=0)
        tl.store(p_row, tl.sum(s_l1, axis=0))
        tl.store(p_row + 1, tl.sum(s_l2, axis=0))
        tl.store(p_row + 2, top.to(tl.float64, bitcast=True))
        tl.atomic_max(p_maxima + layer, top)
        tl.debug_barrier()
        tl.atomic_add(p_summed, 1, sem="acq_rel")


def filter_norms(table: FilterTable, *, share: float) -> Tensor:
    """Compute the same as `kernels.reference.filter_norms`, with its arguments and result, in one launch on a GPU.

    The launch is on the current stream. Sums are fp64, of each filter in a fixed order: two runs give the same bits.
    """
    device = table.segments.device
    out = torch.empty(len(table), 4, dtype=torch.float64, device=device)
    if len(table):
        limit = torch.full((1,), share, dtype=torch.float64, device=device)
        with torch.cuda.device_of(table.segments):
            filter_norms_kernel[(2 * len(table),)](
                table.segments,
                table.starts,
                table.maxima,
                table.counters,
                limit,
                out,
                len(table),
                TILE=TILE,
                **OPTIONS,
            )
    return out
