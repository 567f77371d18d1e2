"""Fine-tune a Hugging Face model with its Trainer in half the time.

python examples/huggingface_trainer.py --data-root DIR [--model NAME]     photos in DIR/train/CLASS and DIR/test/CLASS
python examples/huggingface_trainer.py --toy                              the digits of scikit-learn, in seconds
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from learndrop_ext import Budget, Fixed
from learndrop_ext.app.datasets import load_dataset, load_folder
from learndrop_ext.app.image_set import collate_batch
from learndrop_ext.huggingface import LearnDropCallback, LearnDropMixin


class LearnDropTrainer(LearnDropMixin, Trainer):
    """A Trainer whose training batches come from `drop.loader`."""


def collate(samples: Any) -> dict[str, torch.Tensor]:
    images, labels = collate_batch(samples)
    return {"pixel_values": images, "labels": labels}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root")
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", default="runs/huggingface", help="folder for checkpoints")
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint in --out")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(arguments)
    if args.toy:
        split, policy = load_dataset("digits", limit=128), Fixed({1: 2})
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
        config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10)
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
    else:
        split, policy = load_folder(args.data_root, size=224).map(lambda images: images.decoded()), Budget(2.0)
        model = AutoModelForImageClassification.from_pretrained(args.model, num_labels=len(split.classes))

    settings = TrainingArguments(
        args.out,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=32,
        learning_rate=1e-3 if args.toy else 5e-5,
        save_strategy="epoch",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
    )
    learn_drop = LearnDropCallback(policy=policy)
    trainer = LearnDropTrainer(
        model=model,
        args=settings,
        data_collator=collate,
        train_dataset=split.train,
        eval_dataset=split.test,
        compute_metrics=accuracy,
        callbacks=[learn_drop],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    for record in learn_drop.drop.history:
        print(f"epoch {record.epoch}: {record.epoch_seconds:.2f} s, {record.prefix} layers dropped: {record.reason}")
    print(f"test accuracy: {100 * trainer.evaluate()['eval_accuracy']:.1f} %")


if __name__ == "__main__":
    main()
