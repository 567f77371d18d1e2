"""`learndrop forecast`: the time and memory of a run before training, as text and plots."""

from __future__ import annotations

from pathlib import Path

from learndrop_ext.app.datasets import Split
from learndrop_ext.app.page import check_extras, render_page, write_page
from learndrop_ext.app.recipe import Recipe, make_scheduler, set_up
from learndrop_ext.decide.forecast import Forecast
from learndrop_ext.decide.policy import Fixed

__all__ = ["draw_forecast", "make_forecast"]


def make_forecast(split: Split, recipe: Recipe) -> Forecast:
    """Measure the costs of a recipe and return the forecast of its run, without training."""
    with make_scheduler(set_up(split, recipe), recipe, Fixed({})) as drop:
        return drop.forecast(recipe.epochs)


def draw_forecast(folder: Path, forecast: Forecast) -> Path:
    """Write `forecast.html` into a folder and return its path.

    Raises:
        ImportError: If matplotlib or jinja2 is not installed.
        OSError: If the folder cannot be created or written.
    """
    check_extras("draw_forecast")
    from learndrop_ext.app import plots

    values = forecast.as_dict()
    figures = (plots.plot_forecast(values), plots.plot_row_bytes(values))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "forecast.html"
    table = forecast.format_table()
    write_page(path, render_page("forecast", BODY, table=table, figures=[svg for svg in figures if svg]))
    return path


BODY = """\
<p>The time of a run if the first layers are dropped, forecast from costs measured on this machine.</p>
{% for svg in figures %}
<figure>{{ svg | safe }}</figure>
{% endfor %}
<pre>{{ table }}</pre>
"""
