// Sums over the columns of bf16 attention with VDPBF16PS, on AMX machines too.
//
//   sums_j = sum_i exp2(q'_i . k_j * key_scale[j] - lse_i * log2(e)),  q' and key_scale as in attention_bf16.h
//
// The queries of a head are packed once, as the forward packs keys, so that a score has the bits it had there on
// VDPBF16PS. A unit is a strip of 12 keys, whose scores with 32 queries become probabilities, and are added up, in the
// registers they were summed in.
#pragma once

#include "cpu/ops/attention_bf16.h"
#include "cpu/ops/attention_column_sums.h"
#include "cpu/simd/vdpbf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kColumnSumsHeadDim = 128;  // the largest
constexpr float kNoQuery = 1e4f;             // the shift of what stands beyond the last query: its probability is 0

struct ColumnSumsBf16Scratch {
  bf16* queries;     // B tiles [group][2][D / 32]
  float* shift;      // [groups * 32]: lse * log2(e)
  bf16* rows;        // [16][D / 32 * 32], q' before it is packed
  bf16* keys;        // [12][128]
  float* key_scale;  // [12]
  float* sums;       // [12][16 lanes]
  int64_t groups, depth, bytes;
  ColumnSumsBf16Scratch(ScratchArena arena, int64_t tokens, int64_t head_dim) {
    groups = (tokens + kGroup - 1) / kGroup;
    depth = (head_dim + 31) / 32;
    queries = arena.take<bf16>(groups * 2 * depth * kTile);
    shift = arena.take<float>(groups * kGroup);
    rows = arena.take<bf16>(16 * depth * 32);
    keys = arena.take<bf16>(kVdpbf16Rows * kColumnSumsHeadDim);
    key_scale = arena.take<float>(kVdpbf16Rows);
    sums = arena.take<float>(kVdpbf16Rows * kLanes);
    bytes = arena.used;
  }
};

inline void column_sums_pack_queries_bf16(const AttentionColumnSumsParams& p, const ColumnSumsBf16Scratch& s, int64_t b,
                                          int64_t h) {
  const float* lse = p.lse + (b * p.heads + h) * p.row_stride;
  for (int64_t n = 0; n < s.groups * kGroup; ++n) s.shift[n] = n < p.tokens ? lse[n] * kLog2E : kNoQuery;
  for (int64_t half = 0; half < s.groups * 2; ++half) {
    const int64_t first = half * 16, rows = min_of(16, p.tokens - first);
    for (int64_t i = 0; i < rows; ++i) fold_query(p, b, h, first + i, s.depth, s.rows + i * s.depth * 32, 32);
    for (int64_t d = 0; d < s.depth; ++d)
      pack_columns(s.rows + d * 32, s.depth * 32, rows, 32, s.queries + (half * s.depth + d) * kTile);
  }
}

inline void column_sums_strip_bf16(const AttentionColumnSumsParams& p, const ColumnSumsBf16Scratch& s, int64_t b,
                                   int64_t h, int64_t first, int64_t rows) {
  for (int64_t i = 0; i < kVdpbf16Rows; ++i) {
    bf16* key = s.keys + i * kColumnSumsHeadDim;
    s.key_scale[i] = 0;
    no_query(s.depth, key, 32);
    if (i >= rows) continue;
    __builtin_memcpy(key, token<bf16>(p.k, b, first + i, h), size_t(p.head_dim) * sizeof(bf16));
    s.key_scale[i] = p.rstd_k ? p.rstd_k[b * p.tokens + first + i] : p.scale * kLog2E;
  }
  __builtin_memset(s.sums, 0, sizeof(float) * kVdpbf16Rows * kLanes);
  for (int64_t g = 0; g < s.groups; ++g) {
    const bf16* queries = s.queries + g * 2 * s.depth * kTile;
    Vdpbf16Block block;
    block.zero();
    for (int64_t d = 0; d < s.depth; ++d)
      block.add<kColumnSumsHeadDim, 2, 32>(s.keys + d * 32, queries + d * kTile, queries + (s.depth + d) * kTile, 16);
    const Vec left_shift = load(s.shift + g * kGroup), right_shift = load(s.shift + g * kGroup + 16);
#pragma GCC unroll 12
    for (int i = 0; i < kVdpbf16Rows; ++i) {
      const Vec scale = broadcast(s.key_scale[i]);
      const Vec left = {_mm512_fmsub_ps(block.acc[i][0], scale.v, left_shift.v)};
      const Vec right = {_mm512_fmsub_ps(block.acc[i][1], scale.v, right_shift.v)};
      float* sum = s.sums + i * kLanes;
      store(sum, load(sum) + (exp2_bf16(at_most_zero(left)) + exp2_bf16(at_most_zero(right))));
    }
  }
  float* sums = p.sums + (b * p.heads + h) * p.row_stride + first;
  for (int64_t i = 0; i < rows; ++i) sums[i] = sum(load(s.sums + i * kLanes));
}

void attention_column_sums_bf16(const AttentionColumnSumsParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16 || p.head_dim > kColumnSumsHeadDim) return attention_column_sums(p, executor);
  const int64_t bytes = ColumnSumsBf16Scratch(ScratchArena{nullptr}, p.tokens, p.head_dim).bytes;
  const auto run = [](const AttentionColumnSumsParams& image, void* memory, int64_t begin, int64_t end) {
    const ColumnSumsBf16Scratch s(ScratchArena{static_cast<char*>(memory)}, image.tokens, image.head_dim);
    for_strips<kVdpbf16Rows>(
        begin, end, image.heads, image.tokens,
        [&](int64_t b, int64_t h) { column_sums_pack_queries_bf16(image, s, b, h); },
        [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
          column_sums_strip_bf16(image, s, b, h, first, rows);
        });
  };
  for_images<kVdpbf16Rows>(p, executor, bytes, run);
}

}  // namespace internvit::INTERNVIT_ISA
