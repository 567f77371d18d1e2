"""What rows rely on, looked at for as long as they are relied on.

Each guard answers with a reason, or None if nothing has changed; the reaction to a reason is that rows are computed again,
with a warning. What must not happen at all is a RuntimeError.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from learndrop_ext.cudnn import without_benchmark
from learndrop_ext.data.extras import BatchExtras, InputKey, check_count, input_of, some_of, to_device
from learndrop_ext.data.source import Source
from learndrop_ext.forward.chain import Chain, row_at
from learndrop_ext.forward.cuts import attributes_preserved
from learndrop_ext.forward.images import Constant, Images, Operation, Standing
from learndrop_ext.ops.digests import TensorDigests
from learndrop_ext.rng import fork_rng
from learndrop_ext.rows.rowset import RowSet
from learndrop_ext.rows.slots import filled_at
from learndrop_ext.rows.store.fingerprint import weights_digest

#: Samples that are read again at each epoch.
PROBES = 4
#: Steps in which the version counters of all frozen tensors are read once: reading those of the 294 of EfficientNet-Lite0
#: takes about 40 us.
TURNS = 8
#: How often they are read if the dataset is random. An entry that changes with p = 0.5 passes for constant if 3 further
#: readings of 4 samples do not change it: once in 2^12 times.
READINGS = 4


class FrozenTensors:
    """The parameters and buffers of the dropped layers.

    Args:
        chain: the layers.
        k: number of dropped layers.
        modules: the modules that only they run.
        optimizer: the user's optimizer.
    """

    def __init__(self, chain: Chain, k: int, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self._chain, self._k, self._modules = chain, k, tuple(modules)
        self._slots = _slots(chain, k, self._modules)
        held = held_by(optimizer)
        self._asleep = tuple(  # parameters that did not train when they were dropped, with their requires_grad
            (layer, owner, name, owner[name].requires_grad)
            for layer, owner, name in self._slots
            if isinstance(owner[name], nn.Parameter) and not (owner[name].requires_grad and id(owner[name]) in held)
        )
        for parameter in chain.parameters(0, k):
            parameter.grad = None
        self._turn = 0
        self._turns: list[tuple[list[torch.Tensor], list[int]]] = []
        self.accept()

    def accept(self) -> None:
        """Accept the values as they are now."""
        self._slots = _slots(self._chain, self._k, self._modules)
        self._watched = self._tensors()
        self._digests = TensorDigests(self._watched)
        self._accepted: list[int] = self._digests.measure().tolist()
        self._note_writes()

    def changed_layer(self, *, values: bool = True) -> str | None:
        """Return the name of the first layer with other values than those accepted, or None.

        values: compare all values, and not only those of tensors that were written to, other than through `.data`, or
            replaced.
        """
        if not values and self._untouched():
            return None
        tensors = self._tensors()
        if len(tensors) != len(self._slots):
            return next(layer for layer, owner, name in self._slots if not isinstance(owner.get(name), torch.Tensor))
        if any(now is not before for now, before in zip(tensors, self._watched, strict=True)):
            self._watched, self._digests = tensors, TensorDigests(tensors)
        now = self._digests.measure().tolist()
        if now != self._accepted:
            at = next(i for i, (one, other) in enumerate(zip(now, self._accepted, strict=True)) if one != other)
            return self._slots[at][0]
        self._note_writes()
        return None

    def check_step(self) -> None:
        """Raise RuntimeError, naming the layer, if a value was written to since the rows were computed.

        Compares the version counters of some of the tensors, as it runs at each step: others at the next one. Writes through
        `.data` are found by `changed_layer`.
        """
        self._turn = (self._turn + 1) % TURNS
        watched, versions = self._turns[self._turn]
        if [tensor._version for tensor in watched] == versions:
            return
        layer = self.changed_layer()
        if layer is not None:
            raise RuntimeError(
                f"drop.loader: the weights and buffers of the dropped layers must stay as they are, and those of {layer} "
                "have changed since its rows were computed; change them between epochs, when rows are computed again, or "
                "call drop.undrop() first, or exclude the dropped layers from what changes them (weight decay by hand, "
                "averaging, a loaded checkpoint, a second optimizer)"
            )

    def check_asleep(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise RuntimeError if a parameter of a dropped layer that did not train has been set to train."""
        held = held_by(optimizer)
        for layer, owner, name, asked in self._asleep:
            parameter = owner.get(name)
            if isinstance(parameter, nn.Parameter) and parameter.requires_grad and (not asked or id(parameter) in held):
                raise RuntimeError(
                    f"drop.loader: the parameters of {layer} have been set to train (by requires_grad or by adding them to "
                    "the optimizer), but the layer is dropped: call drop.undrop() to train all layers, or leave them as "
                    "they were"
                )

    def _note_writes(self) -> None:
        self._turn = 0
        parts = [self._watched[i::TURNS] for i in range(TURNS)]
        self._turns = [(part, [tensor._version for tensor in part]) for part in parts]
        self._addresses = [tensor.data_ptr() for tensor in self._watched]

    def _untouched(self) -> bool:
        """Whether all tensors are the same objects at the same addresses, and were not written to."""
        tensors = self._tensors()
        if len(tensors) != len(self._watched) or any(a is not b for a, b in zip(tensors, self._watched, strict=True)):
            return False
        if [tensor.data_ptr() for tensor in tensors] != self._addresses:
            return False
        return all([tensor._version for tensor in part] == versions for part, versions in self._turns)

    def _tensors(self) -> list[torch.Tensor]:
        found = (owner.get(name) for _, owner, name in self._slots)
        return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


