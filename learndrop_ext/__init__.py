"""Train a convolutional network on the cached outputs of the layers that have stopped learning."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("learndrop_ext")

__all__ = ["__version__"]
