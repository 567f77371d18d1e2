"""The recipes of the command line, and the parts of a training run built from a recipe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from learndrop_ext.app.datasets import Split
from learndrop_ext.app.image_set import ImageSet, make_loader
from learndrop_ext.app.networks import Network, build_network
from learndrop_ext.data.source import views_within
from learndrop_ext.decide.forecast import Forecast
from learndrop_ext.decide.policy import Budget, Fixed, Policy, StoppedLearning
from learndrop_ext.decide.rules import AutoFreeze, FreezeOut, LinearFreeze, PipeTransformer
from learndrop_ext.rows.config import CacheConfig
from learndrop_ext.scheduler import DropScheduler
from learndrop_ext.width import CRITERIA, WidthScheduler

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("one-cycle", "constant")
#: The policies of the form KIND:VALUE,NAME=VALUE,...; the first value is that of the first argument.
POLICIES: dict[str, type[Any]] = {
    "budget": Budget,
    "freezeout": FreezeOut,
    "linearfreeze": LinearFreeze,
    "autofreeze": AutoFreeze,
    "pipetransformer": PipeTransformer,
}
POLICY_FORMS = (
    "stopped, budget:SPEEDUP, budget:SPEEDUP,start=EPOCH, fixed:EPOCH=LAYERS,EPOCH=LAYERS,..., freezeout:T0, "
    "linearfreeze:START, linearfreeze:START,level=SHARE, autofreeze:PERCENTILE or pipetransformer:ALPHA"
)
#: Options that only `StoppedLearning` has.
STOPPED_OPTIONS = ("threshold", "patience", "warmup", "max_dropped", "min_saving")
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run."""

    model: str  # see `build_network`, also for stem, width and weights
    stem: str
    width: int
    epochs: int
    batch_size: int
    lr: float  # the peak of one-cycle
    schedule: str = "one-cycle"  # of the learning rate, or "constant"
    weights: str | None = None
    optimizer: str = "sgd"  # with Nesterov momentum 0.9, or "adamw"
    weight_decay: float = 5e-4
    seed: int = 0  # of the weights, the sample order and the views, in 0..2**32-1
    device: str = "cpu"
    amp: str | None = None  # "bf16" for autocast
    augment: str | None = None  # see `ImageSet`
    codec: str = "fp16"  # see `CacheConfig`, also for views and mirror
    views: int = 1
    mirror: bool = False
    policy: str = "stopped"  # see `parse_policy`
    threshold: float = StoppedLearning.threshold  # this and the next four: see `StoppedLearning`
    patience: int = StoppedLearning.patience
    warmup: int = StoppedLearning.warmup
    max_dropped: float = StoppedLearning.max_dropped
    min_saving: float = StoppedLearning.min_saving
    steps: int | None = None  # optimizer steps, if the run ends within its last epoch; not with dropping

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"Recipe: {name} must be one of {', '.join(known)}, got {value!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"Recipe: seed must be within 0..{MAX_SEED}, got {self.seed}")
        policy_of(self)
        cache_of(self)


def cache_of(recipe: Recipe) -> CacheConfig:
    """Return the cache settings of a recipe."""
    return CacheConfig(codec=recipe.codec, views=recipe.views, mirror=recipe.mirror, seed=recipe.seed)


def policy_of(recipe: Recipe) -> Policy:
    """Return the policy of a recipe."""
    return parse_policy(recipe.policy, **{name: getattr(recipe, name) for name in STOPPED_OPTIONS})


def parse_policy(text: str, **stopped: Any) -> Policy:
    """Build a policy from one of `POLICY_FORMS`. "fixed:0=3,1=4" is `Fixed({0: 3, 1: 4})`.

    stopped: the arguments of `StoppedLearning`. Raises ValueError for another form or a value out of range.
    """
    if text == "stopped":
        return StoppedLearning(**stopped)
    kind, _, rest = text.partition(":")
    first, *more = rest.split(",")
    values: dict[str, Any] = {}
    try:
        if kind == "fixed":
            pairs = [(int(epoch), int(layers)) for epoch, layers in (pair.split("=") for pair in (first, *more))]
            values = {"prefixes": dict(pairs)} if len(dict(pairs)) == len(pairs) else {}
        elif kind in POLICIES:
            defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(POLICIES[kind])}
            given = {next(iter(defaults)): first} | dict(word.split("=") for word in more)
            if len(given) == 1 + len(more) and given.keys() <= defaults.keys():
                values = {name: type(defaults[name])(value) for name, value in given.items()}
    except ValueError:
        pass  # not a number: refused below
    if not values:
        raise ValueError(f"policy must be {POLICY_FORMS}, got {text!r}")
    policy: Policy = (Fixed if kind == "fixed" else POLICIES[kind])(**values)
    return policy


