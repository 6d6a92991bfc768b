// Attention in float32 arithmetic, for every dtype, head dimension and instruction set (bf16: attention_bf16.h).
//
//   out = softmax(q' k'^T) v,  q' = q * rstd_q * q_weight * k_weight * scale * log2(e),  k' = k * rstd_k   (base 2)
//
// A unit of work is a strip of queries of one head. A task packs K and V of a head as float32 once, then runs its
// strips: scores of the strip over all keys, softmax in place, product with V. No running maximum: the strip is in
// cache. Queries are columns in both products, S^T = K' Q'^T and out^T = V^T P^T: their right operand stays in L1, the
// left one is a stream, softmax has no sum across lanes, and a query's bits do not depend on its neighbours.
#pragma once

#include "cpu/simd/loops.h"

namespace internvit::INTERNVIT_ISA {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// Rows and vectors of one block of accumulators: as many as the registers hold.
#if defined(__AVX512F__)
constexpr int kBlockRows = 8, kBlockVectors = 2;
#elif defined(__AVX2__)
constexpr int kBlockRows = 6, kBlockVectors = 1;
#else
constexpr int kBlockRows = 2, kBlockVectors = 1;
#endif

// A matrix whose element (i, k) stands at data[i * row + k * depth].
struct Factor {
  const float* data;
  int64_t row, depth;
};

// The terms are summed first, then added to c: the error of one chain of additions grows with its length (attention
// over 4097 keys: 1.2e-6 by one chain, 4e-7 by blocks of kBlockDepth). A stream of depth * kRows floats is prefetched
// meanwhile, if there is one.
template <int kRows, int kVectors, bool kStream = false>
INTERNVIT_INLINE void multiply_block(int64_t depth, Factor a, const float* b, int64_t ldb, float* c, int64_t ldc,
                                     bool accumulate, const float* stream = nullptr) {
  Vec acc[kRows][kVectors];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) acc[i][j] = broadcast(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVectors];
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * ldb + j * kLanes);
    if constexpr (kStream) __builtin_prefetch(stream + k * kRows);
    for (int i = 0; i < kRows; ++i) {
      const Vec left = broadcast(a.data[i * a.row + k * a.depth]);
      for (int j = 0; j < kVectors; ++j) acc[i][j] = fma(left, row[j], acc[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) {
      float* const o = c + i * ldc + j * kLanes;
      store(o, accumulate ? load(o) + acc[i][j] : acc[i][j]);
    }
}

// All rows of a few vectors of columns.
template <int kVectors>
INTERNVIT_INLINE void multiply_columns(int64_t rows, int64_t depth, Factor a, const float* b, int64_t ldb, float* c,
                                       int64_t ldc, bool accumulate) {
  const auto from = [&](int64_t row) { return Factor{a.data + row * a.row, a.row, a.depth}; };
  int64_t i = 0;
  for (; i + kBlockRows <= rows; i += kBlockRows)
    multiply_block<kBlockRows, kVectors>(depth, from(i), b, ldb, c + i * ldc, ldc, accumulate);
  for (constexpr int kHalf = kBlockRows / 2; i + kHalf <= rows; i += kHalf)
    multiply_block<kHalf, kVectors>(depth, from(i), b, ldb, c + i * ldc, ldc, accumulate);
  for (; i < rows; ++i) multiply_block<1, kVectors>(depth, from(i), b, ldb, c + i * ldc, ldc, accumulate);
}

constexpr int64_t kBlockDepth = 128;  // of 32 columns 16 KiB, which stay in L1 while all rows pass by
constexpr int64_t kPanelColumns = 32;

// A matrix whose element (k, j) stands at data[j / 32 * panel + k * row + j % 32]: rows one after another, or panels of
// 32 columns, of which 64 depths lie on 2 pages instead of 64.
struct Columns {
  const float* data;
  int64_t row, panel;
};

INTERNVIT_INLINE Columns row_major(const float* data, int64_t row) { return {data, row, kPanelColumns}; }
INTERNVIT_INLINE Columns panels(const float* data, int64_t depth) {
  return {data, kPanelColumns, depth * kPanelColumns};
}

// Writes a token's head as column n of `depth` deep panels.
INTERNVIT_INLINE void store_column(const float* head, int64_t depth, int64_t n, float* out) {
  out += n / kPanelColumns * depth * kPanelColumns + n % kPanelColumns;
  for (int64_t d = 0; d < depth; ++d) out[d * kPanelColumns] = head ? head[d] : 0.0f;
}

// c [rows, cols] (+)= a [rows, depth] b [depth, cols]; cols is a multiple of 16. Blocks of kBlockDepth terms are
// summed and added in the order of depth.
void multiply(int64_t rows, int64_t cols, int64_t depth, Factor a, Columns b, float* c, int64_t ldc, bool accumulate) {
  int64_t k = 0;
  do {
    const int64_t step = min_of(kBlockDepth, depth - k);
    const Factor left{a.data + k * a.depth, a.row, a.depth};
    const auto right = [&](int64_t j) { return b.data + j / kPanelColumns * b.panel + k * b.row + j % kPanelColumns; };
    const bool add = accumulate || k > 0;
    int64_t j = 0;
    for (; j + kBlockVectors * kLanes <= cols; j += kBlockVectors * kLanes)
      multiply_columns<kBlockVectors>(rows, step, left, right(j), b.row, c + j, ldc, add);
    for (; j < cols; j += kLanes) multiply_columns<1>(rows, step, left, right(j), b.row, c + j, ldc, add);
    k += step;
  } while (k < depth);
}

template <class T>
INTERNVIT_INLINE const T* token(const HeadsView& x, int64_t b, int64_t n, int64_t h) {
  return static_cast<const T*>(x.data) + b * x.stride_b + n * x.stride_n + h * x.stride_h;
}

// One token's head as float32, times weight where one is given, times factor; zero up to `padded`.
template <class T>
INTERNVIT_INLINE void load_token(const T* x, const float* weight, float factor, int64_t head_dim, int64_t padded,
                                 float* out) {
  const Vec f = broadcast(factor);
  for_lanes(head_dim, INTERNVIT_BODY(d, lanes, u) {
    const Vec value = load(x + d, lanes) * f;
    store(out + d, weight ? value * load(weight + d, lanes) : value, lanes);
  });
  for (int64_t d = head_dim; d < padded; ++d) out[d] = 0;
}

struct ScratchArena {  // hands out 64-byte aligned pieces of a task's scratch; with null it only counts
  char* next;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = next ? reinterpret_cast<T*>(next + used) : nullptr;
    used += round_up(count * int64_t(sizeof(T)), 64);
    return piece;
  }
};

