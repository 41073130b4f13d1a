"""The machine code of the Triton kernels, compiled without a GPU: what keeps them fast, checked anywhere."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Bytes that a block may have on an H200, and on every GPU from Ampere on.
HOPPER_SHARED, AMPERE_SHARED = 227 * 1024, 99 * 1024

# As the comments beside their tiles say.
SPILLS = (
    *("many 512, fp32 queue", "many 512, bf16 queue"),
    *("split gradient 512", "split gradient 512 sm_80", "prototypes 512", "split prototypes 256"),
)


@pytest.fixture(scope="module")
def kernels():
    """What tests/aot.py found, by op and label."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(line["op"], line["label"]): line for line in lines}


def test_nothing_spills(kernels):
    assert len(kernels) >= 121
    for name, kernel in kernels.items():
        if "wide highest" in name[1] or name[1] in SPILLS:
            continue
        assert kernel["spills"] == 0 and kernel["local"] == 0, (name, kernel)


def test_products_do_not_wait_for_each_other(kernels):
    """On Hopper: wgmma only, one ARRIVE per product; more would mean operands that pass through registers."""
    seen = set()
    for (op, label), kernel in kernels.items():
        small = "wide" in label or "split gradient 512" in label  # tiles too small for wgmma
        if "products" in kernel and "sm_80" not in label and not small:
            assert kernel["hgmma"] >= 2 and kernel["hmma"] == 0 and kernel["tma"] > 0, (op, label, kernel)
            assert kernel["arrive"] <= kernel["products"], (op, label, kernel)
            seen.add(op)
    assert seen == {"info_nce", "pairs", "dino"}


def test_no_product_loses_registers_that_it_uses(kernels):
    """Many take exponentials from registers, which ptxas must leave alone until the product is waited for."""
    assert not [(name, kernel["hazards"]) for name, kernel in kernels.items() if kernel["hazards"]]


def test_ampere_uses_tensor_cores_and_copies_ahead(kernels):
    """Descriptors, which are for Hopper, would become loads of 2 bytes there that every product waits for."""
    seen = set()
    for (op, label), kernel in kernels.items():
        if "products" in kernel and "sm_80" in label:
            assert kernel["hmma"] > 0 and kernel["hgmma"] == 0 and kernel["tma"] == 0, (op, label, kernel)
            assert kernel["async_copies"] > 0 and kernel["narrow_loads"] == 0, (op, label, kernel)
            seen.add(op)
    assert seen == {"info_nce", "pairs", "dino"}


def test_shared_memory_allows_the_programs_the_tables_ask_for(kernels):
    from moco_fast.kernels import dino, info_nce, pairs

    for op, table in (("info_nce", info_nce.TILES), ("pairs", pairs.TILES), ("dino", dino.TILES)):
        for (kind, features), (*_, warps, _, per_sm) in table.items():
            kernel = kernels[op, f"{kind} {features}"]
            assert kernel["shared"] * per_sm <= HOPPER_SHARED, (op, kind, features)
            assert kernel["registers"] * warps * 32 * per_sm <= 65536, (op, kind, features)
    for op, table in (("pairs", pairs.OLDER_TILES), ("dino", dino.OLDER_TILES)):
        for (kind, features), (*_, warps, _, per_sm) in table.items():
            kernel = kernels[op, f"{kind} {features} sm_80"]
            assert kernel["registers"] * warps * 32 * per_sm <= 65536, (op, kind, features)
    for (op, label), kernel in kernels.items():
        assert kernel["shared"] <= (
            AMPERE_SHARED if "sm_80" in label or "wide" in label else HOPPER_SHARED
        ), (op, label)


def test_ema_update_moves_16_bytes_at_a_time(kernels):
    for label in ("2 bytes", "4 bytes"):
        kernel = kernels["ema_update", label]
        assert kernel["wide_loads"] >= 2 * kernel["wide_stores"] >= 2, (label, kernel)


def test_augment_reads_several_pixels_at_once(kernels):
    """But for those of the image, of which a thread has four in each channel, at places of their own."""
    found = {label: kernel for (op, label), kernel in kernels.items() if op == "augment"}
    assert len(found) == 6
    for label, kernel in found.items():
        assert kernel["narrow_loads"] == 4 * (1 if "gray" in label else 3), (label, kernel)
        assert kernel["barriers"] == 3, (
            label,
            kernel,
        )  # between passes, which no interpreter sees


def test_split_batch_norm_moves_16_bytes_at_a_time(kernels):
    """Where C and L are multiples of 16, whichever of them lies together."""
    found = {label: kernel for (op, label), kernel in kernels.items() if op == "split_batch_norm"}
    assert len(found) == 24
    for label, kernel in found.items():
        if "many" in label:
            writes = "normalise" in label or "gradient" in label
            assert kernel["wide_loads"] >= 2 and (kernel["wide_stores"] >= 1) == writes, (label, kernel)
