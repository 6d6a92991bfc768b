// y = fc2(gelu(fc1(x))) for int8, the GELU's output quantised in cache: a row of it is known where a task computes all
// of the row's columns.
//
// A task has a range of strips and goes through it in blocks of a few: fc1 of a block into float32 scratch, each row of
// it to int8 with a scale and a zero point, fc2 of the block. No hidden row ever leaves the cache, and none is rounded
// but to int8. The price is that weights stream past every block, less than a byte a cycle.
#pragma once

#include "cpu/ops/attention.h"
#include "cpu/ops/linear_int8.h"

namespace internvit::INTERNVIT_ISA {

template <class P>
P* moved(P* rows, int64_t bytes) {
  return rows ? reinterpret_cast<P*>(reinterpret_cast<uintptr_t>(rows) + uintptr_t(bytes)) : nullptr;
}

// Rows [first, last) of a Linear.
inline LinearInt8Params rows_of(LinearInt8Params p, int64_t first, int64_t last) {
  const int64_t x_bytes = p.x_dtype == kFloat32 ? 4 : 2, y_bytes = p.dtype == kFloat32 ? 4 : 2;
  p.x = moved(p.x, first * p.x_stride * x_bytes);
  p.x_q = moved(p.x_q, first * p.x_stride);
  p.x_scale = moved(p.x_scale, first * 4);
  p.x_zero = moved(p.x_zero, first * 4);
  p.residual = moved(p.residual, first * p.residual_stride * y_bytes);
  p.y = moved(p.y, first * p.out_features * y_bytes);
  p.rows = last - first;
  return p;
}

template <class Product>
INTERNVIT_INLINE void multiply_rows(const Product& product, int32_t* sums) {
  multiply_block(product, 0, product.strips, 0, product.panels, sums, [](int64_t) { return true; });
}

// One block: both products number its rows from 0. With null memory it only counts bytes.
template <class Layout, class T>
int64_t mlp_block_int8(LinearInt8Params fc1, LinearInt8Params fc2, void* memory) {
  ScratchArena arena{static_cast<char*>(memory)};
  const auto rows_for = [&](int64_t channels) {
    return Int8Rows<Layout>(arena.take<uint8_t>(Int8Rows<Layout>::bytes(fc1.rows, channels)), fc1.rows, channels);
  };
  const Int8Rows<Layout> x = rows_for(fc1.in_features), hidden = rows_for(fc2.in_features);
  float* values = arena.take<float>(fc1.rows * fc1.out_features);
  fc1.y = values;
  const Int8Product<Layout, float, bf16> first(fc1, x);
  const Int8Product<Layout, T> second(fc2, hidden);
  const int64_t first_sums = sums_of(first, first.panels), second_sums = sums_of(second, second.panels);
  int32_t* sums = arena.take<int32_t>(first_sums > second_sums ? first_sums : second_sums);
  if (!memory) return arena.used;
  for (int64_t strip = 0; strip < first.strips; ++strip) first.pack_rows(strip);
  multiply_rows(first, sums);
  for (int64_t strip = 0; strip < first.strips; ++strip) {
    hidden.for_packed(strip, fc1.rows, [&](int64_t row, int64_t rows) {
      hidden.quantize(row, rows, values + row * fc1.out_features, fc1.out_features, fc1.out_features);
    });
  }
  multiply_rows(second, sums);
  return arena.used;
}

template <class Layout>
void mlp_int8(const MlpInt8Params& p, const Executor& executor) {
  const auto run_block = p.fc2.dtype == kBFloat16 ? mlp_block_int8<Layout, bf16> : mlp_block_int8<Layout, float>;
  // As many strips as share the weights of the deepest product: 1.4 MB of the 300M's hidden rows in float32.
  constexpr int64_t kBlock = Layout::kBlockBytes / Layout::strip_bytes(kInt8DepthBlock);
  const int64_t strips = (p.fc1.rows + Layout::kRows - 1) / Layout::kRows;
  parallel(executor, strips, 1, [&](int64_t begin, int64_t end) {
    const int64_t most = min_of(kBlock * Layout::kRows, p.fc1.rows);
    void* memory = executor.scratch(run_block(rows_of(p.fc1, 0, most), rows_of(p.fc2, 0, most), nullptr));
    const typename Layout::Scope scope;
    const int64_t blocks = (end - begin + kBlock - 1) / kBlock;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t first = (begin + (end - begin) * i / blocks) * Layout::kRows;
      const int64_t last = min_of(p.fc1.rows, (begin + (end - begin) * (i + 1) / blocks) * Layout::kRows);
      run_block(rows_of(p.fc1, first, last), rows_of(p.fc2, first, last), memory);
    }
  });
}

}  // namespace internvit::INTERNVIT_ISA
