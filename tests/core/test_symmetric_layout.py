"""The high-throughput heap (csrc/core/symmetric_layout.hpp): every word, array and row has its own bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

# Prints "<region> <begin> <bytes>" for every piece of three structs, and their sizes as regions of their own.
LISTING = """
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include "core/symmetric_layout.hpp"
using namespace deepep::core;
void piece(const char* name, int64_t begin, int64_t bytes) {
  std::printf("%s %lld %lld\\n", name, (long long)begin, (long long)bytes);
}
int main(int, char** argv) {
  int a[5];
  for (int i = 0; i < 5; ++i) a[i] = std::atoi(argv[i + 1]);
  const int ranks = a[0], local = a[1], blocks = a[2], topk = a[3], scales = a[4];
  const ControlLayout control{ranks, local, blocks};
  const MailboxWords words{ranks};
  for (int s = 0; s < ranks; ++s) {
    for (uint32_t epoch = 0; epoch < 2; ++epoch) {
      const int64_t box = control.mailbox(s, epoch);
      for (int r = 0; r < ranks; ++r) piece("control", box + 8 * words.count(r), 8);
      for (int i = 0; i < kSlotArrays; ++i) piece("control", box + 8 * words.slot(i), 8);
      for (int w : {words.capacity(), words.push_blocks(), words.signature()}) {
        piece("control", box + 8 * w, 8);
      }
      for (int l = 0; l < local; ++l) piece("control", box + 8 * words.expert_count(l), 8);
    }
    for (int b = 0; b < blocks; ++b) piece("control", control.rows_done(s) + 4 * b, 4);
    piece("control", control.staging_free(s), 4);
    piece("control", control.arrived(s), 4);
    for (uint32_t epoch = 0; epoch < 2; ++epoch) piece("control", control.combine_digest(s, epoch), 8);
    piece("control", control.overwritten(s), 4);
  }
  piece("control_size", 0, control.bytes());
  const int64_t rows = 37, row_bytes = 48;
  const SlotLayout slot{rows, row_bytes, scales, topk, 8};
  piece("slot", slot.x(), rows * row_bytes);
  piece("slot", slot.source(), rows * 4);
  piece("slot", slot.scales(), rows * scales * 4);
  piece("slot", slot.topk_idx(), rows * topk * 8);
  piece("slot", slot.topk_weights(), rows * topk * 4);
  piece("slot_size", 0, slot.bytes());
  const int64_t area_bytes = 64 * 1024;
  const StagingLayout staging{area_bytes, row_bytes, topk};
  piece("staging", 0, staging.rows_begin());  // flags
  for (int64_t i = 0; i < staging.capacity(); ++i) {
    piece("staging", staging.row(i), row_bytes);
    if (topk > 0) piece("staging", staging.weights(i), 4 * topk);
  }
  piece("staging_size", 0, area_bytes);
}
"""


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("symmetric")
    source, program = folder / "listing.cpp", folder / "listing"
    source.write_text(LISTING)
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    done = subprocess.run([compiler, *flags, str(source), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize(
    "sizes",  # R, L, blocks, K, scales
    [(1, 1, 1, 0, 0), (2, 33, 132, 8, 56), (3, 1, 24, 1, 0), (8, 32, 132, 8, 0), (32, 2048, 1, 32, 7)],
    ids=str,
)
def test_pieces_do_not_overlap(listing: Path, sizes: tuple[int, ...]) -> None:
    done = subprocess.run([str(listing), *map(str, sizes)], capture_output=True, text=True, check=True)
    pieces: dict[str, list[tuple[int, int]]] = {}
    for line in done.stdout.splitlines():
        name, begin, size = line.split()
        pieces.setdefault(name, []).append((int(begin), int(size)))
    for region in ("control", "slot", "staging"):
        total = pieces[f"{region}_size"][0][1]
        used = sorted(piece for piece in pieces[region] if piece[1])
        assert used[0][0] >= 0
        assert used[-1][0] + used[-1][1] <= total
        for (begin, size), (following, _) in itertools.pairwise(used):
            assert begin + size <= following, f"{region}: [{begin}, {begin + size}) reaches into {following}"
        wide = [begin for begin, size in used if size >= 16]
        assert not any(begin % 16 for begin in wide), f"{region}: not aligned to 16 bytes"
