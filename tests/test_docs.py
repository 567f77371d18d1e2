"""README.md and docs/: every Python block runs, every command parses, every link and error text is there.

The Python blocks of a page run in order and in one namespace, in an empty folder, at toy size: `PRELUDE` defines the
names that a page may use without making them. A block that makes a DropScheduler begins with a fresh model, optimizer
and loader.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_lightning import IGNORED

import learndrop_ext
from learndrop_ext.app import cli
from learndrop_ext.decide.policy import Budget, StoppedLearning

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]

#: Blocks marked `<!-- not run: reason -->`, in all pages; a new one is added here with its reason in the page.
NOT_RUN = {"ddp.md": 1, "memory-and-disk.md": 1}

PRELUDE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 16, 3, padding=1, stride=4), nn.BatchNorm2d(16), nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
images, labels = torch.randn(32, 3, 16, 16), torch.randint(0, 5, (32,))
train_set = TensorDataset(images, labels)
train_loader = DataLoader(train_set, batch_size=8, shuffle=True)
val_loader = DataLoader(train_set, batch_size=8)
criterion = nn.CrossEntropyLoss()
lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
epochs = 3


class JitteredSet(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        return images[index] + torch.rand(()), labels[index]


random_loader = DataLoader(JitteredSet(), batch_size=8, shuffle=True)


def train_one_epoch(drop):
    model.train()
    for x, y in drop.loader:
        loss = criterion(drop.model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. not_run: the reason in the comment above it, or None."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    found = []
    above, opened, start, reason = "", None, 0, None
    body: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if opened is None and line.startswith("```"):
            opened, start, body = line[3:].strip(), number, []
            marked = re.fullmatch(r"<!-- not run: (.+) -->", above)
            reason = marked[1] if marked else None
        elif opened is not None and line.startswith("```"):
            found.append(Block(page, start, opened, "\n".join(body), reason))
            opened = None
        elif opened is not None:
            body.append(line)
        if line.strip():
            above = line
    assert opened is None, f"{page}: the block at line {start} must be closed"
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """At toy size a second thread costs more than it does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=page.name,
            marks=[pytest.mark.filterwarnings(text) for text in IGNORED] if page.name == "integrations.md" else (),
        )
        for page in PAGES
    ],
)
def test_every_python_block_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "integrations.md":
        request.getfixturevalue("pl")
        request.getfixturevalue("transformers")
    names: dict[str, Any] = {}
    exec(PRELUDE, names)
    for block in blocks(page):
        if block.language != "python" or block.not_run is not None:
            continue
        # Blank lines above put the page's line into a traceback.
        code = compile("\n" * block.line + block.text, str(page), "exec")
        for left in (2, 1, 0):
            if "DropScheduler(" in block.text:
                exec(PRELUDE, names)
            try:
                exec(code, names)
                break
            except ValueError as error:
                # A toy step is short: on a busy machine one measurement in many takes it for nothing but overhead.
                if not left or "Budget: speedup must be at most" not in str(error):
                    raise


def test_blocks_have_a_language_and_those_not_run_are_counted() -> None:
    counted: dict[str, int] = {}
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "sh", "text"), (page.name, block.line)
            if block.not_run is not None:
                assert re.search(r"GPU|torchrun|network|not installed", block.not_run), (page.name, block.line)
                counted[page.name] = counted.get(page.name, 0) + 1
    assert counted == NOT_RUN


def commands() -> list[tuple[str, list[str]]]:
    """Every call of the command line in the pages, in blocks and between backticks: where, and its words."""
    found = []
    for page in [*LINKED]:
        lines = [
            (f"{page.name}:{block.line}", line)
            for block in blocks(page)
            if block.language == "sh"
            for line in block.text.replace("\\\n", " ").splitlines()
        ]
        inline = re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))
        for where, line in [*lines, *((page.name, text) for text in inline)]:
            for part in line.split("&&"):
                words = shlex.split(part, comments=True) if "learndrop " in part else []
                if words[:1] == ["learndrop"]:
                    found.append((where, words[1:]))
    return found


class _ParsedError(Exception):
    """The arguments were parsed; nothing is run."""


def parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the real parser takes a command line."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any) -> Any:
        parse_args(self, *args)
        raise _ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            cli.main(words)
        except _ParsedError:
            return True
        except SystemExit as ended:
            return ended.code == 0  # --help
    raise AssertionError("cli.main must parse its arguments first")


