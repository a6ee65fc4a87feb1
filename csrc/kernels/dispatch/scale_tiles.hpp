// Scales of expanded rows, where they lie by columns.
//
// Rows of an expert that follow each other are of tokens far apart and come at different times, and 4 bytes
// of a column are an eighth of the least that memory writes: each scale alone costs 32 bytes read and written.
// So a row leaves word of where its scales lie, and who brings the last row of a tile writes those of all, a
// column of the tile at a time. Nobody waits.
#pragma once

#include "kernels/dispatch/row_fields.hpp"

namespace deepep::kernels {

inline constexpr int kTileRows = dev::kWarpSize;
inline constexpr int kTileColumns = 4;  // scales of a row that a lane has in flight; 8 spill

/// Rows of an expert that follow each other, the nth kTileRows of them; of no other expert.
struct ScaleTile {
  int number;  // no other tile's
  int begin;   // its first row
  int rows;
};

[[nodiscard]] DEEPEP_DEVICE ScaleTile tile_of(const DispatchArgs& args, int expert, int row) {
  const NumberingShared shared = NumberingShared::of(args, dev::num_warps());
  const int first = dev::SharedArray<int32_t>(shared.begins()).get(expert);
  const int last = first + dev::SharedArray<int32_t>(shared.entries()).get(expert);
  const int nth = (row - first) / kTileRows;
  const int begin = first + nth * kTileRows;
  const int end = static_cast<int>(layout::min_of(int64_t{last}, args.expanded.capacity));
  return {.number = first / kTileRows + expert + nth,
          .begin = begin,
          .rows = layout::min_of(end - begin, kTileRows)};
}

/// The rows of a column of scales.
[[nodiscard]] DEEPEP_DEVICE int64_t rows_of_column(const DispatchArgs& args) {
  const NumberingShared shared = NumberingShared::of(args, dev::num_warps());
  const int64_t known = dev::SharedArray<int32_t>(shared.num_rows()).get(0);
  return layout::align_up(args.host == nullptr ? args.expanded.capacity : known, 4);
}

/// The scales of a tile's rows, which have all come. One warp, a row a lane.
DEEPEP_DEVICE void write_tile(const DispatchArgs& args, int begin, int rows) {
  using namespace dev;
  const ExpandedRows& to = args.expanded;
  if (lane() >= rows) return;
  const int32_t origin = dev::load(to.origins + begin + lane());
  const uint32_t* from = args.scales + ~int64_t{origin} * args.scale_strides.row;
  int64_t step = args.scale_strides.column;
  if (origin >= 0) {
    from = recv_array<uint32_t>(args, args.group.rank, layout::kSlotScales) + int64_t{origin} * args.num_scales;
    step = 1;
  }
  const int64_t column = rows_of_column(args);
  uint32_t* target = to.scales + begin + lane();
#pragma unroll 1
  for (int left = args.num_scales; left > 0; left -= kTileColumns) {
    uint32_t scales[kTileColumns];
#pragma unroll
    for (int i = 0; i < kTileColumns; ++i, from += step)
      if (i < left) scales[i] = dev::load(from);
#pragma unroll
    for (int i = 0; i < kTileColumns; ++i, target += column)
      if (i < left) store(target, scales[i]);
  }
}

/// Lanes with an expanded row (`row`, else -1), of `expert`: its scales lie at `origin`, a received row's
/// number, or ~t for this rank's token t. One warp.
DEEPEP_DEVICE void bring_scales(const DispatchArgs& args, int expert, int row, int32_t origin) {
  using namespace dev;
  const ExpandedRows& to = args.expanded;
  ScaleTile tile{};
  bool is_last = false;
  if (row >= 0) {
    tile = tile_of(args, expert, row);
    store(to.origins + row, origin);
    // Release: the origin, and the received scales, which this warp has seen. Acquire: those of all others.
    const uint32_t before = fetch_add<acq_rel, gpu_scope>(to.tiles + tile.number, 1u);
    is_last = static_cast<int>(before) + 1 == tile.rows;
  }
  sync_warp();
#pragma unroll 1
  for (uint32_t left = ballot(is_last); left != 0; left &= left - 1) {
    const int k = lowest_bit(left);
    write_tile(args, shuffle(tile.begin, k), shuffle(tile.rows, k));
    sync_warp();
  }
}

}  // namespace deepep::kernels
