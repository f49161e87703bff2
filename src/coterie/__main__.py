"""The console command, and ``python -m coterie``: light, so that Ctrl-C is caught while the rest is still loading."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C, whenever it comes, ends it with a line and exit code 130."""
    try:
        from coterie.cli.main import main as command

        command()
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
