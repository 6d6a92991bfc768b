// The frozen launch rule: which threads hold a row of C channels, and how many blocks work on the rows. It depends on
// the width and the residual's dtype, never on the number of rows, so that a row has the same bits in any batch; nor on
// the branch's dtype, so that a float32 residual beside a 16-bit branch is summed in the order of the norm of float32.
//
// A thread holds `vectors` vectors, 16 bytes of the residual each, `lanes` threads a row. Reductions go through groups
// of 16 or 32 lanes, so lanes is a multiple of 16: 3200 bf16 channels are 400 vectors, 80 threads of 5, two rows in
// five whole warps, no lane idle; a power of two would idle 22 % of them. 1024 are 128 vectors: one warp of 4, four
// rows a block, and no shared memory at all. No GPU has run this rule: it minimises idle lanes, then the number of
// threads that must meet.
#pragma once

#include <cstdint>

namespace internvit::cuda {

// Vectors a thread may hold: THE list of instantiations, by the residual's dtype.
#define INTERNVIT_VECTORS_16_BIT(X) X(1) X(4) X(5)
#define INTERNVIT_VECTORS_32_BIT(X) X(1) X(5) X(8)

constexpr int kMaxThreads = 256;  // a block; leaves a thread 255 registers, of which backward needs up to 249
constexpr int kRowThreads = 128;  // rows are added to a block up to this many
constexpr int kMaxSharingLanes = kMaxThreads / 2;  // a block of several rows has at most this many lanes a row

struct RowLaunch {
  int vectors;
  int lanes;
  int rows;  // of a block
};

// `width`: elements of a vector (`kWidth` of rows.cuh).
constexpr RowLaunch row_launch(int64_t channels, int width) {
  constexpr int kLadder[2][3] = {
#define INTERNVIT_ENTRY(V) V,
      {INTERNVIT_VECTORS_16_BIT(INTERNVIT_ENTRY)}, {INTERNVIT_VECTORS_32_BIT(INTERNVIT_ENTRY)}
#undef INTERNVIT_ENTRY
  };
  const int64_t needed = (channels + width - 1) / width;
  RowLaunch best = {0, 0, 0};
  for (const int vectors : kLadder[width == 4]) {
    int64_t lanes = ((needed + vectors - 1) / vectors + 15) / 16 * 16;
    if (lanes > kMaxSharingLanes) lanes = (lanes + 31) / 32 * 32;  // alone in its block: whole warps
    if (lanes > kMaxThreads) continue;
    if (best.vectors && lanes * vectors > int64_t(best.lanes) * best.vectors) continue;
    best = {vectors, int(lanes), 1};
  }
  if (best.lanes == 0 || best.lanes > kMaxSharingLanes) return best;
  best.rows = kRowThreads / best.lanes > 1 ? kRowThreads / best.lanes : 1;
  if (best.lanes * best.rows % 32) ++best.rows;  // whole warps: a shuffle names all 32 lanes
  return best;
}

// Backward's blocks walk over the rows: as many as the device holds at a time (`resident_blocks` of kernels.h), and at
// least two tiles of rows for each, since the partial sums of a block cost as much traffic as a row of float32.
constexpr int64_t backward_programs(int64_t rows, const RowLaunch& launch, int64_t resident) {
  const int64_t tiles = (rows + launch.rows - 1) / launch.rows, wanted = (tiles + 1) / 2;
  return wanted < resident ? wanted : resident;
}

// Whether accesses of `bytes` may be used at p and every `stride` bytes from there; a null pointer is not read at all.
inline bool is_aligned(const void* p, int64_t stride, int64_t bytes = 16) {
  return !p || (reinterpret_cast<uintptr_t>(p) | uintptr_t(stride)) % uintptr_t(bytes) == 0;
}

}  // namespace internvit::cuda
