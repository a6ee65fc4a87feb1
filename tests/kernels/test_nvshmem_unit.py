"""Compile what puts over NVSHMEM, where its headers are (extra `wire`): builds leave it out elsewhere."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
from harness.nvcc import find_nvcc
from harness.sources import ROOT

FLAGS = (
    "-std=c++20",
    "--expt-relaxed-constexpr",
    "-Xcicc=-O1",
    "-Xptxas=-O0",
    "-w",
    "-rdc=true",
    "-arch=sm_90",
)


def test_it_compiles(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc (CUDA_HOME or PATH)")
    package = importlib.util.find_spec("nvidia")
    places = [] if package is None else list(package.submodule_search_locations or ())
    found = [place for place in places if (Path(place) / "nvshmem" / "include" / "nvshmem.h").exists()]
    if not found:
        pytest.skip("no nvidia-nvshmem-cu13, whose headers it takes")
    headers = Path(found[0]) / "nvshmem" / "include"
    source, out = ROOT / "csrc/nvshmem/serve.cu", tmp_path / "serve.o"
    command = [nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{headers}", "-dc", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.exists()
