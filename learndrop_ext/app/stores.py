"""`learndrop store`: what is in a store of rows, and keeping it in order."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from learndrop_ext.decide.forecast import align_columns
from learndrop_ext.rows.store.keeping import check_rows, compact, list_rows, remove_rows
from learndrop_ext.rows.store.store import INDEX, RowStore

DAY_SECONDS = 86400


def keep_in_order(args: argparse.Namespace) -> dict[str, Any]:
    """Check, remove and compact the rows of a store as the options ask for, and list what is left.

    Returns `{"folder": str, "damaged": {file: rows}, "removed": [...], "in_use": [...], "saved_bytes": int, "rows": [...]}`,
    with one dict per fingerprint. What is "in_use" exceeds a limit but a run uses it. Raises ValueError if the folder is no
    store.
    """
    folder: Path = args.folder
    if not (folder / INDEX).is_file():
        kind = "a file" if folder.is_file() else "a folder without an index" if folder.is_dir() else "not there"
        raise ValueError(f"DIR must be a store of rows, got {folder}, which is {kind}")
    with contextlib.closing(RowStore(folder)) as store:
        damaged = check_rows(store) if args.check else {}
        age = None if args.remove_older_than is None else args.remove_older_than * DAY_SECONDS
        removed, in_use = remove_rows(store, older_than_seconds=age, keep_bytes=args.keep_bytes)
        saved = compact(store) if args.compact else 0
        listed = {"removed": removed, "in_use": in_use, "rows": list_rows(store)}
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
