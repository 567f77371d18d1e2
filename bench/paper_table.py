"""The tables and plots of the study of the paper's networks, from the files of bench_paper.py; bench/table.py writes them.

The files of several machines are one study. What has no record is "not measured".
"""

from __future__ import annotations

import io
import itertools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fine_tuning_table import machine_of, mean
from paper_cases import CHOSEN_BY, COMPARED, COMPARED_ON, LONG, NETWORKS, NORMS, PAPER, RULES, SCALES, THRESHOLDS

from learndrop_ext.decide.policy import StoppedLearning

Record = Mapping[str, Any]
Study = Mapping[str, Any]

DATASETS = tuple(SCALES["cpu"].images)
#: Forward FLOPs of training that the paper's abstract says were saved, in percent; it names no other network.
FLOPS_OF_PAPER = {"vgg11": 17.83, "resnet152": 83.74}
FAMILIES = {"VGG": NETWORKS[:4], "ResNet": NETWORKS[4:]}
COLOURS = ("#555555", "#0072b2", "#009e73", "#d55e00", "#e69f00", "#cc79a7", "#56b4e9", "#000000")
NOT_MEASURED = "not measured"


def combined(files: Sequence[Study]) -> Study:
    """One study: `{"machines": [...], "epochs": ..., "records": [...]}`. The seconds of two machines do not compare, so all
    records of a network on a dataset under a setting with a seed are from one file, the one with the most of them."""
    groups: dict[tuple[str, str, str, int], dict[int, list[Record]]] = {}
    for number, study in enumerate(files):
        for record in study["records"]:
            case = record["setting"], record["dataset"], record["model"], record["seed"]
            groups.setdefault(case, {}).setdefault(number, []).append(record)
    records = []
    for by_file in groups.values():
        number = max(by_file, key=lambda of_file: len(by_file[of_file]))
        records += [{**record, "file": number} for record in by_file[number]]
    titles = [f"{machine_of(study)}; torch {study['machine']['torch']}, {study['machine']['date']}" for study in files]
    return {"machines": titles, "epochs": max((s["epochs"] for s in files), default=0), "records": records}


def title_of(study: Study) -> str:
    """The machines, numbered if there are several."""
    machines = study["machines"]
    return machines[0] if len(machines) == 1 else "; ".join(f"[{i}] {title}" for i, title in enumerate(machines, 1))


def name_of(study: Study, model: str, runs: Mapping[str, Sequence[Record]]) -> str:
    """The network, with the numbers of the machines of its runs if the study has several."""
    if len(study.get("machines", ())) < 2 or not runs:
        return model
    return f"{model} {sorted({record['file'] + 1 for records in runs.values() for record in records})}"


def runs_of(study: Study, *, setting: str, dataset: str, model: str) -> dict[str, list[Record]]:
    """The records of a network on a dataset by side."""
    found: dict[str, list[Record]] = {}
    for record in study["records"]:
        if (record["setting"], record["dataset"], record["model"]) == (setting, dataset, model):
            found.setdefault(record["side"], []).append(record)
    return found


def of_shared_seeds(runs: Mapping[str, Sequence[Record]], sides: Iterable[str]) -> dict[str, list[Record]]:
    """The records of those of the sides that have any, of the seeds that all of these have."""
    found = {side: runs[side] for side in sides if side in runs}
    seeds = [{record["seed"] for record in records} for records in found.values()]
    shared = set.intersection(*seeds) if seeds else set()
    return {side: [r for r in records if r["seed"] in shared] for side, records in found.items() if shared}


def pairs(records: Iterable[Record], others: Iterable[Record], key: str) -> list[tuple[float, float]]:
    """What each run of a side and the other side's run of the same seed have under a key."""
    by_seed = {record["seed"]: record[key] for record in others}
    return [(record[key], by_seed[record["seed"]]) for record in records if record["seed"] in by_seed]


def difference(records: Iterable[Record], others: Iterable[Record]) -> float | None:
    """The mean difference in accuracy, seed by seed; None without pairs."""
    found = pairs(records, others, "accuracy")
    return statistics.fmean(one - other for one, other in found) if found else None


