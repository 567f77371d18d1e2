"""What rows rely on, looked at for as long as they are relied on.

Each guard answers with a reason, or None if nothing has changed; the reaction to a reason is that rows are computed again,
with a warning. What must not happen at all raises a RuntimeError.
"""

from __future__ import annotations

import hashlib
import operator
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.data.extras import BatchExtras, InputKey, equal, input_of, one_key, some_of, to_device
from learndrop_ext.data.source import Source
from learndrop_ext.forward.bypass import Bypass, no_gradients
from learndrop_ext.forward.chain import Chain
from learndrop_ext.forward.images import Constant, Images, Operation, Standing, form_of
from learndrop_ext.ops.digests import TensorDigests
from learndrop_ext.preserve import attributes_preserved, autocast_of, under_autocast
from learndrop_ext.rng import fork_rng
from learndrop_ext.rows.rowset import RowSet
from learndrop_ext.rows.slots import filled_at
from learndrop_ext.rows.store.fingerprint import weights_digest
from learndrop_ext.warn import warn

#: Samples that are read again at each epoch.
PROBES = 4
#: Frozen tensors whose version counters are read at each step, others at the next one: reading those of the 294 of
#: EfficientNet-Lite0 takes about 40 us.
EACH_STEP = 16
#: Values of each frozen tensor, and a few more, that are compared when an epoch begins. All are when it ends.
HEAD = 1024
#: How often they are read if the dataset is random. An entry that changes with p = 0.5 passes for constant if 3 further
#: readings of 4 samples do not change it: once in 2^12 times.
READINGS = 4


