"""Compile the Triton kernels for a GPU that need not be there, and read the machine code.

``python tests/aot.py`` prints a line of JSON per kernel and tiles. A process of its own, because the tests
set TRITON_INTERPRET, under which nothing is compiled.
"""

import json
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wgmma import hazards

from moco_fast import reference
from moco_fast.kernels import (
    augment,
    dino,
    dino_kernels,
    ema_update,
    enqueue,
    info_nce,
    pairs,
    pairs_kernels,
    split_batch_norm,
    take_rows,
)

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
        "async_copies": r"\bLDGSTS\b",
        "narrow_loads": r"\bLDG\.E\.[US](8|16)\b",
        "wide_loads": r"\bLDG\.E\.128\b",
        "wide_stores": r"\bSTG\.E\.128\b",
    }
    counts = {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}
    counts["hazards"] = len(hazards(code))
    # Those that a kernel asks for; the machine code has more, for shared memory.
    counts["barriers"] = len(re.findall(r"\b(?:ttg|gpu)\.barrier\b", binary.asm["ttgir"]))
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


def finish(chunk, warps, shares):
    """``info_nce._finish`` at the headline width, a row per program, with all it can be asked for."""
    types = {
        **dict.fromkeys(
            ("q", "k", "q_norm", "k_norm", "pos", "sums", "totals", "shifts", "cosines"), "*fp32"
        ),
        **dict.fromkeys(("loss", "dq", "neg"), "*fp32"),
        "ranks": "*i32",
        "rank": "*i64",
        **dict.fromkeys(("N", "K", "C"), "i32"),
        **dict.fromkeys(("scale", "inverse_t"), "fp32"),
    }
    constants = {
        "SHARES": shares, "BLOCK_S": triton.next_power_of_2(shares), "BLOCK_R": 1, "CHUNK": chunk,
        "BLOCK_C": 128, "DQ": True, "SUMS": True, "RANKS": True,
    }  # fmt: skip
    return compiled(info_nce._finish, types, constants, warps, 3, HOPPER)


def info_nce_cases():
    """Every entry of the tables, every form at the headline width, and the extremes on Ampere."""
    for (rows, features), tiles in info_nce.TILES.items():
        yield f"{rows} {features}", partial(sweep, tiles, features, HOPPER)
        if rows == "many" and features >= 64:
            older = info_nce.OLDER_TILES.get(features, tiles)
            yield f"{rows} {features} sm_80", partial(sweep, older, features, AMPERE)
    wide = partial(sweep, info_nce.TILES["many", 512], 512, HOPPER, stats=True, even=False)
    yield "many 512, fp32 queue", partial(wide, queue="fp32")
    yield "many 512, bf16 queue", partial(wide, queue="bf16")
    split = partial(sweep, queue="fp32", split=True)
    yield "highest 128", partial(split, info_nce.SPLIT_TILES[128], 128, HOPPER)
    yield "highest 128, fp16 queue", partial(sweep, info_nce.SPLIT_TILES[128], 128, HOPPER, split=True)
    yield "highest 128, statistics", partial(split, info_nce.SPLIT_TILES[128], 128, HOPPER, stats=True)
    yield "highest 64", partial(split, info_nce.TILES["many", 64], 64, HOPPER)
    for features, tiles in info_nce.OLDER_SPLIT_TILES.items():
        label = "highest 128 sm_80" if features == 128 else f"wide highest {features}"
        yield label, partial(split, tiles, features, AMPERE)
    yield "finish, few rows", partial(finish, 128, 16, 342)
    yield "finish, many rows", partial(finish, 32, 4, 66)
    forms = {
        "online": {"online": True},
        "fp32 queue": {"queue": "fp32"},
        "medium": {"operand": "bf16", "queue": "bf16"},
        "statistics": {"stats": True},
        "forward only": {"dq": False},
        "ragged K": {"even": False},
    }
    for name, form in forms.items():
        yield f"many 128 {name}", partial(sweep, info_nce.TILES["many", 128], 128, HOPPER, **form)