def ratio(records: Iterable[Record], others: Iterable[Record], key: str) -> float | None:
    """The mean ratio, seed by seed; None without pairs."""
    found = pairs(records, others, key)
    return statistics.fmean(one / other for one, other in found) if found else None


def shown(value: float | None, form: str = "{:+.2f}") -> str:
    return "" if value is None else form.format(value)


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*names: str) -> list[str]:
    return [line(*names), f"|{'---|' * len(names)}"]


def drops_in_words(records: Sequence[Record]) -> str:
    """How many layers the first seed dropped, and after how many epochs."""
    first = min(records, key=lambda record: record["seed"])
    drops = [f"{drop['prefix']} after {drop['epoch']}" for drop in first["drops"]]
    if len(drops) > 3:
        drops[1:-1] = [f"{len(drops) - 2} more"]
    return f"{', '.join(drops)}; of {first['layers']}" if drops else ""


def marked(side: str, records: Iterable[Record]) -> str:
    """The side, with a star if a run dropped layers and recalibrated no batch norm of them."""
    as_trained = (
        record["drops"] and not any("batch norms recalibrated" in drop["reason"] for drop in record["drops"])
        for record in records
    )
    return f"{side}*" if any(as_trained) else side


def side_cells(runs: Mapping[str, Sequence[Record]], side: str) -> list[str]:
    """What the tables say of one side: epochs, seconds, FLOPs, accuracy alone, against baseline and short, drops, seeds."""
    records, baseline = runs[side], runs.get("baseline", [])
    time, flops = ratio(baseline, records, "seconds"), ratio(records, baseline, "forward_flops")
    plain = side == "baseline"
    return [
        f"{mean(records, 'epochs'):.3g}",
        f"{mean(records, 'seconds'):.1f}" + ("" if plain else shown(time, " ({:.2f}x)")),
        f"{mean(records, 'forward_flops') / 1e12:.3g} T"
        + ("" if plain or not flops else f" ({100 * (flops - 1):+.1f} %)"),
        f"{mean(records, 'accuracy'):.2f} %",
        "" if plain else shown(difference(records, baseline)),
        "" if side in ("baseline", "short") else shown(difference(records, runs.get("short", []))),
        drops_in_words(records),
        str(len(records)),
    ]


SIDE_NAMES = (
    *("epochs", "seconds", "forward FLOPs", "test accuracy", "against baseline", "against short"),
    *("layers dropped, after epochs (seed 0)", "seeds"),
)


def sides_table(study: Study, sides: Sequence[str], cases: Iterable[tuple[str, str, str]]) -> str:
    """A line for each side that has records of each (setting, dataset, network)."""
    lines = head("dataset", "network", "side", *SIDE_NAMES)
    for setting, dataset, model in cases:
        runs = runs_of(study, setting=setting, dataset=dataset, model=model)
        name = name_of(study, model, runs)
        name += f", {setting.removeprefix('long ')}" if setting.startswith("long") else ""
        there = [side for side in sides if side in runs]
        lines += [line(dataset, name, marked(side, runs[side]), *side_cells(runs, side)) for side in there]
        if not runs.keys() & {*sides}:
            lines.append(line(dataset, name, NOT_MEASURED, *[""] * len(SIDE_NAMES)))
    return "\n".join(lines)


def rows(study: Study) -> str:
    """The 27 rows of the paper, with all sides."""
    return sides_table(study, PAPER, (("paper", dataset, model) for dataset in DATASETS for model in NETWORKS))


def rules(study: Study) -> str:
    """The rules of other work beside dropping and `short`."""
    sides = ("baseline", "short", "budget", "stopped", *RULES)
    return sides_table(study, sides, (("paper", dataset, model) for dataset in COMPARED_ON for model in COMPARED))


