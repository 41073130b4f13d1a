"""Which tiles ``bench/tune.py`` tries for the kernels that sweep blocks of rows over columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product

Tiles = tuple[int, int, int, int, int]  # BLOCK_M, BLOCK_N, warps, stages, programs per multiprocessor

# Of a multiprocessor of an H200: bytes, of which a program takes up to 3 KB beside its tiles, and registers.
SHARED, RESERVED, REGISTERS = 228 * 1024, 3 * 1024, 65536
MOST_PROGRAMS = 3


def candidates(
    rows: Iterable[int],
    columns: Iterable[int],
    stages: Iterable[int],
    inputs: Callable[[int, int, int], int],
    *,
    sums: int,
    scores: int,
    more_warps: bool,
) -> list[Tiles]:
    """Those that an H200 can hold without spilling, with as many programs as fit and with one less.

    Four warps, a warp group, multiply 64 rows. Compiled for sm_90 (tests/aot.py), one group on 128 rows
    spills or comes close to it. Two groups on 64 rows share the columns, which spares registers where rows
    are wide; but operands in two parts then pass through registers, and every product waits for the last.

    Args:
        rows, columns, stages: BLOCK_M, BLOCK_N and stages to combine.
        inputs: bytes of the tiles that are read, by BLOCK_M, BLOCK_N and stages.
        sums: fp32 values per row that a program keeps; on their way out they pass through shared memory.
        scores: tiles of BLOCK_M x BLOCK_N that it keeps. All else takes 60 registers of a thread, of 255, and
            with two groups on 64 rows one more per four columns.
        more_warps: try two warp groups for 64 rows, too.
    """
    found = []
    for block_m, block_n, depth in product(rows, columns, stages):
        fewest = max(4, block_m // 16)
        for warps in (4, 8) if more_warps and fewest == 4 else (fewest,):
            threads = 32 * warps
            registers = block_m * (sums + scores * block_n) // threads + 60 + (warps > fewest) * block_n // 4
            if registers > 255:
                continue
            shared = max(inputs(block_m, block_n, depth), 4 * block_m * sums) + RESERVED
            most = min(SHARED // shared, REGISTERS // (threads * registers), MOST_PROGRAMS)
            found += [(block_m, block_n, warps, depth, count) for count in (most - 1, most) if count > 0]
    return found
