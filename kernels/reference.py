"""The kernels in plain torch.

P parameter tensors, L layers, K columns (6, or 8 with persistence); n tensors of any kind; F filters of L weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import DeltaTable, anchor_of
from .digest_table import BLOCK_WORDS, WORD_BYTES, DigestTable
from .filter_table import FilterTable


def delta_norms(table: DeltaTable, *, refresh: bool, out: Tensor | None = None) -> Tensor:
    """Return sums over each layer's parameters w of their change since the anchors.

    delta = w - anchor, in float64 for fp64 parameters, else rounded once to float32. The previous delta is the difference
    of the two anchors. An element is counted as not finite if its delta is NaN or infinite: w or the anchor is, or their
    difference overflows. It is part of the other columns too, which follow IEEE arithmetic: NaN if any term is NaN.

    Args:
        table: a table that is not stale, as `ops.delta_norms` ensures.
        refresh: make w the anchor. With persistence the older anchor is overwritten, and the two swap roles.
        out: [L, K] float64, contiguous, on the table's device, to write to. Default: a new tensor

    Returns:
        [L, K] float64, for this rank's shards: l1(delta), l2(delta)^2, max |delta|, l1(w), l2(w)^2, number of elements
        not finite; with persistence also dot(delta, previous delta) and l2(previous delta)^2.

    Raises:
        ValueError: if `out` has another form.
    """
    check_out(table, out)
    sums = torch.zeros(len(table), table.columns, dtype=torch.float64, device=table.device)
    role = table.role
    newer = table.anchors[role]
    older = table.anchors[1 - role] if table.persistence else newer
    for entry, counted in zip(table.entries, table.counted, strict=True):
        row = sums[entry.layer]
        weight, anchor = entry.weight, anchor_of(newer, entry)
        if counted and weight.numel():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            w = weight.to(dtype)
            delta = (w - anchor.to(dtype)).double()
            w = w.double()
            row[0] += delta.abs().sum()
            row[1] += delta.square().sum()
            row[2] = torch.maximum(row[2], delta.abs().amax())
            row[3] += w.abs().sum()
            row[4] += w.square().sum()
            row[5] += delta.isfinite().logical_not().sum()
            if table.persistence:
                previous = (anchor.to(dtype) - anchor_of(older, entry).to(dtype)).double()
                row[6] += (delta * previous).sum()
                row[7] += previous.square().sum()
        if refresh:
            anchor_of(older, entry).copy_(weight)
    if refresh and table.persistence:
        table.counters[-1] = 1 - role
    return sums if out is None else out.copy_(sums)


def check_out(table: DeltaTable, out: Tensor | None) -> None:
    """Raise ValueError unless `out` is None or a contiguous [L, K] float64 tensor on the table's device."""
    if out is None:
        return
    wanted = (len(table), table.columns)
    if out.shape != wanted or out.dtype != torch.float64 or out.device != table.device or not out.is_contiguous():
        raise ValueError(
            f"delta_norms: out must be a contiguous {list(wanted)} float64 tensor on {table.device}, "
            f"got {list(out.shape)} {out.dtype} with strides {out.stride()} on {out.device}"
        )


def filter_norms(table: FilterTable, *, share: float) -> Tensor:
    """Return the sums of each filter's weights w, and how many of them are as good as zero.

    A weight counts as zero if |w| <= share * max |w| of its whole layer, in float64. The other columns follow IEEE
    arithmetic: NaN if any term is NaN. NaN is no zero, and a layer that has one has no zeros.

    Args:
        table: of weights that have not moved since it was built.
        share: of a layer's largest absolute value, within 0..1.

    Returns:
        [F, 4] float64: l1(w), l2(w)^2, max |w|, number of zeros.
    """
    rows = [table.segments.new_empty(0, 4, dtype=torch.float64)]
    for weight in table.weights:
        w = weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)
        if not w.numel():
            rows.append(w.new_zeros(len(w), 4, dtype=torch.float64))
            continue
        w = w.abs()
        largest = w.amax(1).double()
        l1 = torch.linalg.vector_norm(w, 1, dim=1, dtype=torch.float64)
        l2 = torch.linalg.vector_norm(w, 2, dim=1, dtype=torch.float64)
        zeros = (w.double() <= share * largest.amax()).sum(1).double()
        rows.append(torch.stack([l1, l2.square(), largest, zeros], dim=1))
    return torch.cat(rows)


def digests(table: DigestTable) -> Tensor:
    """Return a 64-bit digest of each tensor's bits: values that compare equal, such as 0.0 and -0.0, are told apart.

    A tensor's bytes, in the order of its memory, are 32-bit words w_i, the last one filled up with zeros. They form blocks
    of 4,096. The digest is sum_i w_i * a_(i mod 4096) * b_(i div 4096) + seed, modulo 2^64. a_j are odd keys of 32 bits and
    b_j of 64 bits: pseudo-random numbers that depend on the position only. The seed is a hash of the number of bytes and,
    unless the tensor is in row-major order, of its sizes and strides.

    What it sees: a change of bits within one word, two different words of one block that swap their places, and another
    number of zeros always change the digest. Other changes, if made without regard to the keys, cancel out with a
    probability of about 2^-31 at most, which changes of two words can reach. It is near 2^-64 where many words change by
    various amounts, as in a step of an optimizer. The keys are no secret: this is no protection against intent.

    Two tensors with the same digest need not have the same dtype or shape. The same values in another order of dimensions,
    such as channels_last, have another digest. A tensor whose memory has gaps or overlap is digested as a row-major copy.

    Args:
        table: a table that was refreshed, as `ops.digests` ensures.

    Returns:
        [n] int64, on the tensors' device.
    """
    sums = [word_sum(tensor) for tensor in table.memory]
    return table.seeds + torch.stack(sums) if sums else table.seeds.clone()


def word_sum(
    tensor: Tensor,  # dense in memory
) -> Tensor:
    """Return the sum over a tensor's words, each times its key, as one int64 number modulo 2^64."""
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    padded = flat.new_zeros(-(-len(flat) // WORD_BYTES) * WORD_BYTES)
    padded[: len(flat)] = flat
    words = padded.view(torch.int32).long() & 0xFFFFFFFF
    i = torch.arange(len(words), device=words.device)
    return (words * word_keys(i % BLOCK_WORDS) * block_keys(i // BLOCK_WORDS)).sum()


def word_keys(j: Tensor) -> Tensor:
    """Return the key of each position in a block: the finaliser of MurmurHash3, made odd."""
    x = j + 1
    x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return (x ^ x >> 16) | 1


def block_keys(block: Tensor) -> Tensor:
    """Return the key of each block: the finaliser of SplitMix64, made odd."""
    x = block + signed(0x9E3779B97F4A7C15)
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB)
    return (x ^ shifted(x, 31)) | 1


def signed(x: int) -> int:
    """Return the signed number with the same 64 bits."""
    return x - (x >> 63 << 64)


def shifted(x: Tensor, bits: int) -> Tensor:
    """Return x >> bits of int64 taken as unsigned."""
    return (x >> bits) & ((1 << 64 - bits) - 1)
