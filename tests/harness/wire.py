"""Programs in C++ that are ranks on the wire without a NIC, and NVSHMEM's plug-ins to run on it."""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
from pathlib import Path

from deepep.sim.links import loopverbs

NVSHMEM, VERSION = "nvidia-nvshmem-cu13", "3.4.5"


def build(source: Path, out: Path, *libraries: str) -> Path:
    """The program of `source`, compiled to `out`."""
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
    command += [f"-I{loopverbs.SOURCES.parent}", f"-I{source.parent}", str(source), *libraries]
    done = subprocess.run([*command, "-o", str(out), "-ldl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def why_no_nvshmem() -> str:
    """The reason why NVSHMEM's libraries of the version that tests know are not here; empty: they are."""
    try:
        found = importlib.metadata.version(NVSHMEM)
    except importlib.metadata.PackageNotFoundError:
        return f"{NVSHMEM}=={VERSION} is not installed (extra `wire`)"
    return "" if found == VERSION else f"{NVSHMEM}: {found} is installed; its ABI was read off {VERSION}"


def nvshmem_library(name: str) -> Path:
    """A file in the wheel's folder of libraries."""
    wheel = importlib.metadata.distribution(NVSHMEM)
    return Path(str(wheel.locate_file(f"nvidia/nvshmem/lib/{name}")))
