"""Functions called in processes of their own, each the fork of one that has imported torch and the package, and no more."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

FORKS = multiprocessing.get_context("forkserver")
# The first step of an optimizer imports torch._dynamo; the digits of the examples come from scikit-learn.
FORKS.set_forkserver_preload(["pytest", "torch._dynamo", "sklearn.datasets", "learndrop_ext.scheduler"])


class Apart:
    """A call in another process."""

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        self._reader, writer = FORKS.Pipe(duplex=False)
        self._process = FORKS.Process(target=_call, args=(writer, function, *map(str, arguments)))
        self._process.start()
        writer.close()

    def printed(self) -> str:
        """What the call printed, at its end; an AssertionError if it failed or takes minutes."""
        with open(self._reader.fileno(), closefd=False) as pipe:
            text = pipe.read()
        self._process.join()
        assert self._process.exitcode == 0, text
        return text


def _call(writer: Connection, function: Callable[..., None], *arguments: str) -> None:
    signal.alarm(300)
    os.dup2(writer.fileno(), 1)
    os.dup2(writer.fileno(), 2)
    torch.set_num_threads(1)  # of more, those of OpenMP would not be there after another fork
    function(*arguments)
