"""The programs of examples/, each at a toy size."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from processes import Apart

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *needs: str) -> str:
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    return Apart(program, EXAMPLES / f"{name}.py").printed()


def program(path: str) -> None:
    warnings.simplefilter("ignore")  # they would stand among what is printed
    sys.argv = [path, "--toy"]
    runpy.run_path(path, run_name="__main__")


def test_plain_loop() -> None:
    lines = run("plain_loop").splitlines()
    assert [re.sub(r"[\d.]+ s", "T", line).partition(":")[0] for line in lines[:2]] == ["epoch 1", "epoch 2"]
    assert all("2 layers dropped" in line for line in lines[:2])
    assert re.fullmatch(r"test accuracy: \d+\.\d %", lines[2])


def test_optuna_sweep() -> None:
    printed = run("optuna_sweep", "optuna")
    assert re.findall(r"^trial (\d): \d+\.\d\d s with \{'lr'.*'dropped': [23]\}$", printed, re.MULTILINE) == list(
        "1234"
    )
    assert re.search(r"^best: \d+\.\d\d % with", printed, re.MULTILINE)


def test_folds() -> None:
    lines = run("folds").splitlines()
    assert [line.partition(":")[0] for line in lines] == [*(f"fold {i}" for i in range(1, 6)), "mean"]


def test_nightly() -> None:
    lines = run("nightly").splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["150", "165", "182", "200"]
    fills = [float(re.search(r"([\d.]+) s of it for rows", line)[1]) for line in lines]  # type: ignore[index]
    assert len(fills) == 4


@pytest.mark.filterwarnings("ignore:.*pin_memory.* argument is set as true but no accelerator is found")
def test_huggingface_trainer(transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, whose transformers can import torchvision."""
    spec = importlib.util.spec_from_file_location("huggingface_trainer", EXAMPLES / "huggingface_trainer.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)

    def dropped(*options: str) -> list[int]:
        example.main(["--toy", "--out", str(tmp_path), *options])
        printed = capsys.readouterr().out
        assert re.search(r"^test accuracy: \d+\.\d %$", printed, re.MULTILINE)
        return [int(k) for k in re.findall(r"^epoch \d: [\d.]+ s, (\d) layers dropped: ", printed, re.MULTILINE)]

    assert dropped("--epochs", "2") == [2, 2]
    assert dropped("--epochs", "3", "--resume") == [2, 2, 2]


def test_weightless() -> None:
    """A fifth of the tables, those that contribute most, lose little and less than as many drawn at random."""
    lines = run("weightless", "sklearn").splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["60", "100%"],
        ["48", "80%"],
        ["36", "60%"],
        ["24", "40%"],
        ["12", "20%"],
    ]
    whole, *_, few = ([float(number) for number in re.findall(r"(\d+\.\d\d) %", line)] for line in lines[1:])
    assert whole[0] == whole[1] > 85
    assert few[0] > max(few[1], whole[0] - 8)


def test_every_example_is_run() -> None:
    """accelerate_loop: tests/test_accelerate.py."""
    known = {
        *("plain_loop", "accelerate_loop", "huggingface_trainer", "optuna_sweep", "folds", "nightly"),
        "weightless",
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == known
