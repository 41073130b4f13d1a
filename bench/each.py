"""A command once per op of the benchmark, several at a time: ``python -m bench.each 8 COMMAND... --ops``.

The op is the last argument. What each printed is shown when it ends, so that outputs do not mix; also
what those had printed that an interrupt cuts short. The exit code is 1 if one of them failed.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

from bench.gpu_check import OPS  # as in bench/ops.py, which takes seconds to import


def run_each(jobs: int, command: list[str]) -> list[str]:
    """Run the command for every op; returns the ops whose process failed."""
    failed = []

    def run(op: str) -> tuple[str, subprocess.CompletedProcess]:
        return op, subprocess.run([*command, op], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def show(future: Future) -> None:
        op, done = future.result()
        print(f"----- {op}: exit code {done.returncode}\n{done.stdout.decode(errors='replace')}", flush=True)
        if done.returncode:
            failed.append(op)

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, op) for op in OPS}
        try:
            for future in as_completed(set(running)):
                running.discard(future)
                show(future)
        except KeyboardInterrupt:  # which the processes got too
            pool.shutdown(cancel_futures=True)
            for future in running:
                if not future.cancelled():
                    show(future)
            raise
    return failed


if __name__ == "__main__":
    if failed := run_each(int(sys.argv[1]), sys.argv[2:]):
        raise SystemExit(f"failed: {', '.join(failed)}")
    print(f"all {len(OPS)} ops are well")
