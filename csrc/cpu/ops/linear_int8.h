// y = epilogue(x_scale * weight_scale * ((x_q - x_zero) W_q^T) + bias) for int8; W_q is packed once. packed_gemm.h has
// the loops, linear_vnni.h, linear_int8_amx.h and linear_madd.h the products, mlp_int8.h two Linears with a GELU
// between them.
//
// VNNI and AMX multiply unsigned bytes by signed ones: x_q + 128 is packed, and sums begin at -128 times the sum of a
// column's weights, which is packed behind the weights. Sums are exact (int32, up to a depth of 2^31 / (255 * 128) =
// 65,793), so that neither their order nor the instruction matters. The epilogue runs before the only store. x may come
// unquantised: the pass that packs it finds each row's scale and zero point, so that x_q has no memory of its own.
//
// A weight may have a scale for each 128 of a column's depth, ratio * weight_scale: the products of a group are exact,
// and their sum over the groups is float32, in order.
#pragma once

#include "cpu/ops/gelu.h"
#include "cpu/ops/packed_gemm.h"
#include "cpu/ops/quantize_rows.h"
#include "cpu/simd/int8.h"
#include "cpu/simd/pairs.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kInt8DepthBlock = 64, kInt8Group = 2;  // tiles
static_assert(kInt8Group * kInt8Depth == kInt8GroupSize, "");

// What stands behind the tiles: -128 times the sum of each column's weights, [panels][groups][32], and with groups
// their ratios, laid out alike. Without them the whole depth is one group.
struct Int8ColumnSums {
  int64_t groups;
  int32_t* starts;
  float* ratios;

  Int8ColumnSums(const int8_t* packed, int64_t panels, int64_t depth, bool grouped)
      : groups(grouped ? (depth + kInt8Group - 1) / kInt8Group : 1),
        starts(reinterpret_cast<int32_t*>(const_cast<int8_t*>(packed) + panels * depth * kInt8Tile)),
        ratios(grouped ? reinterpret_cast<float*>(starts + panels * groups * kPanel) : nullptr) {}

  INTERNVIT_INLINE int64_t of(int64_t panel, int64_t d) const {
    return (panel * groups + (ratios ? d / kInt8Group : 0)) * kPanel;
  }
};

inline void pack_weight_int8(const PackWeightInt8Params& p, const Executor& executor) {
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel, depth = (p.in_features + 63) / 64;
  const Int8ColumnSums columns(p.packed, panels, depth, p.group_ratio != nullptr);
  parallel(executor, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t half = begin * 2; half < end * 2; ++half) {  // 16 columns
      const int64_t panel = half / 2, right = half % 2, first = half * 16;
      for (int64_t group = 0; group < columns.groups; ++group) {
        const int64_t from = columns.ratios ? group * kInt8Group : 0;
        const int64_t to = columns.ratios ? min_of(depth, from + kInt8Group) : depth;
        alignas(64) int32_t sums[16] = {};
        for (int64_t d = from; d < to; ++d) {
          int8_t* tile = p.packed + (panel * depth + d) * kInt8Tile + right * 16 * kInt8Word;
          pack_half_tile(p.weight_q + (first < p.out_features ? first * p.in_features : 0) + d * 64, p.in_features,
                         p.out_features - first, p.in_features - d * 64, tile, sums);
        }
        const int64_t at = columns.of(panel, from) + right * 16;
        for (int64_t i = 0; i < 16; ++i) columns.starts[at + i] = -128 * sums[i];
        for (int64_t i = 0; columns.ratios && i < 16; ++i)
          columns.ratios[at + i] = first + i < p.out_features ? p.group_ratio[(first + i) * columns.groups + group] : 0;
      }
    }
  });
}

// The epilogue of a panel's columns: zero point, scales and bias, then GELU as exact as G, or the residual; one
// rounding to T.
template <class T, class G>
struct Int8Epilogue {
  const LinearInt8Params& p;
  int64_t column, left_columns, right_columns;
  Vec scale[2], bias[2] = {broadcast(0.0f), broadcast(0.0f)};
  Ints weight_sum[2];  // negated
  Vec group_sum[2] = {broadcast(0.0f), broadcast(0.0f)};

