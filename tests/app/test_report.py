from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from learndrop_ext.app import report
from learndrop_ext.app.page import replacing
from learndrop_ext.app.report import Reporter, format_table, render_report

DROP = {
    "epoch": 8,
    "prefix": 2,
    "layers": ["stem", "layer1.0"],
    "reason": "2 layers have stopped",
    "fill_seconds": 0.75,
    "row_bytes": 2048,
    "tier": "device",
}


def numbers(seconds: float, flops: float, accuracy: float, *drops: dict[str, Any]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "fill_seconds": 0.75 * len(drops),
        "measure_seconds": 0.1,
        "eval_seconds": 2.0,
        "forward_flops": flops,
        "accuracy": accuracy,
        "peak_memory_bytes": 3 * 2**20,
        "drops": list(drops),
    }


RESULT = {
    "config": {"model": "resnet10", "epochs": 12},
    "baseline": numbers(60.0, 2.0e12, 97.5),
    "learndrop": numbers(24.0, 5.0e11, 97.0, DROP, {**DROP, "epoch": 10, "prefix": 3}),
    "speedup": 2.5,
}


def record(run: str, epoch: int, **changes: Any) -> dict[str, Any]:
    return {
        "run": run,
        "epoch": epoch,
        "seconds": 2.0 * epoch,
        "train_loss": 0.5,
        "accuracy": 90.0 + epoch,
        "prefix": 0,
        "layers": 3,
        "lr": 0.1,
        "scores": None if run == "baseline" else {"stem": 0.1, "layer1.0": 0.2, "fc": 0.9},
        "reason": "",
        **changes,
    }


RECORDS = [record("baseline", 1), record("baseline", 2), record("learndrop", 1), record("learndrop", 2)]


