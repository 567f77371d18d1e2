"""bench/on_gpu.sh, rehearsed without a GPU: a typo would cost a GPU's minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "on_gpu.sh"
WRITTEN = {
    "check": {"host_time.json"},
    "kernels": {"row_ops.json", "delta_norms.json", "kernels.json"},
    "training": {"training.json", "paper.json"},
}


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)}
    # A run of pytest in a worker of pytest-xdist is one of its own.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", WRITTEN)
def test_on_gpu_is_rehearsed_on_a_cpu(stage: str, tmp_path: Path) -> None:
    cases = ("cifar10-resnet18", "warm-start", "paper-digits-vgg11") if stage == "training" else ()
    done = run(stage, *cases, "--device", "cpu", "--toy", "--no-build", out=tmp_path)
    assert done.returncode == 0, done.stdout
    steps = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    outcomes = {step["step"]: step["outcome"] for step in steps}
    assert all(outcome == "0" or outcome.startswith("skipped: ") for outcome in outcomes.values())
    for name in WRITTEN[stage]:
        assert json.loads((tmp_path / name).read_text())
    if stage == "check":
        assert outcomes["cuda-tests"] == "skipped: it needs a GPU"
    if stage == "kernels":
        records = json.loads((tmp_path / "kernels.json").read_text())["records"]
        assert {record["suite"] for record in records} == {"append_rows", "delta_norms", "gather_rows"}
        # What was brought from that machine gives the same records on another one.
        convert = [SCRIPT.with_name("run.py"), "--benchmarks", tmp_path / "row_ops.json", tmp_path / "delta_norms.json"]
        convert += ["--machine", tmp_path / "kernels.json", "--out", tmp_path, "--name", "again"]
        subprocess.run([sys.executable, *convert], check=True, stdout=subprocess.DEVNULL)
        assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "kernels.json").read_text())
    if stage == "training":
        found = json.loads((tmp_path / "training.json").read_text())["cases"]
        assert set(found["cifar10-resnet18"]["runs"]) == {"baseline", "learndrop", "short"}
        assert found["cifar10-resnet18"]["runs"]["learndrop"][0]["prefixes"] == [1, 1]
        assert len(found["warm-start"]["runs"]) == 5
        records = json.loads((tmp_path / "paper.json").read_text())["records"]
        assert [record["side"] for record in records] == ["baseline", "budget", "stopped", "short", "freeze-only"]


@pytest.mark.parametrize("arguments", [(), ("traning",), ("check", "--gpu"), ("check", "--device", "cpu")])
def test_on_gpu_refuses_what_it_does_not_know(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, out=tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("on_gpu.sh: ")
    assert not (tmp_path / "out").exists()
