"""Entry point of the ``moco-fast`` command, which needs the extra ``train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from moco_fast.extras import INSTALL


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    # Read when torch loads OpenMP, whose threads spin while they wait for each other. By default they spin so
    # long that a training step takes 4 to 20 times longer once any other program wants one of the cores;
    # this short, it takes about twice as long then, and 5 % longer on an idle machine.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        from moco_fast import commands
    except ImportError as error:
        if argv[:1] == ["doctor"]:  # which tells what is missing, and whether there are compiled kernels
            from moco_fast import doctor

            print(*(f"{what}: {state}" for what, state in doctor.report()), sep="\n")
        print(f"moco-fast: {error}. Install what it needs with: {INSTALL}", file=sys.stderr)
        return 2
    return commands.run(argv)


if __name__ == "__main__":
    sys.exit(main())
