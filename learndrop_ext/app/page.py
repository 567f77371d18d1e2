"""HTML pages: the common head and style, rendering and writing."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any


def check_extras(owner: str) -> None:
    """Raise ImportError if matplotlib or jinja2 is not installed. The message begins with `owner`."""
    for name in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'{owner}: {name} is not installed: pip install "learndrop_ext[cli]"')


def render_page(kind: str, body: str, **values: Any) -> str:
    """Return a self-contained HTML page.

    Args:
        kind: kind of page for the title, such as "report".
        body: a jinja2 template.
        values: the variables of the template.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(HEAD + body + "</body>\n</html>\n").render(kind=kind, **values)


def write_page(path: str | Path, page: str) -> None:
    """Write a page to a temporary file and rename it to `path`, so that `path` is never incomplete."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
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
"""