  Int8Epilogue(const LinearInt8Params& params, int64_t panel, const Int8ColumnSums& sums)
      : p(params), column(panel * kPanel) {
    for (int half = 0; half < 2; ++half) {
      for (int64_t group = 0; group < sums.groups; ++group) {
        const int64_t at = sums.of(panel, group * kInt8Group) + half * 16;
        weight_sum[half] = shifted_right(load_ints(sums.starts + at), 7);
        if (!sums.ratios) continue;
        group_sum[half] = fma(to_floats(weight_sum[half]), load(sums.ratios + at), group_sum[half]);
      }
    }
    const int64_t columns = min_of(kPanel, p.out_features - column);
    left_columns = min_of(16, columns);
    right_columns = columns - left_columns;
    load_pair(p.weight_scale, scale);
    if (p.bias) load_pair(p.bias, bias);
  }

  INTERNVIT_INLINE void load_pair(const float* values, Vec (&pair)[2]) const {
    pair[0] = load(values + column, left_columns);
    pair[1] = right_columns > 0 ? load(values + column + 16, right_columns) : broadcast(0.0f);
  }

  INTERNVIT_INLINE T* row_of(int64_t row) const { return static_cast<T*>(p.y) + row * p.out_features + column; }
  INTERNVIT_INLINE const T* residual_of(int64_t row) const {
    return static_cast<const T*>(p.residual) + row * p.residual_stride + column;
  }

  // A row's columns are one or two lines, far from the next row's: asked for while the last step is computed.
  INTERNVIT_INLINE void prefetch_row(int64_t row) const {
    __builtin_prefetch(row_of(row), 1);
    if (p.residual) __builtin_prefetch(residual_of(row));
  }

  // x_zero taken out of a row's products.
  INTERNVIT_INLINE Vec centred(const int32_t* sums, int32_t zero, int half) const {
    if (p.grouped)
      return fma(broadcast(float(zero)), group_sum[half], load(reinterpret_cast<const float*>(sums) + half * 16));
    return to_floats(load_ints(sums + half * 16) + broadcast_int(zero) * weight_sum[half]);
  }

  INTERNVIT_INLINE void store_row(T* y, Vec left, Vec right) const {
    if (right_columns == 16) {
      store_pair(y, left, right);
    } else {
      store(y, left, left_columns);
      if (right_columns > 0) store(y + 16, right, right_columns);
    }
  }

  // Rows [first, last), whose sums it overwrites. GELU has a loop of its own: after the rest, in one chain of 80
  // cycles, rows overlap less (1024 -> 4096: 4 %).
  INTERNVIT_INLINE void finish_rows(int64_t first, int64_t last, int32_t* sums) const {
    const float* x_scale = p.x_scale;
    const int32_t* x_zero = p.x_zero;
    const T* residual = p.residual ? residual_of(first) : nullptr;
    float* values = reinterpret_cast<float*>(sums);
    const bool gelu = p.gelu;
    for (int64_t row = first, i = 0; row < last; ++row, i += kPanel) {
      const Vec row_scale = broadcast(x_scale[row]);
      const int32_t zero = x_zero ? x_zero[row] : 0;
      Vec pair[2];
      for (int half = 0; half < 2; ++half)
        pair[half] = fma(centred(sums + i, zero, half) * row_scale, scale[half], bias[half]);
      if (residual) {
        pair[0] = pair[0] + load(residual, left_columns);
        if (right_columns > 0) pair[1] = pair[1] + load(residual + 16, right_columns);
        residual += p.residual_stride;
      }
      if (gelu) {
        store_pair(values + i, pair[0], pair[1]);
      } else {
        store_row(row_of(row), pair[0], pair[1]);
      }
    }
    for (int64_t row = first; gelu && row < last; ++row, values += kPanel)
      store_row(row_of(row), gelu_of<G>(load(values)), gelu_of<G>(load(values + 16)));
  }
};