def long(study: Study) -> str:
    """Long schedules, and in how many of them dropping was better than `short`."""
    cases = [
        (f"long {schedule}", dataset, model)
        for dataset in COMPARED_ON
        for model in CHOSEN_BY
        for schedule in ("one-cycle", "constant")
    ]
    found = [runs_of(study, setting=setting, dataset=dataset, model=model) for setting, dataset, model in cases]
    points = [difference(runs.get("budget", []), runs.get("short", [])) for runs in found]
    better = [point for point in points if point is not None]
    text = f"`Budget(2.0, start=1)` is better than `short` in {sum(p > 0 for p in better)} of {len(better)} schedules."
    return sides_table(study, LONG, cases) + f"\n\n{text if better else NOT_MEASURED.capitalize() + '.'}"


def summary(study: Study) -> str:
    """A line for each network: means over the datasets of `Budget(2.0, start=1)`."""
    lines = head(
        *("network", "speedup", "forward FLOPs", "in the paper", "accuracy against baseline", "against `short`"),
        "datasets, runs",
    )
    for model in NETWORKS:
        of_paper = f"-{FLOPS_OF_PAPER[model]:.2f} %" if model in FLOPS_OF_PAPER else ""
        values = {dataset: of_network(study, dataset, model) for dataset in DATASETS}
        there = [value for value in values.values() if value]
        if not there:
            lines.append(line(model, NOT_MEASURED, "", of_paper, "", "", ""))
            continue
        speedup, cut, points = (statistics.fmean(v[key] for v in there) for key in ("speedup", "cut", "points"))
        against = [value["against_short"] for value in there if value["against_short"] is not None]
        lines.append(
            line(
                *(model, f"{speedup:.2f}x", f"{-cut:+.1f} %", of_paper, f"{points:+.2f}"),
                *(
                    shown(statistics.fmean(against) if against else None),
                    f"{len(there)}, {sum(v['runs'] for v in there)}",
                ),
            )
        )
    return "\n".join(lines)


def of_network(study: Study, dataset: str, model: str) -> dict[str, Any] | None:
    """Speedup, FLOPs cut in percent, and points of accuracy of Budget for one network on one dataset; None without runs."""
    runs = runs_of(study, setting="paper", dataset=dataset, model=model)
    baseline, budget = runs.get("baseline", []), runs.get("budget", [])
    speedup, flops = ratio(baseline, budget, "seconds"), ratio(budget, baseline, "forward_flops")
    if speedup is None or flops is None:
        return None
    points, against = difference(budget, baseline), difference(budget, runs.get("short", []))
    return {
        "speedup": speedup,
        "cut": 100 * (1 - flops),
        "points": points,
        "against_short": against,
        "runs": len(budget),
    }


def aims(study: Study) -> str:
    """What the study was to show and shows, as means over the networks and datasets that are measured."""
    found = {
        (dataset, model): value
        for dataset, model in itertools.product(DATASETS, NETWORKS)
        if (value := of_network(study, dataset, model))
    }
    lines = head("", "aim", "measured")

    def add(words: str, aim: str, values: Sequence[float], form: str) -> None:
        lines.append(line(words, aim, form.format(statistics.fmean(values)) if values else NOT_MEASURED))

    add("times as fast as baseline", "2 or more", [value["speedup"] for value in found.values()], "{:.2f}")
    for (family, models), aim in zip(FAMILIES.items(), ("-1.0", "-1.5"), strict=True):
        points = [value["points"] for (_, model), value in found.items() if model in models]
        add(f"accuracy against baseline, {family}", f"{aim} or more", points, "{:+.2f} points")
    cuts = {model: [value["cut"] for (_, of), value in found.items() if of == model] for model in NETWORKS}
    add("forward FLOPs cut, ResNet-152", "70 % or more", cuts["resnet152"], "{:.1f} %")
    for family, models in FAMILIES.items():
        means = [statistics.fmean(cuts[model]) for model in models if cuts[model]]
        grows = sum(deeper > before for before, deeper in itertools.pairwise(means))
        steps = f"in {grows} of {len(means) - 1} steps" if len(means) > 1 else NOT_MEASURED
        lines.append(line(f"the cut grows from a {family} to the next deeper one", "in all steps", steps))
    against = [v["against_short"] for v in found.values() if v["against_short"] is not None]
    better = f"{sum(point >= 0 for point in against)} of {len(against)}" if against else NOT_MEASURED
    lines.append(line("rows at or above `short`", "half or more", better))
    return "\n".join(lines)


