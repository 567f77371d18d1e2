from __future__ import annotations

import time

import pytest
import torch

from learndrop_ext.rows.stopwatch import Stopwatch


def test_stretches_add_up_until_the_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 10.0, 12.0, 20.0, 20.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch(torch.device("cpu"))
    assert watch.seconds() == 0.0
    for wanted in (0.5, 2.5):
        watch.add(watch.now())
        assert watch.seconds() == wanted
    watch.reset()
    assert watch.seconds() == 0.0
    watch.add(watch.now())
    assert watch.seconds() == 0.25


@pytest.mark.cuda
def test_work_on_a_gpu_is_measured_where_it_runs() -> None:
    watch = Stopwatch(torch.device("cuda"))
    begin = watch.now()
    torch.cuda._sleep(20_000_000)  # cycles: 10 ms at 2 GHz
    watch.add(begin)
    assert watch.seconds() > 5e-3
    watch.reset()
    assert watch.seconds() == 0.0
