from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import learndrop_ext
from learndrop_ext.app import cli, report, runs
from learndrop_ext.app.cli import main
from learndrop_ext.app.recipe import Recipe, cache_of
from learndrop_ext.rows.layout import RowForm
from learndrop_ext.rows.store.fingerprint import Fingerprint
from learndrop_ext.rows.store.store import RowKeys, RowStore, StoredRows

SMALL = ["--epochs", "2", "--limit", "96", "--width", "8", "--batch-size", "32"]


def test_compare_prints_a_table_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SMALL, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for word in ("baseline", "learndrop", "wall-clock time", "forward FLOPs", "test accuracy", "report.html"):
        assert word in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["run"], line["epoch"]) for line in lines] == [
        *(("baseline", 1), ("baseline", 2), ("learndrop", 1), ("learndrop", 2)),
    ]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3


def test_compare_json_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *SMALL, "--json", "--with", "freeze-only,short", "--out", str(tmp_path)]) == 0
    out = json.loads(capsys.readouterr().out)
    assert set(out) == {"config", "baseline", "learndrop", "speedup", "freeze-only", "short"}
    assert out["config"]["dataset"] == "digits"
    assert out["config"]["model"] == "resnet10"


def test_train_saves_the_whole_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--out", str(tmp_path)]) == 0
    assert "learndrop" in capsys.readouterr().out
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    assert "conv1.weight" in saved
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "metrics.jsonl", "report.html"}
    assert main(["train", *SMALL, "--plain", "--out", str(tmp_path / "plain")]) == 0
    assert "baseline" in capsys.readouterr().out