// x_q + 128 of up to 64 elements of a row.
template <class X>
INTERNVIT_INLINE void quantize_bytes(uint8_t* bytes, const X* x, int64_t n, Vec inverse, Ints zero) {
  Ints part[4];
  for (int64_t i = 0; i < 4; ++i) {
    const Vec value = (n >= 64      ? load(x + i * 16)
                       : i * 16 < n ? load(x + i * 16, min_of(16, n - i * 16))
                                    : broadcast(0.0f)) *
                      inverse;
    part[i] = nearest_ints(value) + zero;
  }
  store_unsigned(bytes, part);
}

// x_q + 128 as the product `Layout` reads it, and each row's scale and zero point where x comes unquantised.
template <class Layout>
struct Int8Rows {
  static constexpr int64_t kTogether = Layout::kPackedRows;  // rows whose tiles are written at once
  using Bytes = uint8_t[kTogether][kInt8Depth];

  uint8_t* data;
  int64_t strips, depth;
  float* scale;
  int32_t* zero;

  // Tile d of the rows written at once from `row` on.
  INTERNVIT_INLINE uint8_t* tile(int64_t row, int64_t d) const {
    return data + Layout::offset(strips, depth, row / Layout::kRows, row % Layout::kRows, d);
  }

  // Calls pack(first, rows) for the rows of a strip, kTogether at a time.
  template <class Pack>
  INTERNVIT_INLINE static void for_packed(int64_t strip, int64_t rows, const Pack& pack) {
    const int64_t end = min_of(rows, (strip + 1) * Layout::kRows);
    for (int64_t first = strip * Layout::kRows; first < end; first += kTogether)
      pack(first, min_of(kTogether, end - first));
  }

  // Bytes behind the end of a row may be anything: the weights there are 0. In a row that is not finite so may all.
  template <class X>
  INTERNVIT_INLINE void quantize(int64_t first, int64_t rows, const X* x, int64_t stride, int64_t channels) const {
    float inverse[kTogether];
    for (int64_t i = 0; i < rows; ++i) {
      const RowQuantization quantization = quantization_of(x + i * stride, channels, false);
      scale[first + i] = quantization.scale;
      zero[first + i] = quantization.zero;
      inverse[i] = quantization.inverse;
    }
    alignas(64) Bytes bytes = {};
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t i = 0; i < rows; ++i) {
        const X* from = x + i * stride + d * 64;
        quantize_bytes(bytes[i], from, channels - d * 64, broadcast(inverse[i]), broadcast_int(zero[first + i]));
      }
      Layout::store_rows(tile(first, d), bytes);
    }
  }

  INTERNVIT_INLINE void copy(int64_t first, int64_t rows, const int8_t* x, int64_t stride, int64_t channels) const {
    alignas(64) Bytes bytes = {};
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t i = 0; i < rows; ++i) store_unsigned(bytes[i], x + i * stride + d * 64, channels - d * 64);
      Layout::store_rows(tile(first, d), bytes);
    }
  }

  static int64_t bytes(int64_t rows, int64_t channels) {
    const int64_t strips = (rows + Layout::kRows - 1) / Layout::kRows;
    return strips * Layout::strip_bytes((channels + 63) / 64) + round_up(rows * 8, 64);
  }

  Int8Rows(uint8_t* memory, int64_t rows, int64_t channels)
      : data(memory), strips((rows + Layout::kRows - 1) / Layout::kRows), depth((channels + 63) / 64) {
    scale = reinterpret_cast<float*>(memory + strips * Layout::strip_bytes(depth));
    zero = reinterpret_cast<int32_t*>(scale + rows);
  }
};

// A panel's step of weights, multiplied as it was packed.
struct PackedWeights {
  const int8_t* data;
  INTERNVIT_INLINE void start(const int8_t* packed, int64_t) { data = packed; }
};

