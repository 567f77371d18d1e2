"""Images that were not read: a batch in the training loop whose cached rows stand for its images, or for some of them.

B samples in a batch, m of them read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial, partialmethod
from typing import Any

import torch
from torch.utils import _pytree as pytree

from learndrop_ext.rng import fork_rng

ATEN = torch.ops.aten

#: What networks begin with: a loop that does it to images wants another network's output, which needs them.
OF_NETWORKS = frozenset(
    {
        *(ATEN.convolution, ATEN.conv1d, ATEN.conv2d, ATEN.conv3d, ATEN.linear, ATEN.matmul),
        *(ATEN.addmm, ATEN.mm, ATEN.bmm, ATEN.baddbmm),
    }
)
#: Numbers of images on which an operation is tried. What has a value for each sample does not fit one of them, and what
#: moves the samples of a batch by k moves those of one of them, unless k is a multiple of 11 * 13.
TRIED = (11, 13)
#: Consecutive samples of a batch, for micro-batches; and which argument is the dimension.
SLICES = {ATEN.slice: 1, ATEN.split: 2, ATEN.split_with_sizes: 2}


@dataclass(slots=True, eq=False)
class Standing:
    """What stands for some images: the ids of the samples and the rows of those that were not read."""

    owner: Any  # its `inside` is what stands for the images on which the model's forward runs, if it does
    ids: torch.Tensor  # [B] int64 (CPU)
    rows: torch.Tensor | None  # [B - m, ...], or None where all images were read
    at: int  # number of layers behind which the rows enter
    read: Callable[[torch.Tensor], torch.Tensor] | None  # ids -> images [B, ...]
    some: torch.Tensor | None = None  # [B] bool (CPU), which of the images were read, if some were and others not
    checked: bool = False  # whether a training call on them was noted
    trace: list[Any] | None = None  # the operations on them within the forward are noted here
    before: Sequence[Any] = ()  # an earlier trace: equal operations are not analysed again
    count: int = field(init=False)  # B

    def __post_init__(self) -> None:
        self.count = self.ids.numel()  # len() of a tensor takes 1 us

    def inside(self) -> bool:
        """Return whether the model's forward runs on these images."""
        return self.owner.inside is self


class Constant:
    """An operand beside the images, compared by value."""

    __slots__ = ("tensor", "values", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        # Tensors of inference mode do not count their writes.
        self.tensor, self.version, self.values = tensor, None if tensor.is_inference() else tensor._version, tensor

    def keep(self) -> None:
        """Keep the values, in case the tensor is written to."""
        if self.values is self.tensor:
            self.values = self.tensor.detach().clone()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Constant):
            return False
        same = self.tensor is other.tensor and self.version == other.version is not None
        return same or (self.values.dtype == other.values.dtype and torch.equal(self.values, other.values))

    def __repr__(self) -> str:
        some = self.values.flatten()[:8].tolist()
        return f"{some}" if self.values.numel() <= 8 else f"{some} of {list(self.values.shape)}"


