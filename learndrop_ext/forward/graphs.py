"""`wrap=cuda_graphs`: forward and backward of the live layers as CUDA graphs, where the host is slower than the GPU."""

from __future__ import annotations

import gc
import random
import sys
import traceback
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.distributed import several_processes
from learndrop_ext.forward.bypass import has_hooks
from learndrop_ext.forward.chain import Suffix
from learndrop_ext.preserve import TABLES, preserved
from learndrop_ext.warn import warn

#: Where graphs can be captured. Tests record operations on "cpu".
KIND = "cuda"
_TENSOR = object()  # stands for a tensor among the arguments of a call
SIMPLE = (bool, int, float, str, type(None))
#: Memory of a model's graphs. Of one model, only the latest graphs are replayed.
_POOLS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def cuda_graphs(module: nn.Module) -> GraphedModule:
    """Give as `wrap=` of a DropScheduler: `DropScheduler(model, optimizer, loader, wrap=cuda_graphs)`.

    After each drop, forward and backward of the live layers are captured at the first training batch, by
    `torch.cuda.make_graphed_callables`, and replayed for all training batches of its shape; everything else runs eagerly,
    and so do second forwards before a backward. A replay runs no Python: a forward that waits for the GPU, draws random
    numbers on the CPU, changes attributes or calls hooks is not captured, and where a number, a flag or a parameter of a
    live module has been exchanged since, it is not replayed. A RuntimeWarning then says why, once.

    Raises:
        TypeError: the module is wrapped for several processes.
        ValueError: it is not on a GPU.
        RuntimeError: this process is one of several in a group.
    """
    if type(module).__name__ in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
        raise TypeError(f"cuda_graphs: module must be of one process, got a {type(module).__name__}: train it eagerly")
    if several_processes():
        raise RuntimeError("cuda_graphs: wants a single process, got one of several in a group: train without wrap=")
    elsewhere = {p.device.type for p in module.parameters()} - {KIND}
    if elsewhere:
        raise ValueError(f"cuda_graphs: module must be on a GPU, got parameters on {', '.join(sorted(elsewhere))}")
    return GraphedModule(module)


class GraphedModule(nn.Module):
    """A module whose training steps are replayed as CUDA graphs. See `cuda_graphs`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._eager = False  # for good
        self._form: Any = None  # of the calls that are replayed
        self._part: _Part | None = None
        self._fixed: list[tuple[str, dict[str, Any], str, Any]] = []  # attributes that were captured, see `_change`
        self._parameters_at: list[tuple[nn.Parameter, int, bool]] = []  # where they lie, and whether they train
        self._gradients: list[tuple[nn.Parameter, int]] = []  # and the address to which a replay writes each
        self._waiting: Any = lambda: None  # the node of the latest forward, until its backward begins

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._eager or not torch.is_grad_enabled() or not _base(self.module).training:
            return self.module(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        form = (spec, torch.is_autocast_enabled(KIND), torch.get_autocast_dtype(KIND), *map(_form, leaves))
        tensors = tuple(a for a in leaves if isinstance(a, torch.Tensor))
        if self._form is None:
            refused = self._captured(_Part(self.module, leaves, spec), tensors)
            self._form = form
        else:
            refused = self._change()
        if refused is not None:
            self._eager, self._part = True, None
            warn(f"cuda_graphs: training goes on eagerly until the next drop: {refused}")
        if self._part is None or form != self._form or self._waiting() is not None:
            return self.module(*args, **kwargs)
        return self._replayed(self._part, tensors)

    def _replayed(self, part: _Part, tensors: Sequence[torch.Tensor]) -> Any:
        for parameter, address in self._gradients:
            # The gradient of an earlier backward, to which this one's is added, may lie where this one's is written.
            if parameter.grad is not None and parameter.grad.data_ptr() == address:
                parameter.grad = parameter.grad.clone()
        outputs = part(*tensors)
        node = next(y.grad_fn for y in pytree.tree_leaves(outputs) if y.requires_grad)
        self._waiting = weakref.ref(node)
        node.register_prehook(self._begin_backward)
        return pytree.tree_map(torch.clone, outputs)  # the next replay writes to the same addresses

    def _begin_backward(self, _: Any) -> None:
        self._waiting = lambda: None

    def _captured(self, part: _Part, tensors: Sequence[torch.Tensor]) -> str | None:
        """Capture a call; return why it cannot be, or None. Model, gradients and random state stay as they are."""
        base = _base(self.module)
        gc.collect()  # graphs before this one are in reference cycles
        samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in tensors)
        dtype = torch.get_autocast_dtype(KIND)
        autocast = torch.autocast(KIND, dtype, enabled=torch.is_autocast_enabled(KIND), cache_enabled=False)
        with preserved(base), autocast:
            try:
                refused = _refused(self.module, part, samples)
                if refused is not None:
                    return refused
                if base not in _POOLS:
                    _POOLS[base] = torch.cuda.graph_pool_handle()
                torch.cuda.make_graphed_callables(part, samples, allow_unused_input=True, pool=_POOLS[base])
                trained = [p for p in self.module.parameters() if p.requires_grad]
                written = _gradients(part(*samples), trained)
            except Exception as error:  # a driver's, an allocator's, or the forward's own
                return f"the step cannot be captured: {type(error).__name__}: {error} ({_where(error)})"
        self._gradients = [(p, g.data_ptr()) for p, g in zip(trained, written, strict=True) if g is not None]
        # Of torch's own layers only floats and flags are looked at: a step takes about 0.1 us for each value.
        self._fixed = [
            (f"{name}.{key}".lstrip("."), vars(one), key, value)
            for name, one in _live(self.module)
            for key, value in vars(one).items()
            if (key not in TABLES or key == "training")
            and (type(value) in (bool, float) or not type(one).__module__.startswith("torch.nn."))
        ]
        self._parameters_at = [(p, p.data_ptr(), p.requires_grad) for p in self.module.parameters()]
        self._part = part
        return None

    def _change(self) -> str | None:
        """Return what is not as it was when the graphs were captured, or None."""
        for name, table, key, value in self._fixed:
            now = table.get(key)
            if now is not value and not (type(now) in SIMPLE and now == value):
                return f"{name} has changed since the step was captured"
        if any(p.data_ptr() != at or p.requires_grad != trains for p, at, trains in self._parameters_at):
            return "a parameter lies elsewhere, or has begun or ceased to train, since the step was captured"
        return None


class _Part(nn.Module):
    """A call of a module as a function of the tensors among its arguments."""

    def __init__(self, module: nn.Module, leaves: Sequence[Any], spec: Any) -> None:
        super().__init__()
        self.module = module
        self._leaves = [_TENSOR if isinstance(a, torch.Tensor) else a for a in leaves]
        self._spec = spec

    def forward(self, *tensors: torch.Tensor) -> Any:
        rest = iter(tensors)
        leaves = [next(rest) if a is _TENSOR else a for a in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return self.module(*args, **kwargs)


def _base(module: nn.Module) -> nn.Module:
    """The user's model."""
    return module._chain[0].model if isinstance(module, Suffix) else module