// A Linear's product by `Layout`, which has a strip's kRows, of which kPackedRows are packed at once, a step's kStep
// tiles and the kBlockBytes of an x block; `Scope`, held by a task; where x lies, strip_bytes(depth) and offset(strips,
// depth, strip, row, d); store_rows(tile, bytes), which writes the packed rows' tile; and
//
//   multiply(a, next, b, step, from, from_row, sums): sums = from + A B over `step` tiles; `next` is what A comes next
//   multiply_grouped(a, next, b, step, start, ratio, first, sums): sums += ratio * (start + A B) of each group, in
//   float
//
// where B is the data of a Layout::Weights, which is started with a panel's step once for all strips. The output is T,
// GELU as exact as G.
template <class Layout, class T, class G = T>
struct Int8Product {
  using Sum = int32_t;
  using Scope = typename Layout::Scope;
  struct Panel : Int8Epilogue<T, G> {
    using Int8Epilogue<T, G>::Int8Epilogue;
    typename Layout::Weights weights;
  };
  static constexpr int64_t kRows = Layout::kRows, kStep = Layout::kStep;
  static_assert(kStep % kInt8Group == 0, "a step is whole groups");

  LinearInt8Params p;
  Int8Rows<Layout> x;
  int64_t strips, panels, depth;
  Int8ColumnSums columns;

  Int8Product(const LinearInt8Params& params, const Int8Rows<Layout>& rows)
      : p(params),
        x(rows),
        strips(x.strips),
        panels((p.out_features + kPanel - 1) / kPanel),
        depth(x.depth),
        columns(p.packed_weight, panels, depth, p.grouped) {
    if (p.x_q) return;
    p.x_scale = x.scale;
    p.x_zero = x.zero;
  }

  // An x block stays in L2, or where that is small in L3 (29 strips of 2048 deep: fc2 of the 300M 3 % slower), and a
  // panel's weights serve several strips (2 strips of the 6B's 12,800: 15 % slower).
  int64_t depth_block() const { return min_of(depth, kInt8DepthBlock); }
  int64_t row_block() const {
    const int64_t block = Layout::kBlockBytes / Layout::strip_bytes(depth_block());
    return block > 1 ? block : 1;
  }
  Panel epilogue(int64_t panel) const { return Panel(p, panel, columns); }
  INTERNVIT_INLINE void start_step(int64_t index, int64_t d, int64_t step, Panel& panel) const {
    panel.weights.start(p.packed_weight + (index * depth + d) * kInt8Tile, step);
  }

  void pack_rows(int64_t strip) const {
    x.for_packed(strip, p.rows, [&](int64_t first, int64_t rows) {
      if (p.x_q) return x.copy(first, rows, p.x_q + first * p.x_stride, p.x_stride, p.in_features);
      INTERNVIT_DISPATCH(p.x_dtype, X, {
        x.quantize(first, rows, static_cast<const X*>(p.x) + first * p.x_stride, p.x_stride, p.in_features);
      });
    });
  }

  INTERNVIT_INLINE void multiply(int64_t index, int64_t strip, int64_t next_strip, int64_t d, int64_t step,
                                 int32_t* sums, const Panel& panel) const {
    const int64_t first = strip * kRows, end = min_of(p.rows, first + kRows);
    const bool last = d + step == depth;
    for (int64_t row = first; last && row < end; ++row) panel.prefetch_row(row);
    const uint8_t *a = x.tile(first, d), *next = x.tile(next_strip * kRows, d);
    const auto* b = panel.weights.data;
    const int64_t at = columns.of(index, d);
    if (p.grouped) {
      Layout::multiply_grouped(a, next, b, step, columns.starts + at, columns.ratios + at, d == 0,
                               reinterpret_cast<float*>(sums));
    } else if (d == 0) {  // the same start in every row
      Layout::multiply(a, next, b, step, columns.starts + at, 0, sums);
    } else {
      Layout::multiply(a, next, b, step, sums, kPanel, sums);
    }
    if (last) panel.finish_rows(first, end, sums);
  }
};

template <class Layout>
void linear_int8(const LinearInt8Params& p, const Executor& executor) {
  const int64_t bytes = Int8Rows<Layout>::bytes(p.rows, p.in_features);
  const Int8Rows<Layout> x(static_cast<uint8_t*>(executor.shared(bytes)), p.rows, p.in_features);
  if (p.dtype == kBFloat16) {
    packed_gemm(Int8Product<Layout, bf16>(p, x), executor);
  } else {
    packed_gemm(Int8Product<Layout, float>(p, x), executor);
  }
}

}  // namespace internvit::INTERNVIT_ISA
