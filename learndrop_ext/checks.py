"""What DropScheduler refuses, and what it warns about."""

from __future__ import annotations

import inspect
import operator
import os
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.data.rowset import RowSet
from learndrop_ext.decide.deltas import LayerChange
from learndrop_ext.decide.policy import Decision
from learndrop_ext.graph.chain import Chain, user_hooks
from learndrop_ext.graph.live import LiveModel

#: Model -> the scheduler that has dropped layers of it.
HOLDERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def check_free(model: nn.Module, but: object = None) -> None:
    """Raise ValueError if a scheduler other than `but` has dropped layers of the model."""
    holder = HOLDERS.get(model)
    other = holder() if holder is not None else None
    if other is not None and other is not but:
        raise ValueError(
            f"DropScheduler: model must have no dropped layers, got one of which another DropScheduler has dropped "
            f"{other.prefix}: close() that one first"
        )


def check_folder(config: CacheConfig) -> None:
    """Raise ValueError for a `disk_dir` that cannot be written to."""
    folder = config.disk_dir
    if folder is not None and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(
            f"DropScheduler: cache must have a disk_dir that is a folder to write to, got CacheConfig(disk_dir={folder!r})"
        )


def check_settings(policy: Any, epochs: Any, autocast: Any) -> None:
    """Raise TypeError or ValueError for a policy that is not callable, or a bad number of epochs or autocast dtype."""
    if isinstance(policy, type) or (policy is not None and not callable(policy)):
        raise TypeError(f"DropScheduler: policy must be a function of a Situation, got {policy!r}")
    if epochs is not None and (not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1):
        raise ValueError(f"DropScheduler: epochs must be a whole number >= 1 or None, got {epochs!r}")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"DropScheduler: autocast must be torch.bfloat16, torch.float16 or None, got {autocast!r}")


def input_name(model: nn.Module) -> str:
    """Return the name of the first argument of the model's forward."""
    return next(iter(inspect.signature(model.forward).parameters), "x")


def checked_decision(decision: Any, prefix: int, last: int) -> Decision:
    """Return a policy's decision with a plain int. Raises TypeError or ValueError for one that cannot be followed."""
    if not isinstance(decision, Decision):
        raise TypeError(f"drop.step: policy must return a Decision, got {type(decision).__name__}")
    try:
        wanted = operator.index(decision.prefix)
    except TypeError:
        raise TypeError(f"drop.step: policy must decide on a whole number of layers, got {decision.prefix!r}") from None
    if not prefix <= wanted <= last:
        raise ValueError(f"drop.step: policy must decide on {prefix}..{last} layers, got {wanted}")
    return Decision(wanted, decision.reason)


def check_trained(model: LiveModel, samples: int) -> None:
    """Raise RuntimeError if nothing was trained, or the model was not called on the loader's batches."""
    if not samples:
        raise RuntimeError("drop.step: wanted batches of drop.loader since the last step, got none")
    if model.calls == 0:
        got = "calls of it in eval mode only: call model.train()" if model.eval_calls else "no call of it"
        raise RuntimeError(f"drop.step: wanted drop.model to be trained on drop.loader's batches, got {got}")
    if foreign := model.take_foreign():
        raise RuntimeError(
            f"drop.step: drop.model must get the batch's input as drop.loader gave it, got {foreign}; what the loop "
            "does to images it would also do to cached rows: move it into the dataset or the model, or set "
            "check_input=False if it is meant for both"
        )


def check_finite(names: Sequence[str], changes: Sequence[LayerChange]) -> None:
    """Raise ValueError for weights that are not finite, naming their layer."""
    for name, change in zip(names, changes, strict=True):
        if change.nonfinite:
            raise ValueError(f"drop.step: weights must be finite, got {change.nonfinite} NaN or inf in layer {name}")


def warn_unseen(model: nn.Module, chain: Chain, first: int, prefix: int) -> None:
    """Warn about hooks in layers first..prefix-1, and about tensors that their forward stores in attributes."""
    inside = set(chain.segment(first, prefix).modules())
    found = []
    for name, module in model.named_modules():
        if module in inside:
            if any(user_hooks(module).values()):
                found.append(f"the hooks of {name}")
            found += [f"{name}.{attribute}" for key, attribute in sorted(chain.stored) if key == id(module)]
    if found:
        warnings.warn(
            f"drop.step: dropped layers run only to compute rows, so a loss must not use {', '.join(found)}, which "
            "may be of another batch",
            RuntimeWarning,
            stacklevel=6,
        )


def warn_untrained(model: nn.Module, chain: Chain, prefix: int) -> None:
    """Warn if the first `prefix` layers, about to be dropped before the first step, have a norm that was never trained."""
    inside = set(chain.prefix(prefix).modules())
    for name, module in model.named_modules():
        if module in inside and _is_as_made(module):
            warnings.warn(
                "DropScheduler: layers dropped before the first step stay as they are, so they must be pretrained, and "
                f"{name} ({type(module).__name__}), in the first {prefix} of {len(chain)} layers, never was: it has the "
                "values it was made with. Load the pretrained weights first, or drop after some epochs",
                RuntimeWarning,
                stacklevel=6,
            )
            return


def _is_as_made(module: nn.Module) -> bool:
    """Whether a norm has the values that a new one has. A single training step changes them."""
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if isinstance(mean, torch.Tensor) and isinstance(variance, torch.Tensor):
        return not bool(mean.any()) and bool((variance == 1).all())
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) and isinstance(module.weight, torch.Tensor):
        bias = getattr(module, "bias", None)
        return bool((module.weight == 1).all()) and (bias is None or not bool(bias.any()))
    return False


def warn_saturated(rows: RowSet, chain: Chain) -> None:
    """Warn, once in a run, if rows were clamped to the largest fp16 number."""
    if rows.said_saturated or rows.cache is None or not rows.cache.saturated:
        return
    rows.said_saturated = True
    warnings.warn(
        f"drop.step: activations after {chain.names[rows.cut - 1]} are larger than 65504 and were clamped to it by the "
        "codec fp16; use cache='bf16' or 'fp32'",
        RuntimeWarning,
        stacklevel=3,
    )