constexpr int64_t kStrip = 64;  // rows of the strips of backward and of column sums, each of which reads a head once

INTERNVIT_INLINE float row_maximum(const float* scores, int64_t n) {
  const int64_t full = n / kLanes * kLanes;
  float m = scores[0];
  if (full) {
    Vec top = load(scores);
    for (int64_t c = kLanes; c < full; c += kLanes) top = max(top, load(scores + c));
    m = max_lane(top);
  }
  for (int64_t c = full; c < n; ++c) m = scores[c] > m ? scores[c] : m;
  return m;
}

// Scores to 2^exponent(score) in place; returns the sum.
template <class Exponent>
INTERNVIT_INLINE float exponentials(float* scores, int64_t n, const Exponent& exponent) {
  const int64_t full = n / kLanes * kLanes;
  Sum total;
  for_lanes(full, INTERNVIT_BODY(c, lanes, u) {
    const Vec p = exp2_float32(exponent(load(scores + c, lanes)));
    store(scores + c, p, lanes);
    total.part[u] = total.part[u] + p;
  });
  float tail = 0;
  if (full < n) {
    store(scores + full, exp2_float32(exponent(load(scores + full, n - full))), n - full);
    for (int64_t c = full; c < n; ++c) tail += scores[c];
  }
  return total.total() + tail;
}

// q' of one token as float32, zero up to `padded`.
template <class T, class Params>
INTERNVIT_INLINE void load_query(const Params& p, int64_t b, int64_t h, int64_t n, int64_t padded, float* out) {
  const int64_t d = p.head_dim;
  const float factor = p.scale * kLog2E;
  if (!p.q_weight) return load_token(token<T>(p.q, b, n, h), nullptr, factor, d, padded, out);
  load_token(token<T>(p.q, b, n, h), p.q_weight + h * d, p.rstd_q[b * p.tokens + n] * factor, d, padded, out);
  load_token(out, p.k_weight + h * d, 1.0f, d, padded, out);
}

constexpr int64_t kQueries = kBlockVectors * kLanes;  // columns of a block of accumulators: the forward's unit of work

