"""How a model is trained: what the command line asks for, apart from the data."""

from __future__ import annotations

from dataclasses import dataclass

from learndrop_ext.app.networks import check_network
from learndrop_ext.app.policies import parse_policy
from learndrop_ext.cache.config import CacheConfig
from learndrop_ext.decide.policy import Policy, StoppedLearning

OPTIMIZERS = ("sgd", "adamw")
#: Options of `StoppedLearning`, which no other policy has.
STOPPED_OPTIONS = ("threshold", "patience", "warmup", "max_dropped", "min_saving")
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, under a one-cycle learning rate.

    Args:
        model, stem, width, weights: see `build_network`.
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak learning rate.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw".
        weight_decay: of the optimizer.
        seed: of the weights, the order and the views, in 0..2**32-1.
        device: of the model and the images.
        amp: "bf16" for autocast, None for none.
        augment: see `ImageSet`.
        codec, views, mirror: of the cache, see `CacheConfig`.
        policy: see `parse_policy`.
        threshold, patience, warmup, max_dropped, min_saving: see `StoppedLearning`.
    """

    model: str
    stem: str
    width: int
    epochs: int
    batch_size: int
    lr: float
    weights: str | None = None
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    seed: int = 0
    device: str = "cpu"
    amp: str | None = None
    augment: str | None = None
    codec: str = "fp16"
    views: int = 1
    mirror: bool = False
    policy: str = "stopped"
    threshold: float = StoppedLearning.threshold
    patience: int = StoppedLearning.patience
    warmup: int = StoppedLearning.warmup
    max_dropped: float = StoppedLearning.max_dropped
    min_saving: float = StoppedLearning.min_saving

    def __post_init__(self) -> None:
        check_network(self.model)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"Recipe: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"Recipe: seed must be within 0..{MAX_SEED}, got {self.seed}")
        policy_of(self)
        cache_of(self)


def cache_of(recipe: Recipe) -> CacheConfig:
    """Return the cache settings of a recipe."""
    return CacheConfig(codec=recipe.codec, views=recipe.views, mirror=recipe.mirror)


def policy_of(recipe: Recipe) -> Policy:
    """Return the policy of a recipe."""
    return parse_policy(recipe.policy).build(**{name: getattr(recipe, name) for name in STOPPED_OPTIONS})
