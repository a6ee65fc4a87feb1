"""Builds the extension modules and maps `reference/` and `sim/` into the package.

deepep._core      layout rules (csrc/layout), bound with pybind11; a C++20 compiler is all it needs.
deepep._emulator  the kernels' own source over csrc/emulator, for machines without a GPU.
deepep._cuda      the kernels; built where nvcc is found, left out (with a message) elsewhere.
deepep._nvshmem   what puts over NVSHMEM, linked with its device library; built where that is found as well.

Files of all modules are compiled side by side, and objects are kept in build/objects: a file is compiled
again only if it, a header of this tree that it includes, its flags, the compiler, Python or pybind11 has
changed. Where pybind11 lies does not matter: pip puts it into a folder of another name for every build.

    DEEPEP_CUDA=0        leave the CUDA part out; DEEPEP_CUDA=1: its absence is an error
    DEEPEP_CUDA_ARCHS="8.0 9.0a 10.0a"   compute capabilities to compile kernels for; 9.0a if not given. With
                         "+PTX" behind one, newer GPUs too, for which the driver compiles that code again
    DEEPEP_NVSHMEM=DIR   NVSHMEM's include and lib; else those of nvidia-nvshmem-cu13 here. 0: leave it out
    DEEPEP_EMULATOR=0    leave the emulator out
    DEEPEP_BUILD_JOBS=N  compile so many files at a time; the number of cores if not given
    DEEPEP_OBJECTS=DIR   keep objects there instead of in build/objects
    DEEPEP_LOCAL_VERSION=+cu128   of this build, behind the version (PEP 440); release/dist.py sets it
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

CSRC = Path("csrc")
OBJECTS = Path(os.environ.get("DEEPEP_OBJECTS") or Path("build") / "objects")
CXX_FLAGS = [
    "-std=c++20",
    "-O2",
    "-g0",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
]
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "--cudart=static",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-Xptxas=-v,-warn-spills",
    "--expt-relaxed-constexpr",
]
#: For what is linked with NVSHMEM's device library, whose headers warn.
NVSHMEM_FLAGS = ["-gencode=arch=compute_90,code=sm_90", "-rdc=true", "-w"]
CUDA = "deepep._cuda"
NVSHMEM = "deepep._nvshmem"
ARCHS = re.split(r"[\s,;]+", os.environ.get("DEEPEP_CUDA_ARCHS", "").strip() or "9.0a")


def find_nvcc() -> str | None:
    """The nvcc to build with: CUDA_HOME's, else the one on PATH, else none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def find_nvshmem() -> Path | None:
    """The folder with NVSHMEM's headers and libraries, or none."""
    given = os.environ.get("DEEPEP_NVSHMEM")
    if given:
        return None if given == "0" else Path(given)
    try:
        package = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    places = [] if package is None else package.submodule_search_locations or []
    return next((Path(p) for p in places if (Path(p) / "lib" / "libnvshmem_device.a").exists()), None)


def find_cxx() -> list[str]:
    """The C++ compiler and what always goes with it: CXX, else the one Python was built with."""
    return shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")


def code_for(arch: str) -> str:
    """The flag that has nvcc compile for a compute capability."""
    if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
        raise SystemExit(f"DEEPEP_CUDA_ARCHS: got {arch!r}; expected such as 8.0, 9.0a or 8.0+PTX")
    number = arch.removesuffix("+PTX").replace(".", "")
    kinds = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={kinds}"