#: One operation of the loop on its images: its name and its other operands.
Operation = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Form:
    """Shape, strides and dtype of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, count: int, recorded: int) -> Form:
        """Return the form in a batch of `count` samples, this one being of `recorded` samples."""
        if not self.shape or self.shape[0] % recorded:
            return self
        return Form((count * (self.shape[0] // recorded), *self.shape[1:]), self.stride, self.dtype)


def form_of(tensor: torch.Tensor) -> Form:
    """Return the form of a tensor."""
    return tensor.form if isinstance(tensor, Unread) else Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _have_no_values(tensor: Unread, what: str, *_: Any, **__: Any) -> Any:
    raise TypeError(f"drop.loader: {tensor!r} cannot be {what}: it has no values; {tensor.instead}")


class Unread(torch.Tensor):
    """A tensor without values that something stands for."""

    form: Form
    standing: Standing
    instead = "cached rows stand for it"
    number = -1, 0  # of the operation in `Standing.trace` that it came from, and among its results
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(cls, form: Form, device: torch.device, standing: Standing, *_: Any) -> Any:
        made = torch.Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride, dtype=form.dtype, device=device
        )
        torch._C._set_throw_on_mutable_data_ptr(made)  # code that takes no part in dispatch would get a null pointer
        made.form, made.standing = form, standing
        return made

    def __deepcopy__(self, memo: Any) -> Unread:
        return self

    # What asks for values without being an operation:
    numpy = partialmethod(_have_no_values, "a numpy array")
    __dlpack__ = partialmethod(_have_no_values, "given to another library")
    __reduce_ex__ = partialmethod(_have_no_values, "saved or sent")
    share_memory_ = partialmethod(_have_no_values, "shared")
    data_ptr = partialmethod(_have_no_values, "read at its address")
    apply_ = partialmethod(_have_no_values, "changed by a function of Python")
    data = property(torch.Tensor.detach, lambda tensor, _: _have_no_values(tensor, "given other values"))


class Images(Unread):
    """A batch of `drop.loader` [B, ...] while layers are dropped.

    It has the shape, dtype and device of the user's images. `pixels` [m, ...] holds those that were read, for the model
    alone, so that the loop meets the same limits in the epoch in which rows are kept as in those after it.

    The loop may do what keeps each sample by itself and in its place, see `_keeps_samples`, and take consecutive samples.
    `operations` notes what it does: with others the rows would be other rows. All else raises RuntimeError. `memory` counts
    the writes to what a slice or a view shares with its batch, `seen` those that `operations` has.
    """

    instead = "images.read() gives them"

    def __init__(
        self,
        form: Form,
        device: torch.device,
        standing: Standing,
        pixels: torch.Tensor | None = None,
        operations: tuple[Operation, ...] = (),
        memory: list[int] | None = None,
    ) -> None:
        self.pixels, self.operations = pixels, operations
        self.memory = [0] if memory is None else memory
        self.seen = self.memory[0]

    def __repr__(self) -> str:  # type: ignore[override]
        read = "not read" if self.pixels is None else "read, for the model alone"
        if self.standing.some is not None:
            read = f"{self.count_read} of them {read}"
        return f"Images({list(self.shape)}, {read})"

    @property
    def count_read(self) -> int:
        """m, how many of the images were read."""
        return 0 if self.pixels is None else len(self.pixels)

    def part_read(self) -> Images:
        """Return the images that were read, where others were not, as a batch [m, ...] of their own."""
        ids = self.standing.ids[self.standing.some]
        return _batch(self, replace(self.standing, ids=ids, rows=None, some=None), self.pixels)

    def with_rows(self, made: torch.Tensor) -> Images:
        """Return the whole batch as it is if none was read: `made` [m, ...] are the rows of those that were."""
        given, some = self.standing.rows, self.standing.some
        assert given is not None
        assert some is not None
        rows = given.new_empty_strided((len(some), *given.shape[1:]), given.stride(), dtype=made.dtype)
        for part, which in ((made, some), (given, ~some)):
            rows[torch.nonzero(which).flatten().to(rows.device)] = part.to(made.dtype)
        return _batch(self, replace(self.standing, rows=rows, some=None), None)

    def of_each(self, count: int) -> list[Images]:
        """Return the `count` images of each sample [B, ...], of a batch [B, n, ...] that nothing was done to. They go by the
        ids n i + j; a row of theirs is the j-th part of a sample's row."""
        whole, images = self.standing, []
        form = form_of(torch.empty((len(self), *self.shape[2:]), dtype=self.dtype, device="meta"))
        for j in range(count):
            rows, pixels = whole.rows, self.pixels
            if rows is not None:
                rows = rows.chunk(count, 1)[j].contiguous(memory_format=format_of(rows))
            if pixels is not None:
                pixels = pixels[:, j].contiguous()
            images.append(Images(form, self.device, replace(whole, ids=whole.ids * count + j, rows=rows), pixels))
        return images

    def read(self) -> torch.Tensor:
        """Return the images, read now if they were not, as the dataset gives them."""
        if self.pixels is not None and self.standing.some is None and not self.operations:
            return self.pixels.clone()
        if self.standing.read is None:
            raise RuntimeError("drop.loader: images of a loader with ids= can be read only as they come by")
        return self.standing.read(self.standing.ids)

    def check_memory(self) -> None:
        """Raise RuntimeError if the images were changed in place through a slice or a view of them."""
        if self.seen != self.memory[0]:
            raise RuntimeError(
                "drop.loader: the loop may only do to images what keeps each sample by itself and in its place, and they "
                "were changed in place through a slice or a view of them; change the whole batch, or make a copy (x = x - "
                "mean)"
            )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _operands(args, kwargs)
        images = [a for a in operands if type(a) is Images]
        x, packet = images[0], func.overloadpacket
        if x.standing.inside():
            return Feature.__torch_dispatch__(func, types, args, kwargs)
        for a in images:
            a.check_memory()
        if packet is ATEN.record_stream:
            for used in (x.pixels, x.standing.rows):
                if used is not None:
                    func(used, *args[1:])
            return None
        if packet is ATEN.cat and len(images) == len(args[0]) and (len(args) < 2 or args[1] == 0):
            return _joined(images)
        if packet in SLICES and (args[SLICES[packet]] if len(args) > SLICES[packet] else 0) % x.dim() == 0:
            return _sliced(func, x, args[1:], kwargs)
        known, written = _known(func, args, kwargs), _written(func, args, kwargs)
        stays = all(a is x for a in written) and (not written or known.forms == [form_of(x)])
        if not stays or any(a.standing is not x.standing for a in images):
            raise _refused(func, x)
        if known.keeps_samples is None:
            known.keeps_samples = _keeps_samples(func, args, kwargs, len(x), known.forms)
        if not known.keeps_samples:
            raise _refused(func, x)
        note, pixels = x.operations, [x.pixels] * len(known.forms)
        if packet is not ATEN.detach and packet is not ATEN.alias:
            note = (*note, _operation(func, args, kwargs, x, known.forms))
        if x.pixels is not None:
            found = _called(func, args, kwargs, lambda a: a.pixels, len(x), len(x.pixels))
            pixels = [a.view(-1, *form.shape[1:]) for a, form in zip(found, known.forms, strict=True)]
        if written:
            x.memory[0] += 1
            x.pixels, x.operations, x.seen = pixels[0], note, x.memory[0]
            return x
        device = torch.device(kwargs.get("device") or x.device)
        shared = x.memory if func._schema.returns[0].alias_info is not None else None
        if known.kind is torch.Tensor:
            return Images(known.forms[0], device, x.standing, pixels[0], note, shared)
        results = enumerate(zip(known.forms, pixels, strict=True))
        return known.kind(
            [Images(form, device, x.standing, read, (*note, ("result", i)), shared) for i, (form, read) in results]
        )


