"""What nvcc and its companions make of the CUDA sources."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulated import CSRC


def find(tool):
    """A CUDA tool: in CUDA_HOME, in PATH, or shipped with Triton."""
    places = [os.path.join(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    places.append(os.environ["PATH"])
    try:
        import triton

        places.append(str(Path(triton.__file__).parent / "backends/nvidia/bin"))
    except ImportError:
        pass
    found = next(filter(None, (shutil.which(tool, path=place) for place in places)), None)
    return found or pytest.skip(f"{tool} is not installed: CUDA code was not compiled")


def compiled(source, architectures, folder):
    """The object file, how many kernels it holds and what ptxas said of them; none of them may spill."""
    made = folder / "kernel.o"
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    command = [find("nvcc"), "-std=c++17", "-O3", *targets, "-Xptxas=-v", "-c", CSRC / source, "-o", made]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    assert usage and set(usage) == {("0", "0", "0")}, done.stderr
    return made, len(usage), done.stderr
