"""The package as a whole: what importing costs, which way imports go, and forcing a backend."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moco_fast.kernels
from moco_fast import native, reference
from moco_fast.kernels import backend as triton
from moco_fast.ops import arguments

ROOT = Path(moco_fast.__file__).parent

# Lowest first; a module may import from its own row and from rows above it. First match wins.
LAYERS = [
    ("_version", "bar", "exports", "extras", "reference"),
    ("native", "kernels"),
    ("checks",),
    ("backends",),
    ("ops", "doctor", "files"),
    ("queue", "norm", "distributed", "optim"),
    ("models", "data"),
    ("compat",),
    ("evaluate",),
    ("train",),
    ("study", "convert"),
    ("commands",),
    ("cli",),
]


def layer(module):
    name = module.split(".")[1] if "." in module else ""
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


def test_imports_only_go_down():
    seen = 0
    folders = {"moco_fast": ROOT, "moco_fast.kernels": Path(moco_fast.kernels.__path__[0])}
    for package, path in ((name, path) for name, root in folders.items() for path in root.rglob("*.py")):
        module = ".".join([package, *path.relative_to(folders[package]).with_suffix("").parts])
        if path.name == "__init__.py":
            continue
        own = layer(module)
        assert own is not None, f"{module} is in no layer"
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moco_fast"):
                names = [node.module] if "." in node.module else [f"moco_fast.{a.name}" for a in node.names]
            for name in names:
                if name in ("moco_fast._C", "moco_fast.__version__"):
                    continue
                assert layer(name) is not None and layer(name) <= own, (
                    f"{module} imports {name}, which is above it"
                )
                seen += 1
    assert seen > 40


def python(program, **environment):
    import os

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_torch_alone():
    loaded = python(
        "import sys, torch; before = set(sys.modules); import moco_fast\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    ).split()
    assert not {"torchvision", "triton", "rich", "tyro", "matplotlib", "sklearn", "PIL", "tensorboard"} & set(
        loaded
    )


def test_packages_import_what_is_asked_for():
    """torch alone, and of the models no more than one that is named."""
    loaded = python(
        "import sys, torch; before = set(sys.modules); import moco_fast, moco_fast.models, moco_fast.data\n"
        "from moco_fast.models import SimCLR; from moco_fast.data import TwoCrops\n"
        "print(*set(sys.modules) - before)"
    ).split()
    assert {"moco_fast.models.simclr", "moco_fast.data.augment"} <= set(loaded)
    assert not {"moco_fast.models.dino", "moco_fast.data.datasets", "torchvision", "PIL"} & set(loaded)
    loaded = python(
        "import sys, torch; before = set(sys.modules); import moco_fast\nprint(*set(sys.modules) - before)"
    )
    assert set(loaded.split()) <= {"moco_fast", "moco_fast._version", "moco_fast.exports"}


def test_kernels_folder_is_not_a_package(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT.parent))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    if (ROOT.parent / "kernels" / "__init__.py").exists():  # a checkout; an installed wheel has none
        with pytest.raises(ImportError, match=r"import moco_fast\.kernels"):
            import kernels  # noqa: F401
    import moco_fast.kernels  # noqa: F401


def test_native_module_is_there_if_the_build_said_so():
    """A compiled module that fails to import must not pass for a machine without a compiler."""
    if native.build_info().get("native"):
        assert native.unavailable() is None
    else:
        assert native.unavailable()


def test_forcing_a_backend():
    q = torch.randn(2, 4)
    queue = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    with (
        pytest.raises(ValueError, match="backend must be one of 'native', 'triton', 'reference', got 'fast'"),
        moco_fast.use_backend("fast"),
    ):
        pass
    if native.unavailable() is None:
        with moco_fast.use_backend("native"), pytest.raises(RuntimeError, match=r"no torch.float64 kernel"):
            moco_fast.info_nce(q.double(), q.double(), queue.double())
    with moco_fast.use_backend("reference"):
        want = moco_fast.info_nce(q, q, queue)
    assert torch.allclose(moco_fast.info_nce(q, q, queue), want, rtol=1e-5)


def test_which_gpus_triton_serves(monkeypatch):
    """Those of AMD count their capabilities in their own way: 9.4 is not more than Hopper."""

    class OnGpu:
        is_cuda, device, dtype, ndim, shape = True, torch.device("cuda", 0), torch.float32, 2, (4, 128)

    def reason(capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        return triton.cannot_serve("nt_xent", [OnGpu()])

    monkeypatch.setattr(triton, "installed", lambda: True)
    assert reason((8, 0)) is None and reason((12, 0)) is None
    assert reason((7, 5)) == "it needs a GPU of compute capability 8.0 or newer"
    assert reason((9, 4), hip="7.0") == "its kernels are for NVIDIA GPUs, this PyTorch is for AMD's"


def test_backend_from_the_environment():
    program = "from moco_fast import backends; print(backends.forced())"
    assert python(program, MOCO_FAST_BACKEND="reference") == "reference"
    assert python(program, MOCO_FAST_BACKEND="") == "None"
    with pytest.raises(AssertionError, match="MOCO_FAST_BACKEND must be one of"):
        python(program, MOCO_FAST_BACKEND="quick")


def test_public_names():
    for name in moco_fast.__all__:
        assert getattr(moco_fast, name) is not None
    assert set(moco_fast.__all__) <= set(dir(moco_fast))
    with pytest.raises(AttributeError, match="module 'moco_fast' has no attribute 'nothing'"):
        _ = moco_fast.nothing


def test_command_sets_the_openmp_policy_before_torch():
    program = "import sys, moco_fast.cli; print('torch' in sys.modules)"
    assert python(program) == "False"


@pytest.mark.parametrize(
    "op", ["info_nce", "ema_update_", "enqueue_", "nt_xent", "contrast", "dino", "split_batch_norm"]
)
def test_an_op_has_one_name_everywhere(op):
    """The steps of docs/adding-an-op.md."""
    name, root = op.rstrip("_"), ROOT.parent
    assert op in moco_fast.__all__ and hasattr(torch.ops.moco_fast, op)
    assert hasattr(reference, op) and hasattr(arguments, name)
    tests = {"dino": "dino_op"}.get(name, name)  # tests/test_dino.py is of the model
    paths = [f"tests/test_{tests}.py", f"bench/bench_{name}.py", f"kernels/{name}.py"]
    if op in native.OPS:
        assert hasattr(native, op)
        paths += [f"csrc/{name}.h", f"csrc/{name}_cpu.cpp"]
    else:
        assert hasattr(triton, op)
    for path in paths:
        assert (root / path).exists(), path
    assert f"`{op}`" in (root / "CHANGELOG.md").read_text()
