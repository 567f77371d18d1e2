"""CUDA graphs without a GPU: operations of the CPU are recorded, and replayed on the same memory without Python.

With it, `torch.cuda.make_graphed_callables` runs as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from learndrop_ext.forward import graphs

ATEN = torch.ops.aten
WAITING = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.equal, ATEN.is_nonzero}


def _plain(values: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(values) if type(t) in (torch.Tensor, torch.nn.Parameter)]


class Tape(TorchDispatchMode):
    """A graph: in it while it is captured."""

    captured: ClassVar[list[Tape]] = []

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Any] = []
        self.replays = 0
        Tape.captured.append(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in _plain((args, kwargs))}
        made = [t for t in _plain(out) if t.untyped_storage().data_ptr() not in held]
        if len(_plain(out)) == sum(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(out)):
            self.steps.append((func, args, kwargs or {}, made))
        return out

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for func, args, kwargs, made in self.steps:
                again = _plain(func(*args, **kwargs))
                for to, value in zip(made, again if made else (), strict=True):
                    to.copy_(value)


class _Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in WAITING:
            raise RuntimeError("called a synchronizing CUDA operation")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The graphs that were captured, on the CPU."""
    modes: list[_Refusing] = []

    @contextlib.contextmanager
    def capture(tape: Tape, pool: Any = None) -> Iterator[None]:
        assert pool is not None
        with tape:
            yield

    def set_mode(mode: Any) -> None:
        if mode == "error":
            modes.append(_Refusing())
            modes[-1].__enter__()
        elif modes:
            modes.pop().__exit__(None, None, None)

    Tape.captured = []
    monkeypatch.setattr(graphs, "KIND", "cpu")
    for name, fake in {
        "CUDAGraph": Tape,
        "graph": capture,
        "synchronize": lambda *_: None,
        "stream": lambda _: contextlib.nullcontext(),
        "Stream": object,
        "graph_pool_handle": object,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": set_mode,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return Tape.captured
