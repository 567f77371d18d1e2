"""The only package that sees the compiled extension `_C` and the Triton kernels."""

from learndrop_ext.ops.backend import backend_info, free_bytes
from learndrop_ext.ops.delta_norms import delta_norms
from learndrop_ext.ops.digests import TensorDigests, digests
from learndrop_ext.ops.filter_norms import filter_norms
from learndrop_ext.ops.rows import (
    CODECS,
    DTYPES,
    append_rows,
    gather_known_rows,
    gather_rows,
    row_bytes,
    row_stride,
)

__all__ = [
    "CODECS",
    "DTYPES",
    "TensorDigests",
    "append_rows",
    "backend_info",
    "delta_norms",
    "digests",
    "filter_norms",
    "free_bytes",
    "gather_known_rows",
    "gather_rows",
    "row_bytes",
    "row_stride",
]
