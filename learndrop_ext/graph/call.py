"""How a training loop calls a model: which argument is the image, and what the others are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

#: batch -> positional and keyword arguments of the model.
Inputs = Callable[[Any], tuple[Sequence[Any], Mapping[str, Any]]]

#: Types of arguments other than tensors. Their values are the same in every call.
_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


class ModelCall:
    """One way to call a model, taken from an example.

    Arguments are identified by the parameters they are bound to, so `model(x, meta)` and `model(meta=meta, image=x)` are
    the same call. One of the tensors in them, possibly inside tuples, lists and dicts, is the image. The other tensors are
    further inputs, which differ from call to call. Everything else is constant.

    Args:
        model: the model.
        image: [B, ...], the example's image.
        args, kwargs: the example's arguments, with the image itself among them once.

    Attributes:
        image: the example's image.
        others: the example's other tensors, in the order of the model's parameters.
        names: names of the other tensors.

    Raises:
        TypeError: the model's forward does not take these arguments, or one is neither a tensor nor a plain value.
        ValueError: the image is not among the arguments, or more than once.
    """

    def __init__(self, model: nn.Module, image: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._signature = inspect.signature(model.forward)
        try:
            bound = self._bound(args, kwargs)
        except TypeError as error:
            raise TypeError(
                f"split_layers: inputs must be arguments of {type(model).__name__}.forward{self._signature}, got "
                f"{_kinds(args, kwargs)}: {error}"
            ) from None
        pairs, self._spec = pytree.tree_flatten_with_path(bound)
        self._leaves = [leaf for _, leaf in pairs]
        self._names = [re.sub(r"^\['(\w+)'\]", r"\1", pytree.keystr(path)) for path, _ in pairs]
        places = [i for i, leaf in enumerate(self._leaves) if leaf is image]
        if len(places) != 1:
            raise ValueError(
                "split_layers: inputs must have the batch's image itself among them, once, as drop.loader gives it; got "
                f"it {len(places)} times in {_kinds(args, kwargs)}"
            )
        self._place = places[0]
        defaults = [p.default for p in self._signature.parameters.values()]
        for name, leaf in zip(self._names, self._leaves, strict=True):
            if not isinstance(leaf, (torch.Tensor, *_PLAIN)) and not any(leaf is default for default in defaults):
                raise TypeError(
                    "split_layers: inputs must be tensors, plain values, or tuples, lists and dicts of such, got a "
                    f"{type(leaf).__name__} as {name}"
                )
        self._tensors = [i for i, v in enumerate(self._leaves) if isinstance(v, torch.Tensor) and i != self._place]
        self.image = image
        self.others: tuple[torch.Tensor, ...] = tuple(self._leaves[i] for i in self._tensors)
        self.names = tuple(self._names[i] for i in self._tensors)

    @property
    def shapes(self) -> tuple[tuple[int | None, ...], ...]:
        """Shapes of the other tensors; None stands for the batch size."""
        return tuple((None, *t.shape[1:]) if self._per_sample(t) else tuple(t.shape) for t in self.others)

    def first(self, count: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the image and the others of the example's first `count` samples, repeating them if there are fewer.

        A tensor with as many rows as the image has one per sample; any other is the same for every batch.
        """
        image, *others = (_cycled(t, count) if self._per_sample(t) else t for t in (self.image, *self.others))
        return image, tuple(others)

    def arguments(self, image: Any, others: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments of a call with this image and these others."""
        leaves = list(self._leaves)
        for place, value in zip((self._place, *self._tensors), (image, *others), strict=True):
            leaves[place] = value
        bound = self._signature.bind_partial()
        bound.arguments.update(pytree.tree_unflatten(leaves, self._spec))
        return bound.args, bound.kwargs

    def split(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the image and the other tensors of a call.

        Raises:
            TypeError: the call differs from the example in structure, in a constant or in the kind of a tensor.
        """
        try:
            leaves, spec = pytree.tree_flatten(self._bound(args, kwargs))
        except TypeError as error:
            raise TypeError(f"drop.model: wanted the arguments that inputs= gives, got others: {error}") from None
        if spec != self._spec:
            raise TypeError(
                f"drop.model: wanted the arguments that inputs= gives, {', '.join(self._names)}, in their structure; got "
                f"{_kinds(args, kwargs)}"
            )
        for i, (name, was, now) in enumerate(zip(self._names, self._leaves, leaves, strict=True)):
            if i == self._place and isinstance(now, torch.Tensor):
                continue  # a row has another shape
            if not _alike(was, now):
                raise TypeError(
                    f"drop.model: wanted {name} as inputs= gives it, {_described(was)}, got {_described(now)}; only "
                    "tensors may have other values in another call"
                )
        return leaves[self._place], tuple(leaves[i] for i in self._tensors)

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                bound.arguments[name] = dict(sorted(bound.arguments[name].items()))
        return dict(bound.arguments)

    def _per_sample(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() > 0 and len(tensor) == len(self.image)


def arguments_of(inputs: Inputs | None, batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]] | None:
    """Return `inputs(batch)`, or None if `inputs` is None. Raises TypeError if it does not return (args, kwargs)."""
    if inputs is None:
        return None
    if not callable(inputs):
        raise TypeError(f"DropScheduler: inputs must be a function batch -> (args, kwargs), got {inputs!r}")
    found = inputs(batch)
    pair = isinstance(found, tuple) and len(found) == 2
    if not pair or not isinstance(found[0], tuple | list) or not isinstance(found[1], Mapping):
        kinds = f"({', '.join(type(v).__name__ for v in found)})" if isinstance(found, tuple) else type(found).__name__
        raise TypeError(f"DropScheduler: inputs must return (args, kwargs), a tuple and a dict, got {kinds}")
    return found


class CalledWith(nn.Module):
    """The model called with its tensors, the image first. All other arguments are constants of the call."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        args, kwargs = self.call.arguments(x, others)
        return self.model(*args, **kwargs)


def _cycled(tensor: torch.Tensor, count: int) -> torch.Tensor:
    if count <= len(tensor):
        return tensor[:count]
    return torch.cat([tensor] * (count // len(tensor)) + [tensor[: count % len(tensor)]])


def _alike(was: Any, now: Any) -> bool:
    if isinstance(was, torch.Tensor):
        return isinstance(now, torch.Tensor) and (was.dtype, was.dim()) == (now.dtype, now.dim())
    return now is was or (type(now) is type(was) and isinstance(was, _PLAIN) and bool(now == was))


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of {value.dim()} dimensions"
    return repr(value) if isinstance(value, _PLAIN) else f"a {type(value).__name__}"


def _kinds(args: Any, kwargs: Any) -> str:
    kinds = [type(v).__name__ for v in args] + [f"{k}={type(v).__name__}" for k, v in kwargs.items()]
    return f"({', '.join(kinds)})"
