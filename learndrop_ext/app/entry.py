"""Entry point of the command line, which handles Ctrl-C during the imports too."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line and return its exit status, see `learndrop_ext.app.cli.main`."""
    try:
        from learndrop_ext.app.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
