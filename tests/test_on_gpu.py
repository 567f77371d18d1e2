"""bench/on_gpu.sh, rehearsed without a GPU: a typo would cost a GPU's minutes."""

from __future__ import annotations

import importlib
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
    "training": {"training-photos-lite0.json", "training-cifar10-resnet18.json", "paper.json"},
}


def run(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(out)}
    # A run of pytest in a worker of pytest-xdist is one of its own.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("stage", WRITTEN)
def test_on_gpu_is_rehearsed_on_a_cpu(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = ("photos-lite0", "cifar10-resnet18", "paper-digits-vgg11") if stage == "training" else ()
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
        convert = ["--benchmarks", tmp_path / "row_ops.json", tmp_path / "delta_norms.json"]
        convert += ["--machine", tmp_path / "kernels.json", "--out", tmp_path, "--name", "again"]
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, convert)])
        monkeypatch.syspath_prepend(SCRIPT.parent)
        assert importlib.import_module("run").main() == 0
        assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "kernels.json").read_text())
    if stage == "training":
        photos, scratch = (
            json.loads((tmp_path / f"training-{name}.json").read_text())["cases"][name]["runs"] for name in cases[:2]
        )
        assert list(photos) == ["baseline", "learndrop", "short", "freeze-only", "linear probe", "kernel"]
        assert list(scratch) == ["baseline", "learndrop", "default", "short"]
        assert scratch["learndrop"][0]["prefixes"] == photos["freeze-only"][0]["prefixes"] == [1, 1]
        for one in (one for of_side in (*photos.values(), *scratch.values()) for one in of_side):
            whole = sum(seconds for part, seconds in one["spent"].items() if part not in ("capture", "fill"))
            assert whole == pytest.approx(one["seconds"], rel=0.2)
        # Other work on the machine may make steps of milliseconds look as if no drop halved them; the study then goes on.
        for _ in range(2):
            if "budget: not run, Budget: speedup must be at most" in (tmp_path / "paper.log").read_text():
                run(stage, cases[-1], "--device", "cpu", "--toy", "--no-build", out=tmp_path)
        records = json.loads((tmp_path / "paper.json").read_text())["records"]
        sides = [record["side"] for record in records]
        assert sorted(sides) == sorted(["baseline", "budget", "stopped", "short", "freeze-only"])


@pytest.mark.parametrize("arguments", [(), ("traning",), ("check", "--gpu"), ("check", "--device", "cpu")])
def test_on_gpu_refuses_what_it_does_not_know(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run(*arguments, out=tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("on_gpu.sh: ")
    assert not (tmp_path / "out").exists()


def pack(*arguments: Path | str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PIECE": "100k"}
    script = SCRIPT.with_name("pack_gpu.sh")
    return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_pack_gpu_joins_what_it_packed_and_refuses_damaged_pieces(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a").write_bytes(os.urandom(250_000))
    (tmp_path / "b.pth").write_bytes(b"b")
    pieces, joined = tmp_path / "pieces", tmp_path / "joined"
    assert pack("pack", pieces, tmp_path / "set", tmp_path / "b.pth").returncode == 0
    assert sorted(path.name for path in pieces.iterdir()) == ["piece.00", "piece.01", "piece.02", "sums"]
    assert pack("join", pieces, joined).returncode == 0
    for name in ("set/a", "b.pth"):
        assert (joined / name).read_bytes() == (tmp_path / name).read_bytes()
    (pieces / "piece.01").unlink()
    refused = pack("join", pieces, tmp_path / "again")
    assert (refused.returncode, (tmp_path / "again").exists()) == (2, False)
    assert "pack_gpu.sh: pieces must be as they were packed" in refused.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("unpack",), ("pack", "pieces"), ("join", "pieces"), ("join", "/none", "to")]
)
def test_pack_gpu_refuses_what_it_does_not_know(arguments: tuple[str, ...]) -> None:
    done = pack(*arguments)
    assert (done.returncode, done.stderr.startswith("pack_gpu.sh: ")) == (2, True)