class Feature(Unread):
    """A tensor of a dropped layer, `of`, or one computed from it before the row enters. It has no values."""

    def __init__(self, form: Form, device: torch.device, standing: Standing, of: str) -> None:
        self.of = of

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Feature({list(self.shape)}, of the dropped layer {self.of}, not computed)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _operands(args, kwargs)
        x = next(a for a in operands if isinstance(a, Unread))
        of = x.of if isinstance(x, Feature) else "the first one"
        packet, trace = func.overloadpacket, x.standing.trace
        # In a backward pass a checkpoint computes its part again.
        if not (x.standing.inside() or packet is ATEN.detach or torch._C._current_graph_task_id() != -1):
            raise _absent(packet, of)
        written = _written(func, args, kwargs)
        if not all(isinstance(a, Unread) for a in written):
            raise RuntimeError(
                f"drop.loader: {packet.__name__} would write a dropped layer's output, which is not computed any more, into "
                "a tensor of the model; drop fewer layers"
            )
        known = _known(func, args, kwargs) if trace is None else _traced(x.standing, func, args, kwargs, operands)
        if not known.forms:
            raise _absent(packet, of)
        if written:
            return written[0]
        device = torch.device(kwargs["device"]) if kwargs.get("device") else x.device
        made = [Feature(form, device, x.standing, of) for form in known.forms]
        if trace is not None:
            for i, feature in enumerate(made):
                feature.number = len(trace) - 1, i
        return made[0] if known.kind is torch.Tensor else known.kind(made)