class Page(HTMLParser):
    """The words, the tags and the attributes of a page; every tag that must be closed is."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.words.append(data.strip())


def test_format_table() -> None:
    lines = format_table(RESULT).split("\n")
    assert [re.split(" {2,}", line) for line in lines[:4]] == [
        ["run", "wall-clock time", "of which fill", "forward FLOPs", "test accuracy", "layers dropped, and when"],
        ["-" * width for width in (9, 15, 13, 22, 15, 33)],
        ["baseline", "60.0 s", "-", "2.00 TFLOP", "97.50 %", "none"],
        [
            "learndrop",
            "24.0 s (2.50x)",
            "1.5 s",
            "500.00 GFLOP (-75.0 %)",
            "97.00 % (-0.50)",
            "2 after epoch 8, 3 after epoch 10",
        ],
    ]
    assert [lines[n].index(cell) for n, cell in ((0, "forward"), (2, "2.00"), (3, "500.00"))] == [43, 43, 43]
    assert lines[4:] == [
        "",
        "Dropping took 24.0 s against 60.0 s (2.50x as fast), with 75.0 % fewer forward FLOPs and a test accuracy "
        "0.50 points lower.",
    ]


def test_format_table_of_unended_comparisons() -> None:
    assert len(format_table({"config": {}, "baseline": RESULT["baseline"]}).split("\n")) == 3
    alone = format_table({"learndrop": numbers(1000.0, 3e6, 10.0)})
    assert alone.split("\n")[2].split("  ")[0] == "learndrop"
    assert "16.7 min" in alone
    assert "3.00 MFLOP" in alone
    assert "(" not in alone
    assert format_table({}).startswith("run")


def test_format_table_of_slower_and_better_drops() -> None:
    text = format_table({"baseline": numbers(10.0, 1e12, 90.0), "learndrop": numbers(20.0, 1.5e12, 91.0, DROP)})
    assert "(0.50x as fast), with 50.0 % more forward FLOPs and a test accuracy 1.00 points higher." in text


@pytest.mark.parametrize(
    ("accuracy", "said"),
    [(93.5, "2.50 points better: dropping did not pay here."), (90.0, "1.00 points worse."), (91.0, "as good.")],
)
def test_format_table_names_the_rival(accuracy: float, said: str) -> None:
    result = {"baseline": numbers(20.0, 1e12, 90.0), "learndrop": numbers(10.0, 5e11, 91.0, DROP)}
    text = format_table(result | {"short": numbers(9.5, 5e11, accuracy)})
    assert text.endswith(f"test accuracy 1.00 points higher. The plain recipe, shortened to 9.5 s, was {said}")


def test_format_table_claims_nothing_without_a_drop() -> None:
    text = format_table({"baseline": numbers(10.0, 1e12, 90.0), "learndrop": numbers(5.0, 1e12, 90.0)})
    assert text.endswith("\n\nNo layer was dropped: both runs did the same work, so dropping made no difference.")


def test_format_table_of_a_drop_before_the_first_step() -> None:
    text = format_table({"learndrop": numbers(1.0, 1e9, 1.0, {**DROP, "epoch": 0}, DROP)})
    assert text.endswith("2 before the first step, 2 after epoch 8")


def test_format_table_shortens_many_drops() -> None:
    drops = [{**DROP, "epoch": epoch, "prefix": epoch} for epoch in range(1, 7)]
    assert format_table({"learndrop": numbers(1.0, 1e9, 1.0, *drops)}).endswith(
        "1 after epoch 1, 2 after epoch 2, 3 more, 6 after epoch 6"
    )


def test_render_report_is_one_file_with_three_plots() -> None:
    html = render_report(RESULT, RECORDS)
    page = Page(html)
    assert page.tags.count("svg") == 3
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    references = [(n, v) for n, v in page.attributes if n in ("src", "href", "xlink:href", "srcset", "action")]
    assert [value for _, value in references if not value.startswith(("#", "data:image/png;base64,"))] == []
    namespaces = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\s\"'<>)]*", html)) <= namespaces
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_render_report_shows_the_numbers() -> None:
    words = Page(render_report(RESULT, RECORDS)).words
    for wanted in (
        "60.0 s",
        "24.0 s (2.50x)",
        "1.5 s",
        "500.00 GFLOP (-75.0 %)",
        "97.00 % (-0.50)",
        "2 after epoch 8, 3 after epoch 10",
        "2 layers have stopped",
        "stem to layer1.0",
        "2.0 KiB",
        "Peak memory: baseline 3.0 MiB, learndrop 3.0 MiB.",
        "resnet10",
        "Score per layer and epoch",
        "Layers dropped over time",
        "Accuracy against time",
    ):
        assert wanted in words
    assert not any("has not finished" in word for word in words)


CHANGE = {
    **{"l1": 3.25, "l2": 0.5, "maximum": 0.125, "w_l1": 80.0, "w_l2": 10.0},
    **{"relative": 0.05, "cosine": None, "nonfinite": 0},
}


def test_render_report_shows_what_was_measured_last() -> None:
    records = [
        record("learndrop", 1, changes={"stem": {**CHANGE, "l1": 777.0}, "fc": CHANGE}),
        record("learndrop", 2, changes={"stem": None, "fc": CHANGE}),
        record("short", 1),
    ]
    html = render_report(RESULT, records)
    words = " ".join(Page(html).words)
    assert "over epoch 2 of the run learndrop" in words
    assert "stem dropped fc 3.25 0.5 0.125 80 10 0.05 - 0" in words
    assert "777" not in words
    assert "What was measured last" not in render_report(RESULT, RECORDS)


def test_render_report_shows_forecast_against_outcome() -> None:
    records = [
        record("baseline", 1, epoch_seconds=4.0, forecast_seconds=None),
        record("learndrop", 1, epoch_seconds=4.0, forecast_seconds=5.0),
        record("learndrop", 2, epoch_seconds=1.0, forecast_seconds=0.75),
        record("learndrop", 3, epoch_seconds=1.0),
    ]
    words = " ".join(Page(render_report(RESULT, records)).words)
    assert (
        "learndrop 1 5.00 s 4.00 s +25.0 % learndrop 2 0.75 s 1.00 s -25.0 % learndrop all 5.75 s 5.00 s +15.0 %"
        in words
    )
    assert "baseline 1 4.00 s" not in words
    assert "Forecast and measured time" not in render_report(RESULT, RECORDS)


def test_render_report_before_any_run_has_finished() -> None:
    page = Page(render_report({}, RECORDS[:1]))
    assert "No run has finished." in page.words
    assert "The run baseline has not finished: the plots show it up to epoch 1." in page.words
    assert page.words.count("Nothing was measured for this plot.") == 2
    assert page.tags.count("svg") == 1
    assert Page(render_report({}, [])).tags.count("svg") == 0


def test_render_report_with_the_baseline_only() -> None:
    page = Page(render_report({"config": {}, "baseline": RESULT["baseline"]}, RECORDS))
    assert "The run learndrop has not finished: the plots show it up to epoch 2." in page.words
    assert "No layer was dropped." in page.words
    assert page.tags.count("svg") == 3


def test_render_report_escapes() -> None:
    bad = "<script>alert('1')</script> & \"{{ 7 * 7 }}\""
    result = {
        "config": {bad: bad},
        "baseline": RESULT["baseline"],
        "learndrop": numbers(24.0, 1e12, 90.0, {**DROP, "layers": [bad], "reason": bad, "tier": bad}),
    }
    html = render_report(result, [record("learndrop", 1, scores={bad: 0.5}, reason=bad), record(bad, 1)])
    page = Page(html)
    assert "script" not in page.tags
    assert page.words.count(bad) >= 6
    assert "49" not in html.split("<svg")[0]


def test_replacing_gives_whole_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    with Reporter(tmp_path) as reporter:
        reporter.write(RESULT)
    assert path.read_text(encoding="utf-8") == render_report(RESULT, [])
    with replacing(path) as part:
        part.write_text("whole", encoding="utf-8")
    kept = [entry.name for entry in tmp_path.iterdir()]
    assert sorted(kept) == ["metrics.jsonl", "report.html"]

    def fails(self: Path, target: Path) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space"), replacing(path) as part:
        part.write_text("another", encoding="utf-8")
    with pytest.raises(FileNotFoundError), replacing(path) as part:
        (part / "none").write_text("another", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == kept


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_reporter_writes_what_is_not_finite_as_null(tmp_path: Path) -> None:
    with Reporter(tmp_path) as reporter:
        reporter.add(record("baseline", 1, train_loss=float("nan"), reason="\u00e9\n"))
    assert read_metrics(tmp_path) == [record("baseline", 1, train_loss=None, reason="\u00e9\n")]


def test_reporter_writes_each_record_at_once(tmp_path: Path) -> None:
    with Reporter(tmp_path / "a" / "b") as reporter:
        for n, one in enumerate(RECORDS, start=1):
            reporter.add(one)
            assert len(read_metrics(reporter.folder)) == n
        reporter.write(RESULT)
    assert read_metrics(reporter.folder) == RECORDS
    assert (reporter.folder / "report.html").read_text(encoding="utf-8") == render_report(RESULT, RECORDS)


def test_reporter_leaves_a_page_after_an_interruption(tmp_path: Path) -> None:
    def trains() -> None:
        with Reporter(tmp_path) as reporter:
            for one in RECORDS[:2]:
                reporter.add(one)
            reporter.write({"baseline": RESULT["baseline"]})
            reporter.add(RECORDS[2])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trains()
    words = Page((tmp_path / "report.html").read_text(encoding="utf-8")).words
    assert "60.0 s" in words
    assert "The run learndrop has not finished: the plots show it up to epoch 1." in words
    assert len(read_metrics(tmp_path)) == 3


def test_reporter_does_not_draw_again_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(report, "render_report", lambda result, records: drawn.append(len(records)) or "")
    with Reporter(tmp_path) as reporter:
        reporter.add(RECORDS[0])
        reporter.write({})
    assert drawn == [1]


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_reporter_names_the_package_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    message = re.escape(f'{name} is not installed: pip install "learndrop_ext[cli]"')
    with pytest.raises(ImportError, match=f"^Reporter: {message}$"):
        Reporter(tmp_path / "out")
    assert not (tmp_path / "out").exists()
