"""Whether layers can be dropped, tried on a few images before they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.forward.bypass import Bypass
from learndrop_ext.forward.chain import Chain, row_at
from learndrop_ext.forward.images import Images, Standing, Unread, form_of
from learndrop_ext.forward.record import tensors_of
from learndrop_ext.preserve import preserved
from learndrop_ext.rng import fork_rng


def check_cut(chain: Chain, k: int, run: Callable[[torch.Tensor], Any], x: torch.Tensor) -> str | None:
    """Say why the model cannot go on from the rows of its first k layers, or return None.

    Rows must be a function of the sample: the first half of the images runs together with the other half and with itself,
    with two random seeds. And with all layers before the cut absent, the model's outputs must be equal to the bit.
    `run` calls the model on images like x [B, ...], B >= 2, in the loop's way.

    Raises:
        ValueError: rows depend on the other samples of a batch or on the random state. Names the innermost module whose
            outputs differ for equal inputs.
    """
    kept: list[torch.Tensor] = []

    def keep(cut: int, ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        kept.append(row.clone())  # a later operation may write into it
        return row

    bypass = Bypass(chain.recorded, keep=keep)

    def outputs(*, read: bool) -> list[torch.Tensor]:
        """What the model returns. Its forward may keep a state: each run begins with the same one."""
        standing = Standing(bypass, torch.arange(len(x)), None if read else kept[0].clone(), k, None)
        with preserved(chain.model), torch.enable_grad():
            # The loop may write into its images.
            return list(tensors_of(run(Images(form_of(x), x.device, standing, x.clone() if read else None))))

    half = len(x) // 2
    others = torch.cat([x[:half], x[:half], x[2 * half :]])
    with preserved(chain.model), without_benchmark(x.device, deterministic=True):
        chain.model.train()
        bypass.put((k,))
        try:
            wanted = outputs(read=True)
            if not kept:
                return f"{chain.names[k - 1]} is not run in train mode"
            with preserved(chain.model), fork_rng(1), torch.no_grad():
                again = row_at(chain, k, lambda: run(others.clone()))
            if not rows_agree(kept[0][:half], again[:half]):
                raise ValueError(
                    "DropScheduler: the rows of a dropped layer must be a function of the sample alone, and those of "
                    f"{_guilty(chain, k, run, x, others)} change with the other samples of the batch or the random state, "
                    "in eval mode too; drop only the layers before it"
                )
            try:
                got = outputs(read=False)
            except Exception as error:  # the same forward ran on images a moment ago
                return str(error) or repr(error)
        finally:
            bypass.release()
    if any(isinstance(tensor, Unread) for tensor in got):
        return f"what the model returns needs a layer before the end of {chain.names[k - 1]}"
    if len(got) != len(wanted) or not all(map(rows_equal, wanted, got)):
        return f"the model computes something else from the rows of {chain.names[k - 1]} alone"
    return None


def rows_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors are equal to the bit, on a GPU within rounding."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | (one != one)).all()) or (one.is_cuda and rows_agree(one, other))


def rows_agree(wanted: torch.Tensor, got: torch.Tensor, *, error: float = 0.0) -> bool:
    """Return whether rows from batches of other samples agree within rounding and `error`, as a share of the largest value.

    On a GPU the algorithm depends on the batch size, and some multiply fp32 in TF32, with the 10 bits of fp16; cuDNN's
    convolutions do so by default.
    """
    if wanted.shape != got.shape:
        return False
    if torch.equal(wanted, got):
        return True
    finite = wanted[wanted.isfinite()]
    coarse = wanted.dtype.itemsize == 2 or (wanted.is_cuda and wanted.dtype == torch.float32)
    bound = ((2e-2 if coarse else 1e-3) + error) * (float(finite.abs().max()) if finite.numel() else 0.0)
    return bool((((wanted - got).abs() <= bound) | (wanted == got) | (wanted.isnan() & got.isnan())).all())


def _guilty(chain: Chain, k: int, run: Callable[[torch.Tensor], Any], x: torch.Tensor, others: torch.Tensor) -> str:
    """The first module to end whose outputs differ for equal samples: modules within another one end before it."""
    half = len(x) // 2
    passes: list[list[tuple[nn.Module, torch.Tensor]]] = []
    for seed, batch in enumerate((x, others)):
        ended: list[tuple[nn.Module, torch.Tensor]] = []
        passes.append(ended)

        def leave(module: nn.Module, _: Any, output: Any, ended: Any = ended) -> None:
            if isinstance(output, torch.Tensor) and output.shape[:1] == x.shape[:1]:
                ended.append((module, output[:half].clone()))

        with fork_rng(seed), torch.no_grad():
            hook = register_module_forward_hook(leave)
            try:
                row_at(chain, k, lambda batch=batch: run(batch))  # type: ignore[misc]
            finally:
                hook.remove()
    names = {module: name for name, module in chain.model.named_modules()}
    for (module, one), (_, other) in zip(*passes, strict=False):
        if module in names and not rows_agree(one, other):
            return f"{names[module]} ({type(module).__name__})"
    return chain.names[k - 1]