struct AttentionScratch {
  float *keys, *values;           // [N, D], and V^T in blocks of rows, [D / kBlockRows][N][kBlockRows]
  float *queries, *scores, *out;  // Q^T [D, queries], S^T [N, queries], out^T [D, queries]
  float* rows;                    // [queries, D]: Q or out
  int64_t bytes;
  AttentionScratch(void* memory, int64_t n_keys, int64_t head_dim) {
    const int64_t dims = round_up(head_dim, kLanes), key_rows = round_up(n_keys, kBlockRows);
    ScratchArena arena{static_cast<char*>(memory)};
    keys = arena.take<float>(key_rows * dims);
    values = arena.take<float>(n_keys * round_up(dims, kBlockRows));
    scores = arena.take<float>(key_rows * kQueries);
    float** by_query[] = {&queries, &out, &rows};
    for (float** p : by_query) *p = arena.take<float>(kQueries * round_up(dims, kBlockRows));
    bytes = arena.used;
  }
};

// Heads of successive tokens lie on pages of their own: asked for some tokens ahead.
template <class T>
INTERNVIT_INLINE void prefetch_token(const HeadsView& x, int64_t b, int64_t n, int64_t last, int64_t h,
                                     int64_t head_dim) {
  constexpr int64_t kAhead = 8, kLine = 64 / int64_t(sizeof(T));
  const T* head = token<T>(x, b, min_of(n + kAhead, last), h);
  for (int64_t d = 0; d < head_dim; d += kLine) __builtin_prefetch(head + d);
}

template <class T>
void attention_pack_head(const AttentionParams& p, const AttentionScratch& s, int64_t b, int64_t h) {
  const int64_t dims = round_up(p.head_dim, kLanes);
  for (int64_t n = 0; n < p.keys; ++n) {
    const float rstd = p.rstd_k ? p.rstd_k[b * p.keys + n] : 1.0f;
    prefetch_token<T>(p.k, b, n, p.keys - 1, h, p.head_dim);
    prefetch_token<T>(p.v, b, n, p.keys - 1, h, p.head_dim);
    load_token(token<T>(p.k, b, n, h), nullptr, rstd, p.head_dim, dims, s.keys + n * dims);
    load_token(token<T>(p.v, b, n, h), nullptr, 1.0f, p.head_dim, round_up(dims, kBlockRows), s.rows);
    for (int64_t d = 0; d < dims; d += kBlockRows)
      __builtin_memcpy(s.values + d * p.keys + n * kBlockRows, s.rows + d, kBlockRows * sizeof(float));
  }
  const int64_t padding = round_up(p.keys, kBlockRows) - p.keys;
  __builtin_memset(s.keys + p.keys * dims, 0, uint64_t(padding * dims) * sizeof(float));
}

// c [rows, kQueries] (+)= a b: rows in blocks of kBlockRows, each `block` floats after the one before, and the first
// kVectors vectors of columns. The next block is asked for meanwhile (4097 tokens: 10 % faster).
template <int kVectors>
INTERNVIT_INLINE void multiply_stream(int64_t rows, int64_t depth, Factor a, int64_t block, const float* b, float* c,
                                      bool accumulate) {
  for (int64_t i = 0; i < rows; i += kBlockRows) {
    multiply_block<kBlockRows, kVectors, true>(depth, a, b, kQueries, c + i * kQueries, kQueries, accumulate,
                                               a.data + block);
    a.data += block;
  }
}

// Calls body(n, u) for each row of [0, n_rows), u counting 0 to 3: the part of a sum that it goes to (for_lanes).
template <class Body>
INTERNVIT_INLINE void for_rows(int64_t n_rows, Body body) {
  int64_t n = 0;
  for (; n + 4 <= n_rows; n += 4) {
    body(n, 0);
    body(n + 1, 1);
    body(n + 2, 2);
    body(n + 3, 3);
  }
  for (; n < n_rows; ++n) body(n, 0);
}

// S^T to 2^(S^T - maximum) in place: of 16 queries.
INTERNVIT_INLINE void softmax_columns(float* scores, int64_t keys, float* maximum, float* sum) {
  const auto at = [&](int64_t n) __attribute__((always_inline)) { return scores + n * kQueries; };
  Vec top[4] = {load(scores), load(scores), load(scores), load(scores)};
  for_rows(keys, [&](int64_t n, int u) __attribute__((always_inline)) { top[u] = max(top[u], load(at(n))); });
  const Vec shift = max(max(top[0], top[1]), max(top[2], top[3]));
  Vec sums = broadcast(0.0f);
  for (int64_t k = 0; k < keys; k += kBlockDepth) {
    Sum total;
    for_rows(min_of(kBlockDepth, keys - k), [&](int64_t n, int u) __attribute__((always_inline)) {
      const Vec p = exp2_float32(load(at(k + n)) - shift);
      store(at(k + n), p);
      total.part[u] = total.part[u] + p;
    });
    sums = sums + ((total.part[0] + total.part[1]) + (total.part[2] + total.part[3]));
  }
  store(maximum, shift);
  store(sum, sums);
}

