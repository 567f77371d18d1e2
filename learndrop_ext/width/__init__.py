"""Taking filters, neurons and weights out of a network while it trains: see docs/width.md."""

from learndrop_ext.width.criteria import CRITERIA, SCOPES, Below, Coreset, Criterion, Scope, Seen, Zeros
from learndrop_ext.width.scheduler import WidthRecord, WidthScheduler
from learndrop_ext.width.schedules import Iterative, Linear, OneCycle, OneShot, Schedule, Tolerance
from learndrop_ext.width.weights import in_norms, orthogonality, out_norms, sparsify

__all__ = [
    "CRITERIA",
    "SCOPES",
    "Below",
    "Coreset",
    "Criterion",
    "Iterative",
    "Linear",
    "OneCycle",
    "OneShot",
    "Schedule",
    "Scope",
    "Seen",
    "Tolerance",
    "WidthRecord",
    "WidthScheduler",
    "Zeros",
    "in_norms",
    "orthogonality",
    "out_norms",
    "sparsify",
]
