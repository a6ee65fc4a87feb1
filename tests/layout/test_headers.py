"""csrc/layout stands alone: no CUDA, no torch, no containers; each header compiles, for host and device."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
#: What answers the bindings on the host, with exceptions and vectors; all else may run in a kernel.
FOR_THE_HOST = {"check.hpp", "layout.hpp", "sizes.hpp"}
HEADERS = sorted(path for path in (CSRC / "layout").rglob("*.hpp") if path.name not in FOR_THE_HOST)
ALLOWED = {"<cstdint>", "<cstddef>", "<limits>", "<type_traits>"}

KERNEL = """
#include <cuda_runtime.h>
__global__ void lay_out(const int* topk, const unsigned char* in_rank, const int* counts, int* out,
                        int64_t* rows) {
  using namespace deepep::layout;
  const Placement place(64, 8, 8);
  const TokenSplit split{1000, gridDim.x};
  const long long begin = split.begin(blockIdx.x), end = split.end(blockIdx.x);
  int next = count_sent(in_rank, 8, 3, begin + threadIdx.x, end, blockDim.x);
  out[0] = is_first_of_rank(topk, 2, place) + is_first_of_domain(topk, 2, place) + take_next(true, next);
  out[1] = int(rank_mask(topk, 8, place)) + place.local_expert(topk[0], 1);
  rows[0] = first_row_of_source(CountMatrix{counts, 8}, 3, 1) + pack_range(1, 2);
  rows[1] = LowLatencyBuffer<int64_t>{8, 128, 7168, 8}.combine_slot(1, 2, 3);
  fill_send_rows(in_rank, 8, begin, end, rows, rows + 8);
  fill_expert_rows(topk, 8, begin, end, place, rows, rows + 64);
  fill_expanded_rows(topk, 8, begin, end, rows, rows + 64);
  fill_domain_positions(in_rank, begin, end, place, rows, reinterpret_cast<uint64_t*>(rows), out);
}
"""


def test_there_are_headers() -> None:
    assert {"arith.hpp", "placement.hpp", "rows.hpp"} <= {header.name for header in HEADERS}


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.name)
def test_header_includes_nothing_but_the_core(header: Path) -> None:
    text = header.read_text()
    included = re.findall(r'^\s*#\s*include\s*([<"][^>"]+[>"])', text, re.MULTILINE)
    foreign = {name for name in included if not name.startswith('"layout/')} - ALLOWED
    assert not foreign, f"{header.name} includes {foreign}"
    code = re.sub(r"//.*", "", text)
    for word in ("torch", "cuda_", "threadIdx", "std::vector", "std::span", "std::array", "new ", "throw"):
        assert word not in code, f"{header.name} uses {word}"


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: header.name)
def test_header_compiles_alone(header: Path, tmp_path: Path) -> None:
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header.relative_to(CSRC)}"\n')
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-fsyntax-only", f"-I{CSRC}"]
    done = subprocess.run([os.environ.get("CXX", "g++"), *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_a_kernel_calls_the_rules(tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text("".join(f'#include "{header.relative_to(CSRC)}"\n' for header in HEADERS) + KERNEL)
    flags = ["-std=c++20", "-arch=sm_90a", "-Werror=all-warnings", f"-I{CSRC}", "-ptx"]
    flags += ["-o", str(tmp_path / "k.ptx")]
    done = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lay_out" in (tmp_path / "k.ptx").read_text()
