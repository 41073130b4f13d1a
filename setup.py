"""Build of moco_fast: Python packages plus one compiled module, ``moco_fast._C``.

The module is optional. Without nvcc it is built for the CPU only, without a working C++ compiler the install
is pure Python; either is said in one line and recorded in ``moco_fast/_build_info.json``, which
``moco-fast doctor`` shows.

Environment:
    MOCO_FAST_NO_NATIVE=1    do not build ``_C``
    MOCO_FAST_NO_CUDA=1      do not look for nvcc
    CXX, CXXFLAGS, LDFLAGS   compiler and extra flags
    CUDA_HOME                where nvcc is, before PATH and /usr/local/cuda are searched
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CSRC = Path("csrc")
INFO_NAME = "_build_info.json"
# No -ffast-math anywhere: NaN and infinity must reach the loss.
CXX_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Compiled once per entry, with -DMOCO_FAST_ISA=<name>; the CPU decides at run time.
ISA_SOURCES = {
    "info_nce_cpu.cpp",
    "pairs_cpu.cpp",
    "dino_cpu.cpp",
    "sgd_cpu.cpp",
    "adamw_cpu.cpp",
    "split_batch_norm_cpu.cpp",
    "augment_cpu.cpp",
}
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
# Matrix units for bf16, of Linux on x86-64: a source of its own, where the compiler knows them.
AMX_SOURCE = "info_nce_amx.cpp"
AMX_FLAGS = [*X86_ISAS["avx512"], "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
# Whether products are fused with sums: said for every source, after CXXFLAGS. Otherwise ARM, whose least
# instruction set has the fused one, would round in its own way, and updates would not be bitwise torch's.
FUSED = ["-ffp-contract=fast"]
UNFUSED = ["-ffp-contract=off"]
# No value changes without errno and traps, but square roots and choices become vector instructions.
OPTIMIZER_FLAGS = [*UNFUSED, "-fno-math-errno", "-fno-trapping-math"]
SOURCE_FLAGS = {
    "info_nce_cpu.cpp": FUSED,
    AMX_SOURCE: FUSED,
    "pairs_cpu.cpp": FUSED,
    "dino_cpu.cpp": FUSED,
    "split_batch_norm_cpu.cpp": FUSED,
    "augment_cpu.cpp": FUSED,
    "sgd_cpu.cpp": OPTIMIZER_FLAGS,
    "adamw_cpu.cpp": OPTIMIZER_FLAGS,
}  # of all others UNFUSED
USUAL_CUDA = "/usr/local/cuda/bin"
# Code for Ampere and Hopper, and PTX, which every later GPU compiles for itself.
NVCC_TARGETS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]
# Instructions that Hopper alone has, by name of the source file.
HOPPER_SOURCES = {"info_nce_sweep_cuda.cu"}
HOPPER_TARGETS = ["-gencode=arch=compute_90a,code=sm_90a"]


class BuildError(Exception):
    """Why something could not be built, in one line."""


def env_flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def run(command: list[str], **options) -> str:
    """Output of a command; BuildError with the line that says why when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
        raise BuildError((told or [": ".join([f"{command[0]} failed", *lines[:1]])])[0][:300])
    return done.stdout


class Toolchain:
    """The compilers found, and what they can do."""

    def __init__(self, scratch: Path) -> None:
        if os.name == "nt":
            raise BuildError("the kernels need GCC or Clang, which Windows builds of Python do not use")
        chosen = os.environ.get("CXX")
        candidates = [chosen] if chosen else ["g++", "clang++", "c++"]
        self.cxx = next((shlex.split(name) for name in candidates if shutil.which(shlex.split(name)[0])), [])
        if not self.cxx:
            raise BuildError(f"no C++ compiler ({', '.join(candidates)})")
        self.name = run([*self.cxx, "--version"]).splitlines()[0]
        self.is_x86_64 = run([*self.cxx, "-dumpmachine"]).startswith("x86_64")
        self.isas = X86_ISAS if self.is_x86_64 else {"baseline": []}
        self.probe = scratch / "probe"
        probe = self.probe.with_suffix(".cpp")
        probe.write_text("#include <vector>\nint main() { return int(std::vector<int>().size()); }\n")
        self.compile_probe(probe, [])
        try:
            self.compile_probe(probe, ["-fopenmp", "-include", "omp.h"])
            self.openmp = ["-fopenmp"]
        except BuildError:
            self.openmp = []
        self.amx = False
        if self.is_x86_64 and sys.platform == "linux":
            try:
                self.compile_probe(CSRC / AMX_SOURCE, [*AMX_FLAGS, "-DMOCO_FAST_ISA=amx", "-c"])
                self.amx = True
            except BuildError:
                pass

    def variants(self, source: str) -> dict[str, list[str]]:
        """Flags by the instruction set that a source is compiled for, "" where that is no matter."""
        if source == AMX_SOURCE:
            return {"amx": AMX_FLAGS} if self.amx else {}
        return self.isas if source in ISA_SOURCES else {"": []}

    def compile_probe(self, source: Path, flags: list[str]) -> None:
        run([*self.cxx, *CXX_FLAGS, *flags, str(source), "-o", str(self.probe)])


def find_nvcc() -> str:
    if env_flag("MOCO_FAST_NO_CUDA"):
        raise BuildError("MOCO_FAST_NO_CUDA is set")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path=USUAL_CUDA)
    if not nvcc:
        raise BuildError(f"no nvcc in CUDA_HOME, PATH or {USUAL_CUDA}")
    return nvcc