@lru_cache(maxsize=1024)
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """The position and name of what an operation writes its result into: its first argument, or `out`."""
    arguments = [
        (i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]
    return tuple((i, a.name) for i, a in arguments if i == 0 or a.kwarg_only)


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """What an operation writes its result into."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in _writes(func)]


def _operands(args: Any, kwargs: Any) -> list[Any]:
    """The arguments of an operation of torch, those in lists too: it has no deeper ones."""
    found: list[Any] = []
    for a in (*args, *kwargs.values()):
        found += a if type(a) in (list, tuple) else (a,)
    return found


@dataclass(slots=True)
class _Known:
    """What is known of an operation on arguments of these forms."""

    forms: list[Form]  # of its results; none if they are no tensors
    kind: type  # in which it returns them
    keeps_samples: bool | None = None  # see `_keeps_samples`; None before it was asked


#: By operation and the forms of its arguments: torch computes those of the results on the meta device, which takes about
#: 0.3 ms for a sum.
_KNOWN: dict[Any, _Known] = {}
MOST_KNOWN = 4096


def _known(func: Any, args: Any, kwargs: Any) -> _Known:
    def key_of(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return tuple(map(key_of, a))
        return (form_of(a), type(a) is Images) if isinstance(a, torch.Tensor) else (type(a), a)  # 2 == 2.0

    key = (func, *map(key_of, args), *map(key_of, kwargs.items()))
    with contextlib.suppress(TypeError):  # an argument that cannot be hashed
        if key in _KNOWN:
            return _KNOWN[key]

    def meta(a: Any) -> Any:
        if isinstance(a, torch.Tensor):
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        return torch.device("meta") if isinstance(a, torch.device) else a

    given, named = pytree.tree_map(meta, (args, kwargs))
    try:
        out = func(*given, **named)
    except (NotImplementedError, RuntimeError) as error:  # its results, or their forms, depend on values
        if "meta" not in str(error).lower():
            raise
        out = None
    outs = list(out) if isinstance(out, list | tuple) else [out]
    forms = [form_of(a) for a in outs if isinstance(a, torch.Tensor)]
    found = _Known(forms if len(forms) == len(outs) else [], type(out))
    if len(_KNOWN) >= MOST_KNOWN:  # a number among the arguments may be another one at each step
        _KNOWN.clear()
    with contextlib.suppress(TypeError):
        _KNOWN[key] = found
    return found


@lru_cache(maxsize=1024)
def _size_at(func: Any) -> int | None:
    """Which argument of an operation is the size of its result, of which the number of samples may be a part."""
    sizes = (i for i, a in enumerate(func._schema.arguments) if a.name == "size" and "List" in str(a.type))
    return next(sizes, None)


def _operation(func: Any, args: Any, kwargs: Any, x: Images, forms: Sequence[Form]) -> Operation:
    """An operation and its operands beside x, in the same words for every number of samples."""

    def word(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return tuple(map(word, a))
        return ("images" if a is x else a.operations) if type(a) is Images else _noted(a)

    name, at = func.overloadpacket.__name__.rstrip("_"), _size_at(func)
    named = tuple((k, word(v)) for k, v in kwargs.items() if k not in ("device", "non_blocking", "size"))
    rest = (a for i, a in enumerate(args) if i != at and not (i == 0 and a is x))
    sized = () if at is None else (forms[0].shape[1:], forms[0].stride[1:])
    return (name, *sized, *map(word, rest), *named)


def _called(
    func: Any, args: Any, kwargs: Any, instead: Callable[[Images], Any], count: int, samples: int
) -> list[torch.Tensor]:
    """The results of an operation on other tensors instead of its images, of `samples` samples and not `count`."""

    def given(a: Any) -> Any:
        if isinstance(a, list | tuple):
            return type(a)(map(given, a))
        return instead(a) if type(a) is Images else a

    given_args, at = list(map(given, args)), _size_at(func)
    if at is not None and given_args[at][:1] == [count]:
        given_args[at] = [samples, *given_args[at][1:]]
    out = func(*given_args, **{k: given(v) for k, v in kwargs.items()})
    return list(out) if isinstance(out, list | tuple) else [out]


def _keeps_samples(func: Any, args: Any, kwargs: Any, count: int, forms: Sequence[Form]) -> bool:
    """Whether an operation makes something of each of `count` images by itself, and leaves it in its place.

    Tried on `TRIED` random images: where the first one is another one, the results of the others stay as they are, and where
    all are moved by one, the results are, too. Where the operation is random, the same numbers are drawn each time.
    """
    if func.overloadpacket in OF_NETWORKS or not forms or any(form.shape[:1] != (count,) for form in forms):
        return False
    images = {id(a): a for a in _operands(args, kwargs) if type(a) is Images}

    def results(few: int, change: str) -> list[torch.Tensor]:
        given = {}
        with fork_rng(0):
            for key, a in images.items():
                top = 1 if a.is_floating_point() or a.dtype == torch.bool else 255
                draw = torch.rand if a.is_floating_point() else partial(torch.randint, top + 1)
                values = draw((few, *a.shape[1:]), device=a.device)
                if change == "first":
                    values[0] = top - values[0]
                given[key] = (values.roll(1, 0) if change == "moved" else values).to(a.dtype)
            return _called(func, args, kwargs, lambda a: given[id(a)], count, few)

    def keeps(few: int) -> bool:
        kinds = (results(few, change) for change in ("none", "first", "moved"))
        return all(
            len(a) == few and _close(a[1:], b[1:]) and _close(a.roll(1, 0), c) for a, b, c in zip(*kinds, strict=True)
        )

    try:
        return all(map(keeps, TRIED))
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are equal within rounding, NaN to NaN."""
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=1e-2, atol=1e-4, equal_nan=True)
    return torch.equal(one, other)


