"""Measures how long a measurement keeps the host busy, for which training waits.

    python bench/host_time.py --out FILE [--device cpu]

The parameters are those of ResNet-50. Calls are timed without synchronisation, so the device's own time is not included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench_delta_norms import NETWORKS

from learndrop_ext import ops
from learndrop_ext.kernels.chunks import build_table

CALLS = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    layers = [[torch.randn(shape, device=args.device) for shape in layer] for layer in NETWORKS["ResNet-50"]()]
    table = build_table(layers)
    out = torch.empty(len(table), table.columns, dtype=torch.float64, device=args.device)
    times = []
    for _ in range(CALLS):
        if args.device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        ops.delta_norms(table, refresh=True, out=out)
        times.append(time.perf_counter() - begin)
    result = {"device": args.device, "calls": CALLS, "median_s": statistics.median(times), "worst_s": max(times[5:])}
    args.out.write_text(json.dumps(result) + "\n")
    print(result)


if __name__ == "__main__":
    main()
