"""The high-throughput heap (layout/symmetric_layout.hpp): every word, array and row has its own bytes."""

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
#include "layout/symmetric_layout.hpp"
using namespace deepep::layout;
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
      for (int w : {words.capacity(), words.push_blocks(), words.digest()}) {
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


# Fails where an item is not what a division says, or where the parts of a row leave a piece out or share one.
PARTS = """
#include <cstdio>
#include "layout/symmetric_layout.hpp"
using namespace deepep::layout;
int main() {
  for (uint32_t count = 1; count <= StagingLayout::kParts; ++count) {
    const Parts parts(count);
    for (uint64_t n = 0; n < 0x80000000u; n += n < 100000 || n > 0x7fff0000u ? 1 : 1009) {
      const uint32_t item = uint32_t(n);
      if (parts.row_of(item) != item / count || parts.part_of(item) != item % count) {
        std::printf("item %u of %u parts\\n", item, count);
        return 1;
      }
    }
    for (int pieces = 0; pieces < 2000; ++pieces)
      for (uint32_t part = 0; part < count; ++part) {
        const int begin = parts.begin(pieces, part), end = parts.begin(pieces, part + 1);
        const bool joins = part > 0 || begin == 0;
        const bool is_last = part == count - 1;
        const bool ends = parts.is_last(part) == is_last && (!is_last || end == pieces);
        if (!joins || !ends || end < begin || end - begin > pieces / int(count) + 1) {
          std::printf("part %u of %u of %d pieces\\n", part, count, pieces);
          return 1;
        }
      }
  }
}
"""


def compiled(folder: Path, source: str) -> Path:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip("no C++ compiler")
    (folder / "program.cpp").write_text(source)
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    command = [compiler, *flags, str(folder / "program.cpp"), "-o", str(folder / "program")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program"


def test_parts_of_rows(tmp_path: Path) -> None:
    done = subprocess.run([str(compiled(tmp_path, PARTS))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def listing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("symmetric"), LISTING)


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
