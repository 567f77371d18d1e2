"""torch.fx proxies that know their values."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import fx

_METADATA_ATTRIBUTES = frozenset(("ndim", "device", "layout", "is_cuda", "is_nested", "is_quantized", "is_sparse"))


class ValueSource(Protocol):
    """What proxies need of the tracer."""

    def metadata(self, proxy: TracedValue, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def constants(self, found: Any) -> Any: ...
    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


class Values:
    """The values of a node for each of the two batches."""

    def __init__(self, pair: tuple[Any, Any]) -> None:
        self.pair = pair


class TracedShape(tuple[Any, ...]):
    """A shape of constants, and of proxies for sizes that depend on the batch."""

    tracer: ValueSource

    def __getitem__(self, index: Any) -> Any:
        found = tuple.__getitem__(self, index)
        return self.tracer.constants(found)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tracer.constants(tuple(tuple.__iter__(self))))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, tuple) and len(self) == len(other) and all(map(operator.eq, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__


class TracedValue(fx.Proxy):
    """A proxy that knows its values."""

    def __init__(self, node: fx.Node, tracer: ValueSource, values: Values) -> None:
        super().__init__(node, tracer)  # type: ignore[arg-type]
        self.source = tracer
        self.values = values

    def __getattr__(self, name: str) -> Any:
        tracer: ValueSource = self.source
        if isinstance(self.values.pair[0], torch.Tensor):
            if name == "shape":
                return tracer.metadata(self, "size", (), {})
            if name in _METADATA_ATTRIBUTES:
                return getattr(self.values.pair[0], name)
        if name.startswith("__") or callable(getattr(self.values.pair[0], name)):
            return super().__getattr__(name)  # a method: recorded when it is called
        return tracer.create_proxy("call_function", getattr, (self, name), {})

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))  # type: ignore[index]

    def __len__(self) -> int:
        one, two = (
            len(v) if isinstance(v, tuple | list) or (isinstance(v, torch.Tensor) and v.dim()) else None
            for v in self.values.pair
        )
        if one is None or one != two:
            raise fx.proxy.TraceError("the length of a traced value was asked for")
        return one
