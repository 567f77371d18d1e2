"""Delta norms in Triton: one launch for all parameters of a table.

One program reduces one chunk, tile by tile; a chunk lies in one parameter. The program that finishes the last chunk of
a group adds the group's partial sums, the one that finishes a layer's last group adds those of its groups, each in
their order: two runs give the same bits.

Prefixes: `i_` index, `o_` offsets, `m_` mask, `p_` pointer, `b_` values in registers, `s_` sums.
Letters: L layers, C chunks, G groups of chunks, S bytes of an anchor row, K columns (6, with persistence 8); R rows of
a tile, T threads of a row, V elements of a thread's 16-byte vector.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunks import ALIGNED, DTYPE_CODES, DTYPE_MASK, GROUP_CHUNKS, DeltaTable
from .reference import check_out

# An H100 moves 3.0 TB/s, 23 bytes a ns for each of its 132 multiprocessors. With about 0.8 us from a read's issue to
# its data, each must have 18 KB in flight, on an H200 (4.3 TB/s) 26 KB. A tile of 16 KiB is read from the parameter and
# from one or two anchors: 32 or 48 KiB in flight for one program, of which 3, with persistence 2, fit on a
# multiprocessor by their registers (80 and 125 a thread). 256 threads read a row of 4 KiB in vectors of 16 bytes; the 4
# rows of a tile meet in one thread's registers, so that the running sums need neither shared memory nor shuffles before
# the chunk's end.
# With 4 warps ptxas issues the last reads of a tile only after the first have come: 1.3 TB/s with persistence.
WARPS = 8
TILE_ROWS = 4

# With fusion a square or product of a delta is not rounded before it is added. Given because Triton 3.9 warns if the
# default is used, and later versions have another one.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}

CHUNK_COLUMNS = tl.constexpr(5)
PARTIAL_COLUMNS = tl.constexpr(8)
MAXIMUM = tl.constexpr(2)
FLAG_ALIGNED = tl.constexpr(ALIGNED)
FLAG_DTYPE = tl.constexpr(DTYPE_MASK)
FP32 = tl.constexpr(DTYPE_CODES[torch.float32])
BF16 = tl.constexpr(DTYPE_CODES[torch.bfloat16])
FP16 = tl.constexpr(DTYPE_CODES[torch.float16])


@triton.jit
def _magnitude(x):
    """Twice the bits of |x|, unsigned: ordered like |x|, infinity above every number and NaN above infinity.

    The sign is shifted out, for ptxas masks it by an fp64 addition, which keeps that of a NaN.
    """
    if x.dtype == tl.float64:
        return x.to(tl.uint64, bitcast=True) << 1
    else:
        return x.to(tl.uint32, bitcast=True) << 1


@triton.jit
def _from_magnitude(bits):
    """The fp64 number whose `_magnitude` is `bits`."""
    if bits.dtype == tl.uint64:
        return (bits >> 1).to(tl.float64, bitcast=True)
    else:
        return (bits >> 1).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _widen(x):
    """x in fp32. bf16 is converted by its bits, because Triton's interpreter flushes its subnormals to 0."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _scale_exponent(magnitude):
    """Exponent field of the fp32 power of two that brings a magnitude near 1, within what fp32 holds."""
    return tl.minimum(tl.maximum(254 - (magnitude >> 24).to(tl.int32), 1), 254)


