"""Forms of a kernel that record time lines cost the others nothing: what records is in no other's code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from harness.nvcc import find_nvcc
from harness.sources import ROOT


def entries_of(ptx: str) -> dict[str, str]:
    """The bodies of kernels in a file of PTX, by mangled name."""
    parts = re.split(r"\.visible \.entry (\w+)\(", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_only_what_records_asks_for_its_sm(tmp_path: Path) -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc (CUDA_HOME or PATH)")
    out = tmp_path / "combine.ptx"
    csrc = ROOT / "csrc"
    source = csrc / "kernels" / "combine" / "combine.cu"
    flags = ["-std=c++20", "--expt-relaxed-constexpr", "-arch=compute_90a", f"-I{csrc}"]
    subprocess.run([nvcc, *flags, "-ptx", str(source), "-o", str(out)], check=True)
    found = entries_of(out.read_text())
    assert len(found) == 6
    for name, body in found.items():
        assert ("%smid" in body) == ("_recorded" in name), name