# The passes over pairs that the ops are made of, by what asks for them.
PASSES = {  # SECOND, PAIRED, GRADIENT
    "nt_xent loss": (False, True, False),
    "nt_xent gradient": (True, True, True),
    "contrast": (False, False, True),
    "contrast dk": (True, False, True),
}


def pairs_sweep(tiles, features, capability, name, *, bounded=True, split=False, operand="fp16"):
    """``pairs_kernels.sweep`` in one of its forms; products per tile, for what to expect of it."""
    second, paired, gradient = PASSES[name]
    block_m, block_n, warps, stages, _ = tiles
    tma = capability >= HOPPER
    types = {
        **{
            f"{side}_{part}": f"tensordesc<{operand}[{height},{features}]>" if tma else f"*{operand}"
            for side, height in (("x", block_m), ("y", block_n))
            for part in ("high", "rest")
        },
        **dict.fromkeys(("x_log2_sum", "y_log2_sum", "sums", "totals", "shifts"), "*fp32"),
        **dict.fromkeys(("R", "M", "C", "X_PADDED", "Y_PADDED", "first", "tiles_per_share"), "i32"),
        **dict.fromkeys(("scale", "fixed_shift"), "fp32"),
    }
    dtype = torch.bfloat16 if operand == "bf16" else torch.float16
    constants = {
        "WIDTH": features, "TMA": tma, "OFFSET": pairs.OFFSET[dtype][second] if gradient else 0.0,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_C": features,
        "SECOND": second, "PAIRED": paired, "BOUNDED": bounded, "SPLIT": split, "GRADIENT": gradient,
    }  # fmt: skip
    found = compiled(pairs_kernels.sweep, types, constants, warps, stages, capability)
    return found | {"products": (1 + gradient) * (3 if split else 1)}


def pairs_cases():
    """Every entry of the tables in the form that needs most registers, every form at the headline width."""
    for kind, features in pairs.TILES:
        name = "nt_xent gradient" if "gradient" in kind else "nt_xent loss"
        for capability in (HOPPER, AMPERE):
            tiles = pairs.tiles_for(kind, features, capability >= HOPPER)
            yield (
                f"{kind} {features}{'' if capability >= HOPPER else ' sm_80'}",
                partial(pairs_sweep, tiles, features, capability, name, split="split" in kind),
            )
    for name, (*_, gradient) in PASSES.items():
        for split in (False, True):
            tiles = pairs.TILES["split " * split + ("gradient" if gradient else "sums"), 128]
            for bounded in (True, False):
                if name == "contrast dk" and not bounded:
                    continue  # given the log-sum-exps of the columns alone, there is no maximum
                label = f"{name}{', highest' * split}{', running maximum' * (not bounded)}"
                yield label, partial(pairs_sweep, tiles, 128, HOPPER, name, bounded=bounded, split=split)
    medium = partial(pairs_sweep, operand="bf16")
    yield (
        "nt_xent gradient, medium",
        partial(medium, pairs.TILES["gradient", 128], 128, HOPPER, "nt_xent gradient"),
    )


def dino_operands(heights, operand, features, tma):
    """Types of pairs of operands, by name and height of their blocks."""
    return {
        f"{name}_{part}": f"tensordesc<{operand}[{height},{features}]>" if tma else f"*{operand}"
        for name, height in heights.items()
        for part in ("high", "rest")
    }


def dino_sweep(tiles, features, capability, *, teacher, split=False, mean=True, even=True, operand="fp16"):
    """``dino_kernels.sweep`` in one of its forms; products per tile, for what to expect of it."""
    block_m, block_n, warps, stages, _ = tiles
    tma = capability >= HOPPER
    types = {
        **dino_operands({"x": block_m, "y": block_n, "w": block_n}, operand, features, tma),
        **dict.fromkeys(("center", "sums", "totals", "shifts"), "*fp32"),
        **dict.fromkeys(("N", "P", "C", "tiles_per_share"), "i32"),
        "scale": "fp32",
    }
    constants = {
        "WIDTH": features, "TMA": tma, "OFFSET": 0.0 if operand == "bf16" else 15.0,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_C": features,
        "EVEN": even, "SPLIT": split, "TEACHER": teacher, "MEAN": mean,
    }  # fmt: skip
    found = compiled(dino_kernels.sweep, types, constants, warps, stages, capability)
    return found | {"products": (1 + mean) * (3 if split else 1)}


