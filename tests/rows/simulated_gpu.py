"""A GPU whose streams are queues: their work runs by chance, as late or as early as its events allow.

Work on the GPU's memory is put on the current stream. Host memory is read when a copy runs, not when it is enqueued.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from learndrop_ext.ops import transfer
from learndrop_ext.rows import host, tiers

CUDA = torch.device("cuda")


class Ticket:
    """One record of an event."""

    def __init__(self) -> None:
        self.done = False


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        # A lazy stream runs only when somebody waits for it.
        self.eagerness = gpu.random.choice([0.0, 0.1, 0.9])
        self.queue: list[Callable[[], bool]] = []
        gpu.streams.append(self)

    def enqueue(self, work: Callable[[], object]) -> None:
        """Run `work` when its turn comes."""
        self.put(lambda: [work()] != [])

    def put(self, attempt: Callable[[], bool]) -> None:
        """Add something that is tried until it returns True."""
        self.queue.append(attempt)
        self.gpu.run_by_chance()

    def wait_event(self, event: Event) -> None:
        ticket = event.ticket
        self.put(lambda: ticket is None or ticket.done)

    def synchronize(self) -> None:
        self.gpu.run_until(lambda: not self.queue)

    def step(self) -> bool:
        if self.queue and self.queue[0]():
            self.queue.pop(0)
            return True
        return False


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.ticket: Ticket | None = None  # of the last record

    def record(self, stream: Stream) -> None:
        ticket = self.ticket = Ticket()
        stream.enqueue(lambda: setattr(ticket, "done", True))

    def synchronize(self) -> None:
        ticket = self.ticket
        self.gpu.run_until(lambda: ticket is None or ticket.done)


class Executor:
    """A thread that runs at once, or when it is waited for."""

    latest: Gpu

    def __init__(self, *_: Any, **__: Any) -> None:
        self.gpu = self.latest
        self.gpu.threads.append(self)

    def submit(self, function: Callable[..., None], *arguments: Any) -> Promise:
        promise = Promise(lambda: function(*arguments))
        if self.gpu.random.random() < 0.5:
            promise.run()
        return promise

    def shutdown(self, *, wait: bool) -> None:
        self.gpu.threads.remove(self)


class Promise:
    def __init__(self, work: Callable[[], None]) -> None:
        self.work: Callable[[], None] | None = work
        self.error: Exception | None = None

    def run(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            try:
                work()
            except Exception as error:
                self.error = error

    def result(self) -> None:
        self.run()
        if self.error is not None:
            raise self.error


class GpuTensor(torch.Tensor):
    """Memory of the GPU: what is done to it is put on the current stream."""

    gpu: Gpu

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.gpu.recorded.append((self.data_ptr(), stream))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu = cls.gpu
        if func is torch.Tensor.copy_:
            to, source = plain(args[0]), args[1]
            gpu.current.enqueue(lambda: (gpu.check_pinned(source), to.copy_(plain(source))))
            return args[0]
        if func is torch.Tensor.cpu:
            source, to = plain(args[0]), plain(args[0]).clone()
            gpu.current.enqueue(lambda: to.copy_(source))
            gpu.current.synchronize()
            return to
        if func is torch.Tensor.__setitem__:
            to, where, values = plain(args[0]), args[1], args[2]
            values = plain(values) if isinstance(values, GpuTensor) else values.clone()
            gpu.current.enqueue(lambda: to.__setitem__(where, values))
            return None
        if func is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor):
            gpu.current.synchronize()
        return super().__torch_function__(func, types, args, kwargs or {})


def plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(torch.Tensor)


class Gpu:
    """The streams, the pinned memory, and what went wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.random = random.Random(seed)
        self.streams: list[Stream] = []
        self.threads: list[Executor] = []
        self.pinned: dict[int, int] = {}
        self.recorded: list[tuple[int, Stream]] = []  # address of memory, and the stream that uses it too
        self.faults: list[str] = []
        self.current = Stream(self)
        gpu = self
        GpuTensor.gpu = Executor.latest = gpu

        def allocate(rows: int, stride_bytes: int, device: torch.device) -> Tensor:
            return torch.randint(0, 256, (rows, stride_bytes), dtype=torch.uint8).as_subclass(GpuTensor)

        def read(self: host.HostTier, index: Tensor, into: Tensor) -> None:
            if not isinstance(into, GpuTensor):
                into.copy_(self.data[index])
                return
            data, index, to = self.data, index.clone(), plain(into)
            gpu.current.enqueue(lambda: (gpu.check_pinned(data), to.copy_(data[index])))

        real_empty = torch.empty

        def empty(*arguments: Any, device: Any = None, **options: Any) -> Tensor:
            made = real_empty(*arguments, **options)
            return made.as_subclass(GpuTensor) if str(device) == "cuda" else made

        for name, value in {
            "Stream": lambda device=None: Stream(gpu),
            "Event": lambda: Event(gpu),
            "current_stream": lambda device=None: gpu.current,
            "stream": self.on,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(transfer, "pin", lambda rows, device: self.pinned.update({rows.data_ptr(): rows.nbytes}))
        monkeypatch.setattr(transfer, "unpin", lambda rows: self.pinned.pop(rows.data_ptr(), None))
        monkeypatch.setattr(host.HostTier, "read", read)
        monkeypatch.setattr(tiers, "allocate", allocate)
        monkeypatch.setattr(tiers, "ThreadPoolExecutor", Executor)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def check_pinned(self, source: Tensor) -> None:
        """Note a copy that reads host memory which is not pinned any more."""
        at = source.data_ptr()
        if not any(begin <= at < begin + size for begin, size in self.pinned.items()):
            self.faults.append("a copy reads host memory that is not pinned any more")

    def run_by_chance(self) -> None:
        while self.random.random() < 0.6:
            stream = self.random.choice(self.streams)
            if self.random.random() < stream.eagerness:
                stream.step()

    def run_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            order = self.random.sample(self.streams, len(self.streams))
            assert any(stream.step() for stream in order), "deadlock: every stream waits"

    def run_all(self) -> None:
        self.run_until(lambda: not any(stream.queue for stream in self.streams))
