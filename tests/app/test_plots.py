from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from learndrop_ext.app.plots import plot_accuracy, plot_dropped, plot_scores, plot_widths

SVG = "{http://www.w3.org/2000/svg}"
LAYERS = ("stem", "layer1.0", "fc")


def record(run: str, epoch: int, prefix: int, **changes: Any) -> dict[str, Any]:
    scores = {name: 0.2 * row for row, name in enumerate(LAYERS)} if run == "learndrop" else None
    return {
        "run": run,
        "epoch": epoch,
        "seconds": 1.5 * epoch,
        "train_loss": 1.0,
        "accuracy": 90.0 + epoch,
        "prefix": prefix,
        "layers": 3,
        "lr": 0.1,
        "scores": scores,
        "reason": "",
        **changes,
    }


RECORDS = [record("baseline", 1, 0), record("baseline", 2, 0), record("learndrop", 1, 1), record("learndrop", 2, 1)]


def texts(svg: str | None) -> list[str]:
    assert svg is not None
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_plot_scores_labels() -> None:
    shown = texts(plot_scores(RECORDS))
    wanted = {"epoch", "score (0: not learning)", "layer, from the input (top) to the output", *LAYERS, "dropped"}
    assert wanted <= set(shown)


def test_plot_scores_hatches_only_what_was_dropped_before() -> None:
    def cells(records: list[dict[str, Any]]) -> int:
        svg = plot_scores(records)
        assert svg is not None
        # the colour bar's own cells are the same in each
        return len(re.findall("<path", svg))

    kept = [record("learndrop", epoch, 0) for epoch in (1, 2)]
    dropped_last = [record("learndrop", 1, 0), record("learndrop", 2, 1)]
    assert cells(kept) == cells(dropped_last)
    assert "dropped" not in texts(plot_scores(dropped_last))
    assert "dropped" in texts(plot_scores(RECORDS))


def test_layers_dropped_before_the_first_step_are_dropped_from_the_first_epoch_on() -> None:
    scores = {"stem": None, "layer1.0": 0.2, "fc": 0.4}
    records = [record("learndrop", epoch, 1, scores=scores) for epoch in (1, 2)]
    assert "dropped" in texts(plot_scores(records[:1]))
    assert "dropped" not in texts(plot_scores([record("learndrop", 1, 1)]))

    def heights(records: list[dict[str, Any]]) -> set[str]:
        """Where the line of the run passes."""
        svg = plot_dropped(records)
        assert svg is not None
        line = re.search(r'<g id="dropped-line2d_\d+">\s*<path d="(M [^"]+)"[^>]*stroke: #0072b2', svg)
        assert line is not None
        return set(re.findall(r"[ML] \S+ (\S+)", line.group(1)))

    assert len(heights(records)) == 1  # at one layer from the beginning
    assert len(heights([record("learndrop", epoch, 1) for epoch in (1, 2)])) == 2


def test_plot_scores_of_many_cells_is_an_image() -> None:
    names = [f"l{i}" for i in range(41)]
    records = [record("learndrop", e, 0, layers=41, scores=dict.fromkeys(names, 0.5)) for e in range(1, 101)]
    svg = plot_scores(records)
    assert svg is not None
    assert "data:image/png;base64," in svg
    assert len(svg) < 300_000
    # every second layer is named
    assert {"l0", "l2", "l40"} <= set(texts(svg))
    assert "l1" not in texts(svg)


@pytest.mark.parametrize("records", [[], [record("baseline", 1, 0)]])
def test_plot_scores_without_scores(records: list[dict[str, Any]]) -> None:
    assert plot_scores(records) is None


def test_plot_scores_of_a_measurement_without_numbers() -> None:
    nothing = dict.fromkeys(LAYERS)
    assert set(LAYERS) <= set(texts(plot_scores([record("learndrop", 1, 0, scores=nothing)])))


def test_plot_dropped() -> None:
    shown = texts(plot_dropped(RECORDS))
    assert {"layers dropped", "training time (s), without evaluation", "all 3 layers", "learndrop"} <= set(shown)
    assert "baseline" not in shown
    assert plot_dropped(RECORDS[:2]) is None


def test_plot_accuracy() -> None:
    shown = texts(plot_accuracy([*RECORDS, record("another", 1, 0)]))
    assert {"test accuracy (%)", "training time (s), without evaluation"} <= set(shown)
    assert {"baseline", "learndrop", "another"} <= set(shown)
    assert plot_accuracy([]) is None


@pytest.mark.parametrize(
    ("plot", "wanted"), [(plot_accuracy, "learndrop"), (plot_dropped, "learndrop"), (plot_scores, "fc")]
)
def test_plots_of_one_epoch(plot: Any, wanted: str) -> None:
    assert wanted in texts(plot([record("learndrop", 1, 0)]))


def test_plots_have_ids_and_references_of_their_own() -> None:
    seen: set[str] = set()
    for plot in (plot_accuracy, plot_dropped, plot_scores):
        svg = plot(RECORDS)
        assert svg is not None
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert used
        assert used <= ids
        assert not ids & seen
        seen |= ids
        assert svg == plot(RECORDS)


def test_plots_show_names_as_they_are() -> None:
    hostile = {"$\\frac{": 0.5, "</text><script>": 0.1, "\u5c64": 0.2}
    svg = plot_scores([record("learndrop", 1, 0, scores=hostile)])
    assert set(hostile) <= set(texts(svg))
    assert "<script" not in (svg or "")


def test_plot_widths_has_a_cell_for_each_layer_and_epoch() -> None:
    full = {"conv1": 8, "conv2": 16}
    widths = [{"conv1": 8, "conv2": 12}, {"conv1": 4, "conv2": 8}, {"conv1": 2, "conv2": 8}]
    records = [record("learndrop", i, 0, widths=now, full_widths=full) for i, now in enumerate(widths, 1)]
    shown = texts(plot_widths(records))
    assert {"epoch", "channels left", "layer, from the input (top) to the output", "conv1", "conv2"} <= set(shown)

    def colours(records: list[dict[str, Any]]) -> list[str]:
        """Of the map's cells; the colour bar has the rest."""
        return re.findall(r'id="widths-QuadMesh_1".*?</g>', plot_widths(records) or "", re.DOTALL)[:1]

    assert colours(records) != colours(records[:2])
    assert plot_widths([record("learndrop", 1, 0, widths=None, full_widths={})]) is None
    assert plot_widths([record("baseline", 1, 0)]) is None
