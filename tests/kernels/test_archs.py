"""Kernels compile for GPUs of three generations: of every folder the smallest, or what uses most of them.

Compute capability 9.0a is what the build compiles (setup.py), all of it. The compiler optimises little here,
since only ptxas's refusals are asked for: an instruction that a GPU of that generation does not have.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.nvcc import find_nvcc
from harness.sources import ROOT

CSRC = ROOT / "csrc"

UNITS = {
    "all_reduce": ("oneshot",),
    "barrier": ("barrier",),
    "combine": ("copy_engine",),
    "copy": ("bulk_copy",),
    "dispatch": ("cached",),
    "exchange": ("exchange_read",),
    "layout": ("layout",),
    "low_latency": ("combine_send", "dispatch_send"),
    "low_latency_far": ("combine_send",),
    "low_latency_rails": ("dispatch",),
    "ring": ("before_send",),
    "rows": ("cast_rows",),
    "two_level": ("dispatch_cached",),
}
ARCHS = ("sm_80", "sm_100a")
FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-Xcicc=-O1", "-Xptxas=-O0", "-cubin")


def test_every_folder_of_kernels_has_its_unit() -> None:
    folders = {source.parent.name for source in (CSRC / "kernels").rglob("*.cu")}
    assert folders <= set(UNITS)


def test_kernels_compile_for_other_generations(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc (CUDA_HOME or PATH)")
    source = tmp_path / "units.cu"
    names = [f"{folder}/{header}" for folder, headers in UNITS.items() for header in headers]
    source.write_text("".join(f'#include "kernels/{name}.hpp"\n' for name in names))

    def compile_for(arch: str) -> str:
        out = tmp_path / f"{arch}.cubin"
        command = [nvcc, *FLAGS, f"-arch={arch}", f"-I{CSRC}", str(source), "-o", str(out)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    with ThreadPoolExecutor(2) as pool:
        said = dict(zip(ARCHS, pool.map(compile_for, ARCHS), strict=True))
    assert not any("error" in words for words in said.values()), said
    assert all((tmp_path / f"{arch}.cubin").exists() for arch in ARCHS), said
