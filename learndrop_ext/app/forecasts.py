"""`learndrop forecast`: the time and memory of a run before training, as text and plots."""

from __future__ import annotations

from pathlib import Path

from learndrop_ext.app.datasets import Split
from learndrop_ext.app.page import FORECAST, check_extras, render_page, write_page
from learndrop_ext.app.recipe import Recipe, make_scheduler, set_up
from learndrop_ext.decide.forecast import Forecast
from learndrop_ext.decide.policy import Fixed


def make_forecast(split: Split, recipe: Recipe) -> Forecast:
    """Measure the costs of a recipe and return the forecast of its run, without training."""
    with make_scheduler(set_up(split, recipe), recipe, Fixed({})) as drop:
        return drop.forecast(recipe.epochs)


def draw_forecast(folder: Path, forecast: Forecast) -> Path:
    """Write `forecast.html` into a folder and return its path."""
    check_extras("draw_forecast")
    from learndrop_ext.app import plots

    values = forecast.as_dict()
    figures = (plots.plot_forecast(values), plots.plot_row_bytes(values))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "forecast.html"
    table = forecast.format_table()
    write_page(path, render_page("forecast", FORECAST, table_text=table, figures=[svg for svg in figures if svg]))
    return path