def dino_prototypes(tiles, features, capability, *, split=False, operand="fp16"):
    """``dino_kernels.prototypes``; products per tile."""
    block_m, block_n, warps, stages, _ = tiles
    tma = capability >= HOPPER
    types = {
        **dino_operands({"w": block_m, "v": block_m, "s": block_n, "t": block_n}, operand, features, tma),
        **dict.fromkeys(("center", "tops", "shares_of_one", "dw"), "*fp32"),
        **dict.fromkeys(("P", "N", "C"), "i32"),
        **dict.fromkeys(("s_scale", "t_scale", "factor"), "fp32"),
    }
    constants = {
        "WIDTH": features, "TMA": tma,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_C": features, "SPLIT": split,
    }  # fmt: skip
    found = compiled(dino_kernels.prototypes, types, constants, warps, stages, capability)
    return found | {"products": 3 * (3 if split else 1)}


def dino_cases():
    """Every entry of the tables in the form that needs most registers, every form at the headline width."""
    for kind, features in dino.TILES:
        split = "split" in kind
        form = (
            partial(dino_prototypes, split=split)
            if "prototypes" in kind
            else partial(dino_sweep, teacher=True, even=False, split=split)
        )
        for capability in (HOPPER, AMPERE):
            tiles = dino.tiles_for(kind, features, capability >= HOPPER)
            label = f"{kind} {features}{'' if capability >= HOPPER else ' sm_80'}"
            yield label, partial(form, tiles, features, capability)
    headline = partial(dino_sweep, dino.TILES["rows", 256], 256, HOPPER)
    yield "student", partial(headline, teacher=False)
    yield "student, loss alone", partial(headline, teacher=False, mean=False)
    yield "teacher, even P", partial(headline, teacher=True)
    yield "teacher, medium", partial(headline, teacher=True, operand="bf16")
    yield (
        "student, highest",
        partial(dino_sweep, dino.TILES["split rows", 256], 256, HOPPER, teacher=False, split=True),
    )
    medium = partial(dino_prototypes, operand="bf16")
    yield "prototypes, medium", partial(medium, dino.TILES["prototypes", 256], 256, HOPPER)


def ema(size):
    """``ema_update._ema_update`` with the tiles of an element size, for tensors that start on 16 bytes."""
    block, warps = ema_update.TILES[size]
    dtype = {8: tl.float64, 4: tl.float32, 2: tl.bfloat16}[size]
    types = {"table": "*i64", "m": "*fp64", "keep": "fp32", "take": "fp32"}
    constants = {
        "STATE": dtype, "SOURCE": dtype, "COPY": dtype, "HAS_COPY": False,
        "M_ON_DEVICE": True, "ALIGNED": True, "BLOCK": block,
    }  # fmt: skip
    return compiled(ema_update._ema_update, types, constants, warps, 3, HOPPER)