class ForwardProbe:
    """One image, whose row says whether the dropped layers still compute what they did: a number that forward reads, a
    hook, a global variable may have changed where no weight has.

    Args:
        chain: the layers.
        k: number of dropped layers.
        run: calls the model on images, in the loop's way.
        image: [1, ...].
    """

    def __init__(self, chain: Chain, k: int, run: Callable[[torch.Tensor], Any], image: torch.Tensor) -> None:
        self._chain, self._k, self._run, self._image = chain, k, run, image
        self._autocast = _autocast(image)  # whatever the loop is in when an epoch begins
        self.accept()

    def accept(self) -> None:
        """Accept what the layers compute now."""
        self._row = self._now()

    def reason(self) -> str | None:
        """Say that the layers compute something else, or return None."""
        now = self._now()
        row = self._row
        if now.shape == row.shape and bool(((now == row) | ((now != now) & (row != row))).all()):
            return None
        self._row = now
        return (
            f"the first {self._k} layers compute something else than when their rows were: what their forward reads beside "
            "its input has changed (an attribute, a hook, a global variable)"
        )

    def _now(self) -> torch.Tensor:
        still = without_benchmark(self._image.device, deterministic=True)
        dtype = self._autocast
        same = torch.autocast(self._image.device.type, dtype, enabled=dtype is not None, cache_enabled=False)
        with attributes_preserved(self._chain.model, tables=False), fork_rng(0), torch.no_grad(), still, same:
            return row_at(self._chain, self._k, lambda: self._run(self._image.clone())).detach().clone()


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
            raise RuntimeError(
                "drop.loader: images must not require gradients while layers are dropped, because no gradient passes the "
                "cut; call drop.undrop() before adversarial training"
            )
        if self.operations is None:
            for operation in images.operations:
                for operand in operation:
                    if isinstance(operand, Constant):
                        operand.keep()
            self.operations, self.autocast = images.operations, _autocast(images)
            said, self.said = self.said, None
            if said and said != self.describe():
                return f"the loop did {said} to images when they were, and does {self.describe()}"
        autocast = _autocast(images)
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
                self._other(describe_operations(self.operations), describe_operations(images.operations))
            )

    @staticmethod
    def _other(wanted: str, got: str) -> str:
        return (
            "drop.loader: the loop must do the same to the images of every batch while layers are dropped, because cached "
            f"rows stand for them: wanted {wanted}, got {got}; move what changes into the dataset or the model"
        )


def _autocast(images: torch.Tensor) -> torch.dtype | None:
    kind = images.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def describe_operations(operations: Sequence[Operation]) -> str:
    """Return the loop's operations in words, the same in every run."""

    def word(value: Any) -> str:
        if isinstance(value, Constant):
            tensor = value.tensor if value.kept is None else value.kept
            values = tensor.flatten()[:8].tolist()
            return f"{values}" if tensor.numel() <= 8 else f"{values} of {list(tensor.shape)}"
        return str(value)

    return ", then ".join(f"{name}({', '.join(map(word, rest))})" for name, *rest in operations) or "nothing"


