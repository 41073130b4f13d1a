"""Run a script that was written for the official code: ``python -m moco_fast.compat SCRIPT ARGS...``.

``import moco.builder``, ``moco.loader``, ``moco.optimizer`` and ``vits`` then find the modules of
:mod:`moco_fast.compat`, in the script and in the processes that it spawns.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing.spawn
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

PROGRAM = "python -m moco_fast.compat"

ANSWERED = {
    "moco.builder": "moco_fast.compat.builder",
    "moco.loader": "moco_fast.compat.loader",
    "moco.optimizer": "moco_fast.compat.optimizer",
    "vits": "moco_fast.compat.vits",
}

EXAMPLES = f"""\
examples:
  {PROGRAM} main_moco.py -a resnet50 --mlp --moco-t 0.2 --cos \\
      --dist-url tcp://localhost:10001 --multiprocessing-distributed --world-size 1 --rank 0 imagenet/
  {PROGRAM} --device cpu main_moco.py ...      the script's .cuda() calls leave everything on the CPU
  {PROGRAM} --device cpu:2 main_moco.py ...    and it finds two devices, for which it may spawn processes
  torchrun --nproc-per-node 8 -m moco_fast.compat my_script.py ...

options after SCRIPT are the script's own.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for wrong arguments."""
    options = _parser().parse_args(argv)
    script = Path(options.script)
    if not script.is_file():
        print(f"{PROGRAM}: no such script: {script}", file=sys.stderr)
        return 2
    folder = script.resolve().parent
    answered = [f"{name.replace('.', '/')}.py" for name in ANSWERED]
    if shadowed := [name for name in answered if (folder / name).exists()]:
        print(f"{PROGRAM}: moco_fast answers for {', '.join(shadowed)} in {folder}", file=sys.stderr)
    install(options.device, folder)
    if not (options.device or _finds_gpu()):
        hint = "--device cpu before the script lets the CPU stand for one"
        print(f"{PROGRAM}: no GPU found; {hint}", file=sys.stderr)
    sys.argv = [str(script), *options.arguments]
    sys.path.insert(0, str(folder))
    runpy.run_path(str(script.absolute()), run_name="__main__")
    return 0


def _finds_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def install(devices: int, folder: Path) -> None:
    """Answer the imports of upstream scripts, here and in processes spawned from here.

    Args:
        devices: CUDA devices to be found, all of them the CPU; 0 leaves devices alone.
        folder: The script's, whose ``moco/`` has the modules that are not answered.
    """
    package = ModuleType("moco", "Answered by moco_fast.compat.")
    package.__path__ = [str(folder / "moco")]
    sys.modules["moco"] = package
    for name, home in ANSWERED.items():
        module = sys.modules[name] = importlib.import_module(home)
        if name.startswith("moco."):
            setattr(package, name.partition(".")[2], module)
    if devices:
        from moco_fast.compat import device

        device.use_cpu(devices)
    _install_in_children(devices, folder)


class _Install:
    """Unpickled as a call of :func:`install`."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[object, ...]:
        return install, self.arguments


def _install_in_children(devices: int, folder: Path) -> None:
    # A spawned process unpickles these data before it imports the script, and ignores keys it does not know.
    original = multiprocessing.spawn.get_preparation_data

    def with_imports(name: str) -> dict[str, object]:
        return original(name) | {"moco_fast": _Install(devices, folder)}

    multiprocessing.spawn.get_preparation_data = with_imports


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message}; see {PROGRAM} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Run an official MoCo script, or one written after it, on moco_fast.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device",
        type=_devices,
        default=0,
        metavar="cpu[:COUNT]",
        help="let the CPU stand for COUNT (1) CUDA devices, to try a script out",
    )
    parser.add_argument("script", metavar="SCRIPT", help="the script to run")
    arguments = parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its own")
    arguments.required = False  # which argparse does not know of the remainder
    return parser


def _devices(text: str) -> int:
    name, _, count = text.partition(":")
    if name != "cpu" or not (count or "1").isdecimal() or int(count or 1) < 1:
        raise argparse.ArgumentTypeError(f"must be cpu or cpu:COUNT, got {text!r}")
    return int(count or 1)