def recipes(study: Study) -> str:
    """The accuracy on validation images for each learning rate that was tried."""
    tried = [record for record in study["records"] if record["setting"] == "recipe"]
    rates = sorted({record["recipe"]["lr"] for record in tried}) or list(SCALES["cpu"].lrs)
    lines = head("dataset", "network", *(f"lr {rate:g}" for rate in rates))
    for dataset, model in itertools.product(DATASETS, CHOSEN_BY):
        found = {
            r["recipe"]["lr"]: r["validation_accuracy"] for r in tried if (r["dataset"], r["model"]) == (dataset, model)
        }
        cells = (
            [shown(found.get(rate), "{:.2f} %") for rate in rates]
            if found
            else [NOT_MEASURED, *[""] * (len(rates) - 1)]
        )
        lines.append(line(dataset, model, *cells))
    return "\n".join(lines)


def scores(study: Study) -> str:
    """Drops chosen by scores beside drops of the same cost chosen without, and by hindsight."""
    names = (
        "dataset",
        "network",
        "policy",
        "by scores",
        "at an even pace",
        "by hindsight",
        "seconds of the three",
        "seeds",
    )
    lines, gains = head(*names), []
    for dataset, model in itertools.product(COMPARED_ON, COMPARED):
        runs = runs_of(study, setting="paper", dataset=dataset, model=model)
        measured = [policy for policy in ("budget", "stopped") if f"{policy}-even" in runs]
        for policy in measured:
            sides = policy, f"{policy}-even", f"{policy}-hindsight"
            shared = of_shared_seeds(runs, sides)
            three = [shared.get(side, []) for side in sides]
            accuracies = [f"{mean(records, 'accuracy'):.2f} %" if records else "" for records in three]
            seconds = " / ".join(f"{mean(records, 'seconds'):.1f}" if records else "-" for records in three)
            name = name_of(study, model, runs)
            lines.append(line(dataset, name, policy, *accuracies, seconds, str(len(three[1]))))
            gains += [gain for gain in [difference(three[0], three[1])] if gain is not None]
        if not measured:
            lines.append(line(dataset, model, NOT_MEASURED, *[""] * 5))
    verdict = f"Scores against an even pace: {statistics.fmean(gains):+.2f} points in mean" if gains else ""
    verdict += f", better in {sum(gain > 0 for gain in gains)} of {len(gains)} rows." if gains else "Not measured."
    return "\n".join([*lines, "", verdict])


def thresholds(study: Study) -> str:
    """The default policy by its threshold, as means over the networks and datasets of the scores."""
    lines = head("threshold", "runs", "runs with drops", "times as fast as baseline", "accuracy against baseline")
    values = {"stopped": StoppedLearning.threshold, **THRESHOLDS}
    for side, value in sorted(values.items(), key=lambda one: one[1]):
        records, faster, points = [], [], []
        for dataset, model in itertools.product(COMPARED_ON, COMPARED):
            runs = of_shared_seeds(runs_of(study, setting="paper", dataset=dataset, model=model), ("baseline", *values))
            baseline, of_side = runs.get("baseline", []), runs.get(side, [])
            if (times := ratio(baseline, of_side, "seconds")) is not None:
                records += of_side
                faster.append(times)
                points.append(difference(of_side, baseline) or 0.0)
        if not records:
            lines.append(line(f"{value:g}", NOT_MEASURED, "", "", ""))
            continue
        dropped = str(sum(bool(record["drops"]) for record in records))
        means = f"{statistics.fmean(faster):.2f}", f"{statistics.fmean(points):+.2f}"
        lines.append(line(f"{value:g}", str(len(records)), dropped, *means))
    return "\n".join(lines)