class DataGuard:
    """A few samples are compared, at each epoch, with what they were when their rows were kept.

    Args:
        key: position of the model's input in a batch.
        like: a batch with the structure of all.
        extras: what is kept of the batches beside their rows.
        seed: random seed of the choice.
    """

    def __init__(self, *, key: InputKey, like: Any, extras: BatchExtras, seed: int) -> None:
        self._key, self._like, self._extras = key, like, extras
        self._seed = seed
        self._digests = torch.empty(0, dtype=torch.int64)  # [N], of the images
        self._known = torch.empty(0, dtype=torch.bool)  # [N]

    def forget(self) -> None:
        """Forget all images."""
        self._known.zero_()

    def note(self, batch: Any, ids: torch.Tensor, *, only_new: bool = False) -> None:
        """Note the images of samples `ids` [B], whose rows are about to be kept; or only of those not noted yet."""
        images, size = input_of(batch, self._key), int(ids.max()) + 1
        if size > len(self._known):
            more = max(size, 2 * len(self._known)) - len(self._known)
            self._known = torch.cat([self._known, torch.zeros(more, dtype=torch.bool)])
            self._digests = torch.cat([self._digests, self._digests.new_zeros(more)])
        if only_new:
            new = torch.nonzero(~self._known[ids]).flatten()
            ids, images = ids[new], images[new.to(images.device)]
        self._known[ids] = True
        self._digests = self._digests.to(images.device)
        self._digests[ids.to(self._digests.device, non_blocking=True)] = image_digests(images)

    def state(self) -> list[torch.Tensor]:
        """Return what is known of the images, as tensors on the CPU."""
        return [self._known, self._digests.cpu()]

    def load(self, known: torch.Tensor, digests: torch.Tensor) -> None:
        """Know what another process knew."""
        self._known, self._digests = known, digests

    def choose(self, kept: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return the samples to read again: some of those with rows, `kept` [n]."""
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        chosen: torch.Tensor = kept[torch.randint(len(kept), (PROBES,), generator=generator)].unique()
        return chosen

    def check_shape(self, batch: Any) -> None:
        """Raise RuntimeError if the images have another shape."""
        shape, wanted = (list(input_of(one, self._key).shape[1:]) for one in (batch, self._like))
        if shape != wanted:
            raise RuntimeError(
                f"drop.loader: images must keep their shape {wanted} while layers are dropped, got {shape}; call "
                "drop.undrop() and make a new DropScheduler for images of another size"
            )

    def reason(
        self, batch: Any, ids: torch.Tensor, places: torch.Tensor, others: Sequence[Any] = (), *, random: bool
    ) -> str | None:
        """Say what has changed of samples `ids` [B], whose extras lie at `places` [B], or return None.

        Args:
            batch: the samples as they are read now.
            others: further readings of random samples.
            random: whether images differ each time they are read; then only the rest is compared.
        """
        changed = None
        if not random:
            known = self._known[ids] if len(self._known) > int(ids.max()) else torch.zeros(len(ids), dtype=torch.bool)
            if bool(known.any()):
                now = image_digests(input_of(batch, self._key))[known.to(self._digests.device)]
                if not torch.equal(now, self._digests[ids[known].to(self._digests.device)]):
                    changed = "the images"
        changed = changed or self._extras.first_difference(batch, places, others)
        return (
            changed and f"{changed} of some samples are no longer what the dataset gave when their rows were computed"
        )


class Guards:
    """All guards of a run, and the one reaction to them.

    Args:
        chain: the model's layers.
        source: the samples.
        rows: the rows.
        extras: what is kept of the batches beside their rows.
        key: position of the model's input in a batch.
        like: a batch with the structure of all.
        run: calls the model on images [n, ...], in the loop's way.
        modules: k -> the outermost modules that only the first k layers run.
    """

    def __init__(
        self,
        chain: Chain,
        source: Source,
        rows: RowSet,
        extras: BatchExtras,
        *,
        key: InputKey,
        like: Any,
        run: Callable[[torch.Tensor], Any],
        modules: Callable[[int], Sequence[nn.Module]],
    ) -> None:
        self._modules = modules
        self.loop = LoopGuard()
        self._chain, self._source, self._rows, self._extras = chain, source, rows, extras
        self._key, self._like, self._run = key, like, run
        self._data = DataGuard(key=key, like=like, extras=extras, seed=rows.config.seed)
        self._tensors: FrozenTensors | None = None
        self._probe: ForwardProbe | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def drop(self, k: int, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Guard the first k layers from now on."""
        self._tensors = FrozenTensors(self._chain, k, modules, optimizer)
        self._probe = ForwardProbe(self._chain, k, self._run, input_of(self._like, self._key)[:1])
        self._optimizer = optimizer

    def release(self) -> None:
        """Guard nothing."""
        self._tensors = self._probe = self._optimizer = None
        self.loop.forget()
        self._data.forget()

    def follow_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Look at another optimizer from now on."""
        if self._optimizer is not None:
            self._optimizer = optimizer

    def look(self, where: str) -> None:
        """Look at the model: discard the rows, with a RuntimeWarning, if the dropped layers have changed.

        Raises:
            RuntimeError: a parameter of a dropped layer has been set to train.
        """
        if self._tensors is None or self._probe is None or self._optimizer is None:
            return
        self._tensors.check_asleep(self._optimizer)
        # Between two steps all values are compared once; an epoch that begins asks for what else may have changed.
        changed = self._tensors.changed_layer(values=where == "step")
        reason = None if changed else self._probe.reason()
        if reason:
            changed = self._tensors.changed_layer()  # written to through `.data`
        if changed:
            self._tensors.accept()
            self._probe.accept()
            self._discard(where, f"the weights or buffers of the dropped layer {changed} have changed")
        elif reason:
            self._discard(where, reason)

    def begin_epoch(self, epoch: int) -> None:
        """Look at the model and, where samples can be read by number, at the data, before an epoch begins.

        Raises:
            RuntimeError: a parameter of a dropped layer has been set to train, or images have another shape.
        """
        self.look("loader")
        if not self._source.readable or not self._rows.stores:
            return
        kept = self._rows.drawn()
        if not len(kept):
            return
        ids = self._data.choose(kept, epoch)
        random = self._has_random_views()
        readings = [self._read(ids, epoch + i) for i in range(READINGS if random else 1)]
        self._compare_with(readings[0], ids, readings[1:])

    def check_step(self, images: Images, trains: bool) -> None:
        """Look at a call on images, before its forward. See `LoopGuard.check` and `FrozenTensors.check_step`."""
        if not trains:
            self.loop.compare(images)
            return
        if self._tensors is not None:
            self._tensors.check_step()
        if reason := self.loop.check(images):
            self._discard("loader", reason)
        if self.loop.autocast is None:
            self._cast_old(images.standing)
        if images.pixels is not None or images.standing.at < self._rows.cut:
            self._rows.begin_making(images.pixels is None, len(images))

    def _cast_old(self, standing: Standing) -> None:
        """A batch that was given before its rows were discarded trains on them for the last time, whatever they are: without
        autocast, in the dtype of the weights behind them."""
        row, at = standing.rows, standing.at
        if row is not None and row.dtype != self._rows.dtype(at):
            standing.rows = row.to(next(self._chain.parameters(at, at + 1)).dtype)

    def check_batch(self, batch: Any, ids: torch.Tensor) -> None:
        """Raise ValueError or RuntimeError unless a batch has all of its samples `ids` [B], in the shape of all."""
        check_count(batch, len(ids), self._key)
        self._data.check_shape(batch)

    def note(self, batch: Any, ids: torch.Tensor, *, only_new: bool = False) -> None:
        """Note the images of samples `ids` [B], whose rows are about to be kept; or only of those not noted yet."""
        if not self._has_random_views():
            self._data.note(batch, ids, only_new=only_new)

    def compare(self, batch: Any, ids: torch.Tensor, again: torch.Tensor | None) -> bool:
        """Compare a few samples of a batch of images with what they were when their rows were kept.

        Args:
            batch: the images of samples `ids`, on the device.
            ids: [B].
            again: [n] positions in the batch of ids that came before in this epoch; these are compared first.

        Returns:
            Whether any sample of the batch has a row, so that a change could be seen.

        Raises:
            RuntimeError: the shape of the images has changed.
            ValueError: an id stands for two samples in one epoch.
        """
        self._data.check_shape(batch)
        there = torch.nonzero(self._rows.filled(ids) & filled_at(self._extras, self._rows.places(ids))).flatten()
        if not len(there):
            return False
        if self._has_random_views():
            return True
        repeated = there if again is None else there[torch.isin(there, again)]
        among = repeated if again is not None and len(repeated) else there
        generator = torch.Generator().manual_seed(self._rows.config.seed + self._rows.epoch)
        take = among[torch.randperm(len(among), generator=generator)[:PROBES]]
        part = some_of(batch, take, key=self._key, like=self._like)
        if changed := self._data.reason(part, ids[take], self._rows.places(ids[take]), random=False):
            if again is not None and len(repeated):
                raise ValueError(
                    "drop.loader: an id must stand for one sample, got two samples with the same id in one iteration over "
                    "loader; give each sample an id of its own, and views=V where it is another image each time"
                )
            self._discard("loader", changed)
        return True

    def refresh(self, ids: torch.Tensor | None) -> None:
        """Discard the rows and extras of samples [n], or of all, without a warning."""
        if ids is None:
            self._rows.forget()
            self.forget_extras()
        else:
            self._rows.forget(ids)

    def forget_extras(self) -> None:
        """Discard what is kept beside the rows, and what is known of the images."""
        self._extras.clear()
        self._data.forget()

    def state(self) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """Return what is kept beside the rows, see `BatchExtras.state`, and what is known of their images."""
        values, tensors = self._extras.state()
        return values, [*self._data.state(), *tensors]

    def load(self, values: dict[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Replace what is kept beside the rows, and what is known of their images, by a `state`."""
        known, digests, *extras = tensors
        self._data.load(known, digests)
        self._extras.load(values, extras)

    def checksum(self, k: int) -> str:
        """Return a digest of the weights and buffers of the first k layers, the same in every process."""
        return weights_digest(self._modules(k), self._chain.parameters(0, k)) if k else ""

    def _compare_with(self, batch: Any, ids: torch.Tensor, others: Sequence[Any]) -> None:
        self.check_batch(batch, ids)
        there = filled_at(self._extras, self._rows.places(ids))
        if not bool(there.all()):
            return
        random = self._has_random_views()
        if changed := self._data.reason(batch, ids, self._rows.places(ids), others, random=random):
            self._discard("loader", changed)

    def _read(self, ids: torch.Tensor, seed: int) -> Any:
        return to_device(self._source.read(ids.tolist(), seed), self._rows.device)

    def _has_random_views(self) -> bool:
        return self._rows.views > 1 and not self._rows.config.mirror

    def _discard(self, where: str, reason: str) -> None:
        """The reaction: rows are computed again when their samples are next drawn."""
        cache = self._rows.cache
        if cache is not None and bool(cache.filled.any()):
            warnings.warn(
                f"drop.{where}: the rows are computed again: {reason}", RuntimeWarning, stacklevel=_frames_up()
            )
        self._rows.forget()
        self.loop.forget()
        self.forget_extras()


def _frames_up() -> int:
    """The stack level, for a warning by the caller, of the first frame outside of this package and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "learndrop_ext",
        "torch",
    ):
        frame, level = frame.f_back, level + 1
    return level


def image_digests(images: torch.Tensor) -> torch.Tensor:
    """Return a digest [B] int64 of each image of [B, ...], on their device: the sum of its 16-bit words, each times an odd
    random number of its position, mod 2^64. A change of one word is always seen."""
    raw = images.detach().contiguous().flatten(1).view(torch.uint8)
    if raw.shape[1] % 2:
        raw = nn.functional.pad(raw, (0, 1))
    words = raw.view(torch.int16).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(1 << 62), 1 << 62, (words.shape[1],), generator=generator) * 2 + 1
    digests: torch.Tensor = (words * keys.to(images.device)).sum(1)
    return digests


def held_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the identities of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _slots(chain: Chain, k: int, modules: Sequence[nn.Module]) -> list[tuple[str, Mapping[str, Any], str]]:
    """(layer, dictionary of the owning module, name) of each parameter and buffer of the first k layers."""
    layer_of = {name: layer.name for layer in chain[:k] for name in layer.tensors}
    names = {module: name for name, module in chain.model.named_modules()}
    found: list[tuple[str, Mapping[str, Any], str]] = []
    done: set[int] = set()
    last = chain.names[0]
    for name, layer in layer_of.items():
        path, _, own = name.rpartition(".")
        owner = chain.model.get_submodule(path)._parameters
        if owner.get(own) is not None and id(owner[own]) not in done:  # None: pruned, and found in its module below
            done.add(id(owner[own]))
            found.append((layer, owner, own))
    for module in dict.fromkeys(m for one in modules for m in one.modules()):
        mine = [layer for name, layer in layer_of.items() if name.startswith(f"{names.get(module, '')}.")]
        last = mine[0] if mine else last
        for held in (module._parameters, module._buffers):
            for own, tensor in held.items():
                if isinstance(tensor, torch.Tensor) and id(tensor) not in done:
                    done.add(id(tensor))
                    found.append((last, held, own))
    return found
