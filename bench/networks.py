"""Into how many layers `split_layers` splits networks of torchvision, timm and transformers, and which can be dropped.

    python bench/networks.py OUT.json [--against OTHER.json] [NAME ...]

Each network, with random weights, is split; then the first, the middle and the last cut are tried as a drop tries them: rows
that depend on the sample alone, and the same output from rows with everything before the cut absent. Adds a record for each
network that OUT.json does not have yet, so that it can be stopped and started again: `layers`, and `refused`, the reasons by
number of layers. `--against` lists networks with fewer layers than in another file. Networks of more than 200 million
parameters are left out. Needs torchvision, timm and transformers.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import nn

from learndrop_ext import split_layers
from learndrop_ext.forward.proof import check_cut

TIMM = [
    *("resnet26d", "resnet10t", "resnetv2_50", "resnext26ts", "seresnet50", "ecaresnet26t", "res2net50_26w_4s"),
    *("resnest14d", "skresnet18", "regnetx_002", "regnety_002", "regnetz_b16", "densenet121", "dla34", "dpn68"),
    *("cspresnet50", "cspdarknet53", "darknet53", "ese_vovnet19b_dw", "hardcorenas_a", "mobilenetv2_050"),
    *("mobilenetv3_small_050", "mobilenetv3_large_100", "mobilenetv4_conv_small", "fbnetc_100", "fbnetv3_b"),
    *("spnasnet_100", "efficientnet_b0", "efficientnetv2_rw_t", "tf_efficientnet_lite0", "ghostnet_050"),
    *("gernet_s", "repvgg_a0", "rexnet_100", "nf_resnet26", "convnext_atto", "convnextv2_atto", "inception_v3"),
    *("xception41", "vgg11_bn", "tinynet_e", "hrnet_w18_small", "selecsls42b", "tf_mixnet_s"),
]
LARGE = 200_000_000


def networks() -> Iterator[tuple[str, str, Callable[[], nn.Module]]]:
    """Source, name, and what makes the network."""
    models = torchvision.models
    for name in models.list_models(module=models):
        if models.get_model_weights(name).DEFAULT.meta["num_params"] <= LARGE:
            slow = name in ("googlenet", "inception_v3") or name.startswith("vgg")
            options = {"init_weights": False} if slow else {}
            yield "torchvision", name, lambda n=name, o=options: models.get_model(n, weights=None, num_classes=10, **o)
    for name in TIMM:
        yield "timm", name, lambda n=name: timm.create_model(n, num_classes=10)
    sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2]}
    vit = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 64,
    }
    for name, options in (
        ("ResNet", {"embedding_size": 8, "layer_type": "basic", **sizes}),
        ("ConvNext", sizes),
        ("ViT", {"patch_size": 16, **vit}),
    ):
        config = getattr(transformers, f"{name}Config")(num_labels=10, **options)
        kind = getattr(transformers, f"{name}ForImageClassification")
        yield "transformers", f"{name}ForImageClassification", lambda k=kind, c=config: k(c)


def size_for(model: nn.Module) -> int:
    """The first size of images that the model takes in both modes."""
    for size in (64, 224, 299):
        try:
            with torch.no_grad():
                model.train()(torch.randn(2, 3, size, size))
                model.eval()(torch.randn(2, 3, size, size))
            return size
        except (RuntimeError, ValueError, AssertionError):
            continue
    raise ValueError(f"{type(model).__name__} takes no images of 64, 224 or 299 px")


def tried(source: str, name: str, make: Callable[[], nn.Module]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make()
    size = size_for(model)
    x = torch.randn(4, 3, size, size)
    chain = split_layers(model, x[:2])
    refused = {k: check_cut(chain, k, model, x) for k in sorted({1, len(chain) // 2, len(chain) - 1})}
    found = {k: reason for k, reason in refused.items() if reason is not None}
    return {"source": source, "name": name, "size": size, "layers": len(chain), "refused": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", help="networks (default: all)")
    parser.add_argument("--against", type=Path, help="list networks with fewer layers than there")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    records = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(r["source"], r["name"]) for r in records}
    for source, name, make in networks():
        if (source, name) in done or (args.names and name not in args.names):
            continue
        records.append(tried(source, name, make))
        args.out.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
        print(json.dumps(records[-1]), flush=True)
        gc.collect()
    before = (
        {(r["source"], r["name"]): r["layers"] for r in json.loads(args.against.read_text())} if args.against else {}
    )
    fewer = [
        (r, before[key]) for r in records if (key := (r["source"], r["name"])) in before and r["layers"] < before[key]
    ]
    print(
        f"{len(records)} networks, at least {min(r['layers'] for r in records)} layers, {len(fewer)} with fewer than before"
    )
    for r, count in fewer:
        print(f"{r['name']}: {r['layers']}, before {count}")


if __name__ == "__main__":
    main()
