"""Warnings that name the user's line."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Give a RuntimeWarning at the first frame outside of this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "learndrop_ext",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)
