"""A command once per op of the benchmark, several at a time: ``python -m bench.each 8 COMMAND... --ops``.

The op is the last argument. What each printed is shown when it ends, so that outputs do not mix and a run
that is killed has shown those that ended. The exit code is 1 if one of them failed.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

from bench.ops import OPS


def run_each(jobs: int, command: list[str]) -> list[str]:
    """Run the command for every op; returns the ops whose process failed."""

    def run(op: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, op], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, op): op for op in OPS}
        for future in as_completed(running):
            op, done = running[future], future.result()
            print(
                f"----- {op}: exit code {done.returncode}\n{done.stdout.decode(errors='replace')}", flush=True
            )
            if done.returncode:
                failed.append(op)
    return failed


if __name__ == "__main__":
    if failed := run_each(int(sys.argv[1]), sys.argv[2:]):
        raise SystemExit(f"failed: {', '.join(failed)}")
    print(f"all {len(OPS)} ops are well")
