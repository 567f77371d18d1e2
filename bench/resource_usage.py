"""Prints registers, shared memory and spills of each CUDA kernel for each architecture; fails when a kernel spills.

Needs nvcc and c++filt, no GPU:    python bench/resource_usage.py [sm_80 sm_90 ...]
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# ptxas says, for each kernel: its name; stack and spills; registers and shared memory.
REPORT = re.compile(
    r"Compiling entry function '(?:void )?(?:learndrop::cuda::)?(?:\(anonymous namespace\)::)?"
    r"(?P<name>[^']+?)\(learndrop::cuda::[^']*' for .*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"[^\n]*Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers a thread, bytes of shared memory a block, bytes spilled a thread."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    spilled: int


def compile_report(source: Path, architecture: str) -> str:
    """What ptxas says of a source's kernels."""
    command = ["nvcc", "-std=c++20", f"-I{CSRC}", f"-arch={architecture}", "-cubin", "--resource-usage"]
    done = subprocess.run([*command, "-o", "/dev/null", source], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def usages(source: Path, architecture: str) -> Iterator[Usage]:
    """One Usage for each kernel of a source."""
    mangled = compile_report(source, architecture)
    report = subprocess.run(["c++filt"], input=mangled, check=True, capture_output=True, text=True).stdout
    for match in REPORT.finditer(report):
        yield Usage(
            kernel=re.sub(r"\(learndrop::(\w+)\)", r"\1 ", match["name"]),
            architecture=architecture,
            registers=int(match["registers"]),
            shared=int(match["shared"] or 0),
            spilled=int(match["stack"]) + int(match["stores"]) + int(match["loads"]),
        )


def main(architectures: list[str]) -> int:
    """Prints the table; 1 when a kernel spills."""
    jobs = [(source, one) for source in sorted((CSRC / "cuda").glob("*.cu")) for one in architectures or ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        found = [usage for part in pool.map(lambda job: list(usages(*job)), jobs) for usage in part]
    print(f"{'registers':>9} {'shared':>7} {'spilled':>7}  kernel")
    for usage in found:
        print(f"{usage.registers:>9} {usage.shared:>7} {usage.spilled:>7}  {usage.architecture} {usage.kernel}")
    print(f"{len(found)} kernels, at most {max(usage.registers for usage in found)} registers")
    return int(not found or any(usage.spilled for usage in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