template <int kVectors, class T>
void attention_strip(const AttentionParams& p, const AttentionScratch& s, int64_t b, int64_t h, int64_t first,
                     int64_t rows) {
  const int64_t dims = round_up(p.head_dim, kLanes), d = p.head_dim, columns = kVectors * kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    prefetch_token<T>(p.q, b, first + i, p.tokens - 1, h, d);
    load_query<T>(p, b, h, first + i, dims, s.rows + i * dims);
  }
  __builtin_memset(s.rows + rows * dims, 0, uint64_t((columns - rows) * dims) * sizeof(float));
  transpose(columns, dims, s.rows, dims, s.queries, kQueries);
  multiply_stream<kVectors>(p.keys, d, {s.keys, dims, 1}, kBlockRows * dims, s.queries, s.scores, false);
  float maxima[kQueries], sums[kQueries];
  for (int64_t i = 0; i < columns; i += kLanes) softmax_columns(s.scores + i, p.keys, maxima + i, sums + i);
  for (int64_t k = 0; k < p.keys; k += kBlockDepth) {
    const Factor values{s.values + k * kBlockRows, 1, kBlockRows};
    multiply_stream<kVectors>(dims, min_of(kBlockDepth, p.keys - k), values, kBlockRows * p.keys,
                              s.scores + k * kQueries, s.out, k > 0);
  }
  transpose(dims, columns, s.out, kQueries, s.rows, dims);
  for (int64_t i = 0; i < rows; ++i) {
    const double lse = double(maxima[i]) * double(kLn2) + __builtin_log(double(sums[i]));
    p.lse[(b * p.heads + h) * p.row_stride + first + i] = float(lse);
    const Vec inverse = broadcast(1.0f / sums[i]);
    T* out = static_cast<T*>(p.out) + ((b * p.tokens + first + i) * p.heads + h) * d;
    for_lanes(d, INTERNVIT_BODY(c, lanes, u) { store(out + c, load(s.rows + i * dims + c, lanes) * inverse, lanes); });
  }
}

// Calls pack(b, h) whenever the head changes, and strip(b, h, first, rows), over the units [begin, end).
template <int64_t kRows = kStrip, class Pack, class Strip>
INTERNVIT_INLINE void for_strips(int64_t begin, int64_t end, int64_t heads, int64_t tokens, const Pack& pack,
                                 const Strip& strip) {
  const int64_t strips = (tokens + kRows - 1) / kRows;
  int64_t packed = -1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / strips, first = unit % strips * kRows;
    if (head != packed) pack(head / heads, head % heads);
    packed = head;
    strip(head / heads, head % heads, first, min_of(kRows, tokens - first));
  }
}

// The units [begin, end) of images without keys: strips of `strip` queries.
template <class T>
void attention_without_keys(const AttentionParams& p, int64_t strip, int64_t begin, int64_t end) {
  const int64_t strips = (p.tokens + strip - 1) / strip;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t b = unit / strips / p.heads, h = unit / strips % p.heads, first = unit % strips * strip;
    for (int64_t n = first; n < min_of(first + strip, p.tokens); ++n) {
      p.lse[(b * p.heads + h) * p.row_stride + n] = -__builtin_inff();
      T* out = static_cast<T*>(p.out) + ((b * p.tokens + n) * p.heads + h) * p.head_dim;
      __builtin_memset(out, 0, uint64_t(p.head_dim) * sizeof(T));
    }
  }
}

INTERNVIT_INLINE void advance(HeadsView& x, DType dtype, int64_t tokens) {
  x.data = static_cast<const char*>(x.data) + tokens * x.stride_n * (dtype == kFloat32 ? 4 : 2);
}

template <class Params>
INTERNVIT_INLINE const int32_t* key_ends(const Params& p) {
  return p.cu_seqlens_k ? p.cu_seqlens_k : p.cu_seqlens;
}

