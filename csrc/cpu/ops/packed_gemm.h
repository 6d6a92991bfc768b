// The loops of y = epilogue(x W^T) over packed operands, whatever multiplies them.
//
// x is packed first, in a parallel pass of its own. Then a task has a range of panels (32 output features) and goes
// block by block: rows in blocks, and depth where a row is long, so that the x block stays in L2; within them depth in
// steps, so that a panel's step stays in L1 while the strips of rows pass by. The sums between steps lie in a task's
// scratch. The order of additions over the depth depends on the depth alone.
//
// `Product` is the share of a dtype and an instruction set: kRows of a strip and kStep tiles of a step; `Sum`; `Scope`,
// held by a task; the extents of the product in strips, panels and tiles of depth; row_block() strips and depth_block()
// tiles of a block; pack_rows(strip); epilogue(panel), what it keeps of a panel; start_step(panel, ...), before the
// strips pass by a step; and the product of one strip with one panel's step, whose last step runs the epilogue.
#pragma once

#include "cpu/simd/loops.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kPanel = 32;

// Strips [first, last) times a panel, over tiles [from, to) of the depth. `sums` [strip][kRows][32] carries over to the
// next step.
template <class Product, class Epilogue>
INTERNVIT_INLINE void multiply_panel(const Product& product, int64_t panel, int64_t first, int64_t last, int64_t from,
                                     int64_t to, typename Product::Sum* sums, Epilogue&& epilogue) {
  for (int64_t d = from; d < to; d += Product::kStep) {
    const int64_t step = min_of(Product::kStep, to - d);
    product.start_step(panel, d, step, epilogue);
    for (int64_t strip = first; strip < last; ++strip) {
      const int64_t next = strip + 1 < last ? strip + 1 : strip;
      product.multiply(panel, strip, next, d, step, sums + (strip - first) * Product::kRows * kPanel, epilogue);
    }
  }
}

// How many sums a task needs for so many panels: beyond one block of depth those of other panels wait for the next.
template <class Product>
INTERNVIT_INLINE int64_t sums_of(const Product& product, int64_t panels) {
  const int64_t block = product.row_block() * Product::kRows * kPanel;
  return product.depth > product.depth_block() ? block * panels : block;
}

// Strips [first, last), at most a row block, times the panels of [first_panel, last_panel) that has(panel).
template <class Product, class Has>
INTERNVIT_INLINE void multiply_block(const Product& product, int64_t first, int64_t last, int64_t first_panel,
                                     int64_t last_panel, typename Product::Sum* all_sums, const Has& has) {
  const int64_t apart = sums_of(product, 2) - sums_of(product, 1), depth_block = product.depth_block();
  for (int64_t outer = 0; outer < product.depth; outer += depth_block) {
    const int64_t outer_end = min_of(product.depth, outer + depth_block);
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
      if (!has(panel)) continue;
      multiply_panel(product, panel, first, last, outer, outer_end, all_sums + (panel - first_panel) * apart,
                     product.epilogue(panel));
    }
  }
}

template <class Product>
void packed_gemm(const Product& product, const Executor& executor) {
  using Sum = typename Product::Sum;
  const int64_t strips = product.strips;
  const int64_t row_blocks = (strips + product.row_block() - 1) / product.row_block();
  parallel(executor, strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) product.pack_rows(strip);
  });
  // Panels change slowest over the units, so that two tasks share no weights, and rows split where there are many
  // tasks.
  parallel(executor, product.panels * row_blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first_panel = begin / row_blocks, last_panel = (end + row_blocks - 1) / row_blocks;
    const int64_t bytes = sums_of(product, last_panel - first_panel) * int64_t(sizeof(Sum));
    Sum* sums = static_cast<Sum*>(executor.scratch(bytes));
    const typename Product::Scope scope;
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t first = strips * block / row_blocks, last = strips * (block + 1) / row_blocks;
      multiply_block(product, first, last, first_panel, last_panel, sums, [&](int64_t panel) {
        const int64_t unit = panel * row_blocks + block;
        return unit >= begin && unit < end;
      });
    }
  });
}

}  // namespace internvit::INTERNVIT_ISA
