"""The layers of a model, and its own forward up to a cut and from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from learndrop_ext.forward.bypass import IMAGES, Bypass, ReachedError, with_images
from learndrop_ext.forward.cuts import Cut, Layer, Recorded, record_layers
from learndrop_ext.forward.images import Images, Standing


class Chain(Sequence[Layer]):
    """The layers of a model, in the order in which its forward runs them. It holds the model, and no copy of it."""

    def __init__(self, recorded: Recorded) -> None:
        self.model, self.recorded = recorded.model, recorded

    def renew(self, recorded: Recorded) -> None:
        """Take another record of the same layers, after their widths have changed."""
        self.recorded = recorded

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers."""
        return tuple(layer.name for layer in self.recorded.layers)

    def __len__(self) -> int:
        return len(self.recorded.layers)

    def __getitem__(self, i: Any) -> Any:
        return self.recorded.layers[i]

    def owner(self, name: str) -> nn.Module:
        """Return the module that a parameter, by its name in the model, belongs to."""
        return self.model.get_submodule(name.rpartition(".")[0])

    def parameters(self, first: int, last: int) -> Iterator[nn.Parameter]:
        """Yield the parameters that layers first..last-1 of the model hold now."""
        for name in (name for layer in self.recorded.layers[first:last] for name in layer.tensors):
            owner, own = self.owner(name), name.rpartition(".")[2]
            parameter = owner._parameters.get(own)
            if parameter is not None:
                yield parameter
            else:  # pruned or parametrized: weight_orig, parametrizations.weight.original
                yield from (p for other, p in owner.named_parameters() if own in other)

    def prefix(self, k: int) -> Prefix:
        """Return the first k layers: images [B, ...] -> row [B, ...]."""
        self._check("prefix", k)
        return Prefix(self, k)

    def suffix(self, k: int) -> Suffix:
        """Return the layers behind the first k: row [B, ...] -> what the model returns."""
        self._check("suffix", k)
        return Suffix(self, k, Bypass(self.recorded))

    def _check(self, name: str, k: int) -> None:
        if not 1 <= k < len(self):
            raise ValueError(f"Chain.{name}: k must be within 1..{len(self) - 1}, got {k}")


class _Part(nn.Module):
    """Some layers of a model: the modules that run in them alone are its submodules, the model itself is not."""

    def __init__(self, chain: Chain, modules: Sequence[nn.Module], first: int, last: int) -> None:
        super().__init__()
        self._chain = (chain,)  # in a tuple, so that the model is not a submodule
        names = {module: name for name, module in chain.model.named_modules()}
        for module in modules:
            self.add_module(names[module].replace(".", "_"), module)
        held = {id(p) for p in self.parameters()}
        for layer in chain[first:last]:
            for name in layer.tensors:
                parameter = chain.owner(name)._parameters.get(name.rpartition(".")[2])
                if parameter is not None and id(parameter) not in held:  # None: pruned, and held by its module
                    held.add(id(parameter))
                    self.register_parameter(name.replace(".", "_"), parameter)


class Prefix(_Part):
    """The first k layers of a model. See `Chain.prefix`."""

    def __init__(self, chain: Chain, k: int) -> None:
        super().__init__(chain, chain.recorded.before(k), 0, k)
        self.k = k

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the model's own forward on its arguments up to the cut."""
        (chain,) = self._chain
        return row_at(chain, self.k, lambda: chain.model(*args, **kwargs))


class Suffix(_Part):
    """The layers of a model behind its first k. See `Chain.suffix`. A bypass without a cut gets one for each call."""

    def __init__(self, chain: Chain, k: int, bypass: Bypass) -> None:
        super().__init__(chain, chain.recorded.behind(k), k, len(chain))
        self.k = k
        self._bypass = bypass

    def forward(self, row: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward on rows [B, ...]; IMAGES stands for the images among its further arguments."""
        (chain,) = self._chain
        if not args and not kwargs:
            args = (IMAGES,)
        shape = (len(row), *chain.recorded.image.shape[1:])
        if torch.compiler.is_compiling():
            assert self._bypass.cuts, "only with its layers dropped, as wrap= does"
            return self._bypass.trace(row, shape, args, kwargs)
        standing = Standing(self._bypass, torch.arange(len(row)), row, self.k, None, checked=True)
        form = replace(chain.recorded.image, shape=shape)
        args, kwargs = with_images(Images(form, row.device, standing), args, kwargs)
        if self._bypass.cuts:
            return chain.model(*args, **kwargs)
        self._bypass.put((self.k,))
        try:
            return chain.model(*args, **kwargs)
        finally:
            self._bypass.release()


def row_at(chain: Chain, k: int, call: Callable[[], Any]) -> torch.Tensor:
    """Return what arrives at cut k when `call()` calls the model. The forward ends there."""
    cut: Cut = chain[k - 1].cut

    def stop(row: Any) -> Any:
        raise ReachedError(row)

    hook = cut.watch(stop)
    try:
        call()
    except ReachedError as reached:
        row: torch.Tensor = reached.args[0]
        return row
    finally:
        hook.remove()
    raise RuntimeError(f"split_layers: the forward must call {cut.path}, as it did when it was recorded, and did not")


def split_layers(model: nn.Module, example: torch.Tensor, *, call: Callable[[], Any] | None = None) -> Chain:
    """Find the layers of a model: record its own forward on a few samples, and look for the modules after which exactly one
    tensor is still needed.

    Nothing of the model is copied or changed. `chain.names` are the names of its layers; `chain[i]` has the name, the
    shape of the output, the FLOPs and the parameters' names of one; `chain.prefix(k)(x)` and `chain.suffix(k)(row)` run
    the model's own forward up to a cut, and from there on.

    Args:
        model (nn.Module): the model.
        example (Tensor): [B, ...], images on the model's device, B >= 2 (a single one is used twice without `call`).
        call (Callable, optional): calls the model on `example`, for models that take more. Default: `model(example)`

    Raises:
        TypeError: the model or the example has the wrong type.
        ValueError: the model has lazy parameters, or no cut.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"split_layers: model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = ("OptimizedModule", "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")
    if type(model).__name__ in wrappers:
        raise TypeError(
            f"split_layers: model must be the plain module, got a {type(model).__name__}; "
            "give torch.compile or DistributedDataParallel as wrap= instead"
        )
    if not isinstance(example, torch.Tensor):
        raise TypeError(f"split_layers: example must be a tensor [B, ...], got {type(example).__name__}")
    if example.dim() < 2 or example.shape[0] < 1:
        raise ValueError(f"split_layers: example must be [B, ...] with B >= 1, got {list(example.shape)}")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("split_layers: model must have its parameters, got lazy ones; call it once on a batch before")
    image = example
    if call is None:
        image = (torch.cat([example, example]) if len(example) == 1 else example[:2]).detach().clone()

        def call() -> Any:
            return model(image)

    return Chain(record_layers(model, call, image))
