"""`learndrop store`: what is in a store of rows, and keeping it in order."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from learndrop_ext.decide.forecast import align_columns
from learndrop_ext.rows.store.keeping import StoredSet, check_rows, compact, list_rows, remove_rows
from learndrop_ext.rows.store.store import INDEX, RowStore

DAY_SECONDS = 86400


def keep_in_order(
    folder: Path, *, check: bool, older_than_days: float | None, keep_bytes: int | None, compacts: bool
) -> dict[str, Any]:
    """Check, remove and compact the rows of a store as asked for, and list what is left.

    Returns `{"folder": str, "damaged": {file: rows}, "removed": [...], "in_use": [...], "saved_bytes": int, "rows": [...]}`,
    with one dict per fingerprint. What is "in_use" exceeds a limit but a run uses it. Raises ValueError if `folder` is no
    store.
    """
    if not (folder / INDEX).is_file():
        kind = "a file" if folder.is_file() else "a folder without an index" if folder.is_dir() else "not there"
        raise ValueError(f"DIR must be a store of rows, got {folder}, which is {kind}")
    store = RowStore(folder)
    try:
        damaged = check_rows(store) if check else {}
        removed: list[StoredSet] = []
        in_use: list[StoredSet] = []
        if older_than_days is not None or keep_bytes is not None:
            age = None if older_than_days is None else older_than_days * DAY_SECONDS
            removed, in_use = remove_rows(store, older_than_seconds=age, keep_bytes=keep_bytes)
        saved = compact(store) if compacts else 0
        listed = {"removed": removed, "in_use": in_use, "rows": list_rows(store)}
    finally:
        store.close()
    return {"folder": str(folder), "damaged": damaged, "saved_bytes": saved} | {
        name: [dataclasses.asdict(one) for one in rows] for name, rows in listed.items()
    }


def format_listing(listing: dict[str, Any]) -> str:
    """Format a listing for a terminal, one line for each fingerprint."""
    lines = [
        f"{file}: {count} damaged rows, which will be computed again" for file, count in listing["damaged"].items()
    ]
    lines += [f"removed {len(listing['removed'])} files"] if listing["removed"] else []
    lines += [f"kept {one['file']}, which a run uses" for one in listing["in_use"]]
    lines += [f"saved {listing['saved_bytes']:,} bytes"] if listing["saved_bytes"] else []
    rows = listing["rows"]
    if not rows:
        return "\n".join([*lines, f"no rows in {listing['folder']}"])
    cells = [[f"{v:.0f}" if isinstance(v, float) else str(v)[:60] for v in row.values()] for row in rows]
    return "\n".join([*lines, *align_columns([list(rows[0]), *cells])])
