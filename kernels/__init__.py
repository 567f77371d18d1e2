"""Kernels of learndrop_ext that know torch and Triton and nothing of the package around them."""

from __future__ import annotations

if __name__ != "learndrop_ext.kernels":
    raise ImportError(f"kernels must be imported as learndrop_ext.kernels, got {__name__}")
