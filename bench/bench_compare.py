"""The comparison of README.md with several seeds: runs `learndrop compare` once per seed and keeps what it prints.

    python bench/bench_compare.py --data-root PHOTOS --weights FILE [--seeds 3]

Each comparison is a process of its own and is added to the file of this machine in bench/results/compare/ when it ends;
seeds in the file are skipped. `bench/table.py` makes the table from these files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from run import describe_machine, file_name, results_to_continue, write

from learndrop_ext.app.report import RUNS

ROOT = Path(__file__).resolve().parent.parent

#: What README.md says to type, but for the folder, the weights and the seed.
OPTIONS = (
    *("--dataset", "folder", "--model", "timm:tf_efficientnet_lite0", "--image-size", "96"),
    *("--policy", "budget:2.0", "--epochs", "5", "--with", "short,freeze-only"),
)


def compare(data_root: Path, weights: Path, seed: int) -> dict[str, Any]:
    """Run the command and return the object that it prints, without the folder in which the weights lie."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "learndrop_ext.app.entry", "compare", *OPTIONS, "--json", "--out", out]
        command += ["--data-root", str(data_root), "--weights", str(weights), "--seed", str(seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    result["config"]["weights"] = weights.name
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", type=Path, required=True, help="folder with train/ and val/ or test/")
    parser.add_argument("--weights", type=Path, required=True, help="file of EfficientNet-Lite0's weights")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0 on")
    parser.add_argument("--tests-passed", type=int, required=True, help="how many tests passed before")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "compare")
    parser.add_argument("--name", help="name of the file (default: GPU or CPU)")
    args = parser.parse_args(argv)
    machine = describe_machine(args.tests_passed)
    path = args.out / f"{args.name or file_name(machine)}.json"
    kept = results_to_continue(path, machine) or {"machine": machine, "results": []}
    for seed in range(args.seeds):
        if seed in (result["config"]["seed"] for result in kept["results"]):
            continue
        kept["results"].append(compare(args.data_root, args.weights, seed))
        args.out.mkdir(parents=True, exist_ok=True)
        write(path, kept)
        last = kept["results"][-1]
        shown = (f"{run} {last[run]['seconds']:.1f} s {last[run]['accuracy']:.2f} %" for run in RUNS if run in last)
        print(f"seed {seed}: {', '.join(shown)}", flush=True)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
