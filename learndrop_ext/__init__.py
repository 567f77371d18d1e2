"""Train a convolutional network on the cached outputs of the layers that have stopped learning."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("learndrop_ext")

from learndrop_ext.cache.cache import ActivationCache
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.decide.deltas import Deltas, LayerChange
from learndrop_ext.decide.forecast import Forecast, RunCosts
from learndrop_ext.decide.policy import Budget, Decision, Fixed, Policy, Situation, StoppedLearning
from learndrop_ext.decide.scores import score, scores
from learndrop_ext.graph.chain import Chain, Layer, split_layers
from learndrop_ext.history import Record
from learndrop_ext.ops import backend_info
from learndrop_ext.scheduler import DropScheduler

__all__ = [
    "ActivationCache",
    "Budget",
    "CacheConfig",
    "Chain",
    "Decision",
    "Deltas",
    "DropScheduler",
    "Fixed",
    "Forecast",
    "Layer",
    "LayerChange",
    "Policy",
    "Record",
    "RunCosts",
    "Situation",
    "StoppedLearning",
    "__version__",
    "backend_info",
    "score",
    "scores",
    "split_layers",
]
