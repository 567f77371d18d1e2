"""A real Hugging Face Trainer with dropped layers equals one whose first layers are frozen and run live."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from learndrop_ext import CacheConfig, Fixed
from learndrop_ext.guards import PROBES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

#: Number of layers that are dropped after two and after three epochs, the modules in which they are, and one of these that
#: stays live: dropout behind the last weights.
DROPS = {
    "resnet": {2: (1, ["resnet.embedder"], None), 3: (2, ["resnet.encoder.stages.0"], None)},
    "vit": {
        2: (2, ["vit.embeddings"], "vit.embeddings.dropout"),
        3: (4, ["vit.embeddings", "vit.layers.0", "vit.layers.1"], None),
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """At toy size a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Photos(Dataset[Any]):
    """24 images, with the ids that were read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(24, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, 5, (24,), generator=generator)
        self.read: list[int] = []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def network(transformers: Any, name: str = "resnet") -> Any:
    torch.manual_seed(0)
    if name == "resnet":
        small = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5
        )
        return transformers.ResNetForImageClassification(small)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, **dropout, image_size=8, patch_size=4, num_labels=5)
    )


def policy(name: str = "resnet") -> Fixed:
    return Fixed({epoch: prefix for epoch, (prefix, *_) in DROPS[name].items()})


def trainer(
    transformers: Any,
    folder: Path,
    *callbacks: Any,
    mixed: bool = True,
    model: Any = None,
    photos: Any = None,
    **options: Any,
) -> Any:
    """A Trainer that keeps its losses. mixed: whether it has the mixin."""
    from learndrop_ext.huggingface import LearnDropMixin

    class Recording(*([LearnDropMixin] if mixed else []), transformers.Trainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            if self.model.training:
                losses.append(loss.detach().item())
            return loss

    losses: list[float] = []
    settings = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "num_train_epochs": 5, "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    args = transformers.TrainingArguments(output_dir=str(folder), **{**settings, **quiet, **options})
    model = network(transformers) if model is None else model
    photos = Photos() if photos is None else photos
    made = Recording(model=model, args=args, train_dataset=photos, eval_dataset=Photos(), callbacks=list(callbacks))
    made.losses = losses
    return made


def callback(**options: Any) -> Any:
    from learndrop_ext.huggingface import LearnDropCallback

    return LearnDropCallback(**{"policy": policy(), "cache": "fp32", **options})


def at_epochs_end(transformers: Any, act: Callable[[int, Any], None]) -> Any:
    """A callback that is called with the number of epochs, and the model."""

    class AtEpochsEnd(transformers.TrainerCallback):  # type: ignore[misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            act(round(state.epoch), model)

    return AtEpochsEnd()


def freezing(name: str) -> Callable[[int, nn.Module], None]:
    """What freezes the layers that the others drop: they run, in eval mode."""

    def freeze(epoch: int, model: nn.Module) -> None:
        _, parts, behind = DROPS[name].get(epoch, (0, [], None))
        for path in parts:
            part = model.get_submodule(path).requires_grad_(False)
            nn.Module.train(part, False)
            vars(part)["train"] = lambda mode=True, part=part: part
        if behind is not None:
            model.get_submodule(behind).train()

    return freeze


def prefixes(learn_drop: Any) -> list[int]:
    return [record.prefix for record in learn_drop.drop.history]


def attributes(model: nn.Module) -> dict[str, set[str]]:
    """The names of what the modules hold, but for accelerate's mark."""
    return {name: {*vars(module)} - {"_is_accelerate_prepared"} for name, module in model.named_modules()}


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    wanted = other.state_dict()
    assert one.state_dict().keys() == wanted.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet", {}),
        ("vit", {}),
        ("vit", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        ("vit", {"bf16": True}),
        ("resnet", {"label_smoothing_factor": 0.1, "accelerator_config": {"use_seedable_sampler": False}}),
    ],
)
def test_losses_are_those_of_a_frozen_live_prefix(
    transformers: Any, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    live = trainer(
        transformers,
        tmp_path,
        at_epochs_end(transformers, freezing(name)),
        mixed=False,
        model=network(transformers, name),
        **options,
    )
    live.train()
    learn_drop, photos, read = callback(policy=policy(name)), Photos(), []

    def count(epoch: int, model: Any) -> None:
        read.append(len(photos.read))
        photos.read.clear()

    run = trainer(
        transformers,
        tmp_path,
        learn_drop,
        at_epochs_end(transformers, count),
        model=network(transformers, name),
        photos=photos,
        **options,
    )
    run.train()
    assert run.losses == live.losses
    assert len(run.losses) == 15
    assert_equal(run.model, live.model)
    assert prefixes(learn_drop) == ([0, 1, 2, 2, 2] if name == "resnet" else [0, 2, 4, 4, 4])
    assert [record.samples for record in learn_drop.drop.history] == [24] * 5
    assert learn_drop.drop._rows.cache is None  # closed
    assert read[2] >= 24
    assert max(read[3:]) <= PROBES


@pytest.fixture(scope="module")
def whole(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A Trainer after an uninterrupted training, with its callback."""
    learn_drop = callback()
    run = trainer(transformers, tmp_path_factory.mktemp("whole"), learn_drop)
    run.train()
    run.learn_drop = learn_drop
    return run


@pytest.mark.parametrize("steps", [3, 8, 9, 11])
def test_a_resumed_training_equals_the_uninterrupted_one(
    transformers: Any, whole: Any, steps: int, tmp_path: Path
) -> None:
    """After the first epoch, and within and at the end of epochs with dropped layers."""
    learn_drop = callback()

    class Stop(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    first = trainer(transformers, tmp_path, callback(), Stop(), save_strategy="steps", save_steps=steps)
    first.train()
    assert len(first.losses) == steps
    second = trainer(transformers, tmp_path, learn_drop)
    second.train(resume_from_checkpoint=True)
    assert first.losses + second.losses == whole.losses
    assert_equal(second.model, whole.model)
    assert prefixes(learn_drop) == [0, 1, 2, 2, 2]
    wanted = whole.learn_drop.drop.history
    assert [record.scores for record in learn_drop.drop.history] == [record.scores for record in wanted]


@pytest.mark.parametrize("steps", [4, 8])
def test_a_training_resumed_within_an_epoch_sees_the_views_of_the_uninterrupted_one(
    transformers: Any, steps: int, tmp_path: Path
) -> None:
    def run(**options: Any) -> Any:
        learn_drop = callback(policy=Fixed({0: 1}), cache=CacheConfig(codec="fp32", mirror=True))
        return trainer(transformers, tmp_path, learn_drop, num_train_epochs=4, **options)

    first = run(save_strategy="steps", save_steps=steps, save_total_limit=9)
    first.train()
    second = run()
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert second.losses == first.losses[steps:]


def test_a_training_that_fails_goes_on_from_its_rows(transformers: Any, whole: Any, tmp_path: Path) -> None:
    cache = CacheConfig(codec="fp32", store=tmp_path, key=str)

    def fail(epoch: int, model: Any) -> None:
        if epoch == 5:
            raise OSError("the machine went away")

    first, learn_drop = (
        trainer(transformers, tmp_path / "run", callback(cache=cache), save_strategy="epoch"),
        callback(cache=cache),
    )
    first.add_callback(at_epochs_end(transformers, fail))
    with pytest.raises(OSError, match="the machine went away"):
        first.train()
    assert len(list(tmp_path.glob("rows-*.bin"))) == 1
    photos = Photos()
    second = trainer(transformers, tmp_path / "run", learn_drop, photos=photos)

    class Start(transformers.TrainerCallback):  # type: ignore[misc]
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            photos.read.clear()

    second.add_callback(Start())
    second.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-12"))
    assert first.losses[:12] + second.losses == whole.losses
    assert len(photos.read) <= PROBES
    assert list(tmp_path.glob("rows-*")) == []


def test_evaluation_sees_the_whole_model_which_is_given_back_as_it_was(transformers: Any, tmp_path: Path) -> None:
    learn_drop = callback()
    run = trainer(
        transformers, tmp_path, learn_drop, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True
    )
    before = attributes(run.model)
    run.train()
    told = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(told) == 5
    best = min(range(5), key=lambda i: told[i])
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{3 * (best + 1)}")
    assert run.evaluate()["eval_loss"] == pytest.approx(told[best], abs=1e-6)
    assert attributes(run.model) == before
    # The Trainer goes on, with the same callback.
    run.train()
    assert prefixes(learn_drop) == [0, 1, 2, 2, 2]


def test_evaluation_within_an_epoch_is_not_counted_as_training(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Slow(transformers.TrainerCallback):  # type: ignore[misc]
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            now[0] += 1000.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            now[0] += 1.0

    learn_drop = callback(policy=Fixed({}))
    run = trainer(transformers, tmp_path, learn_drop, Slow(), num_train_epochs=1, eval_strategy="steps", eval_steps=1)
    run.train()
    assert [record.epoch_seconds for record in learn_drop.drop.history] == [3.0]


def test_max_steps_ends_an_epoch_in_its_middle(transformers: Any, tmp_path: Path) -> None:
    learn_drop = callback()
    trainer(transformers, tmp_path, learn_drop, max_steps=10).train()
    assert [record.samples for record in learn_drop.drop.history] == [24, 24, 24, 8]
    assert prefixes(learn_drop) == [0, 1, 2, 2]
    assert learn_drop.drop._epochs == 4


def test_the_live_part_is_wrapped_anew_after_each_drop(transformers: Any, whole: Any, tmp_path: Path) -> None:
    wrapped: list[nn.Module] = []

    class Wrapper(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.calls = body, 0
            wrapped.append(self)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.body(*args, **kwargs)

    run = trainer(transformers, tmp_path, callback(wrap=Wrapper))
    run.train()
    assert run.losses == whole.losses
    assert [one.calls for one in wrapped[:3]] == [6, 3, 6]


def test_without_a_callback_the_mixin_changes_nothing(transformers: Any, tmp_path: Path) -> None:
    plain, mixed = (trainer(transformers, tmp_path, mixed=mixed, num_train_epochs=2) for mixed in (False, True))
    assert plain.train().metrics.keys() == mixed.train().metrics.keys()
    assert plain.losses == mixed.losses
    assert type(mixed.get_train_dataloader()).__name__ == "DataLoaderShard"


def test_the_trainer_counts_its_samples(transformers: Any, tmp_path: Path) -> None:
    run = trainer(transformers, tmp_path, callback(), num_train_epochs=2)
    seen: list[int] = []
    count = run.num_examples
    run.num_examples = lambda loader: seen.append(count(loader)) or seen[-1]
    run.train()
    assert set(seen) == {24}


def refused(run: Any, message: str) -> None:
    before = attributes(run.model)
    with pytest.raises(ValueError, match=message):
        run.train()
    assert attributes(run.model) == before


def test_trainers_that_cannot_be_followed_are_refused(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(
        trainer(transformers, tmp_path, callback(), mixed=False),
        "must take its loader from LearnDropMixin, got another",
    )
    wrapping = trainer(transformers, tmp_path, callback())
    wrapping.model_wrapped = nn.Sequential(wrapping.model)
    refused(wrapping, "must train the plain model, got a Sequential around it")
    several = trainer(transformers, tmp_path, callback())
    monkeypatch.setattr(type(several.args), "world_size", 2)
    refused(several, "must run one process, got 2")


def test_options_are_those_of_the_scheduler(transformers: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="codec"):
        trainer(transformers, tmp_path, callback(codec="fp16")).train()


def collated(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {
        "x": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


def test_another_call_of_the_model_is_given(transformers: Any, whole: Any, tmp_path: Path) -> None:
    learn_drop = callback(input="x", call=lambda model, batch: model(batch["x"]))
    run = trainer(transformers, tmp_path, learn_drop, remove_unused_columns=False)
    run.data_collator = collated
    own = run.compute_loss
    run.compute_loss = lambda model, inputs, **kwargs: own(
        model, {"pixel_values": inputs["x"], "labels": inputs["labels"]}, **kwargs
    )
    run.train()
    assert run.losses == whole.losses
    assert prefixes(learn_drop) == [0, 1, 2, 2, 2]


def test_layers_behind_which_an_adapter_learns_are_dropped(transformers: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        made = network(transformers, "vit")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
        return peft.get_peft_model(made, config)

    def freeze(epoch: int, model: nn.Module) -> None:
        freezing("vit")(epoch, model.base_model.model)

    options = {"label_names": ["labels"], "num_train_epochs": 4}
    live = trainer(transformers, tmp_path, at_epochs_end(transformers, freeze), mixed=False, model=adapted(), **options)
    live.train()
    learn_drop = callback(policy=policy("vit"))
    run = trainer(transformers, tmp_path, learn_drop, model=adapted(), **options)
    run.train()
    assert run.losses == live.losses
    assert_equal(run.model, live.model)
    assert prefixes(learn_drop) == [0, 2, 4, 4]
