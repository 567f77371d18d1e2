"""Train a convolutional network on the cached outputs of the layers that have stopped learning."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("learndrop_ext")

if TYPE_CHECKING:
    from learndrop_ext.decide.deltas import Deltas, LayerChange
    from learndrop_ext.decide.forecast import Forecast, RunCosts
    from learndrop_ext.decide.policy import Budget, Decision, Fixed, Policy, Situation, StoppedLearning
    from learndrop_ext.decide.rules import AutoFreeze, FreezeOut, LinearFreeze, PipeTransformer
    from learndrop_ext.decide.scores import score, scores
    from learndrop_ext.forward.chain import Chain, split_layers
    from learndrop_ext.forward.graphs import cuda_graphs
    from learndrop_ext.history import Record
    from learndrop_ext.ops import backend_info
    from learndrop_ext.rows.config import CacheConfig
    from learndrop_ext.scheduler import DropScheduler

__all__ = [
    "AutoFreeze",
    "Budget",
    "CacheConfig",
    "Chain",
    "Decision",
    "Deltas",
    "DropScheduler",
    "Fixed",
    "Forecast",
    "FreezeOut",
    "LayerChange",
    "LinearFreeze",
    "PipeTransformer",
    "Policy",
    "Record",
    "RunCosts",
    "Situation",
    "StoppedLearning",
    "__version__",
    "backend_info",
    "cuda_graphs",
    "score",
    "scores",
    "split_layers",
]

#: Where each public name is defined. A name is imported when it is first asked for, and torch with it: the command line
#: can then take Ctrl-C while torch is imported.
HOMES = {
    "rows.config": ("CacheConfig",),
    "decide.deltas": ("Deltas", "LayerChange"),
    "decide.forecast": ("Forecast", "RunCosts"),
    "decide.policy": ("Budget", "Decision", "Fixed", "Policy", "Situation", "StoppedLearning"),
    "decide.rules": ("AutoFreeze", "FreezeOut", "LinearFreeze", "PipeTransformer"),
    "decide.scores": ("score", "scores"),
    "forward.chain": ("Chain", "split_layers"),
    "forward.graphs": ("cuda_graphs",),
    "history": ("Record",),
    "ops": ("backend_info",),
    "scheduler": ("DropScheduler",),
}


def __getattr__(name: str) -> Any:
    for home, names in HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"learndrop_ext.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'learndrop_ext' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
