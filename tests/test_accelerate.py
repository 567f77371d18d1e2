"""The examples run, at toy size."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def accelerate_loop(request: pytest.FixtureRequest) -> ModuleType:
    """The example as a module; Accelerate imports torchvision where it is installed."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        request.getfixturevalue("torchvision_stub")
    spec = importlib.util.spec_from_file_location("accelerate_loop", EXAMPLES / "accelerate_loop.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def fresh_state() -> Callable[[], None]:
    """Accelerate keeps its settings in the process: forget those of the run before."""

    def forget() -> None:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    return forget


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_drops_and_goes_on_from_its_checkpoint(
    accelerate_loop: ModuleType,
    fresh_state: Callable[[], None],
    precision: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*arguments: str) -> list[float]:
        fresh_state()
        losses = accelerate_loop.main(["--samples", "256", "--precision", precision, "--codec", "fp32", *arguments])
        assert isinstance(losses, list)
        return losses

    whole = run("--epochs", "5")
    said = capsys.readouterr().out
    assert [int(k) for k in re.findall(r"(\d) layers dropped", said)] == [0, 1, 1, 2, 2]
    found = re.search(r"held-out accuracy: ([\d.]+) %", said)
    assert found is not None
    assert float(found[1]) > 90
    # The same in two runs, the second from the checkpoint of the first, with a layer dropped by then.
    parts = run("--epochs", "3", "--out", str(tmp_path)) + run("--epochs", "5", "--out", str(tmp_path), "--resume")
    assert parts == whole
    assert run("--epochs", "2", "--accumulate", "4") != whole[:2]
