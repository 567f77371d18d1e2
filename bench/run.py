"""Runs the tests, then the benchmark suites and the training comparisons, and writes one JSON file for this machine.

    python bench/run.py [--suites kernels training overhead] [--data-root DIR] [--out bench/results] [--name NAME]

With --benchmarks the kernels' times are read from files of pytest-benchmark, such as those of bench/on_gpu.sh. No number is
written if a test fails. `docs/results.md` describes the file, from which `bench/table.py` makes the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import fcntl
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import stream_copy
import torch

from learndrop_ext import backend_info
from learndrop_ext.app import runs
from learndrop_ext.app.datasets import load_dataset
from learndrop_ext.app.options import PRESETS
from learndrop_ext.app.recipe import Recipe
from learndrop_ext.decide.probes import copy_bytes_per_second

ROOT = Path(__file__).resolve().parent.parent

SUITES = ("kernels", "training", "overhead")

#: dataset, model, seeds; what a machine without a GPU can finish, and what needs one.
CPU_TRAINING = [("digits", "resnet10", 3)]
GPU_TRAINING = [
    *[(data, model, 1) for data in ("mnist", "cifar10", "imagenette") for model in ("vgg11", "resnet18", "resnet50")],
    ("cifar10", "resnet152", 1),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--data-root", type=Path, help="folder with the original files of the image sets")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--name", help="name of the file (default: GPU or CPU)")
    parser.add_argument("--benchmarks", nargs="+", type=Path, help="files of pytest-benchmark to read, none is run")
    parser.add_argument("--machine", type=Path, help="file with the machine and limits that --benchmarks came with")
    parser.add_argument("--tests-passed", type=int, help="how many tests passed before; without it they are run first")
    args = parser.parse_args()
    if args.machine is not None:
        if args.benchmarks is None:
            parser.error("--machine needs --benchmarks, the files that were written on it")
        return convert(args)
    passed = run_tests() if args.tests_passed is None else args.tests_passed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = describe_machine(passed)
    result: dict[str, Any] = {
        "machine": machine,
        "limits": {"copy_gb_s": copy_limit(device)},
        "records": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name or file_name(machine)}.json"
    if "training" in args.suites:
        for record in training_records(device, args.data_root):
            result["records"].append(record)
            print(f"{record['run']:<12} {record['dataset']} {record['model']} {record['seconds']:.1f} s", flush=True)
        write(path, result)
    if "kernels" in args.suites:
        benchmarks = run_benchmarks() if args.benchmarks is None else read_benchmarks(args.benchmarks)
        result["records"] += kernel_records(benchmarks, device, result["limits"]["copy_gb_s"])
        write(path, result)
    if "overhead" in args.suites:
        result["records"] += overhead_records()
        write(path, result)
    print(path)
    return 0


def copy_limit(device: str) -> float:
    """GB/s, read plus written, of copies on the device: on a GPU as many in a row as the suites time calls."""
    if device == "cpu":
        return stream_copy.copy_gb_s()
    return copy_bytes_per_second(torch.device(device), size=1 << 28, copies=16) / 1e9


def convert(args: argparse.Namespace) -> int:
    """Write the records of benchmarks that another machine ran, with what a file of its own says of it."""
    came = json.loads(args.machine.read_text())
    result = {"machine": came["machine"], "limits": came["limits"]}
    device = "cuda" if came["machine"]["gpu"] else "cpu"
    records = kernel_records(read_benchmarks(args.benchmarks), device, came["limits"]["copy_gb_s"])
    path = args.out / f"{args.name or file_name(came['machine'])}.json"
    write(path, result | {"records": list(records)})
    print(path)
    return 0


def write(path: Path, result: dict[str, Any]) -> None:
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(path)


def results_to_continue(path: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a file of results, {} if there is none. Ends the program if another machine wrote it."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    for key in ("gpu", "cpu", "cores"):
        if found["machine"][key] != machine[key]:
            sys.exit(
                f"{path.name}: its runs have {key} = {found['machine'][key]!r}, this machine has {machine[key]!r}, and "
                "their seconds do not compare: give --name"
            )
    return found


def add(path: Path, machine: dict[str, Any], new: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Add a record to a file of results, to which other processes may add, and return it. new: if there is none yet."""
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        results = results_to_continue(path, machine) or new
        results["machine"] = machine
        results["records"].append(record)
        write(path, results)
    finally:
        os.close(handle)
    return results


def file_name(machine: Mapping[str, Any]) -> str:
    """The name of a machine's file: its GPU, or its CPU where it has none."""
    return re.sub(r"[^a-z0-9]+", "-", (machine["gpu"] or machine["cpu"]).lower()).strip("-")


