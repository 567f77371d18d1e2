"""Time work on a device without synchronising after each interval."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds of some intervals; on a GPU it uses events on the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    def now(self) -> Any:
        """Start an interval; pass the result to `add`."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, begin: Any) -> None:
        """End an interval."""
        if self._on_gpu:
            self._events.append((begin, self.now()))
        else:
            self._seconds += time.perf_counter() - begin

    def seconds(self) -> float:
        """Return the seconds since the last `reset`. Waits for the measured work to finish."""
        for _, end in self._events[-1:]:
            end.synchronize()
        return self._seconds + sum(float(begin.elapsed_time(end)) / 1e3 for begin, end in self._events)

    def reset(self) -> None:
        """Start again from zero."""
        self._seconds, self._events = 0.0, []
