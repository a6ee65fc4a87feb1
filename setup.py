"""Builds the extension modules and maps `reference/` and `sim/` into the package.

deepep._core      layout rules (csrc/core, csrc/host), bound with pybind11; a C++20 compiler is all it needs.
deepep._emulator  the kernels' own source over csrc/emulator, for machines without a GPU.
deepep._cuda      the kernels for sm_90a; built where nvcc is found, left out (with a message) elsewhere.

DEEPEP_CUDA=0 leaves the CUDA part out, DEEPEP_CUDA=1 makes its absence an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
CXX_FLAGS = ["-std=c++20", "-O2", "-g0", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fvisibility=hidden"]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "-gencode=arch=compute_90a,code=sm_90a",
    "--cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas=-v,-warn-spills",
    "--expt-relaxed-constexpr",
]


def find_nvcc() -> str | None:
    """The nvcc to build with: CUDA_HOME's, else the one on PATH, else none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


class BuildExtensions(build_ext):
    """pybind11 extensions by the C++ compiler; `deepep._cuda` by nvcc."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "deepep._cuda":
            self.build_cuda(ext)
        else:
            super().build_extension(ext)

    def build_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        build = Path(self.build_temp) / "cuda"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{d}" for d in [*ext.include_dirs, *self.include_dirs]]
        objects = []
        for source in ext.sources:
            obj = build / (Path(source).name + ".o")
            command = [nvcc, *NVCC_FLAGS, *includes, "-x", "cu", "-c", source, "-o", str(obj)]
            print(" ".join(command), flush=True)
            done = subprocess.run(command, text=True, capture_output=True)
            if done.returncode != 0:
                sys.stderr.write(done.stdout + done.stderr)
                raise SystemExit(f"nvcc failed on {source}")
            objects.append(str(obj))
        subprocess.run([nvcc, "-shared", "--cudart=static", *objects, "-o", str(target)], check=True)


def pybind_extension(name: str, sources: list[str]) -> Extension:
    headers = [str(p) for p in sorted(CSRC.rglob("*.hpp")) + sorted(CSRC.rglob("*.cuh"))]
    return Extension(
        name,
        sources=sources,
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=CXX_FLAGS,
        depends=headers,
        language="c++",
    )


def extensions() -> list[Extension]:
    host = [str(p) for p in sorted((CSRC / "host").glob("*.cpp"))]
    wanted = [pybind_extension("deepep._core", ["csrc/bindings.cpp", *host])]
    if (CSRC / "emulator" / "bindings.cpp").exists():
        emulator_sources = [str(p) for p in sorted((CSRC / "emulator").glob("*.cpp"))]
        wanted.append(pybind_extension("deepep._emulator", emulator_sources))
    kernels = [str(p) for p in sorted((CSRC / "kernels").glob("*.cu"))]
    mode = os.environ.get("DEEPEP_CUDA", "auto")
    if kernels and mode != "0":
        if find_nvcc():
            wanted.append(pybind_extension("deepep._cuda", [*kernels, "csrc/bindings_cuda.cpp"]))
        elif mode == "1":
            raise SystemExit("DEEPEP_CUDA=1, and no nvcc was found (CUDA_HOME or PATH)")
        else:
            print("deepep: no nvcc found; building without CUDA kernels (CPU backends only)")
    return wanted


setup(
    packages=[
        "deepep",
        "deepep.bench",
        "deepep.cli",
        "deepep.demo",
        "deepep.engine",
        "deepep.nn",
        "deepep.reference",
        "deepep.sim",
    ],
    package_dir={"deepep": "deepep", "deepep.reference": "reference", "deepep.sim": "sim"},
    package_data={"deepep": ["py.typed", "*.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions},
)