class FrozenTensors:
    """The parameters and buffers of the first k layers, as they were when their rows were computed."""

    def __init__(self, chain: Chain, k: int, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self._chain, self._k, self._modules = chain, k, tuple(modules)
        held = held_by(optimizer)
        self.accept()
        self._asleep = [  # parameters that did not train when they were dropped, with their requires_grad
            (slot, slot.tensor.requires_grad)
            for slot in self._slots
            if isinstance(slot.tensor, nn.Parameter) and not (slot.tensor.requires_grad and id(slot.tensor) in held)
        ]
        for parameter in chain.parameters(0, k):
            parameter.grad = None
        self._turn = 0

    def accept(self) -> None:
        """Accept the values as they are now."""
        self._slots = _slots(self._chain, self._k, self._modules)
        self._follow([slot.tensor for slot in self._slots])
        self._accepted = self._digests.measure().tolist()

    def changed_layer(self, *, values: bool = True) -> str | None:
        """Return the name of the first layer with other values than those accepted, or None.

        values: compare all values, and not only the first ones of each tensor, and those of tensors that were written to,
            other than through `.data`, or replaced.
        """
        tensors = [slot.tensor for slot in self._slots]
        if (gone := next((slot for slot, t in zip(self._slots, tensors, strict=True) if t is None), None)) is not None:
            return gone.layer
        same = all(map(operator.is_, tensors, self._watched))
        if not values and same and self._is_untouched():
            return None
        if not same:
            self._follow(tensors)
        now = self._digests.measure().tolist()
        for slot, value, accepted in zip(self._slots, now, self._accepted, strict=True):
            if value != accepted:
                return slot.layer
        self._note_writes()
        return None

    def check_step(self) -> None:
        """Raise RuntimeError, naming the layer, if a value was written to since the rows were computed.

        Compares the version counters of some of the tensors, as it runs at each step: others at the next one. Writes through
        `.data` are found by `changed_layer`.
        """
        self._turn = (self._turn + 1) % len(self._turns)
        watched, versions = self._turns[self._turn]
        if [tensor._version for tensor in watched] == versions or (layer := self.changed_layer()) is None:
            return
        raise RuntimeError(
            f"drop.loader: the weights and buffers of the dropped layers must stay as they are, and those of {layer} have "
            "changed since its rows were computed; change them between epochs, when rows are computed again, or call "
            "drop.undrop() first, or exclude the dropped layers from what changes them (weight decay by hand, averaging, a "
            "loaded checkpoint, a second optimizer)"
        )

    def woken_layer(self, optimizer: torch.optim.Optimizer) -> str | None:
        """Return the name of the first dropped layer with a parameter that did not train and has been set to train since,
        or None."""
        held = held_by(optimizer)
        for slot, asked in self._asleep:
            parameter = slot.tensor
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad and (not asked or id(parameter) in held):
                return slot.layer
        return None

    def _follow(self, tensors: list[torch.Tensor]) -> None:
        self._watched, self._digests = tensors, TensorDigests(tensors)
        parts = (tensor.detach() for tensor in tensors)
        self._heads = TensorDigests(t[: HEAD * len(t) // t.numel() + 1] if t.numel() > HEAD else t for t in parts)
        self._note_writes()

    def _note_writes(self) -> None:
        turns = max(1, len(self._watched) // EACH_STEP)
        parts = [self._watched[i::turns] for i in range(turns)]
        self._turns: list[tuple[list[torch.Tensor], list[int]]] = [
            (part, [tensor._version for tensor in part]) for part in parts
        ]
        self._addresses = [tensor.data_ptr() for tensor in self._watched]
        self._first = self._heads.measure().tolist()

    def _is_untouched(self) -> bool:
        written = any([tensor._version for tensor in part] != versions for part, versions in self._turns)
        moved = self._addresses != [tensor.data_ptr() for tensor in self._watched]
        return not written and not moved and self._heads.measure().tolist() == self._first


class ForwardProbe:
    """Whether the dropped layers still compute what they did: a number that forward reads, a hook, a global variable may
    have changed where no weight has.

    Their operations are compared first, on one image that was not read, which computes nothing. Where they differ or cannot
    run without values, the row of `image` [1, ...] is compared.
    """

    def __init__(self, bypass: Bypass, call: Callable[[torch.Tensor], Any], image: torch.Tensor) -> None:
        self._bypass, self._call, self._image = bypass, call, image
        self._autocast = autocast_of(image.device)  # whatever the loop is in when an epoch begins
        self._traces = True  # whether the layers can run without values
        self._trace: list[Any] | None = None
        self._guarded = {id(tensor) for tensor in (*bypass.model.parameters(), *bypass.model.buffers())}
        self.accept()

    def accept(self) -> None:
        """Accept what the layers compute now."""
        self._row, self._trace = self._computed(), self._traced()

    def reason(self) -> str | None:
        """Say that the layers compute something else, or return None."""
        trace = self._traced()
        if trace is not None and trace == self._trace:
            return None
        row, self._row, self._trace = self._row, self._computed(), trace
        if equal(row, self._row):
            return None
        return (
            f"the first {self._bypass.cuts[-1]} layers compute something else than when their rows were: what their forward "
            "reads beside its input has changed (an attribute, a hook, a global variable)"
        )

    def digests(self, k: int) -> tuple[str, str]:
        """Return the SHA-256 of the operations before cut k, and of the tensors beside the image that they use, the same in
        every process. Where layers cannot run without values, these are of no other process."""
        if self._trace is None:
            return uuid.uuid4().hex, uuid.uuid4().hex
        constants: list[torch.Tensor] = []

        def word(operand: Any) -> Any:
            if isinstance(operand, Constant):
                constants.append(operand.values)
                return None
            return operand.type if isinstance(operand, torch.device) else operand

        said = [
            (str(operation), *map(word, operands)) for operation, operands, _ in self._trace[: self._bypass.passed[k]]
        ]
        operations = f"{list(self._image.shape)} {self._image.dtype} {said}"
        return hashlib.sha256(operations.encode()).hexdigest(), weights_digest(constants)

    def _traced(self) -> list[Any] | None:
        """The operations of the layers, or None."""
        if not self._traces:
            return None
        trace: list[Any] = []
        only = torch.zeros(1, dtype=torch.int64)
        standing = Standing(self._bypass, only, None, 0, None, checked=True, trace=trace, before=self._trace or ())
        try:
            with under_autocast(self._image.device, None):
                self._run(Images(form_of(self._image), self._image.device, standing), opened=True)
        except Exception:  # whatever an operation that needs values raises
            self._traces = False
            return None
        for operand in (operand for _, operands, _ in trace for operand in operands):
            if isinstance(operand, Constant) and id(operand.tensor) not in self._guarded:
                operand.keep()
        return trace

    def _computed(self) -> torch.Tensor:
        device = self._image.device
        with without_benchmark(device, deterministic=True), under_autocast(device, self._autocast):
            return self._run(self._image.clone()).detach().clone()

    def _run(self, image: torch.Tensor, *, opened: bool = False) -> torch.Tensor:
        with attributes_preserved(self._bypass.model, tables=False), fork_rng(0), torch.no_grad():
            self._bypass.model.eval()  # live modules may run before the cut, on other inputs
            return self._bypass.row(lambda: self._call(image), opened=opened)


class LoopGuard:
    """What the loop does to images before it calls the model, and the autocast it calls it under: the same for all rows."""

    def __init__(self) -> None:
        self.operations: tuple[Operation, ...] | None = None
        self.autocast: torch.dtype | None = None
        self.said: str | None = None  # `describe()` of the run that this one resumes

    def resume(self, said: str) -> None:
        """Compare what comes next with what another process did."""
        self.operations, self.said = None, said

    def forget(self) -> None:
        """Accept whatever comes next."""
        self.operations = self.said = None

    def describe(self) -> str:
        """Return the operations and the autocast dtype in words; "" before the first batch."""
        if self.operations is None:
            return self.said or ""
        return f"{describe_operations(self.operations)} under {self.autocast}"

    def check(self, images: Images) -> str | None:
        """Return a reason to compute rows again.

        Raises:
            RuntimeError: the operations are others than for the rows, or gradients of the images are asked for.
        """
        self.compare(images)
        if images.requires_grad:
            raise no_gradients()
        if self.operations is None:
            for operand in pytree.tree_leaves(images.operations):
                if isinstance(operand, Constant):
                    operand.keep()
            self.operations, self.autocast = images.operations, autocast_of(images.device)
            said, self.said = self.said, None
            if said and said != self.describe():
                return f"the loop did {said} to images when they were, and does {self.describe()}"
        autocast = autocast_of(images.device)
        before, self.autocast = self.autocast, autocast
        if autocast == before:
            return None
        names = ["no autocast" if dtype is None else f"autocast of {dtype}" for dtype in (before, autocast)]
        return f"they were computed under {names[0]}, and the loop now trains under {names[1]}"

    def compare(self, images: Images) -> None:
        """Raise RuntimeError if the operations on images are others than for the rows."""
        images.check_memory()
        if self.operations is not None and images.operations != self.operations:
            raise RuntimeError(
                "drop.loader: the loop must do the same to the images of every batch while layers are dropped, because "
                f"cached rows stand for them: wanted {describe_operations(self.operations)}, got "
                f"{describe_operations(images.operations)}; move what changes into the dataset or the model"
            )


def describe_operations(operations: Sequence[Operation]) -> str:
    """Return the loop's operations in words, the same in every run."""
    return ", then ".join(f"{name}({', '.join(map(str, rest))})" for name, *rest in operations) or "nothing"


class Guards:
    """All guards of a run, and the one reaction to them. Images are compared by digests, noted when their rows were kept."""

    def __init__(
        self,
        chain: Chain,
        source: Source,
        rows: RowSet,
        extras: BatchExtras,
        *,
        key: InputKey,
        like: Any,  # a batch with the structure of all
        run: Callable[[torch.Tensor], Any],  # calls the model on images [n, ...], in the loop's way
        bypass: Bypass,
    ) -> None:
        self.loop = LoopGuard()
        self._chain, self._source, self._rows, self._extras = chain, source, rows, extras
        self._key, self._like, self._run, self._bypass = key, like, run, bypass
        self._tensors: FrozenTensors | None = None
        self._probe: ForwardProbe | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._said: set[str] = set()  # what was said once

    def drop(self, k: int, optimizer: torch.optim.Optimizer) -> None:
        """Guard the first k layers, which `bypass` has dropped, from now on."""
        self._tensors = FrozenTensors(self._chain, k, self._bypass.frozen, optimizer)
        self._probe = self._new_probe()
        self._optimizer = optimizer

    def release(self) -> None:
        """Make all layers live again, free the rows, and guard nothing."""
        self._bypass.release()
        self._rows.stop()
        self._extras.clear()
        self._tensors = self._probe = self._optimizer = None
        self.loop.forget()

    def follow_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at another optimizer from now on."""
        if self._optimizer is not None:
            self._optimizer = optimizer

    def look(self, where: str) -> None:
        """Look at the model: discard the rows, with a RuntimeWarning, if the dropped layers have changed; `release` them,
        with one too, if a parameter that was frozen when its layer was dropped has been set to train."""
        if self._tensors is None or self._probe is None or self._optimizer is None:
            return
        if woken := self._tensors.woken_layer(self._optimizer):
            self.release()
            warn(
                f"drop.{where}: all layers train again, and the rows are freed: the parameters of the dropped layer {woken} "
                "have been set to train (by requires_grad, or by adding them to the optimizer)"
            )
            return
        # Between two steps all values are compared once; an epoch that begins asks for what else may have changed.
        changed = self._tensors.changed_layer(values=where == "step")
        reason = None if changed else self._probe.reason()
        if reason:
            changed = self._tensors.changed_layer()  # written to through `.data`
        if changed:
            reason = f"the weights or buffers of the dropped layer {changed} have changed"
        if reason:
            self._discard(where, reason, accepts=bool(changed))

    def begin_epoch(self, epoch: int) -> None:
        """Look at the model and, where samples can be read by number, at the data, before an epoch begins."""
        self.look("loader")
        if not (self._source.readable and self._rows.stores):
            return
        kept = self._rows.drawn()
        kept = kept[filled_at(self._extras, self._rows.places(kept))]  # others are read, and compared, with their batch
        if not len(kept):
            return
        generator = torch.Generator()
        generator.seed()  # other samples in each run
        ids = kept[torch.randint(len(kept), (PROBES,), generator=generator)].unique()
        batch, *others = [
            to_device(self._source.read(ids.tolist(), epoch + i), self._rows.device)
            for i in range(READINGS if self._has_random_views() else 1)
        ]
        if len(input_of(batch, self._key)) < len(ids):  # collate_fn has left some out
            return
        if changed := self._changed_data(batch, ids, self._rows.places(ids), others):
            self._discard("loader", changed, data=True)

    def check_step(self, images: Images, trains: bool) -> None:
        """Look at a call on images, before its forward. See `LoopGuard.check` and `FrozenTensors.check_step`."""
        standing, read = images.standing, images.count_read
        row, at = standing.rows, standing.at
        if not trains:
            self.loop.compare(images)
            if row is not None and autocast_of(images.device) is None:  # whatever the loop trains under
                standing.rows = row.to(next(self._chain.parameters(at, at + 1)).dtype)
            return
        if self._tensors is not None:
            self._tensors.check_step()
        if reason := self.loop.check(images):
            self._discard("loader", reason)
        if self.loop.autocast is None and row is not None and row.dtype != self._rows.dtype(at):
            # A batch that was given before its rows were discarded trains on them for the last time, whatever they are: in
            # the dtype of the weights behind them.
            standing.rows = row.to(next(self._chain.parameters(at, at + 1)).dtype)
        if read:
            self._rows.begin_making(False, read)
        if standing.count > read and at < self._rows.cut:
            self._rows.begin_making(True, standing.count - read)

    def may_keep(self, batch: Any, ids: torch.Tensor) -> bool:
        """Return whether rows of a batch may be kept: if it has all of its samples `ids` [B], and images of the shape of the
        first batch. If not, a RuntimeWarning says so once."""
        got = len(input_of(batch, self._key))
        if got != len(ids):
            reason = (
                f"collate_fn must give every sample of a batch, wanted {len(ids)}, got {got}; leave out samples that cannot "
                "be read with a Subset or a sampler"
            )
        elif not self._has_its_shape(batch):
            reason = (
                f"images must have one shape, wanted {self._shape(self._like)} as in the first batch, got "
                f"{self._shape(batch)}; for rows of another size, call drop.undrop() and make a new DropScheduler"
            )
        else:
            return True
        subject = reason.partition(" ")[0]
        if subject not in self._said:
            self._said.add(subject)
            warn(f"drop.loader: some batches keep no rows, and run through the dropped layers each time: {reason}")
        return False

    def are_same(self, batch: Any, ids: torch.Tensor) -> bool:
        """Return whether the images of samples `ids` [B], which are read for the rest of their batch, are those of their
        rows. If not, the rows are discarded."""
        changed = self._changed_data(batch, ids, None)
        if changed:
            self._discard("loader", changed, data=True)
        return not changed

    def note(self, batch: Any, ids: torch.Tensor, makes: torch.Tensor) -> None:
        """Note the images of samples `ids` [B]: of those whose rows are about to be kept (`makes` [B] bool), and of others
        that were not noted yet."""
        if self._has_random_views():
            return
        images = input_of(batch, self._key)
        new = torch.nonzero(makes | ~self._rows.digests.of(ids)[0]).flatten()
        if len(new) < len(ids):
            ids, images = ids[new], images[new.to(images.device)]
        if len(ids):
            self._rows.digests.note(ids, image_digests(images))

    def compare(self, batch: Any, ids: torch.Tensor, again: torch.Tensor | None) -> bool:
        """Compare a few samples of a batch of images with what they were when their rows were kept, first those of ids that
        came before in this epoch (`again` [n] are their positions). Return whether any sample of the batch has a row, so
        that a change could be seen.

        Raises:
            ValueError: an id stands for two samples in one epoch.
        """
        there = torch.nonzero(self._rows.filled(ids) & filled_at(self._extras, self._rows.places(ids))).flatten()
        if not len(there):
            return False
        if self._has_random_views() and self._has_its_shape(batch):
            return True
        repeated = there if again is None else there[torch.isin(there, again)]
        among = repeated if again is not None and len(repeated) else there
        generator = torch.Generator().manual_seed(self._rows.config.seed + self._rows.epoch)
        take = among[torch.randperm(len(among), generator=generator)[:PROBES]]
        part = some_of(batch, take, key=self._key, like=self._like)
        if changed := self._changed_data(part, ids[take], self._rows.places(ids[take])):
            if again is not None and len(repeated):
                raise ValueError(
                    "drop.loader: an id must stand for one sample, got two samples with the same id in one iteration over "
                    "loader; give each sample an id of its own, and views=V where it is another image each time"
                )
            self._discard("loader", changed, data=True)
        return True

    def refresh(self, ids: torch.Tensor | None) -> None:
        """Discard the rows and extras of samples [n], or of all, without a warning."""
        self._rows.forget(ids, everywhere=True)
        if ids is None:
            self._extras.clear()

    def checksum(self, k: int) -> str:
        """Return a digest of the weights and buffers of the first k layers, the same in every process."""
        buffers = (buffer for module in self._chain.recorded.before(k) for buffer in module.buffers())
        return weights_digest((*self._chain.parameters(0, k), *buffers)) if k else ""

    def digests(self, k: int) -> tuple[str, str]:
        """Return `ForwardProbe.digests`: of the layers that are dropped, or of what would be if the first k were."""
        if self._probe is not None:
            return self._probe.digests(k)
        self._bypass.put((k,))
        try:
            return self._new_probe().digests(k)
        finally:
            self._bypass.release()

    def _new_probe(self) -> ForwardProbe:
        return ForwardProbe(self._bypass, self._run, input_of(self._like, one_key(self._key))[:1])

    def _changed_data(
        self, batch: Any, ids: torch.Tensor, places: torch.Tensor | None, others: Sequence[Any] = ()
    ) -> str | None:
        """Say what has changed of samples `ids` [B] as they are read now, or return None. Their extras lie at `places` [B],
        if they are known. Of random views only the rest of the batch is compared; `others` are further readings of it."""
        changed = None
        known, before = self._rows.digests.of(ids)
        if not self._has_its_shape(batch):
            changed = "the images"
        elif len(before) and not self._has_random_views():
            images = input_of(batch, self._key)
            now = image_digests(images[torch.nonzero(known).flatten().to(images.device)])
            changed = None if torch.equal(now, before.to(now.device)) else "the images"
        if changed is None and places is not None:
            changed = self._extras.first_difference(batch, places, others)
        return (
            changed and f"{changed} of some samples are no longer what the dataset gave when their rows were computed"
        )

    def _has_its_shape(self, batch: Any) -> bool:
        """Whether the images of a batch have the shape of those in the first one."""
        return self._shape(batch) == self._shape(self._like)

    def _shape(self, batch: Any) -> list[int]:
        return list(input_of(batch, self._key).shape[1:])

    def _has_random_views(self) -> bool:
        return self._rows.views > 1 and not self._rows.config.mirror

    def _discard(self, where: str, reason: str, *, data: bool = False, accepts: bool = False) -> None:
        """The reaction: rows are computed again when their samples are next drawn. data: whether the images have changed, so
        that those in the store are wrong for other runs too. accepts: whether the model is accepted as it is now."""
        cache = self._rows.cache
        had = cache is not None and bool(cache.filled.any())
        self._rows.forget(everywhere=data)  # at first: it may be interrupted
        if accepts and self._tensors is not None and self._probe is not None:
            self._tensors.accept()
            self._probe.accept()
        self.loop.forget()
        self._extras.clear()
        if had:  # at last: the user may have made warnings errors
            warn(f"drop.{where}: the rows are computed again: {reason}")


def image_digests(images: torch.Tensor) -> torch.Tensor:
    """Return a digest [B] int64 of each image of [B, ...], on their device: the sum of its 16-bit words, each times an odd
    random number of its position, mod 2^64. A change of one word is always seen."""
    raw = images.detach().contiguous().flatten(1).view(torch.uint8)
    if raw.shape[1] % 2:
        raw = nn.functional.pad(raw, (0, 1))
    words = raw.view(torch.int16).to(torch.int64)
    digests: torch.Tensor = (words * _keys(words.shape[1]).to(images.device)).sum(1)
    return digests


@lru_cache(maxsize=1)
def _keys(count: int) -> torch.Tensor:
    """Odd random numbers [count], the same in every process."""
    return torch.randint(-(1 << 62), 1 << 62, (count,), generator=torch.Generator().manual_seed(0)) * 2 + 1


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the identities of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


@dataclass(frozen=True)
class _Slot:
    """Where a parameter or buffer of a dropped layer is held: the table of the module that owns it, and its name there."""

    layer: str
    table: Mapping[str, Any]
    name: str

    @property
    def tensor(self) -> Any:
        """The tensor, or None."""
        return self.table.get(self.name)


def _slots(chain: Chain, k: int, modules: Sequence[nn.Module]) -> list[_Slot]:
    layer_of = {name: layer.name for layer in chain[:k] for name in layer.tensors}
    names = {module: name for name, module in chain.model.named_modules()}
    slots = [_Slot(layer, chain.owner(name)._parameters, name.rpartition(".")[2]) for name, layer in layer_of.items()]
    last = chain.names[0]
    for module in dict.fromkeys(m for one in modules for m in one.modules()):
        last = next((layer for name, layer in layer_of.items() if name.startswith(f"{names.get(module, '')}.")), last)
        slots += [_Slot(last, table, own) for table in (module._parameters, module._buffers) for own in table]
    # One pruned or parametrized is None here, and found in its module.
    return list({id(slot.tensor): slot for slot in reversed(slots) if slot.tensor is not None}.values())[::-1]
