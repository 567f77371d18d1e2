"""A network without weights: look-up tables on binarised digits, culled by what each contributes to accuracy.

    python examples/weightless.py [--toy]

Every pixel gives THRESHOLDS bits: whether it is above each of them. A look-up table reads BITS of these, drawn at random,
as an address; for each class it holds how often training images of the class had that address. The class in which most
tables know an image's address wins. Culling removes, over and over, the tables without which the validation images are told
apart best: the idea of "Pruning weightless neural networks" (Susskind et al., ESANN 2022), whose own rule is not in its
abstract.

N images, K look-up tables, C classes, A = 2 ** BITS addresses.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

THRESHOLDS = (2, 6, 10, 14)  # of pixels from 0 to 16
BITS = 7


@dataclass(frozen=True)
class Tables:
    """K look-up tables.

    Args:
        inputs: [K, BITS], the bits that each table reads.
        counts: [K, C, A], how many training images of a class had an address.
        known: an address is known from this many images on.
    """

    inputs: Tensor
    counts: Tensor
    known: int = 1

    def kept(self, keep: Tensor) -> Tables:
        """Return some of the tables. keep: [K] bool."""
        return Tables(self.inputs[keep], self.counts[keep], self.known)

    def votes(self, bits: Tensor) -> Tensor:
        """Return in which classes each table knows the address of an image [N, n], as [N, K, C] numbers 0 or 1."""
        at = addresses(bits, self.inputs)
        found = self.counts.permute(0, 2, 1)[torch.arange(len(self.inputs)), at]
        return (found >= self.known).int()

    @property
    def bytes(self) -> int:
        """Memory of the tables with one bit for each address and class."""
        return self.counts.numel() // 8


def binarised(images: Tensor) -> Tensor:
    """[N, pixels] -> [N, pixels * thresholds] of 0 and 1."""
    return torch.cat([(images > threshold).int() for threshold in THRESHOLDS], 1)


def addresses(bits: Tensor, inputs: Tensor) -> Tensor:
    """Return the address that each table reads, [N, K]."""
    return (bits[:, inputs] << torch.arange(inputs.shape[1])).sum(2)


def learned(bits: Tensor, labels: Tensor, *, tables: int, seed: int) -> Tables:
    """Count the addresses of the training images: one pass, no gradient."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(bits.shape[1], generator=generator) for _ in range(tables)])
    inputs = order[: tables * BITS].view(tables, BITS)
    at = addresses(bits, inputs)
    counts = torch.zeros(tables, int(labels.max()) + 1, 2**BITS, dtype=torch.int32)
    for k in range(tables):
        counts[k].index_put_((labels, at[:, k]), torch.ones(len(labels), dtype=torch.int32), accumulate=True)
    return Tables(inputs, counts)


def accuracy(tables: Tables, bits: Tensor, labels: Tensor) -> float:
    """Return the share of images whose class most tables vote for, in percent."""
    return 100 * float((tables.votes(bits).sum(1).argmax(1) == labels).double().mean())


def without_each(tables: Tables, bits: Tensor, labels: Tensor) -> Tensor:
    """Return how well images are told apart without each table, [K]: the accuracy, and of equal ones the mean margin."""
    votes = tables.votes(bits)
    rest = (votes.sum(1, keepdim=True) - votes).double()  # [N, K, C]
    own = torch.nn.functional.one_hot(labels, rest.shape[2]).bool()[:, None].expand_as(rest)
    margin = rest[own].view(rest.shape[:2]) - rest.masked_fill(own, -1).amax(2)
    return (margin > 0).double().mean(0) + margin.mean(0) / (1000 * len(tables.inputs))


def culled(tables: Tables, bits: Tensor, labels: Tensor, *, keep: int) -> Tables:
    """Remove tables until `keep` are left, a twentieth of them at a time."""
    while (count := len(tables.inputs)) > keep:
        worst = without_each(tables, bits, labels).argsort(descending=True)[: min(count - keep, -(-count // 20))]
        stays = torch.ones(count, dtype=torch.bool)
        stays[worst] = False
        tables = tables.kept(stays)
    return tables


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args(argv)
    count = 60 if args.toy else args.tables
    images, labels = map(torch.as_tensor, load_digits(return_X_y=True))
    bits = binarised(images)
    parts = [slice(0, 900), slice(900, 1300), slice(1300, None)]
    (train, train_labels), choose, test = ((bits[part], labels[part]) for part in parts)
    tables = learned(train, train_labels, tables=count, seed=args.seed)
    known = max(range(1, 6), key=lambda known: accuracy(Tables(tables.inputs, tables.counts, known), *choose))
    whole = Tables(tables.inputs, tables.counts, known)
    generator = torch.Generator().manual_seed(args.seed)
    print("tables  of all    KiB  test accuracy  as many at random")
    for share in (1.0, 0.8, 0.6, 0.4, 0.2):
        keep = round(share * count)
        found = culled(whole, *choose, keep=keep)
        drawn = torch.zeros(count, dtype=torch.bool)
        drawn[torch.randperm(count, generator=generator)[:keep]] = True
        shown = f"{keep:6}  {share:6.0%}  {found.bytes / 1024:5.1f}  {accuracy(found, *test):11.2f} %"
        print(f"{shown}  {accuracy(whole.kept(drawn), *test):15.2f} %")


if __name__ == "__main__":
    main()
