"""What all tests share: memory that nobody wrote is poison, a GPU is never skipped in silence, real data where it is."""

from __future__ import annotations

import fcntl
import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
MadeOnce = Callable[[str, Callable[[Path], object]], Path]

if not torch.cuda.is_available():
    # Read by Triton when it is imported: its kernels then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


# The workers of pytest-xdist share the cores, and so do the programs that they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests go first: one at the end would keep a single worker busy."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What imports have made stays to the end: looking for garbage among it takes a third of a second each time."""
    importlib.import_module("torch._dynamo")  # torch imports it with the first step of an optimizer
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Triton's bindings tell what is left at the end."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") is None or torch.cuda.is_available():
        return
    if os.environ.get("LEARNDROP_REQUIRE_CUDA") == "1":
        pytest.fail("LEARNDROP_REQUIRE_CUDA=1 wants a GPU, and torch.cuda.is_available() is False", pytrace=False)
    pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty gives NaN (the largest value for integers), so that a value that nobody wrote is seen.

    Not on a GPU: the mode that fills memory also refuses operators that training needs there.
    """
    if request.node.get_closest_marker("cuda") is not None:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def torchvision_stub() -> ModuleType:
    """torchvision, whose import wants two operators; a build for another torch cannot load its own."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        pytest.skip("torchvision is not installed")
    try:
        torch.ops.load_library(Path(spec.origin).with_name("_C.so"))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(library)
    return importlib.import_module("torchvision")


@pytest.fixture(scope="session")
def timm(torchvision_stub: ModuleType) -> ModuleType:
    """timm, which imports torchvision."""
    return pytest.importorskip("timm")


@pytest.fixture(scope="module")
def pl(request: pytest.FixtureRequest) -> Any:
    """Lightning, which imports torchvision where it is installed."""
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_stub")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch
    return lightning.pytorch


@pytest.fixture(scope="session")
def transformers(request: pytest.FixtureRequest) -> ModuleType:
    """transformers, which imports torchvision, and `kernels` where it finds one: in the folder that tests are run from."""
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_stub")
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(sys, "path", [path for path in sys.path if Path(path).resolve() != ROOT])
        found = importlib.import_module("transformers")
        assert found.Trainer
        assert found.ResNetForImageClassification
    return found


#: A library's operators go with it.
LIBRARIES: list[torch.library.Library] = []


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Makes a file or folder of a name, and returns it: workers of pytest-xdist share what the first of them makes."""
    base = tmp_path_factory.getbasetemp()

    def made(name: str, make: Callable[[Path], object]) -> Path:
        path = (base.parent if workers else base) / name
        with open(f"{path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    return made


@pytest.fixture(scope="session")
def data_root(made_once: MadeOnce) -> Path:
    """A folder with real MNIST and CIFAR-10 in their original form.

    LEARNDROP_DATA, or unpacked from shared/data beside the checkout; skips where there is neither.
    """
    if named := os.environ.get("LEARNDROP_DATA"):
        return Path(named)
    unpack = ROOT.parent / "shared" / "data" / "unpack.py"
    if not unpack.exists():
        pytest.skip("no real data: LEARNDROP_DATA is not set")
    return made_once(
        "data",
        lambda root: subprocess.run(
            [sys.executable, unpack, root, "mnist", "cifar10"], check=True, capture_output=True
        ),
    )