// What both directions have of one packed sequence, as a batch of one image: a sequence has the bits of that image.
template <class Params>
INTERNVIT_INLINE Params image_of(const Params& p, int64_t sequence) {
  const int64_t start = p.cu_seqlens[sequence], start_k = key_ends(p)[sequence];
  Params image = p;
  image.batch = 1;
  image.tokens = p.cu_seqlens[sequence + 1] - start;
  image.keys = key_ends(p)[sequence + 1] - start_k;
  image.cu_seqlens = image.cu_seqlens_k = nullptr;
  advance(image.q, p.dtype, start);
  advance(image.k, p.dtype, start_k);
  advance(image.v, p.dtype, start_k);
  if (p.q_weight) image.rstd_q += start, image.rstd_k += start_k;
  image.lse += start;
  return image;
}

INTERNVIT_INLINE AttentionParams sequence_of(const AttentionParams& p, int64_t sequence) {
  AttentionParams image = image_of(p, sequence);
  HeadsView out = {p.out, 0, p.heads * p.head_dim, p.head_dim};
  advance(out, p.dtype, p.cu_seqlens[sequence]);
  image.out = const_cast<void*>(out.data);
  return image;
}

INTERNVIT_INLINE AttentionBackwardParams sequence_of(const AttentionBackwardParams& p, int64_t sequence);
INTERNVIT_INLINE AttentionColumnSumsParams sequence_of(const AttentionColumnSumsParams& p, int64_t sequence);

// Calls run(images, memory, begin, end) on every thread: `images` is the batch, or one packed sequence as a batch of
// one, and [begin, end) some of its units, strips of kRows queries of a head or with kRows = 0 heads. Sequences are
// shared out by the pairs of tokens in their units, so that threads with long and with short ones have as much to do.
template <int64_t kRows, class Params, class Run>
void for_images(const Params& p, const Executor& executor, int64_t bytes, const Run& run) {
  const auto units_of = [&](int64_t tokens, int64_t keys) {
    return p.heads * (kRows ? (tokens + kRows - 1) / kRows : tokens + keys > 0);
  };
  if (!p.cu_seqlens) {
    parallel(executor, p.batch * units_of(p.tokens, p.keys), 1,
             [&](int64_t begin, int64_t end) { run(p, executor.scratch(bytes), begin, end); });
    return;
  }
  const auto length = [](const int32_t* ends, int64_t i) { return int64_t(ends[i + 1]) - ends[i]; };
  const auto units = [&](int64_t i) { return units_of(length(p.cu_seqlens, i), length(key_ends(p), i)); };
  const auto cost = [&](int64_t i) {
    const int64_t tokens = length(p.cu_seqlens, i), keys = length(key_ends(p), i);
    const int64_t pairs = kRows ? keys : tokens * keys;
    return pairs ? pairs : 1;
  };
  int64_t total = 0;
  for (int64_t i = 0; i < p.sequences; ++i) total += units(i) * cost(i);
  parallel(executor, total, 1, [&](int64_t begin, int64_t end) {
    void* memory = nullptr;
    int64_t at = 0;  // a unit belongs to the thread in whose range it begins
    for (int64_t i = 0; i < p.sequences && at < end; ++i) {
      const int64_t count = units(i), each = cost(i);
      if (!count) continue;
      const auto unit_at = [&](int64_t place) {
        return place <= at ? 0 : min_of(count, (place - at + each - 1) / each);
      };
      if (unit_at(begin) < unit_at(end)) {
        if (!memory) memory = executor.scratch(bytes);
        run(sequence_of(p, i), memory, unit_at(begin), unit_at(end));
      }
      at += count * each;
    }
  });
}

void attention(const AttentionParams& p, const Executor& executor) {
  INTERNVIT_DISPATCH(p.dtype, T, {
    const int64_t bytes = AttentionScratch(nullptr, p.keys, p.head_dim).bytes;
    const auto run = [](const AttentionParams& image, void* memory, int64_t begin, int64_t end) {
      if (image.keys == 0) return attention_without_keys<T>(image, kQueries, begin, end);
      const AttentionScratch s(memory, image.keys, image.head_dim);
      for_strips<kQueries>(
          begin, end, image.heads, image.tokens, [&](int64_t b, int64_t h) { attention_pack_head<T>(image, s, b, h); },
          [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
            const auto strip = rows > kLanes ? attention_strip<kBlockVectors, T> : attention_strip<1, T>;
            strip(image, s, b, h, first, rows);
          });
    };
    for_images<kQueries>(p, executor, bytes, run);
  });
}

}  // namespace internvit::INTERNVIT_ISA