def run_tests() -> int:
    """The number of tests that passed; ends the program when one failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"], cwd=ROOT, check=False
        ).returncode
        if code != 0:
            sys.exit("bench/run.py: a test failed, so no number is written")
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        count = {key: int(suite.get(key, "0")) for key in ("tests", "skipped", "failures", "errors")}
    return count["tests"] - count["skipped"] - count["failures"] - count["errors"]


def cpu_name(cpuinfo: str) -> str | None:
    """The name of a CPU with its family and model: clouds call CPUs of several generations by one name.

    Args:
        cpuinfo: text of /proc/cpuinfo.

    Returns:
        For example "AMD EPYC (family 25, model 1)"; the name alone where no numbers are given, None where there is none.
    """
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", cpuinfo, re.MULTILINE))
    if "model name" not in fields:
        return None
    numbers = ", ".join(
        f"{word} {fields[key]}" for key, word in (("cpu family", "family"), ("model", "model")) if key in fields
    )
    return fields["model name"] + (f" ({numbers})" if numbers else "")


def describe_machine(passed: int) -> dict[str, Any]:
    info = backend_info()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": cpu_name(Path("/proc/cpuinfo").read_text()) or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "triton": info.triton,
        "cuda": torch.version.cuda,
        "driver": info.driver,
        # A copy of the tree without its history is told its commit.
        "commit": os.environ.get("LEARNDROP_COMMIT")
        or commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "tests_passed": passed,
    }


def run_benchmarks() -> list[dict[str, Any]]:
    """Run all suites of pytest-benchmark and return what they measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "benchmarks.json"
        suites = sorted((ROOT / "bench").glob("bench_*.py"))
        options = ["-q", "--numprocesses=0", "--benchmark-only", "--benchmark-save-data", f"--benchmark-json={file}"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *map(str, suites)], cwd=folder, check=True)
        return read_benchmarks([file])


def read_benchmarks(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the benchmarks of files that pytest-benchmark wrote; a file that it left empty has none."""
    texts = [file.read_text() for file in files]
    return [benchmark for text in texts if text for benchmark in json.loads(text)["benchmarks"]]


def kernel_records(benchmarks: Iterable[Mapping[str, Any]], device: str, copy_gb_s: float) -> Iterator[dict[str, Any]]:
    """One record for each of our benchmarks and peer of it; without a peer one with peer None.

    A benchmark says in `extra_info` what it is: suite, case, contender ("learndrop" or the peer's name), bytes (moved at
    least, read plus written), of_a_copy (whether a copy of as many bytes in memory is its limit), launches (counted by the
    profiler, or None), and in_turn, the times of peers that were measured in turn with it.
    """
    cases: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        cases.setdefault((info["suite"], info["case"]), {})[info["contender"]] = benchmark
    for (suite, case), contenders in sorted(cases.items()):
        ours = contenders.pop("learndrop", None)
        if ours is None:
            continue
        times = sorted(ours["stats"]["data"])
        median = statistics.median(times)
        p20, p80 = (times[int(share * (len(times) - 1))] for share in (0.2, 0.8))
        moved = ours["extra_info"]["bytes"]
        record = {
            "suite": suite,
            "case": case,
            "device": device,
            "bytes": moved,
            "median_s": median,
            "p20_s": p20,
            "p80_s": p80,
            "gb_s": moved / median / 1e9,
            "share_of_limit": moved / median / 1e9 / copy_gb_s if ours["extra_info"].get("of_a_copy", True) else None,
            "launches": ours["extra_info"].get("launches"),
        }
        peers = {name: benchmark["stats"]["data"] for name, benchmark in contenders.items()}
        peers |= ours["extra_info"].get("in_turn", {})
        for peer, peer_times in sorted(peers.items()) or [(None, None)]:
            peer_median = statistics.median(peer_times) if peer_times else None
            ratio = peer_median / median if peer_median is not None else None
            yield record | {"peer": peer, "peer_median_s": peer_median, "ratio": ratio}


def overhead_records() -> Iterator[dict[str, Any]]:
    """The records of bench_overhead.py, which runs on the CPU."""
    program = ROOT / "bench" / "bench_overhead.py"
    run = subprocess.run([sys.executable, program], stdout=subprocess.PIPE, text=True, check=True)
    for line in run.stdout.splitlines():
        yield json.loads(line) | {"device": "cpu"}


def training_records(device: str, root: Path | None) -> Iterator[dict[str, Any]]:
    """One record for each run of each comparison: baseline, learndrop, freeze-only, short."""
    for dataset, model, seeds in GPU_TRAINING if device == "cuda" else CPU_TRAINING:
        if dataset != "digits" and root is None:
            print(f"training on {dataset}: not run, it needs --data-root", flush=True)
            continue
        split = load_dataset(dataset, root)
        preset = PRESETS[dataset] | ({"model": model})
        for seed in range(seeds):
            augment = preset.get("augment")
            recipe = Recipe(
                **{key: preset[key] for key in ("model", "width", "epochs", "batch_size", "lr")},
                stem="small" if split.size <= 64 else "imagenet",
                seed=seed,
                device=device,
                amp="bf16" if device == "cuda" else None,
                augment=augment,
                views=4 if augment else 1,
            )
            result: dict[str, Any] = {}
            for result in runs.compare(split, recipe, rivals=("freeze-only", "short")):  # noqa: B007
                pass
            for run in ("baseline", "learndrop", "freeze-only", "short"):
                yield {
                    "suite": "training",
                    "run": run,
                    "model": model,
                    "dataset": dataset,
                    "recipe": dataclasses.asdict(recipe),
                    "policy": {"learndrop": "StoppedLearning", "freeze-only": "Fixed, same drops"}.get(run),
                    "cache": recipe.codec if run == "learndrop" else None,
                    "seed": seed,
                    "device": device,
                    "epochs": result["config"]["short_epochs"] if run == "short" else recipe.epochs,
                    **result[run],
                }


if __name__ == "__main__":
    sys.exit(main())
