"""Observes what user code does while it is traced, other than calling operations: modes, random numbers, attributes."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


class Observer(Protocol):
    """Receives reads and writes of attributes, and uses of autocast, unless it is `executing`."""

    executing: bool

    def note_read(self, module: nn.Module, name: str, value: Any) -> None: ...
    def note_write(self, module: nn.Module, name: str) -> None: ...
    def note_autocast(self) -> None: ...


def random_state(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the global generators of Python, numpy and torch, for comparison."""
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    state = (random.getstate(), torch.get_rng_state().numpy().tobytes(), keys.tobytes(), kind, *rest)
    if device.type == "cuda":
        return (*state, torch.cuda.get_rng_state(device).numpy().tobytes())
    return state


def modes() -> tuple[Any, ...]:
    """Return the modes of torch on which an operation depends beside its arguments."""
    attention = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._len_torch_function_stack(),
        (attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled(), attention.math_sdp_enabled()),
    )


@contextlib.contextmanager
def observed(tracer: Observer) -> Iterator[None]:
    """Report attributes read from modules and set on them, and uses of autocast, to the tracer."""
    get_thread = threading.get_ident
    thread = get_thread()
    put = nn.Module.__setattr__
    enter: Any = torch.autocast.__enter__

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        # Most reads happen in calls in which nothing is recorded.
        if not tracer.executing and get_thread() == thread:
            tracer.note_read(module, name, value)
        return value

    def write(module: nn.Module, name: str, value: Any) -> None:
        if get_thread() == thread:
            tracer.note_write(module, name)
        put(module, name, value)

    def enter_autocast(context: torch.autocast) -> Any:
        tracer.note_autocast()
        return enter(context)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    nn.Module.__setattr__ = write  # type: ignore[method-assign,assignment]
    torch.autocast.__enter__ = enter_autocast  # type: ignore[method-assign]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = put  # type: ignore[method-assign]
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]
