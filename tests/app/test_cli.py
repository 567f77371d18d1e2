from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import learndrop_ext
from learndrop_ext.app.cli import main

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
    assert main(["train", *SMALL, "--plain", "--out", str(tmp_path / "plain")]) == 0
    assert "baseline" in capsys.readouterr().out


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
        (["compare", "--width", "4000"], "million parameters and wants"),
        (["compare", "--width", "1" + 30 * "0"], "is too large"),
        (["compare", "--policy", "budget"], "policy must be stopped, budget:SPEEDUP"),
        (["compare", "--policy", "fixed:1=2", "--patience", "5"], "--patience is for --policy stopped"),
        (["train", "--test-share", "0.5"], "--test-share is for --dataset folder, got --dataset digits"),
        (["train", "--dataset", "folder"], "--dataset folder wants --data-root DIR"),
        (["train", "--dataset", "folder", "--data-root", "{tmp}/none"], "none: no such folder"),
        (["train", "--weights", "default"], "'default' wants a model timm:NAME or torchvision:NAME"),
        (["train", "--weights", "{tmp}/none.pt"], "weights must be a file, got"),
        (["cache", "{tmp}/none"], "DIR must be a folder of rows"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert main(filled if filled[0] == "cache" else [*filled, "--out", str(tmp_path / "out")]) == 2
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


def test_compare_runs_through_on_real_cifar10(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dataset", "cifar10", "--data-root", str(data_root), "--model", "resnet18", "--epochs", "2"]
    assert main(["compare", *arguments, "--limit", "64", "--width", "8", "--out", str(tmp_path)]) == 0
    assert "learndrop" in capsys.readouterr().out
