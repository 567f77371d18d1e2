"""What DropScheduler refuses, and what it warns about."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from learndrop_ext.decide.deltas import LayerChange
from learndrop_ext.decide.policy import Decision
from learndrop_ext.forward.bypass import Bypass
from learndrop_ext.forward.chain import Chain
from learndrop_ext.guards import held_by
from learndrop_ext.kernels.chunks import DTYPE_CODES
from learndrop_ext.kernels.shards import as_sharded
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.warn import warn

#: Model -> the scheduler that has dropped layers of it, and what makes them live again if it is gone.
HOLDERS: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], Callable[[], Any]]] = weakref.WeakKeyDictionary()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of all parameters of a model. Raises TypeError or ValueError for what is no such model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"DropScheduler: model must be a torch.nn.Module, got {type(model).__name__}")
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        found = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise ValueError(f"DropScheduler: model must have its parameters on one device, got {found}")
    return devices.pop()


def check_free(model: nn.Module, but: object = None) -> None:
    """Raise ValueError if a scheduler other than `but` has dropped layers of the model."""
    holder, release = HOLDERS.get(model, (None, None))
    other = holder() if holder is not None else None
    if other is None and release is not None:
        release()
        HOLDERS.pop(model)
    if other is not None and other is not but:
        raise ValueError(
            f"DropScheduler: model must have no dropped layers, got one of which another DropScheduler has dropped "
            f"{other.prefix}: close() that one first"
        )


def make_folder(config: CacheConfig) -> None:
    """Make the folder of `store` if it is not there. Raise ValueError for one that cannot be written to."""
    folder = config.store
    if folder is None:
        return
    with contextlib.suppress(OSError):
        os.makedirs(folder, exist_ok=True)
    if not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(
            f"DropScheduler: cache must have a store that is a folder to write to, got CacheConfig(store={str(folder)!r})"
        )


def check_settings(model: nn.Module, policy: Any, epochs: Any, call: Any) -> None:
    """Raise TypeError or ValueError for a policy or a call that is not callable, a bad number of epochs, a model that takes
    more than images where no call is given, a default device, sharded parameters, or ones that train and whose changes
    cannot be measured."""
    if isinstance(policy, type) or (policy is not None and not callable(policy)):
        raise TypeError(f"DropScheduler: policy must be a function of a Situation, got {policy!r}")
    if epochs is not None and (not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1):
        raise ValueError(f"DropScheduler: epochs must be a whole number >= 1 or None, got {epochs!r}")
    if call is not None and not callable(call):
        raise TypeError(f"DropScheduler: call must be a function of the model and a batch, got {call!r}")
    if call is None:
        _check_takes_images(model)
    if (default := torch.get_default_device()).type != "cpu":
        raise ValueError(
            f"DropScheduler: torch's default device must be the CPU, where samples are numbered, got {default}: take "
            "torch.set_default_device away, and move the model; drop.loader gives batches on the model's device"
        )
    for name, parameter in model.named_parameters():
        if as_sharded(parameter) is not None:
            raise ValueError(
                f"DropScheduler: model must have whole parameters, got a sharded one (FSDP, tensor parallel), {name}; give "
                "DistributedDataParallel as wrap= instead"
            )
        if parameter.requires_grad and parameter.dtype not in DTYPE_CODES:
            raise TypeError(
                "DropScheduler: model must have parameters of fp32, bf16, fp16 or fp64 where they train, got "
                f"{parameter.dtype} in {name}; keep complex ones as real ones, and torch.view_as_complex in forward"
            )


def _check_takes_images(model: nn.Module) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # a forward without a Python signature
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ValueError(
            "DropScheduler: call must say how the loop calls a model that does not take the images alone, as in "
            f"call=lambda model, batch: model(...), got {type(model).__name__}.forward{signature}: {error}"
        ) from None


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
    return dataclasses.replace(decision, prefix=wanted)


def check_trained(bypass: Bypass, samples: int) -> None:
    """Raise RuntimeError if nothing was trained, or the model was not called on the loader's batches."""
    if not samples:
        raise RuntimeError("drop.step: wanted batches of drop.loader since the last step, got none")
    if bypass.cuts and not bypass.calls:
        raise RuntimeError(
            "drop.step: wanted the model to be trained on drop.loader's batches, got no call of it on one in train mode"
        )


def traces_of(model: nn.Module) -> list[int]:
    """Return what a training step changes: how often weights, gradients and buffers were written to."""
    tensors = [t for p in model.parameters() for t in (p, p.grad)] + list(model.buffers())
    return [-1 if tensor is None else tensor._version for tensor in tensors]


def check_touched(model: nn.Module, traces: Sequence[int], changes: Sequence[LayerChange]) -> None:
    """Raise RuntimeError if nothing of the model was trained since `traces_of` gave `traces`."""
    if traces_of(model) == list(traces) and not any(change.l2 for change in changes):
        raise RuntimeError(
            "drop.step: wanted the model to be trained on drop.loader's batches, got the weights, gradients and buffers of "
            "the last step"
        )


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a model's parameters by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_widths(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Raise RuntimeError if parameters have other shapes than `shapes_of` gave."""
    changed = sum(shape != shapes.get(name, shape) for name, shape in shapes_of(model).items())
    if changed:
        raise RuntimeError(
            "drop.step: wanted the widths that the layers were recorded with, got other shapes of "
            f"{changed} parameters: call drop.step() first, then narrow the model and call drop.follow_widths()"
        )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise TypeError or ValueError for an optimizer with none of the model's parameters."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"DropScheduler: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = held_by(optimizer)
    own = list(model.parameters())
    if not any(id(p) in held for p in own):
        raise ValueError(f"DropScheduler: optimizer must hold the model's parameters, got none of its {len(own)}")


def check_precision(chain: Chain) -> None:
    """Raise ValueError for a model whose rows no codec holds."""
    for layer in chain:
        dtype = None if layer.cut is None else layer.cut.dtype
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"DropScheduler: model must compute in float32, bfloat16 or float16 where rows are kept, got {dtype} after "
                f"{layer.name}; give cache=None to freeze layers without rows"
            )


def check_finite(names: Sequence[str], changes: Sequence[LayerChange]) -> None:
    """Raise ValueError for weights that are not finite, naming their layer."""
    for name, change in zip(names, changes, strict=True):
        if change.nonfinite:
            raise ValueError(f"drop.step: weights must be finite, got {change.nonfinite} NaN or inf in layer {name}")


def warn_untrained(model: nn.Module, chain: Chain, prefix: int) -> None:
    """Warn if the first `prefix` layers, about to be dropped before the first step, have a norm that was never trained."""
    inside = set(chain.prefix(prefix).modules())
    for name, module in model.named_modules():
        if module in inside and _is_as_made(module):
            warn(
                "DropScheduler: layers dropped before the first step stay as they are, so they must be pretrained, and "
                f"{name} ({type(module).__name__}), in the first {prefix} of {len(chain)} layers, never was: it has the "
                "values it was made with. Load the pretrained weights first, or drop after some epochs"
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


def warn_saturated(layer: str) -> None:
    """Warn that rows behind a layer were clamped to the largest fp16 number."""
    warn(
        f"drop.step: activations after {layer} are larger than 65504 and were clamped to it by the codec fp16; use "
        "cache='bf16' or 'fp32'"
    )
