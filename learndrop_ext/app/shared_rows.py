"""`learndrop cache`: list and remove rows shared between runs in a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from learndrop_ext.decide.forecast import align_columns
from learndrop_ext.rows.store import shared

DAY_SECONDS = 86400


def list_and_remove(folder: Path, *, older_than_days: float | None, keep_bytes: int | None) -> dict[str, Any]:
    """Remove files of rows that exceed a limit, if there is one, and list the others.

    older_than_days: remove files that no run has used for so long; keep_bytes: then remove the least recently used ones
    until at most so many bytes are left. Returns `{"folder": str, "removed": [...], "in_use": [...], "rows": [...]}`, with
    one dict per file. Files "in_use" exceed a limit but are being read by a run.
    """
    if not folder.is_dir():
        raise ValueError(
            f"DIR must be a folder of rows, got {folder}, which is {'a file' if folder.exists() else 'not there'}"
        )
    removed: tuple[shared.SharedFile, ...] = ()
    in_use: tuple[shared.SharedFile, ...] = ()
    if older_than_days is not None or keep_bytes is not None:
        age = None if older_than_days is None else older_than_days * DAY_SECONDS
        outcome = shared.remove_rows(folder, older_than_seconds=age, keep_bytes=keep_bytes)
        removed, in_use = outcome.removed, outcome.in_use
    listed = {"removed": removed, "in_use": in_use, "rows": shared.list_rows(folder)}
    return {"folder": str(folder)} | {
        name: [dataclasses.asdict(file) for file in files] for name, files in listed.items()
    }


def format_listing(listing: dict[str, Any]) -> str:
    """Format a listing for a terminal, one line per file."""
    lines = [f"removed {len(listing['removed'])} files"] if listing["removed"] else []
    lines += [f"kept {file['name']}, which a run is reading" for file in listing["in_use"]]
    rows = listing["rows"]
    if not rows:
        return "\n".join([*lines, f"no rows in {listing['folder']}"])
    cells = [[f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    return "\n".join([*lines, *align_columns([list(rows[0]), *cells])])