def _live(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that may run, with their names in the model."""
    base = _base(module)
    dropped = module._chain[0].recorded.before(module.k) if isinstance(module, Suffix) else ()
    skipped = {m for one in dropped for m in one.modules()}
    return ((name, m) for name, m in base.named_modules() if m not in skipped)


def _form(value: Any) -> Any:
    """What must be equal in all calls that are replayed."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return value if type(value) in SIMPLE else id(value)


def _refused(module: nn.Module, part: _Part, samples: Sequence[torch.Tensor]) -> str | None:
    """Run a step in which whatever waits for the GPU raises; return why it cannot be replayed, or None."""
    hooked = [name for name, m in _live(module) if has_hooks(m) or m._backward_hooks or m._backward_pre_hooks]
    hooked += [name for name, p in module.named_parameters() if p._backward_hooks]
    if hooked:
        return f"a replay would not run the hooks of {hooked[0] or 'the model'}"
    trained = [p for p in module.parameters() if p.requires_grad]
    before, drawn = _attributes(module), _draws()
    _gradients(part(*samples), trained)  # cuDNN may time its algorithms now
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = part(*samples)
        _gradients(outputs, trained)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    after = _attributes(module)
    changed = next((name for name in {**before, **after} if before.get(name) != after.get(name)), None)
    if changed is not None:
        return f"each forward changes {changed}, which a replay would not"
    if _draws() != drawn:
        return "each forward draws random numbers on the CPU, which a replay would not"
    leaves = pytree.tree_leaves(outputs)
    if not all(isinstance(y, torch.Tensor) for y in leaves) or not any(y.requires_grad for y in leaves):
        return "its outputs are not all tensors, or none has a gradient"
    return None


def _gradients(outputs: Any, parameters: Sequence[nn.Parameter]) -> Sequence[torch.Tensor | None]:
    """The gradients of the sum of all outputs."""
    leaves = [y for y in pytree.tree_leaves(outputs) if isinstance(y, torch.Tensor) and y.requires_grad]
    if not leaves or not parameters:
        return [None] * len(parameters)
    ones = [torch.ones_like(y) for y in leaves]
    return torch.autograd.grad(leaves, list(parameters), ones, allow_unused=True)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of live modules: values of simple ones, and which objects the others are and hold."""

    def content(value: Any) -> Any:
        if type(value) in SIMPLE:
            return value
        if isinstance(value, dict):
            return id(value), [(id(k), id(v)) for k, v in value.items()]
        return (id(value), list(map(id, value))) if isinstance(value, list | tuple | set) else id(value)

    return {
        f"{name}.{key}".lstrip("."): content(value)
        for name, one in _live(module)
        for key, value in vars(one).items()
        if key not in TABLES
    }


def _draws() -> Any:
    """The state of the random numbers on the CPU."""
    numpy = np.random.get_state()
    return random.getstate(), numpy[1].tobytes(), numpy[2], torch.get_rng_state().tolist()  # type: ignore[index]


def _where(error: BaseException) -> str:
    """The innermost line of an error that is neither torch's nor this package's."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
    frames = traceback.extract_tb(error.__traceback__ or sys.exc_info()[2])
    outside = [f for f in frames if not f.filename.startswith(ours)]
    at = (outside or frames)[-1]
    return f"{at.filename}:{at.lineno}"