def _traced(standing: Standing, func: Any, args: Any, kwargs: Any, operands: Sequence[Any]) -> _Known:
    """Note an operation with its operands and what is known of it in the trace, and return that."""
    trace, number = standing.trace, len(standing.trace or ())
    assert trace is not None
    earlier = standing.before[number] if number < len(standing.before) else (None, (), None)
    is_same = earlier[0] is func and len(earlier[1]) == len(operands) and all(map(_is_noted, operands, earlier[1]))
    trace.append(earlier if is_same else (func, _noted(operands), _known(func, args, kwargs)))
    found: _Known = trace[-1][2]
    return found


def _is_noted(operand: Any, word: Any) -> bool:
    """Whether an operand is what `_noted` has made of one."""
    if type(word) is Constant:
        if operand is word.tensor and word.version is not None:
            return bool(operand._version == word.version) or Constant(operand) == word
        return isinstance(operand, torch.Tensor) and not isinstance(operand, Unread) and Constant(operand) == word
    if isinstance(operand, Unread):
        return bool(operand.number == word)
    return type(operand) is type(word) and bool(operand == word)


def _noted(operand: Any) -> Any:
    """An operand, as `Images.operations` and `Standing.trace` have it."""
    if isinstance(operand, list | tuple):
        return tuple(map(_noted, operand))
    if isinstance(operand, Unread):
        return operand.number
    return Constant(operand) if isinstance(operand, torch.Tensor) else operand


def _sliced(func: Any, x: Images, rest: Any, kwargs: Any) -> Any:
    """Consecutive samples of a batch: one slice, or a list of them."""

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        found = func(tensor, *rest, **kwargs)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    try:
        ids = parts(x.standing.ids)  # they have one dimension, that of the batch
    except IndexError:
        raise _refused(func, x) from None
    if x.standing.some is not None:
        made = [_some_of(x, at) for at in parts(torch.arange(x.standing.count))]
    else:
        nothing = [None] * len(ids)
        rows = nothing if x.standing.rows is None else parts(x.standing.rows)
        pixels = nothing if x.pixels is None else parts(x.pixels)
        made = [
            _batch(x, replace(x.standing, ids=i, rows=row), read, x.memory)
            for i, row, read in zip(ids, rows, pixels, strict=True)
        ]
    return made[0] if func.overloadpacket is ATEN.slice else made