def write(capability):
    """``enqueue._write`` at the headline width."""
    elements, warps = enqueue.TILES["rows"]
    types = {"queue": "*fp32", "mirror": "*fp16", "ptr": "*i64", "keys": "*fp32", "order": "*i64"}
    types |= dict.fromkeys(("N", "K", "C"), "i32")
    constants = {"HAS_MIRROR": True, "HAS_ORDER": True, "BLOCK_R": elements // 128, "BLOCK_C": 128}
    return compiled(enqueue._write, types, constants, warps, 3, capability)


def take(capability):
    """``take_rows._take_rows`` of rows of 8-byte words that fill whole programs."""
    words, warps = take_rows.TILES["rows"]
    types = {"x": "*i64", "index": "*i64", "out": "*i64", "width": "i32"}
    return compiled(take_rows._take_rows, types, {"BLOCK": words}, warps, 3, capability)


def views(channels, size, between, result, capability):
    """``augment._augment`` of contiguous images, of a size that is a multiple of 16 or not."""
    rows, columns, warps = augment.TILES["views"]
    block = triton.next_power_of_2(size)
    types = {"images": "*u8", "parameters": "*fp32", "front": f"*{between}", "back": f"*{between}"}
    types |= {"out": f"*{result}"} | dict.fromkeys(("H", "W", "S"), "i32")
    radius = reference.blur_radius(size)
    known = {"column_stride": 1} | ({"most_radius": 1} if radius == 1 else {})
    types |= {} if radius == 1 else {"most_radius": "i32"}
    types |= dict.fromkeys(("image_stride", "channel_stride", "row_stride"), "i32")
    types |= dict.fromkeys([f"{name}_{i}" for name in ("mean", "scale") for i in range(3)], "fp32")
    constants = known | {
        "C": channels, "LAST": channels == 3,
        "BLOCK_Y": min(rows, block), "BLOCK_X": min(columns, block),
    }  # fmt: skip
    multiples = ("H", "W", "S", "image_stride", "channel_stride", "row_stride") if size % 16 == 0 else ()
    return compiled(augment._augment, types, constants, warps, 3, capability, multiples)


def views_cases():
    """Views of 224 pixels in bf16, of 30 in fp32, of one channel."""
    for capability in (AMPERE, HOPPER):
        yield f"bf16 sm_{capability}", partial(views, 3, 224, "fp16", "bf16", capability)
        yield f"fp32 30 px sm_{capability}", partial(views, 3, 30, "fp32", "fp32", capability)
        yield f"gray 28 px sm_{capability}", partial(views, 1, 28, "fp32", "fp32", capability)


def batch_norm(name, layout, rows, capability):
    """A kernel of ``split_batch_norm`` for bf16 and fp32 weights; with one row, sizes of 1 are constants."""
    kernel = getattr(split_batch_norm, name)
    elements, columns, warps, _ = split_batch_norm.TILES[layout]
    types = dict.fromkeys(("x", "y", "dy", "dx"), "*bf16") | {"eps": "fp32"}
    types |= dict.fromkeys(("weight", "bias", "found", "means", "variances", "dw", "db"), "*fp32")
    types |= dict.fromkeys(("R", "C", "L", "ALONG", "steps", "shares"), "i32")
    known = {"L": 1, "ALONG": 1} if layout == "together" else {}
    known |= {"R": 1, "steps": 1, "shares": 1} if rows == "one" else {}
    types = {arg: kind for arg, kind in types.items() if arg in kernel.arg_names and arg not in known}
    constants = known | {
        "HAS_WEIGHT": True, "HAS_BIAS": True, "TOGETHER": layout == "together",
        "CHUNK": split_batch_norm.SHARES, "BLOCK_X": columns,
        "BLOCK_R": elements // columns if rows == "many" else 1,
    }  # fmt: skip
    return compiled(kernel, types, constants, warps, 3, capability, multiples={"C", "L"} & types.keys())


def split_batch_norm_cases():
    """All kernels in both layouts."""
    for layout in split_batch_norm.TILES:
        for name in ("_statistics", "_normalise", "_sums", "_gradient"):
            for rows, capability in (("many", AMPERE), ("many", HOPPER), ("one", HOPPER)):
                label = f"{name.strip('_')} {layout} {rows} sm_{capability}"
                yield label, partial(batch_norm, name, layout, rows, capability)


CASES = {
    "info_nce": info_nce_cases,
    "pairs": pairs_cases,
    "dino": dino_cases,
    "ema_update": lambda: ((f"{size} bytes", partial(ema, size)) for size in ema_update.TILES),
    "enqueue": lambda: ((f"sm_{capability}", partial(write, capability)) for capability in (AMPERE, HOPPER)),
    "take_rows": lambda: ((f"sm_{capability}", partial(take, capability)) for capability in (AMPERE, HOPPER)),
    "split_batch_norm": split_batch_norm_cases,
    "augment": views_cases,
}

if __name__ == "__main__":
    todo = [(op, *case) for op, cases in CASES.items() for case in cases()]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        running = [pool.submit(compile_it) for _, _, compile_it in todo]
        for (op, label, _), found in zip(todo, running, strict=True):
            print(json.dumps({"op": op, "label": label, **found.result()}), flush=True)
