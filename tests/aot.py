"""Compile the Triton kernels for a GPU that need not be there, and read the machine code.

``python tests/aot.py`` prints a line of JSON per kernel and tiles. A process of its own, because the tests
set TRITON_INTERPRET, under which nothing is compiled.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moco_fast.kernels import ema_update, enqueue, info_nce, split_batch_norm, take_rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HOPPER, AMPERE = 90, 80


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def compiled(kernel, types, constants, warps, stages, capability, multiples=()):
    """Registers, local memory, shared memory and instructions of one kernel.

    Args:
        types: Triton type by argument; pointers count as 16-byte aligned, as torch allocates.
        constants: value by constexpr argument.
        multiples: integers that count as multiples of 16.
    """
    names = kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in multiples]
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={name: constants[name] for name in names if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage, code = tool("cuobjdump", "-res-usage", file.name), tool("cuobjdump", "-sass", file.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage).groups())
    patterns = {
        "spills": r"\b(LDL|STL)\b",
        "hgmma": r"\bHGMMA\b",
        "hmma": r"\bHMMA\b",
        "arrive": r"\bWARPGROUP\.ARRIVE\b",
        "tma": r"\bUTMALDG\b",
        "wide_loads": r"\bLDG\.E\.128\b",
        "wide_stores": r"\bSTG\.E\.128\b",
    }
    counts = {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}
    return {"registers": registers, "local": stack + local, "shared": binary.metadata.shared, **counts}


def sweep(
    tiles, features, capability, *, operand="fp16", queue="fp16",
    online=False, split=False, dq=True, stats=False, even=True,
):  # fmt: skip
    """``info_nce._sweep`` in one of its forms; products per pass over a tile, for what to expect of it."""
    block_m, block_n, warps, stages, _ = tiles
    tma = capability >= HOPPER
    types = {
        "q_high": f"tensordesc<{operand}[{block_m},{features}]>" if tma else f"*{operand}",
        "q_low": f"tensordesc<{operand}[{block_m},{features}]>" if tma else f"*{operand}",
        "queue": f"tensordesc<{queue}[{block_n},{features}]>" if tma else f"*{queue}",
        **dict.fromkeys(("pos", "sums", "totals", "shifts", "cosines"), "*fp32"),
        "ranks": "*i32",
        **dict.fromkeys(("N", "K", "C", "steps_per_share"), "i32"),
        "scale": "fp32",
        "fixed_shift": "fp32",
    }
    constants = {
        "WIDTH": features, "TMA": tma, "OFFSET": 15.0,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_C": features, "EVEN": even,
        "ONLINE": online, "SPLIT": split, "SPLIT_QUEUE": split and queue != "fp16",
        "DQ": dq, "SUMS": stats or not dq, "RANKS": stats,
    }  # fmt: skip
    found = compiled(info_nce._sweep, types, constants, warps, stages, capability)
    products = (1 + dq) * (1 + split + constants["SPLIT_QUEUE"])
    return found | {"products": products * (2 - online)}  # a fixed shift has the running maximum behind it


def info_nce_cases():
    """Every entry of the tables, every form at the headline width, and the extremes on Ampere."""
    for (rows, features), tiles in info_nce.TILES.items():
        yield f"{rows} {features}", lambda t=tiles, f=features: sweep(t, f, HOPPER)
        if rows == "many" and features >= 64:
            older = info_nce.OLDER_TILES.get(features, tiles)
            yield f"{rows} {features} sm_80", lambda t=older, f=features: sweep(t, f, AMPERE)
    for features, tiles in info_nce.SPLIT_TILES.items():
        yield (
            f"wide highest {features}",
            lambda t=tiles, f=features: sweep(t, f, AMPERE, split=True, queue="fp32"),
        )
    forms = {
        "online": {"online": True},
        "fp32 queue": {"queue": "fp32"},
        "highest": {"queue": "fp32", "split": True},
        "highest, fp16 queue": {"split": True},
        "medium": {"operand": "bf16", "queue": "bf16"},
        "statistics": {"stats": True},
        "forward only": {"dq": False},
        "ragged K": {"even": False},
    }
    for name, form in forms.items():
        yield f"many 128 {name}", lambda f=form: sweep(info_nce.TILES["many", 128], 128, HOPPER, **f)


def ema_update_cases():
    """Every entry of the table, for tensors that start on 16 bytes."""
    types = {"table": "*i64", "m": "*fp64", "keep": "fp32", "take": "fp32"}
    for size, (block, warps) in ema_update.TILES.items():
        dtype = {8: tl.float64, 4: tl.float32, 2: tl.bfloat16}[size]
        constants = {
            "STATE": dtype, "SOURCE": dtype, "COPY": dtype, "HAS_COPY": False,
            "M_ON_DEVICE": True, "ALIGNED": True, "BLOCK": block,
        }  # fmt: skip
        yield (
            f"{size} bytes",
            lambda c=constants, w=warps: compiled(ema_update._ema_update, types, c, w, 3, HOPPER),
        )


def enqueue_cases():
    """The kernel that writes, at the headline width."""
    types = {"queue": "*fp32", "mirror": "*fp16", "ptr": "*i64", "keys": "*fp32", "order": "*i64"}
    types |= dict.fromkeys(("N", "K", "C"), "i32")
    constants = {
        "HAS_MIRROR": True,
        "HAS_ORDER": True,
        "BLOCK_R": enqueue.TILES["elements"] // 128,
        "BLOCK_C": 128,
    }
    for capability in (AMPERE, HOPPER):
        yield (
            f"sm_{capability}",
            lambda c=capability: compiled(enqueue._write, types, constants, enqueue.TILES["warps"], 3, c),
        )


def take_rows_cases():
    """Words of 8 bytes, of rows that fill whole programs."""
    types = {"x": "*i64", "index": "*i64", "out": "*i64", "width": "i32"}
    tiles = take_rows.TILES
    for capability in (AMPERE, HOPPER):
        yield (
            f"sm_{capability}",
            lambda c=capability: compiled(
                take_rows._take_rows, types, {"BLOCK": tiles["words"]}, tiles["warps"], 3, c
            ),
        )


def split_batch_norm_cases():
    """All four kernels in both layouts, bf16 with fp32 weights; also sizes of 1, which become constants."""
    kernels = {name: getattr(split_batch_norm, f"_{name}") for name in ("statistics", "normalise", "sums")}
    kernels["gradient"] = split_batch_norm._gradient
    types = dict.fromkeys(("x", "y", "dy", "dx"), "*bf16") | {"eps": "fp32"}
    types |= dict.fromkeys(("weight", "bias", "found", "means", "variances", "dw", "db"), "*fp32")
    types |= dict.fromkeys(("R", "C", "L", "ALONG", "steps", "shares"), "i32")
    for layout, (elements, columns, warps, _) in split_batch_norm.TILES.items():
        for rows in ("many", "one"):
            known = {"L": 1, "ALONG": 1} if layout == "together" else {}
            known |= {"R": 1, "steps": 1, "shares": 1} if rows == "one" else {}
            constants = known | {
                "HAS_WEIGHT": True, "HAS_BIAS": True, "TOGETHER": layout == "together",
                "CHUNK": split_batch_norm.SHARES, "BLOCK_X": columns,
                "BLOCK_R": elements // columns if rows == "many" else 1,
            }  # fmt: skip
            for name, kernel in kernels.items():
                for capability in (AMPERE, HOPPER) if rows == "many" else (HOPPER,):
                    given = {
                        arg: kind
                        for arg, kind in types.items()
                        if arg in kernel.arg_names and arg not in known
                    }
                    yield (
                        f"{name} {layout} {rows} sm_{capability}",
                        lambda k=kernel, g=given, c=constants, w=warps, cc=capability: compiled(
                            k, g, c, w, 3, cc, multiples={"C", "L"} & g.keys()
                        ),
                    )


CASES = {
    "info_nce": info_nce_cases,
    "ema_update": ema_update_cases,
    "enqueue": enqueue_cases,
    "take_rows": take_rows_cases,
    "split_batch_norm": split_batch_norm_cases,
}

if __name__ == "__main__":
    for op, cases in CASES.items():
        for label, compile_it in cases():
            print(json.dumps({"op": op, "label": label, **compile_it()}), flush=True)
