"""Digests in Triton: one launch for all tensors of a table.

One program sums the words of one chunk, block by block, and adds its sum to its tensor's digest. Sums are modulo 2^64, so
their order does not matter. The definition is in `reference.digests`.

Prefixes: `i_` index, `o_` offsets, `m_` mask, `p_` pointer, `b_` values in registers, `s_` sums.
Letters: n tensors, C chunks; R rows of a block, T threads of a row.
"""

# What Triton compiles has no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .digest_table import BLOCK_WORDS, WORD_BYTES, DigestTable

# 256 threads read a row of 4 KiB in vectors of 16 bytes, and a block of 16 KiB in four of them. A block's keys are made once
# for the two blocks of a chunk. That leaves about 9 instructions for a word of 4 bytes, of which an H200 has time for 13 at
# 4.3 TB/s (132 multiprocessors, 64 integer instructions in a cycle of 0.6 ns).
WARPS = 8

# There are no floats to fuse: given because Triton 3.9 warns if the default is used.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}

COLUMNS = tl.constexpr(4)
WORDS = tl.constexpr(BLOCK_WORDS)
WORD = tl.constexpr(WORD_BYTES)


@triton.jit
def _word_keys(o):
    """Keys of the positions in a block, uint32."""
    x = o.to(tl.uint32) + 1
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return (x ^ (x >> 16)) | 1


@triton.jit
def _block_key(i_block):
    """Key of a block, uint64."""
    x = i_block.to(tl.uint64) + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return (x ^ (x >> 31)) | 1


@triton.jit
def _block_sums(
    b_words,  # [R, T * 4] uint32
    b_keys,
    i_block,
    T: tl.constexpr,
):
    """In each thread: the sum of a block's words times their keys; [R, T * 4] to [T] uint64."""
    b_products = b_words.to(tl.uint64) * b_keys.to(tl.uint64)
    # The vector that each thread holds of each row becomes an axis, and nothing moves.
    b_products = tl.reshape(b_products, [b_products.shape[0], T, b_products.shape[1] // T])
    return tl.sum(tl.sum(b_products, axis=0), axis=1) * _block_key(i_block)


@triton.jit
def digests_kernel(
    p_chunks,  # [C, 4] int64
    p_out,  # [n] int64, the seeds
    T: tl.constexpr,
):
    p_chunk = p_chunks + tl.program_id(0).to(tl.int64) * COLUMNS
    address = tl.load(p_chunk)
    length_bytes = tl.load(p_chunk + 1)
    i_block = tl.load(p_chunk + 2)
    i_tensor = tl.load(p_chunk + 3)

    ROW: tl.constexpr = T * 4
    o = tl.arange(0, WORDS // ROW)[:, None] * ROW + tl.arange(0, ROW)[None, :]
    b_keys = _word_keys(o)
    s_words = tl.zeros([T], tl.uint64)

    # The hint is for the rounded address, which only full blocks use: they are aligned.
    p_words = tl.multiple_of((address & -16).to(tl.pointer_type(tl.uint32), bitcast=True), 16)
    blocks = (length_bytes + WORDS * WORD - 1) // (WORDS * WORD)
    full = tl.where(address % 16 == 0, length_bytes // (WORDS * WORD), 0)
    for i in range(0, full):
        s_words += _block_sums(tl.load(p_words + i * WORDS + o), b_keys, i_block + i, T)
    if (address | length_bytes) % WORD == 0:
        p_words = address.to(tl.pointer_type(tl.uint32), bitcast=True)
        for i in range(full, blocks):
            m = o < length_bytes // WORD - i * WORDS
            s_words += _block_sums(tl.load(p_words + i * WORDS + o, mask=m, other=0), b_keys, i_block + i, T)
    else:
        p_bytes = address.to(tl.pointer_type(tl.uint8), bitcast=True)
        for i in range(full, blocks):
            b_words = tl.zeros(o.shape, tl.uint32)
            for byte in tl.static_range(WORD):
                o_byte = (i * WORDS + o) * WORD + byte
                b_byte = tl.load(p_bytes + o_byte, mask=o_byte < length_bytes, other=0)
                b_words |= b_byte.to(tl.uint32) << (8 * byte)
            s_words += _block_sums(b_words, b_keys, i_block + i, T)
    tl.atomic_add(p_out + i_tensor, tl.sum(s_words, axis=0).to(tl.int64, bitcast=True), sem="relaxed")


def constants() -> dict[str, int]:
    """Return the kernel's compile-time arguments."""
    return {"T": 32 * WARPS}


def digests(table: DigestTable) -> Tensor:
    """Compute the same as `kernels.reference.digests`, with its argument and result, in one launch on a GPU.

    The launch is on the current stream after a copy of the seeds, without synchronisation. It can be captured in a CUDA
    graph, and launches on several streams can share a table.
    """
    out = table.seeds.clone()
    if len(table.chunks):
        with torch.cuda.device_of(table.chunks):
            digests_kernel[(len(table.chunks),)](table.chunks, out, **constants(), **OPTIONS)
    return out
