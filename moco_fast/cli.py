"""Entry point of the ``moco-fast`` command, which needs the extra ``train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    try:
        from moco_fast import commands
    except ImportError as error:
        print(
            f"moco-fast: {error}. Install what it needs with: pip install moco_fast[train]", file=sys.stderr
        )
        return 2
    return commands.run(list(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