class BuildExtensions(build_ext):
    """Extensions by the C++ compiler, `deepep._cuda` by nvcc; one pool of jobs for all of them."""

    def build_extensions(self) -> None:
        jobs = int(os.environ.get("DEEPEP_BUILD_JOBS") or os.cpu_count() or 1)
        sources = [(ext, source) for ext in self.extensions for source in ext.sources]
        # What takes longest begins: kernels, then bindings.
        sources.sort(key=lambda job: (not job[1].endswith(".cu"), "/bindings/" not in job[1]))
        names = [(ext.name, source) for ext, source in sources]
        with ThreadPoolExecutor(jobs) as pool:
            made = dict(zip(names, pool.map(lambda job: self.compile(*job), sources), strict=True))
            objects = {
                ext.name: [made[ext.name, source] for source in ext.sources] for ext in self.extensions
            }
            list(pool.map(lambda ext: self.link(ext, objects[ext.name]), self.extensions))

    def compile(self, ext: Extension, source: str) -> Path:
        """The object file of a source, compiled if it is not up to date."""
        folder = OBJECTS / f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}" / ext.name
        target = folder / (source.replace("/", "-") + ".o")
        depends = target.with_suffix(".d")
        includes = [f"-I{d}" for d in [*ext.include_dirs, sysconfig.get_path("include")]]
        if ext.name == CUDA:
            compiler = [find_nvcc() or "nvcc", *NVCC_FLAGS, *map(code_for, ARCHS), "-x", "cu"]
            if "/bindings/" in source:
                compiler.append(f'-DDEEPEP_CUDA_ARCHS="{" ".join(ARCHS)}"')
        elif ext.name == NVSHMEM:
            compiler = [find_nvcc() or "nvcc", *NVCC_FLAGS, *NVSHMEM_FLAGS, "-x", "cu"]
        else:
            compiler = [*find_cxx(), *CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        command = [*compiler, *includes, "-c", source, "-o", str(target), "-MD", "-MF", str(depends)]
        made_by = [*compiler, version_of(compiler[0]), sys.version, f"pybind11 {pybind11.__version__}"]
        state = target.with_suffix(".json")
        if not is_up_to_date(state, made_by):
            folder.mkdir(parents=True, exist_ok=True)
            print(f"deepep: {ext.name.rpartition('.')[2]}: compiling {source}", flush=True)
            began = time.time()
            said = run(command, f"compiling {source}")
            files = digests(depends)
            if all(Path(name).stat().st_mtime < began for name in files):  # else: edited meanwhile
                state.write_text(json.dumps({"made_by": made_by, "files": files, "said": said}))
        return target

    def link(self, ext: Extension, objects: list[Path]) -> None:
        """The module, of its objects."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        linker = [find_nvcc() or "nvcc", "--cudart=static"] if ext.name in (CUDA, NVSHMEM) else find_cxx()
        strip = ["-Xlinker", "--strip-all"] if sys.platform == "linux" else []
        libraries = []
        if ext.name == NVSHMEM:
            libraries = [NVSHMEM_FLAGS[0], f"-L{find_nvshmem()}/lib", "-lnvshmem_device"]
        command = [*linker, "-shared", *strip, *map(str, objects), *libraries, "-o", str(target)]
        run(command, f"linking {ext.name}")


class LabelledEggInfo(egg_info):
    """Metadata with this build's local version, whatever setup.cfg says, which sdists come with."""

    def finalize_options(self) -> None:
        self.tag_build = os.environ.get("DEEPEP_LOCAL_VERSION") or self.tag_build
        super().finalize_options()


@cache
def version_of(compiler: str) -> str:
    """The words of `compiler --version`."""
    return subprocess.run([compiler, "--version"], text=True, capture_output=True).stdout


def run(command: list[str], what: str) -> str:
    """Runs a compiler and returns its words, ptxas's report among them; they are shown if it fails."""
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode != 0:
        sys.stderr.write(shlex.join(command) + "\n" + done.stdout + done.stderr)
        raise SystemExit(f"{what} failed")
    return done.stderr


def digests(depends: Path) -> dict[str, str]:
    """The files of this tree that a compiler has read, of its rule for make, and a digest of each."""
    words = depends.read_text().replace("\\\n", " ").partition(": ")[2].split()
    return {name: digest_of(name) for name in words if not Path(name).is_absolute()}


def digest_of(name: str) -> str:
    """Of a file; empty if it is not there."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def is_up_to_date(state: Path, made_by: list[str]) -> bool:
    """True if an object was made by these tools of these very files."""
    if not state.exists() or not state.with_suffix(".o").exists():
        return False
    known = json.loads(state.read_text())
    return known.get("made_by") == made_by and all(digest_of(n) == d for n, d in known["files"].items())


def extension(name: str, binding: str, *folders: str, suffix: str = ".cpp") -> Extension:
    """A module: its binding, and all sources under these folders."""
    sources = [str(p) for folder in folders for p in sorted((CSRC / folder).rglob(f"*{suffix}"))]
    return Extension(
        name,
        sources=[*sources, f"csrc/bindings/{binding}.cpp"],
        include_dirs=["csrc", pybind11.get_include()],
    )


def extensions() -> list[Extension]:
    wanted = [extension("deepep._core", "core", "layout")]
    if os.environ.get("DEEPEP_EMULATOR", "1") != "0":
        wanted.append(extension("deepep._emulator", "emulator", "emulator"))
    mode = os.environ.get("DEEPEP_CUDA", "auto")
    if mode == "0":
        return wanted
    if find_nvcc():
        wanted.append(extension(CUDA, "cuda", "kernels", "put_server", "virtual_ranks", suffix=".cu"))
        nvshmem = find_nvshmem()
        if nvshmem is None:
            print("deepep: no NVSHMEM found (nvidia-nvshmem-cu13); building without puts between domains")
        else:
            wanted.append(extension(NVSHMEM, "nvshmem", "nvshmem", suffix=".cu"))
            wanted[-1].include_dirs.append(str(nvshmem / "include"))
    elif mode == "1":
        raise SystemExit("DEEPEP_CUDA=1, and no nvcc was found (CUDA_HOME or PATH)")
    else:
        print("deepep: no nvcc found; building without CUDA kernels (CPU backends only)")
    return wanted


setup(
    packages=[
        *find_packages(include=["deepep", "deepep.*"]),
        *("deepep.reference", "deepep.sim"),
        *(f"deepep.sim.{name}" for name in find_packages("sim")),
    ],
    package_dir={"deepep": "deepep", "deepep.reference": "reference", "deepep.sim": "sim"},
    package_data={"deepep": ["py.typed", "*.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions, "egg_info": LabelledEggInfo},
)