@triton.jit
def _scale(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _unscale(exponent):
    """1 / _scale(exponent), in fp64."""
    return ((1150 - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _sum(x):
    """In each thread: sum over the rows of a tile, then over a vector; [R, T, V] to [T]."""
    return tl.sum(tl.sum(x, axis=0), axis=1)


@triton.jit
def _top(x):
    """In each thread: the greatest value of a tile; [R, T, V] to [T]."""
    return tl.max(tl.max(x, axis=0), axis=1)


@triton.jit
def _load(p, o, m, MASKED: tl.constexpr):
    """[R, T * V]"""
    if MASKED:
        return tl.load(p + o, mask=m, other=0.0)
    else:
        return tl.load(p + o)


@triton.jit
def _by_thread(x, T: tl.constexpr):
    """[R, T * V] to [R, T, V]: the vector that each thread holds of each row becomes an axis, and nothing moves.

    Tiles are loaded in two dimensions, so that Triton lays each row across the threads. Given three, some versions
    (3.6) divide the rows among the threads of a warp.
    """
    return tl.reshape(x, [x.shape[0], T, x.shape[1] // T])


@triton.jit
def _add_tile(
    p_w,
    p_newer,
    p_older,
    o,  # [R, T * V]
    m,  # [R, T * V], read only where MASKED
    sums,  # 8 running sums, [T] each
    MASKED: tl.constexpr,
    REFRESH: tl.constexpr,
    PERSISTENCE: tl.constexpr,
    T: tl.constexpr,
):
    """Add one tile to the running sums and, where REFRESH, write its anchor.

    fp32 sums are over the 16 values of one thread only, scaled by a power of two that keeps their squares from overflow
    and underflow. All later sums are fp64.
    """
    b_w = _load(p_w, o, m, MASKED)
    b_newer = _load(p_newer, o, m, MASKED)
    if PERSISTENCE:
        b_older = _load(p_older, o, m, MASKED)
    if REFRESH:
        if MASKED:
            tl.store(p_older + o, b_w, mask=m)
        else:
            tl.store(p_older + o, b_w)

    b_w = _by_thread(b_w, T)
    b_newer = _by_thread(b_newer, T)
    if PERSISTENCE:
        b_older = _by_thread(b_older, T)
    s_l1, s_l2, s_top, s_w1, s_w2, s_bad, s_dot, s_previous = sums
    if b_w.dtype == tl.float64:
        b_delta = b_w - b_newer
        b_size = _magnitude(b_delta)
        s_bad += _sum((b_size >= 0xFFE0000000000000).to(tl.int32))
        s_top = tl.maximum(s_top, _top(b_size))
        s_l1 += _sum(tl.abs(b_delta))
        s_l2 += _sum(b_delta * b_delta)
        s_w1 += _sum(tl.abs(b_w))
        s_w2 += _sum(b_w * b_w)
        if PERSISTENCE:
            b_previous = b_newer - b_older
            s_dot += _sum(b_delta * b_previous)
            s_previous += _sum(b_previous * b_previous)
    else:
        b_w = _widen(b_w)
        b_newer = _widen(b_newer)
        b_delta = b_w - b_newer
        b_size = _magnitude(b_delta)
        b_top = _top(b_size)
        s_bad += _sum((b_size >= 0xFF000000).to(tl.int32))
        s_top = tl.maximum(s_top, b_top)

        e_delta = _scale_exponent(b_top)
        u_delta = _unscale(e_delta)
        b_delta = b_delta * _scale(e_delta)[None, :, None]
        s_l1 += _sum(tl.abs(b_delta)).to(tl.float64) * u_delta
        s_l2 += _sum(b_delta * b_delta).to(tl.float64) * u_delta * u_delta

        e_w = _scale_exponent(_top(_magnitude(b_w)))
        u_w = _unscale(e_w)
        b_w = b_w * _scale(e_w)[None, :, None]
        s_w1 += _sum(tl.abs(b_w)).to(tl.float64) * u_w
        s_w2 += _sum(b_w * b_w).to(tl.float64) * u_w * u_w

        if PERSISTENCE:
            b_previous = b_newer - _widen(b_older)
            e_previous = _scale_exponent(_top(_magnitude(b_previous)))
            u_previous = _unscale(e_previous)
            b_previous = b_previous * _scale(e_previous)[None, :, None]
            s_dot += _sum(b_delta * b_previous).to(tl.float64) * u_delta * u_previous
            s_previous += _sum(b_previous * b_previous).to(tl.float64) * u_previous * u_previous
    return s_l1, s_l2, s_top, s_w1, s_w2, s_bad, s_dot, s_previous


@triton.jit
def _chunk_sums(
    address,
    p_newer,  # [S] uint8, at the chunk's anchor
    p_older,
    length,
    aligned,
    ELEMENT: tl.constexpr,
    REFRESH: tl.constexpr,
    PERSISTENCE: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
):
    """The 8 sums of one chunk of elements of type ELEMENT, as fp64 scalars. Where REFRESH, its anchor is written."""
    p_newer = tl.multiple_of(p_newer.to(tl.pointer_type(ELEMENT), bitcast=True), 16)
    p_older = tl.multiple_of(p_older.to(tl.pointer_type(ELEMENT), bitcast=True), 16)
    V: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    ROW: tl.constexpr = T * V
    o_row = tl.arange(0, ROW)[None, :]
    zeros = tl.zeros([T], tl.float64)
    counts = tl.zeros([T], tl.int32)
    if ELEMENT.primitive_bitwidth == 64:
        sums = (zeros, zeros, tl.zeros([T], tl.uint64), zeros, zeros, counts, zeros, zeros)
    else:
        sums = (zeros, zeros, tl.zeros([T], tl.uint32), zeros, zeros, counts, zeros, zeros)

    # The hint is for the rounded address, which only full tiles use: they are aligned.
    p_w = tl.multiple_of((address & -16).to(tl.pointer_type(ELEMENT), bitcast=True), 16)
    full = tl.where(aligned, length // (R * ROW), 0)
    o = tl.arange(0, R)[:, None] * ROW + o_row
    for i_tile in range(0, full):
        i = i_tile * (R * ROW)
        sums = _add_tile(p_w + i, p_newer + i, p_older + i, o, o, sums, False, REFRESH, PERSISTENCE, T)
    # A row at a time: a whole tile, each element with its own address and mask, takes twice the registers.
    p_w = address.to(tl.pointer_type(ELEMENT), bitcast=True)
    for i in range(full * (R * ROW), length, ROW):
        m = o_row < tl.minimum(length - i, ROW).to(tl.int32)
        sums = _add_tile(p_w + i, p_newer + i, p_older + i, o_row, m, sums, True, REFRESH, PERSISTENCE, T)

    s_l1, s_l2, s_top, s_w1, s_w2, s_bad, s_dot, s_previous = sums
    return (
        tl.sum(s_l1, axis=0),
        tl.sum(s_l2, axis=0),
        _from_magnitude(tl.max(s_top, axis=0)),
        tl.sum(s_w1, axis=0),
        tl.sum(s_w2, axis=0),
        tl.sum(s_bad, axis=0).to(tl.float64),
        tl.sum(s_dot, axis=0),
        tl.sum(s_previous, axis=0),
    )


@triton.jit
def _add_partials(
    p_partials,  # [C + G, 8] float64
    first,
    last,
    ROWS: tl.constexpr,
):
    """The sum of rows first to last - 1 of the partial sums, [8]; the maximum in its column."""
    o_rows = tl.arange(0, ROWS)[:, None]
    o_columns = tl.arange(0, PARTIAL_COLUMNS)
    s_sums = tl.zeros([ROWS, PARTIAL_COLUMNS], tl.float64)
    s_tops = tl.zeros([ROWS, PARTIAL_COLUMNS], tl.uint64)
    for i in range(first, last, ROWS):
        # .cg: other programs wrote these, and the first-level cache may hold older values.
        b_partials = tl.load(
            p_partials + (i + o_rows) * PARTIAL_COLUMNS + o_columns[None, :],
            mask=i + o_rows < last,
            other=0.0,
            cache_modifier=".cg",
        )
        s_sums += b_partials
        s_tops = tl.maximum(s_tops, _magnitude(b_partials))
    b_maxima = _from_magnitude(tl.max(s_tops, axis=0))
    return tl.where(o_columns == MAXIMUM, b_maxima, tl.sum(s_sums, axis=0))


@triton.jit
def _is_last(p_counter, count):
    """Count this program. Returns true in the last of `count`, which also resets the counter to 0.

    All threads of the last program see what the threads of the others stored before.
    """
    tl.debug_barrier()
    last = tl.atomic_add(p_counter, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(p_counter, 0)
    return last


@triton.jit(do_not_specialize=["L", "row_bytes"])
def delta_norms_kernel(
    p_chunks,  # [C, 5] int64
    p_starts,  # [L + 1, 2] int64
    p_anchors,  # [1 or 2, S] uint8
    p_partials,  # [C + G, 8] float64
    p_counters,  # [G + L + 2] int32
    p_out,  # [L, K] float64
    L,
    row_bytes,  # S
    REFRESH: tl.constexpr,
    PERSISTENCE: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    p_chunk = p_chunks + i_chunk * CHUNK_COLUMNS
    address = tl.load(p_chunk)
    p_newer = p_anchors + tl.load(p_chunk + 1)
    length = tl.load(p_chunk + 2)
    layer = tl.load(p_chunk + 3)
    flags = tl.load(p_chunk + 4)
    SWAP: tl.constexpr = 1 if REFRESH and PERSISTENCE else 0
    chunks = tl.load(p_starts + L * 2)
    groups = tl.load(p_starts + L * 2 + 1)
    p_layers_done = p_counters + groups + L
    p_role = p_layers_done + 1
    p_older = p_newer
    if PERSISTENCE:
        role = tl.load(p_role).to(tl.int64)
        p_older = p_newer + (1 - role) * row_bytes
        p_newer = p_newer + role * row_bytes
    aligned = (flags & FLAG_ALIGNED) != 0
    code = flags & FLAG_DTYPE

    first_chunk = tl.load(p_starts + layer * 2)
    first_group = tl.load(p_starts + layer * 2 + 1)
    last_chunk = tl.load(p_starts + layer * 2 + 2)
    last_group = tl.load(p_starts + layer * 2 + 3)
    i_group = (i_chunk - first_chunk) // GROUP
    first = first_chunk + i_group * GROUP
    last = tl.minimum(first + GROUP, last_chunk)
    group = first_group + i_group

    # 16-bit elements are twice as many in a row, and fp32 once loaded.
    if code == FP32:
        sums = _chunk_sums(address, p_newer, p_older, length, aligned, tl.float32, REFRESH, PERSISTENCE, R, T)
    elif code == BF16:
        sums = _chunk_sums(address, p_newer, p_older, length, aligned, tl.bfloat16, REFRESH, PERSISTENCE, R // 2, T)
    elif code == FP16:
        sums = _chunk_sums(address, p_newer, p_older, length, aligned, tl.float16, REFRESH, PERSISTENCE, R // 2, T)
    else:
        sums = _chunk_sums(address, p_newer, p_older, length, aligned, tl.float64, REFRESH, PERSISTENCE, R, T)
    for i in tl.static_range(8):
        tl.store(p_partials + i_chunk * PARTIAL_COLUMNS + i, sums[i])

    o_columns = tl.arange(0, PARTIAL_COLUMNS)
    if _is_last(p_counters + group, last - first):
        b_group = _add_partials(p_partials, first, last, GROUP)
        tl.store(p_partials + (chunks + group) * PARTIAL_COLUMNS + o_columns, b_group)
        if _is_last(p_counters + groups + layer, last_group - first_group):
            b_layer = _add_partials(p_partials, chunks + first_group, chunks + last_group, GROUP)
            if PERSISTENCE:
                tl.store(p_out + layer * 8 + o_columns, b_layer)
            else:
                tl.store(p_out + layer * 6 + o_columns, b_layer, mask=o_columns < 6)
            if _is_last(p_layers_done, L):
                tl.store(p_role, tl.load(p_role) ^ SWAP)


def constants(*, refresh: bool, persistence: bool) -> dict[str, int | bool]:
    """Return the kernel's compile-time arguments."""
    return {
        "REFRESH": refresh,
        "PERSISTENCE": persistence,
        "R": TILE_ROWS,
        "T": 32 * WARPS,
        "GROUP": GROUP_CHUNKS,
    }


def delta_norms(table: DeltaTable, *, refresh: bool, out: Tensor | None = None) -> Tensor:
    """Compute the same as `kernels.reference.delta_norms`, with its arguments, result and errors, in one launch on a GPU.

    The launch is on the current stream, without synchronisation. It allocates only the result, or nothing with `out`, so it
    can be captured in a CUDA graph. Two runs give the same bits. The sums are fp64 over fp32 sums of 16 terms, added 6 deep:
    within 8 * 2^-24 of the reference, relative to the sum of the terms' magnitudes.
    """
    check_out(table, out)
    sums = torch.empty(len(table), table.columns, dtype=torch.float64, device=table.device) if out is None else out
    if len(table):
        with torch.cuda.device_of(table.chunks):
            delta_norms_kernel[(len(table.chunks),)](
                table.chunks,
                table.starts,
                table.anchors,
                table.partials,
                table.counters,
                sums,
                len(table),
                table.anchors.shape[1],
                **constants(refresh=refresh, persistence=table.persistence),
                **OPTIONS,
            )
    return sums