def write_ninja(path: Path, output: Path, tools: Toolchain, nvcc: str | None) -> None:
    """The build graph. Objects depend on the headers their compiler reports: builds are incremental."""
    import pybind11
    from ninja.ninja_syntax import Writer

    includes = [f"-I{directory}" for directory in (pybind11.get_include(), sysconfig.get_paths()["include"])]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    defines = [
        *(["-DMOCO_FAST_X86_64"] if tools.is_x86_64 else []),
        *(["-DMOCO_FAST_AMX"] if tools.amx else []),
    ]
    common = shlex.join([*CXX_FLAGS, *tools.openmp, *extra, *defines])
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    link_flags = [*tools.openmp, *extra, *shlex.split(os.environ.get("LDFLAGS", ""))]
    with path.open("w") as stream:
        ninja = Writer(stream)
        ninja.variable("ninja_required_version", "1.3")
        ninja.rule(
            "cxx",
            f"{shlex.join(tools.cxx)} -MMD -MF $out.d {common} $flags -c $in -o $out",
            depfile="$out.d",
            deps="gcc",
        )
        if nvcc:
            # Of "ccache g++ -m64" the compiler.
            host = ["-ccbin", next(word for word in reversed(tools.cxx) if not word.startswith("-"))]
            device = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            ninja.rule(
                "nvcc",
                f"{shlex.join([nvcc, *host, *device])} $targets -MD -MF $out.d -c $in -o $out",
                depfile="$out.d",
                deps="gcc",
            )
            host_flags = [f"-Xcompiler={flag}" for flag in link_flags]
            ninja.rule(
                "link", f"{shlex.join([nvcc, *host, '-shared', '-cudart=static', *host_flags])} $in -o $out"
            )
        else:
            ninja.rule("link", f"{shlex.join([*tools.cxx, *shared])} $in {shlex.join(link_flags)} -o $out")

        objects: list[str] = []
        for source in sorted(CSRC.glob("*.cpp")):
            flags = list(SOURCE_FLAGS.get(source.name, UNFUSED))
            if source.name == "bindings.cpp":
                flags += [*includes, *(["-DMOCO_FAST_CUDA"] if nvcc else [])]
            for isa, isa_flags in tools.variants(source.name).items():
                chosen = [f"-DMOCO_FAST_ISA={isa}", *isa_flags] if isa else []
                target = f"{source.stem}{'.' + isa if isa else ''}.o"
                objects += ninja.build(
                    target, "cxx", str(source.resolve()), variables={"flags": shlex.join([*flags, *chosen])}
                )
        if nvcc:
            for source in sorted(CSRC.glob("*.cu")):
                targets = HOPPER_TARGETS if source.name in HOPPER_SOURCES else NVCC_TARGETS
                objects += ninja.build(
                    f"{source.stem}.o",
                    "nvcc",
                    str(source.resolve()),
                    variables={"targets": shlex.join(targets)},
                )
        ninja.build(str(output), "link", objects)


def build_module(output: Path, scratch: Path) -> dict[str, object]:
    """Compile ``output``; what was built and why not more, for ``_build_info.json``."""
    scratch.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    if env_flag("MOCO_FAST_NO_NATIVE"):
        raise BuildError("MOCO_FAST_NO_NATIVE is set")
    tools = Toolchain(scratch)

    def compile_with(nvcc: str | None) -> None:
        try:
            import ninja

            write_ninja(scratch / "build.ninja", output.resolve(), tools, nvcc)
        except ImportError as error:
            raise BuildError(f"the build needs pybind11 and ninja: {error}") from error
        executable = Path(ninja.BIN_DIR) / "ninja"
        run([str(executable) if executable.exists() else "ninja", "-C", str(scratch)])

    why = "" if tools.openmp else "no OpenMP: the CPU kernels run on one thread"
    cuda = False
    try:
        compile_with(find_nvcc())
        cuda = True
    except BuildError as reason:
        why = "; ".join(filter(None, [f"CPU only: {reason}", why]))
        compile_with(None)
    return {"native": True, "cuda": cuda, "why": why, "compiler": tools.name, "isas": list(tools.isas)}


class NinjaBuildExt(build_ext):
    """Builds ``_C`` through ninja, and survives not being able to."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        try:
            info = build_module(output, Path(self.build_temp))
        except BuildError as reason:
            output.unlink(missing_ok=True)
            info = {
                "native": False,
                "cuda": False,
                "why": f"pure Python: {reason}",
                "compiler": "",
                "isas": [],
            }
        if info["why"]:
            print(f"moco_fast: {info['why']}", file=sys.stderr)
        (output.parent / INFO_NAME).write_text(json.dumps(info, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: a module that could not be rebuilt must not linger."""
        for ext in self.extensions:
            built = Path(self.build_lib, *ext.name.split(".")[:-1]) / INFO_NAME
            package = Path(self.get_finalized_command("build_py").get_package_dir("moco_fast"))
            shutil.copyfile(built, package / INFO_NAME)
            if not json.loads(built.read_text())["native"]:
                (package / Path(self.get_ext_filename(ext.name)).name).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class FreshBuildPy(build_py):
    """Leaves no module in a wheel that an earlier build had and the sources have no more."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "moco_fast"), ignore_errors=True)
        super().run()


setup(
    packages=[*find_packages(include=["moco_fast", "moco_fast.*"]), "moco_fast.kernels"],
    package_dir={"moco_fast": "moco_fast", "moco_fast.kernels": "kernels"},
    package_data={"moco_fast": ["py.typed"]},
    # optional: setuptools then accepts that the file is missing. The sources are listed for sdist.
    ext_modules=[Extension("moco_fast._C", sorted(map(str, CSRC.glob("*.cpp"))), optional=True)],
    cmdclass={"build_py": FreshBuildPy, "build_ext": NinjaBuildExt},
)