def norms(study: Study) -> str:
    """The drops of `budget` with batch norms as training has left them, and recalibrated."""
    lines = head("dataset", "network", "layers dropped, after epochs", *NORMS, "difference", "seeds")
    gains = []
    for dataset, model in itertools.product(DATASETS, NETWORKS):
        runs = runs_of(study, setting="paper", dataset=dataset, model=model)
        shared = of_shared_seeds(runs, NORMS)
        both = [shared.get(side, []) for side in NORMS]
        if (gain := difference(both[1], both[0])) is not None:
            gains.append(gain)
            accuracies = [f"{mean(records, 'accuracy'):.2f} %" for records in both]
            name, drops = name_of(study, model, runs), drops_in_words(both[1])
            lines.append(line(dataset, name, drops, *accuracies, shown(gain), str(len(both[1]))))
    if not gains:
        return "\n".join([*lines, "", "Not measured."])
    better = f"better in {sum(gain > 0 for gain in gains)} of {len(gains)} rows."
    return "\n".join([*lines, "", f"{statistics.fmean(gains):+.2f} points in mean, {better}"])


def plot_flops(study: Study) -> str:
    """Draw the forward FLOPs that Budget cut against the depth in the network's name, as SVG; crosses: the paper's two."""
    figure, axes_of = figure_of(columns=len(FAMILIES))
    for axes, (family, models) in zip(axes_of, FAMILIES.items(), strict=True):
        for dataset, colour in zip(DATASETS, COLOURS, strict=False):
            found = [(depth(model), of_network(study, dataset, model)) for model in models]
            points = [(x, value["cut"]) for x, value in found if value]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=dataset)
        paper = [(depth(model), FLOPS_OF_PAPER[model]) for model in models if model in FLOPS_OF_PAPER]
        axes.plot(*zip(*paper, strict=True), "x", color="black", label="in the paper's abstract")
        axes.set_title(family)
        axes.set_xlabel("layers with weights")
    axes_of[0].set_ylabel("forward FLOPs cut (%)")
    return svg_of(figure, axes_of)


def plot_accuracy(study: Study) -> str:
    """Draw accuracy against time as SVG, a panel for each network and dataset; a line joins a rule's settings."""
    cases = list(itertools.product(COMPARED_ON, COMPARED))
    figure, axes_of = figure_of(columns=len(COMPARED), rows=len(COMPARED_ON))
    curves = {
        "plain recipe": ("short", "baseline"),
        "Budget(2.0, start=1)": ("budget",),
        "StoppedLearning()": ("stopped",),
    }
    for rule in RULES:
        kind = rule.partition(":")[0]
        curves[kind] = (*curves.get(kind, ()), rule)
    for axes, (dataset, model) in zip(axes_of, cases, strict=True):
        runs = runs_of(study, setting="paper", dataset=dataset, model=model)
        runs = of_shared_seeds(runs, itertools.chain(*curves.values()))
        for (label, sides), colour in zip(curves.items(), COLOURS, strict=False):
            points = sorted((mean(runs[s], "seconds"), mean(runs[s], "accuracy")) for s in sides if s in runs)
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=label)
        axes.set_title(f"{model}, {dataset}")
        axes.set_xlabel("training time (s)")
        axes.set_xlim(left=0.0)
    axes_of[0].set_ylabel("test accuracy (%)")
    return svg_of(figure, axes_of)


def depth(model: str) -> int:
    return int(re.sub(r"\D", "", model))


def figure_of(*, columns: int, rows: int = 1) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes_of = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in axes_of:
        axes.grid(axis="y", color="#dddddd")
    return figure, axes_of


def svg_of(figure: Any, axes_of: Sequence[Any]) -> str:
    """The figure with one legend for all panels."""
    from matplotlib import rc_context

    entries = {}
    for axes in axes_of:
        entries |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False)
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "learndrop_ext"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


#: The plots by the name of their file in docs/.
PLOTS = {"paper-flops.svg": plot_flops, "paper-accuracy.svg": plot_accuracy}
