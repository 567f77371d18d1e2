"""`learndrop forecast`: what dropping would take and save, said and drawn before training."""

from __future__ import annotations

from pathlib import Path

from learndrop_ext.app import runs
from learndrop_ext.app.datasets import Split
from learndrop_ext.app.report import check_extras, write_page
from learndrop_ext.app.runs import Recipe
from learndrop_ext.decide.forecast import Forecast
from learndrop_ext.decide.policy import Fixed

__all__ = ["draw_forecast", "make_forecast"]


def make_forecast(split: Split, recipe: Recipe) -> Forecast:
    """Measure the costs of a recipe's model and data and forecast its run. Trains nothing."""
    with runs.make_scheduler(runs.set_up(split, recipe), recipe, Fixed({})) as drop:
        return drop.forecast(recipe.epochs)


def draw_forecast(folder: Path, forecast: Forecast) -> Path:
    """Write ``forecast.html`` into a folder, one file with inline SVG, and return its path.

    Raises:
        ImportError: where matplotlib or jinja2 is not installed.
        OSError: where the folder cannot be made or written.
    """
    check_extras("draw_forecast")
    import jinja2

    from learndrop_ext.app import plots

    values = forecast.as_dict()
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    figures = (plots.plot_forecast(values), plots.plot_row_bytes(values))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "forecast.html"
    write_page(path, page.render(table=forecast.format_table(), figures=[svg for svg in figures if svg]))
    return path


TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Learn &amp; drop: forecast</title>
<style>
body { font: 16px/1.5 sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; }
figure { margin: 2rem 0; }
svg { width: 100%; height: auto; }
pre { overflow-x: auto; font-size: 0.85rem; }
</style>
</head>
<body>
<h1>Learn &amp; drop: forecast</h1>
<p>What a run would take if its first layers were dropped, from costs measured on this machine.</p>
{% for svg in figures %}
<figure>{{ svg | safe }}</figure>
{% endfor %}
<pre>{{ table }}</pre>
</body>
</html>
"""
