"""What the documents name is there, and what is there is named."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import moco_fast
from moco_fast import data, models
from moco_fast.data import download
from moco_fast.train.build import data_parallel
from moco_fast.train.methods import Row

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text()
LISTED = re.findall(r"^\| `(moco_fast[\w.]+)` \|", API, re.MULTILINE)


@pytest.mark.parametrize("name", LISTED)
def test_what_is_listed_imports(name):
    package, _, name = name.rpartition(".")
    module = importlib.import_module(package)
    assert name in module.__all__ and getattr(module, name) is not None and name in dir(module)


def test_what_is_listed_is_there_after_import_moco_fast():
    """As it is written there, and whatever was used before."""
    for name in {name.rpartition(".")[0]: name for name in LISTED}.values():
        subprocess.run([sys.executable, "-c", f"import moco_fast; {name}"], check=True)


@pytest.mark.parametrize("module", [moco_fast, models, data])
def test_what_is_public_is_listed(module):
    for name in module.__all__:
        assert f"{module.__name__}.{name}" in LISTED or f"moco_fast.{name}" in LISTED, name
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
        _ = module.nothing


def test_environment_variables_are_listed():
    """Those of this library that anything reads, and no others."""
    sources = [
        *ROOT.glob("moco_fast/**/*.py"),
        *ROOT.glob("kernels/*.py"),
        *ROOT.glob("csrc/*.cpp"),
        ROOT / "setup.py",
    ]
    read = set()
    for path in sources:
        read |= set(
            re.findall(
                r"(?:getenv|env_flag|environ\.get)\(\"(MOCO_FAST_\w+)\"", path.read_text(encoding="utf-8")
            )
        )
    assert read == set(re.findall(r"^\| `(MOCO_FAST_\w+)` ", API, re.MULTILINE)) and len(read) >= 6


def test_the_directory_of_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("MOCO_FAST_DATA", str(tmp_path))
    assert download.roots()[0] == tmp_path and download.roots()[1:] == [
        Path(os.path.expanduser("~/.cache/moco_fast")),
        Path("data"),
    ]


def test_adding_a_method_names_fields_of_a_row():
    text = (ROOT / "docs" / "adding-a-method.md").read_text().split("2. **The row**")[1]
    named = set(re.findall(r"`(\w+)=\"", text)) | set(re.findall(r"`(\w+)=\w", text))
    assert named == {"undivided"} and named <= {f.name for f in fields(Row)}


def test_training_on_a_gpu_lets_cudnn_choose(monkeypatch):
    """As the official script does, and the benchmark of steps."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    model = torch.nn.Linear(1, 1)
    assert data_parallel(model, torch.device("cpu")) is model and not torch.backends.cudnn.benchmark
    assert data_parallel(model, torch.device("cuda")) is model and torch.backends.cudnn.benchmark
