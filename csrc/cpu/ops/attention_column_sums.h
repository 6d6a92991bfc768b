// Sums over the columns of attention in float32 arithmetic, for every dtype, head dimension and instruction set (bf16:
// attention_column_sums_bf16.h).
//
//   sums_j = sum_i 2^(q'_i . k'_j - lse_i * log2(e)),  q' and k' as in attention.h
//
// The forward's roles are swapped: a task packs the queries of a head, and a unit of work is a strip of keys, which
// walks over all queries in order. No sum crosses threads: the bits are those of any number of threads.
#pragma once

#include "cpu/ops/attention.h"

namespace internvit::INTERNVIT_ISA {

INTERNVIT_INLINE AttentionColumnSumsParams sequence_of(const AttentionColumnSumsParams& p, int64_t sequence) {
  const int64_t start = p.cu_seqlens[sequence];
  AttentionColumnSumsParams image = p;
  image.batch = 1;
  image.keys = image.tokens = p.cu_seqlens[sequence + 1] - start;
  image.cu_seqlens = nullptr;
  advance(image.q, p.dtype, start);
  advance(image.k, p.dtype, start);
  if (p.q_weight) image.rstd_q += start, image.rstd_k += start;
  image.lse += start;
  image.sums += start;
  return image;
}

// A probability is at most 1, but lse's rounding is a factor of it: at |lse| = 10^9 one of 2^64.
INTERNVIT_INLINE Vec at_most_zero(Vec exponent) { return min(broadcast(0.0f), exponent); }  // NaN stays

struct ColumnSumsScratch {
  float *queries, *shift, *keys, *scores, *query;
  int64_t bytes;
  ColumnSumsScratch(void* memory, int64_t tokens, int64_t head_dim) {
    const int64_t columns = round_up(tokens, kLanes), dims = round_up(head_dim, kLanes);
    ScratchArena arena{static_cast<char*>(memory)};
    queries = arena.take<float>(dims * round_up(columns, kPanelColumns));
    shift = arena.take<float>(columns);
    keys = arena.take<float>(kStrip * dims);
    scores = arena.take<float>(kStrip * columns);
    query = arena.take<float>(dims);
    bytes = arena.used;
  }
};

template <class T>
void column_sums_pack_queries(const AttentionColumnSumsParams& p, const ColumnSumsScratch& s, int64_t b, int64_t h) {
  const int64_t columns = round_up(p.tokens, kLanes), dims = round_up(p.head_dim, kLanes);
  const float* lse = p.lse + (b * p.heads + h) * p.row_stride;
  for (int64_t n = 0; n < p.tokens; ++n) {
    load_query<T>(p, b, h, n, dims, s.query);
    store_column(s.query, dims, n, s.queries);
    s.shift[n] = lse[n] * kLog2E;
  }
  for (int64_t n = p.tokens; n < columns; ++n) store_column(nullptr, dims, n, s.queries);
}

template <class T>
void column_sums_strip(const AttentionColumnSumsParams& p, const ColumnSumsScratch& s, int64_t b, int64_t h,
                       int64_t first, int64_t rows) {
  const int64_t columns = round_up(p.tokens, kLanes), dims = round_up(p.head_dim, kLanes);
  for (int64_t i = 0; i < rows; ++i) {
    const float rstd = p.rstd_k ? p.rstd_k[b * p.tokens + first + i] : 1.0f;
    load_token(token<T>(p.k, b, first + i, h), nullptr, rstd, p.head_dim, dims, s.keys + i * dims);
  }
  multiply(rows, columns, p.head_dim, {s.keys, dims, 1}, panels(s.queries, dims), s.scores, columns, false);
  float* sums = p.sums + (b * p.heads + h) * p.row_stride + first;
  for (int64_t i = 0; i < rows; ++i) {
    float* scores = s.scores + i * columns;
    for_lanes(p.tokens, INTERNVIT_BODY(c, lanes, u) {
      store(scores + c, at_most_zero(load(scores + c, lanes) - load(s.shift + c, lanes)), lanes);
    });
    sums[i] = exponentials(scores, p.tokens, [](Vec x) __attribute__((always_inline)) { return x; });
  }
}

void attention_column_sums(const AttentionColumnSumsParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, {
    const int64_t bytes = ColumnSumsScratch(nullptr, p.tokens, p.head_dim).bytes;
    const auto run = [](const AttentionColumnSumsParams& image, void* memory, int64_t begin, int64_t end) {
      const ColumnSumsScratch s(memory, image.tokens, image.head_dim);
      for_strips(
          begin, end, image.heads, image.tokens,
          [&](int64_t b, int64_t h) { column_sums_pack_queries<T>(image, s, b, h); },
          [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
            column_sums_strip<T>(image, s, b, h, first, rows);
          });
    };
    for_images<kStrip>(p, executor, bytes, run);
  });
}

}  // namespace internvit::INTERNVIT_ISA
