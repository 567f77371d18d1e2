"""HTML pages: their templates and rendering, and how a file is replaced."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def check_extras(owner: str) -> None:
    """Raise ImportError if matplotlib or jinja2 is not installed. The message begins with `owner`."""
    for name in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'{owner}: {name} is not installed: pip install "learndrop_ext[cli]"')


def render_page(kind: str, body: str, **values: Any) -> str:
    """Return a self-contained HTML page from a jinja2 template and its variables. kind: for the title, such as "report"."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(HEAD + body + "</body>\n</html>\n").render(kind=kind, **values)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path and rename it to `path` at the end, so that `path` is never incomplete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Learn &amp; drop: {{ kind }}</title>
<style>
body { font: 16px/1.5 sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
caption { text-align: left; color: #555; padding-bottom: 0.4rem; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 0.8rem 0.35rem 0; border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #888; }
figure { margin: 0; } figcaption { color: #555; font-size: 0.9rem; }
:not(h2) + figure { margin-top: 2rem; }
svg { width: 100%; height: auto; }
pre { margin-top: 2rem; overflow-x: auto; font-size: 0.85rem; }
td, tbody th { white-space: nowrap; } td.words { white-space: normal; min-width: 12rem; }
.note { border-left: 4px solid #d55e00; padding-left: 0.8rem; }
</style>
</head>
<body>
<h1>Learn &amp; drop: {{ kind }}</h1>
{% macro table(head, rows, caption="", words=-1) %}
<div class="wide"><table>
{% if caption %}
<caption>{{ caption }}</caption>
{% endif %}
{% if head %}
<thead><tr>{% for name in head %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
{% endif %}
<tbody>
{% for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}
<td{% if loop.index == words %} class="words"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
"""

FORECAST = """\
<p>The time of a run if the first layers are dropped, forecast from costs measured on this machine.</p>
{% for svg in figures %}
<figure>{{ svg | safe }}</figure>
{% endfor %}
<pre>{{ table_text }}</pre>
"""

REPORT = """\
{% if summary %}
<p>{{ summary }}</p>
{% endif %}
{% for run, epoch in unfinished %}
<p class="note">The run {{ run }} has not finished: the plots show it up to epoch {{ epoch }}.</p>
{% endfor %}
{% if rows %}
{{ table(columns, rows, "Time includes fills and measurements, but not evaluation. In brackets: compared with the baseline.",
words=5) }}
{% else %}
<p class="note">No run has finished.</p>
{% endif %}
{% for title, caption, svg in figures %}
<h2>{{ title }}</h2>
{% if svg %}
<figure>{{ svg | safe }}<figcaption>{{ caption }}</figcaption></figure>
{% else %}
<p>Nothing was measured for this plot.</p>
{% endif %}
{% endfor %}
<h2>Drops</h2>
{% if drops %}
{{ table(["run", "after epoch", "layers dropped in all", "which", "reason", "fill", "size of a row", "tier"], drops,
words=4) }}
{% else %}
<p>No layer was dropped.</p>
{% endif %}
{% if changes %}
<h2>Last measurement</h2>
{{ table(["layer", "l1", "l2", "largest", "l1 of weights", "l2 of weights", "relative", "cosine", "not finite"],
changes.rows, "Change of each layer's parameters over epoch %s of the run %s: norms of the change and of the weights, the
relative change, its cosine with the previous change, and the number of values that were not finite."
| format(changes.epoch, changes.run)) }}
{% endif %}
{% if forecasts %}
<h2>Forecast and measured time</h2>
{{ table(["run", "epoch", "forecast", "measured", "forecast off by"], forecasts,
"Seconds of each epoch, including the computation of rows.") }}
{% endif %}
{% if memory %}
<p>Peak memory: {% for run, size in memory %}{{ run }} {{ size }}{{ ", " if not loop.last }}{% endfor %}.</p>
{% endif %}
{% if config %}
<h2>Settings</h2>
{{ table([], config.items(), words=1) }}
{% endif %}
"""
