"""Entry point of the ``moco-fast`` command, which needs the extra ``train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    # Read when torch loads OpenMP. Threads that spin while they wait for each other make a step 20 times
    # slower as soon as any other program wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
