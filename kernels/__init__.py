"""Kernels that depend on torch and Triton only, not on the rest of the package."""

from __future__ import annotations

if __name__ != "learndrop_ext.kernels":
    raise ImportError(f"kernels must be imported as learndrop_ext.kernels, got {__name__}")