def _some_of(x: Images, at: torch.Tensor) -> Images:
    """The samples at positions `at` [n], ascending, of a batch of which some were read."""
    standing, some = x.standing, x.standing.some
    assert standing.rows is not None
    assert some is not None
    assert x.pixels is not None
    taken = torch.zeros_like(some)
    taken[at] = True
    part = some[at]
    pixels = samples_at(x.pixels, torch.nonzero(taken[some]).flatten()) if part.any() else None
    rows = None if part.all() else samples_at(standing.rows, torch.nonzero(taken[~some]).flatten())
    mixed = part if pixels is not None and rows is not None else None
    return _batch(x, replace(standing, ids=standing.ids[at], rows=rows, some=mixed), pixels, x.memory)


def _joined(images: Sequence[Images]) -> Images:
    """Batches of images one behind the other."""
    first, rows = images[0], [x.standing.rows for x in images if x.standing.rows is not None]
    cuts = {x.standing.at for x in images if x.standing.rows is not None}
    if any(x.operations != first.operations for x in images) or len(cuts) > 1:
        raise RuntimeError(
            "drop.loader: images that are joined must have gone through the same operations, and their rows must be of one "
            f"cut, got {', '.join(map(repr, images))} and rows behind {sorted(cuts)} layers"
        )
    pixels = [x.pixels for x in images if x.pixels is not None]
    some = torch.cat(
        [
            torch.full((x.standing.count,), x.pixels is not None) if x.standing.some is None else x.standing.some
            for x in images
        ]
    )
    joined = None
    if rows:  # with the strides of each: torch.cat by itself keeps those of channels-last rows only
        joined = rows[0].new_empty_strided((sum(map(len, rows)), *rows[0].shape[1:]), rows[0].stride())
        torch.cat(rows, out=joined)
    standing = replace(
        first.standing,
        ids=torch.cat([x.standing.ids for x in images]),
        rows=joined,
        at=max(cuts, default=0),
        some=some if rows and pixels else None,
    )
    return _batch(first, standing, torch.cat(pixels) if pixels else None)


def _batch(like: Images, standing: Standing, pixels: torch.Tensor | None, memory: list[int] | None = None) -> Images:
    """Other samples that went through the same operations."""
    form = Form((standing.count, *like.shape[1:]), like.stride(), like.dtype)
    return Images(form, like.device, standing, pixels, like.operations, memory)


def format_of(rows: torch.Tensor) -> torch.memory_format:
    """Return channels last for rows [B, C, H, W] that lie so, else contiguous."""
    last = rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last) and not rows.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def samples_at(stack: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return the samples at positions `at` [n] (CPU) of a stack [B, ...], n <= B, with its strides."""
    return torch.index_select(stack, 0, at.to(stack.device), out=torch.empty_like(stack[: len(at)]))


def _absent(packet: Any, of: str) -> RuntimeError:
    return RuntimeError(
        f"drop.loader: {packet.__name__} would have to see the output of a dropped layer ({of}), which is not computed any "
        "more: cached rows stand for it. A loss or a hook may use the live layers' outputs; keep the layer live with a "
        "policy that drops fewer layers, or call drop.undrop()"
    )


def _refused(func: Any, x: torch.Tensor) -> RuntimeError:
    return RuntimeError(
        "drop.loader: the loop may only do to images what keeps each sample by itself and in its place (casts, .to, "
        "arithmetic with constants that have no batch dimension, crops, pads, slices of the batch), because cached rows "
        f"stand for them, and {func.overloadpacket.__name__} would have to see {math.prod(x.shape[1:])} values of each "
        "sample; move it into the dataset or into the model, or give it images.read() (another network's input)"
    )