def test_every_command_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = commands()
    assert {words[0] for _, words in found} >= {"compare", "train", "info"}
    for where, words in found:
        assert parses(words, monkeypatch), (where, words)


def test_a_command_that_the_parser_does_not_know_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parses(["compare", "--with", "short"], monkeypatch)
    assert not parses(["compare", "--wiht", "short"], monkeypatch)
    assert not parses(["compere"], monkeypatch)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        # mkdocs serves docs/ alone.
        assert page.parent != DOCS or linked.parent == DOCS, target
        assert not anchor or anchor in anchors(linked), target


def test_the_contents_name_every_page() -> None:
    named = re.findall(r"^ +- [^:\n]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(named) == [page.name for page in sorted(DOCS.glob("*.md"))]


def test_the_tables_are_what_the_files_say() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "bench" / "table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_readme_has_the_signatures_there_are() -> None:
    calls = dict(re.findall(r"^\| `(\w+)\(([^`]*)\)` \|", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    parameters = inspect.signature(learndrop_ext.DropScheduler).parameters.values()
    first_keyword = next(i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY)
    names = [p.name for p in parameters]
    assert calls["DropScheduler"] == ", ".join([*names[:first_keyword], "*", *names[first_keyword:]])
    for policy in (StoppedLearning, Budget):
        for name, value in (word.split("=") for word in calls[policy.__name__].split(", ")):
            assert repr(inspect.signature(policy).parameters[name].default) == value, (policy, name)


def test_every_public_name_is_in_the_pages() -> None:
    told = set(re.findall(r"\w+", "".join(page.read_text() for page in PAGES)))
    assert {*learndrop_ext.__all__} - {"__version__"} <= told


#: What users meet: files of the package, and what their messages begin with.
SPEAKERS = (
    *("DropScheduler", "drop.", "split_layers:", "CacheConfig:", "StoppedLearning:", "Fixed:", "Budget:"),
    *("AutoFreeze:", "FreezeOut:", "cuda_graphs:"),
    "LearnDropCallback:",
    *("WidthScheduler", "width.", "OneShot:", "Iterative:", "Tolerance:", "Coreset:", "Zeros:"),
    *("Below:", "sparsify:"),
)
#: What a variable at the beginning of a message stands for.
SPEAKER_OF = {
    "checkpoint.py": ("…:", "DropScheduler.load_state_dict:"),
    "rules.py": ("…:", "FreezeOut:"),
}
SPEAKING = (
    *(
        "scheduler.py",
        "checks.py",
        "ledger.py",
        "checkpoint.py",
        "guards.py",
        "data/*.py",
        "forward/*.py",
        "rows/rowset.py",
        "rows/run_store.py",
    ),
    *("rows/store/store.py", "width/*.py", "distributed.py"),
    *("rows/config.py", "decide/policy.py", "decide/rules.py", "decide/timing.py", "lightning.py", "huggingface.py"),
)


def messages() -> set[str]:
    """The messages of errors and warnings, with … in the place of what is filled in."""
    found = set()
    for pattern in SPEAKING:
        paths = sorted((ROOT / "learndrop_ext").glob(pattern))
        assert paths, pattern
        for path in paths:
            nodes = list(ast.walk(ast.parse(path.read_text())))
            # Docstrings, and the pieces of a text with places to fill in.
            skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            skipped |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
            for node in nodes:
                text = None if id(node) in skipped else in_words(node)
                variable, speaker = SPEAKER_OF.get(path.name, ("", ""))
                if text is not None and variable and text.startswith(variable):
                    text = speaker + text.removeprefix(variable)
                if text is not None and text.startswith(SPEAKERS) and " " in text:
                    found.add(text)
    return found


def in_words(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def first_words(message: str) -> str:
    return " ".join(message.split()[:9])


def test_every_message_is_explained() -> None:
    page = (DOCS / "errors.md").read_text()
    found = messages()
    assert len(found) > 60
    assert [message for message in sorted(found) if first_words(message) not in page] == []


def test_no_message_is_explained_that_is_gone() -> None:
    known = {first_words(message) for message in messages()}
    told = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(), flags=re.MULTILINE)
    told = [text for text in told if text.startswith(SPEAKERS)]
    assert len(told) > 60
    assert [text for text in told if first_words(text) not in known] == []