def test_train_narrows_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--plain", "--narrow", "l1:0.5", "--out", str(tmp_path)]) == 0
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {name: len(saved[f"{name}.weight"]) for name in lines[-1]["widths"]} == lines[-1]["widths"]
    assert lines[-1]["widths"] != lines[-1]["full_widths"]
    assert "Widths over epochs" in (tmp_path / "report.html").read_text()
    assert main(["train", *SMALL, "--narrow", "l1:2", "--out", str(tmp_path)]) == 2
    assert "--narrow must be CRITERION:KEEP" in capsys.readouterr().err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of photos of two classes that a network can tell apart: dark and bright."""
    folder = tmp_path / "photos"
    noise = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 156)):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = noise.integers(low, low + 100, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("model", ["resnet10", "timm:resnet18", "torchvision:resnet18"])
def test_train_on_a_folder_of_photos(
    photos: Path, tmp_path: Path, timm: ModuleType, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    common = ["--dataset", "folder", "--data-root", str(photos), "--image-size", "32", "--batch-size", "8"]
    common += ["--model", model, "--policy", "fixed:1=2", "--json"]
    assert main(["train", *common, "--epochs", "2", "--out", str(tmp_path / "a")]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [(drop["epoch"], drop["prefix"]) for drop in printed["learndrop"]["drops"]] == [(1, 2)]
    assert printed["config"]["optimizer"] == "adamw"
    assert printed["config"]["policy"] == "fixed:1=2"
    assert (printed["config"]["image_size"], printed["config"]["dataset"]) == (32, "folder")
    saved = tmp_path / "a" / "model.pt"
    assert torch.load(saved, weights_only=True)["fc.weight"].shape[0] == 2
    again = ["train", *common, "--epochs", "1", "--weights", str(saved), "--out", str(tmp_path / "b")]
    assert main([*again, "--test-share", "0.5", "--plain"]) == 0
    assert f"tensors from {saved}" in capsys.readouterr().err


def test_a_network_gets_the_pixels_that_its_weights_were_trained_on(
    photos: Path, timm: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def train(name: str, split: Any, recipe: Any, **_: Any) -> None:
        seen.append((split, recipe))
        raise ValueError("seen")

    monkeypatch.setattr(runs, "train", train)
    options = ["--dataset", "folder", "--data-root", str(photos), "--image-size", "32"]
    for model in ("timm:tf_efficientnet_lite0", "resnet10"):
        assert main(["train", *options, "--model", model]) == 2
    assert [split.train.mean for split, _ in seen] == [(0.5,) * 3, (0.485, 0.456, 0.406)]
    assert isinstance(seen[0][0].train.images, torch.Tensor)
    monkeypatch.setattr(cli, "free_bytes", lambda device: 40 * 3 * 32 * 32)
    assert main(["train", *options, "--model", "resnet10"]) == 2
    assert not isinstance(seen[2][0].train.images, torch.Tensor)


def test_what_is_wrong_with_photos_or_weights_is_said_in_a_line(
    photos: Path, tmp_path: Path, timm: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(message: str, *options: str) -> None:
        arguments = ["train", "--dataset", "folder", "--data-root", str(photos), "--image-size", "16"]
        assert main([*arguments, "--out", str(tmp_path / "out"), *options]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1

    refuses("the nearest: resnet18", "--model", "timm:resnett18")
    refuses("--width is for the models vgg.. and resnet.., got --model timm:resnet18", *NARROW)
    refuses("must hold tensors only, got a pickle that asks for", "--weights", str(pickled(tmp_path)))
    other = tmp_path / "other.pt"
    torch.save({"a": torch.zeros(1)}, other)
    refuses("must be of this network, got no 'conv1.weight'", "--weights", str(other))
    refuses(f"--out must be a folder that can be written, got {other}, where {other} is a file", "--out", str(other))
    (photos / "dark" / "3.png").write_text("no image")
    refuses(f"{photos / 'dark' / '3.png'}: must be a whole image, got: ")


NARROW = ["--model", "timm:resnet18", "--width", "8"]


def pickled(folder: Path) -> Path:
    path = folder / "code.pt"
    torch.save({"a": print}, path)
    return path


def test_forecast_prints_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {
        "epochs": 4,
        "layers": ["stem", "block", "head"],
        "views": 1,
        "full_seconds": 40.0,
        "runs": [
            [{"prefix": k, "start": s, "seconds": 40.0 - 5 * k * (4 - s), "speedup": 1.0} for s in range(4)]
            for k in (1, 2)
        ],
        "rows": [{"cut": 1, "bytes": [2**20, 0]}, {"cut": 2, "bytes": [2**19, 2**19]}],
        "largest_speedup": 1.5,
    }
    made = SimpleNamespace(as_dict=lambda: values, format_table=lambda: "4 epochs <without> drops: 40.0 s")
    monkeypatch.setattr(cli, "make_forecast", lambda split, recipe: made)
    assert main(["forecast", *SMALL, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "4 epochs <without> drops: 40.0 s" in printed
    page = (tmp_path / "out" / "forecast.html").read_text()
    assert str(tmp_path / "out" / "forecast.html") in printed
    assert page.count("<svg") == 2
    assert "4 epochs &lt;without&gt; drops: 40.0 s" in page
    for words in ("before the first step", "after epoch 1", "nothing dropped", "host"):
        assert words in page
    assert main(["forecast", *SMALL, "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == values
    for row in values["rows"]:
        row["bytes"] = []
    assert main(["forecast", *SMALL, "--out", str(tmp_path / "none")]) == 0
    assert (tmp_path / "none" / "forecast.html").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("arguments", "views", "mirror"),
    [
        ([], 1, False),
        (["--epochs", "24"], 1, False),
        (["--augment", "flip", "--epochs", "24"], 6, False),
        (["--augment", "standard", "--epochs", "24", "--policy", "budget:3,start=1"], 4, False),
        (["--augment", "flip", "--epochs", "5"], 2, False),
        (["--augment", "flip", "--epochs", "24", "--views", "3"], 3, False),
        (["--mirror"], 1, True),
    ],
)
def test_options_of_the_rows(
    arguments: list[str], views: int, mirror: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    made = SimpleNamespace(as_dict=dict, format_table=str)
    monkeypatch.setattr(cli, "make_forecast", lambda split, recipe: recipes.append(recipe) or made)
    monkeypatch.setattr(report, "write_forecast", lambda out, found: out)
    assert main(["forecast", *SMALL, *arguments, "--out", str(tmp_path)]) == 0
    assert (recipes[0].views, recipes[0].mirror) == (views, mirror)
    assert cache_of(recipes[0]).rows_per_sample == (2 if mirror else views)
    assert cache_of(dataclasses.replace(recipes[0], seed=7)).seed == 7


def test_store_lists_checks_and_removes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, form = RowStore(tmp_path), RowForm.of(torch.zeros(1, 5), "fp32")
    for cut in (1, 2):
        made_of = Fingerprint(f"w{cut}", cut, "fp32", "Net", "", "", "one")
        keys = RowKeys([b"a", b"b"], [0, 0], [None, None])
        StoredRows(store, made_of).append(keys, torch.full((2, 128), cut, dtype=torch.uint8), form, torch.float32)
    damaged, other = (tmp_path / entry.file for entry in sorted(store.entries()))
    damaged.write_bytes(damaged.read_bytes().replace(b"\1", b"\7", 1))
    assert main(["store", str(tmp_path), "--check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["damaged"] == {damaged.name: 1}
    assert {row["file"]: (row["cut"], row["rows"]) for row in found["rows"]} == {
        damaged.name: (1, 1),
        other.name: (2, 2),
    }
    assert main(["store", str(tmp_path)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["file", "cut"]
    assert sorted(line.split()[1] for line in lines) == ["1", "2"]
    assert main(["store", str(tmp_path), "--compact", "--remove-older-than", "1"]) == 0
    assert f"saved {128:,} bytes" in capsys.readouterr().out.splitlines()
    assert main(["store", str(tmp_path), "--keep-bytes", "0"]) == 0
    assert capsys.readouterr().out == f"removed 2 files\nno rows in {tmp_path}\n"


def test_store_refuses_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").touch()
    for name, kind in (("a", "a file"), (".", "a folder without an index"), ("none", "not there")):
        assert main(["store", str(tmp_path / name)]) == 2
        assert f"DIR must be a store of rows, got {tmp_path / name}, which is {kind}" in capsys.readouterr().err


def test_info_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == learndrop_ext.__version__
    assert found["torch"] == torch.__version__
    assert main(["info"]) == 0
    assert "cuda compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "--dataset", "mnist"], "needs a root"),
        (["compare", "--dataset", "mnist", "--data-root", "{tmp}"], "train-images-idx3-ubyte"),
        (["compare", "--model", "lenet"], "lenet"),
        (["compare", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["compare", "--device", "cpu:abc"], "--device must be auto, cpu, cuda or cuda:N, got 'cpu:abc'"),
        (["compare", "--threshold", "7"], "threshold must be within 0.0..1.0, got 7.0"),
        (["compare", "--width", "4000"], "million parameters and needs"),
        (["compare", "--width", "1" + 30 * "0"], "is too large"),
        (["compare", "--policy", "budget"], "policy must be stopped, budget:SPEEDUP"),
        (["compare", "--policy", "fixed:1=2", "--patience", "5"], "--patience is for --policy stopped"),
        (["train", "--test-share", "0.5"], "--test-share is for --dataset folder, got --dataset digits"),
        (["train", "--dataset", "folder"], "--dataset folder needs --data-root DIR"),
        (["train", "--dataset", "folder", "--data-root", "{tmp}/none"], "none: no such folder"),
        (["train", "--weights", "default"], "'default' needs a model timm:NAME or torchvision:NAME"),
        (["train", "--weights", "{tmp}/none.pt"], "weights must be a file, got"),
        (["store", "{tmp}/none"], "DIR must be a store of rows"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(filled if filled[0] == "store" else [*filled, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be a whole number of at least 1, got '0'"),
        (["--lr", "-1"], "must be a number above 0, got '-1'"),
        (["--with", "prayer"], "must be of freeze-only, short, separated by commas, got 'prayer'"),
        (["--dataset", "svhn"], "invalid choice"),
        (["--seed", str(2**64)], f"must be a whole number within 0..{2**32 - 1}, got '{2**64}'"),
        (["--seed", "-1"], f"must be a whole number within 0..{2**32 - 1}, got '-1'"),
        (["--width", "9" * 5000], "must be a whole number of at least 1, got '9999"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error_that_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--device", "cuda"]) == 2
    assert "torch.cuda.is_available() is False here" in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "compare" in capsys.readouterr().out


def test_ctrl_c_ends_cleanly_and_leaves_what_was_written_readable(tmp_path: Path) -> None:
    code = "import sys; from learndrop_ext.app.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "compare", "--epochs", "200", "--limit", "96", "--width", "8"]
    run = subprocess.Popen(
        [*command, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell makes what it runs in the background, this test too, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted; what was measured so far is in" in said
    assert "Traceback" not in said
    assert len([json.loads(line) for line in metrics.read_text().splitlines()]) >= 2


def test_ctrl_c_while_images_are_read_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "load_dataset", interrupted)
    assert main(["train", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_traceback_is_shown_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEARNDROP_TRACEBACK", "1")
    with pytest.raises(ValueError, match="model must be one of"):
        main(["train", "--model", "lenet", "--out", str(tmp_path / "out")])


def test_compare_runs_through_on_real_cifar10(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", "cifar10", "--data-root", str(data_root), "--model", "resnet18", "--epochs", "2"]
    assert main(["compare", *arguments, "--limit", "64", "--width", "8", "--out", str(tmp_path)]) == 0
    assert "learndrop" in capsys.readouterr().out
