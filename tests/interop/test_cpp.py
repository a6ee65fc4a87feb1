"""The C++ interface: its example by a compiler alone gives Python's layouts and bytes; its CMake package."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from deepep import _core

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cpp" / "layout.cpp"
CASES = 1000


def routing(number: int) -> tuple[list[int], int, int, int]:
    """Entries [T, K] of one rank; K, E, R."""
    dice = random.Random(number)
    num_topk, num_ranks = dice.randint(1, 6), dice.choice([1, 2, 3, 8, 32])
    num_experts = num_ranks * dice.randint(1, 4)
    size = num_topk * dice.choice([0, 1, 7, 33])
    return [dice.randint(-1, num_experts - 1) for _ in range(size)], num_topk, num_experts, num_ranks


def by_python(entries: list[int], num_topk: int, num_experts: int, num_ranks: int) -> list[list[int]]:
    """Tokens per rank and per expert, rows of the last rank's tokens, and the entries' FP8 message."""
    topk_idx = np.array(entries, dtype=np.int64).reshape(-1, num_topk)
    ranks, domains = np.zeros(num_ranks, np.int32), np.zeros(1, np.int32)
    experts = np.zeros(num_experts, np.int32)
    marks = np.zeros((len(topk_idx), num_ranks), bool)
    _core.dispatch_layout(topk_idx, num_experts, num_ranks, num_ranks, ranks, domains, experts, marks)
    rows = np.zeros(marks.shape, np.int64)
    _core.send_rows(marks, (num_ranks - 1) * ranks.astype(np.int64), 1, rows)
    values = (np.array(entries, dtype=np.float32) / np.float32(3)).astype(np.float32)
    message = np.zeros(_core.gradient_message_bytes("fp8", len(values)), np.uint8)
    _core.encode_gradients("fp8", values, message, True, (0, 0), 0)
    return [array.flatten().tolist() for array in (ranks, experts, rows, message)]


def check_output(program: Path) -> None:
    cases = [routing(number) for number in range(CASES)]
    lines = [f"{k} {e} {r} {len(entries)} {' '.join(map(str, entries))}" for entries, k, e, r in cases]
    printed = subprocess.run(
        [program], input="\n".join(lines), text=True, check=True, stdout=subprocess.PIPE, timeout=60
    ).stdout.splitlines()
    assert len(printed) == 4 * CASES
    for number, case in enumerate(cases):
        found = [list(map(int, line.split()[1:])) for line in printed[4 * number :][:4]]
        assert found == by_python(*case), (number, case)


# Layouts that no call has made, each to be refused by its last argument's check.
REFUSED = """
#include <cstdio>
#include "deepep/deepep.hpp"
int main() {
  const deepep::DispatchLayout odd{{1, 1}, {}, {}, {1, 1, 1}}, good{{1, 1}, {}, {}, {1, 1}};
  const std::vector<int64_t> first{0, 0}, none;
  for (const auto& [layout, rows] : {std::pair{deepep::DispatchLayout{}, none}, {odd, first}, {good, none}}) {
    try {
      (void)deepep::send_rows(layout, rows);
      std::puts("taken");
    } catch (const std::invalid_argument& error) {
      std::puts(error.what());
    }
  }
}
"""


def compiled(source: Path, folder: Path, rules: str = "*.cpp") -> Path:
    """The program of a source, built with the rules (by pattern) by a compiler alone."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = folder / source.stem
    sources = [source, *sorted((ROOT / "csrc" / "layout" / "rules").glob(rules))]
    flags = ["-std=c++20", "-O0", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run(
        [compiler, *flags, f"-I{ROOT}/include", f"-I{ROOT}/csrc", *sources, "-o", program], check=True
    )
    return program


def test_the_example_builds_with_a_compiler_alone(tmp_path: Path) -> None:
    check_output(compiled(EXAMPLE, tmp_path))


def test_layouts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "refused.cpp"
    source.write_text(REFUSED)
    printed = subprocess.run(
        [compiled(source, tmp_path, "layout.cpp")], text=True, check=True, stdout=subprocess.PIPE, timeout=60
    ).stdout.splitlines()
    assert [line.partition(":")[0] for line in printed] == ["layout", "layout", "first_rows"]


@pytest.mark.slow
def test_the_example_finds_the_installed_package(tmp_path: Path) -> None:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("no cmake")
    if not (shutil.which("make") or shutil.which("ninja")):
        pytest.skip("cmake has nothing to build with")

    def build(source: Path, name: str, *options: str) -> Path:
        where = tmp_path / name
        quiet = {"check": True, "stdout": subprocess.DEVNULL}
        settings = ["-DCMAKE_CXX_FLAGS=-O0", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"]
        subprocess.run([cmake, "-S", source, "-B", where, *settings, *options], **quiet)
        subprocess.run([cmake, "--build", where, "-j2"], **quiet)
        return where

    library = build(ROOT, "library", f"-DCMAKE_INSTALL_PREFIX={tmp_path / 'prefix'}")
    subprocess.run([cmake, "--install", library], check=True, stdout=subprocess.DEVNULL)
    check_output(build(EXAMPLE.parent, "example") / "layout")