def parse_narrow(text: str) -> tuple[str, float]:
    """Return the criterion, a key of `CRITERIA`, and the share of channels left in the end, from "CRITERION:KEEP".

    Raises ValueError for another form, an unknown criterion, or a share not within 0..1.
    """
    criterion, _, share = text.partition(":")
    try:
        keep = float(share)
    except ValueError:
        keep = 0.0
    if criterion not in CRITERIA or not 0 < keep <= 1:
        forms = f"CRITERION:KEEP with one of {', '.join(CRITERIA)} and a share above 0 and at most 1"
        raise ValueError(f"--narrow must be {forms}, got {text!r}")
    return criterion, keep


def default_views(augment: str | None, epochs: int, policy: str) -> int:
    """Return how many views of a sample are kept in a run under a policy: 1 without augmentation, see `views_within`."""
    return views_within(epochs, getattr(parse_policy(policy), "speedup", Budget.speedup)) if augment else 1


@dataclass(frozen=True)
class Setup:
    """The model on its device, and the other parts of a training loop."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None  # None: the learning rate is constant
    loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]
    train: ImageSet
    test: ImageSet


def make_network(split: Split, recipe: Recipe) -> Network:
    """Build the network of a recipe for the images and classes of a split."""
    return build_network(
        recipe.model,
        num_classes=len(split.classes),
        in_channels=split.channels,
        stem=recipe.stem,
        width=recipe.width,
        weights=recipe.weights,
        seed=recipe.seed,
    )


def set_up(split: Split, recipe: Recipe) -> Setup:
    """Build the parts of a run. The same recipe gives the same initial weights and sample order."""
    device = torch.device(recipe.device)
    torch.manual_seed(recipe.seed)
    train_set, test_set = split.train.to(device).augmented(recipe.augment), split.test.to(device)
    loader = make_loader(train_set, recipe.batch_size, shuffle=True, seed=recipe.seed)
    # Channels last: on two cores of an AMD EPYC a step of EfficientNet-Lite0 takes 148 ms, with contiguous weights 258.
    model = make_network(split, recipe).model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
        )
    steps = recipe.steps or recipe.epochs * len(loader)
    one_cycle = recipe.schedule == "one-cycle"
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps) if one_cycle else None
    return Setup(model, optimizer, schedule, loader, train_set, test_set)


def make_scheduler(setup: Setup, recipe: Recipe, policy: Policy, *, caches: bool = True) -> DropScheduler:
    """Build the DropScheduler of a run. If `caches` is false, no rows are kept and frozen layers run at each step."""
    device = recipe.device.partition(":")[0]

    def call(model: nn.Module, batch: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=recipe.amp is not None):
            return model(batch[0])

    return DropScheduler(
        setup.model,
        setup.optimizer,
        setup.loader,
        policy=policy,
        epochs=recipe.epochs,
        cache=cache_of(recipe) if caches else None,
        call=call,
    )


def make_narrower(setup: Setup, recipe: Recipe, narrow: tuple[str, float], example: torch.Tensor) -> WidthScheduler:
    """Build the WidthScheduler of a run: one threshold over all layers, from the first epoch to the last.

    narrow: see `parse_narrow`.
    """
    if example.device.type == "cpu":
        # The backward pass of torch 2.13 corrupts memory on a CPU for a 1x1 convolution with stride 2 over fewer than 8
        # channels in the channels-last format, and a narrow ResNet has some.
        setup.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    criterion, keep = narrow
    options: dict[str, Any] = {"scope": "global", "epochs": recipe.epochs, "seed": recipe.seed}
    return WidthScheduler(setup.model, setup.optimizer, example, criterion=criterion, keep=keep, **options)


def make_forecast(split: Split, recipe: Recipe) -> Forecast:
    """Measure the costs of a recipe and return the forecast of its run, without training."""
    with make_scheduler(set_up(split, recipe), recipe, Fixed({})) as drop:
        return drop.forecast()
