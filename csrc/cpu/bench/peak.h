// The rate of an instruction set's own multiply-adds: the inner loop of its products over operands that stay in L1, or
// in tiles. What a kernel's share of the limit is taken of.
#pragma once

#include "cpu/ops/attention.h"
#if defined(__AMX_BF16__)
#include "cpu/simd/amx.h"
#elif defined(__AVX512BF16__)
#include "cpu/simd/vdpbf16.h"
#endif
#if defined(__AVX512VNNI__)
#include "cpu/simd/vnni.h"
#elif defined(INTERNVIT_AVX2_ALONE)
#include "cpu/simd/madd.h"
#endif

namespace internvit::INTERNVIT_ISA {

// Multiplies `rounds` times on this thread; returns the flops done.
int64_t peak_of_thread(DType dtype, int64_t rounds, const Executor& executor) {
#if defined(__AMX_BF16__)
  if (dtype == kBFloat16 || dtype == kInt8) {
    bf16* tile = static_cast<bf16*>(executor.scratch(kTile * int64_t(sizeof(bf16))));
    __builtin_memset(tile, 0, kTile * sizeof(bf16));
    const TileScope scope;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, tile, 64);
    _tile_loadd(5, tile, 64);
    _tile_loadd(6, tile, 64);
    _tile_loadd(7, tile, 64);
    for (int64_t i = 0; i < rounds && dtype == kBFloat16; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    for (int64_t i = 0; i < rounds && dtype == kInt8; ++i) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    return rounds * 4 * 16 * 16 * (dtype == kInt8 ? 64 : 32) * 2;
  }
#elif defined(__AVX512BF16__)
  if (dtype == kBFloat16) {
    constexpr int64_t kDepth = 256;
    ScratchArena arena{static_cast<char*>(executor.scratch((kVdpbf16Rows + 32) * kDepth * 2 + kVdpbf16Rows * 32 * 4))};
    bf16 *a = arena.take<bf16>(kVdpbf16Rows * kDepth), *b = arena.take<bf16>(32 * kDepth);
    float* sums = arena.take<float>(kVdpbf16Rows * 32);
    __builtin_memset(a, 0, uint64_t(arena.used));
    for (int64_t i = 0; i < rounds; ++i) {
      Vdpbf16Block block;
      block.load_from(sums, 32);
      block.add<kDepth, 2, 64>(a, b, b + 32, kDepth / 2);
      block.store_to(sums, 32);
    }
    return rounds * kVdpbf16Rows * 32 * kDepth * 2;
  }
#endif
#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
  if (dtype == kInt8) {
    constexpr int64_t kBytes = 512;
    ScratchArena arena{static_cast<char*>(executor.scratch((kVnniRows + 32) * kBytes + kVnniRows * 32 * 4))};
    uint8_t* a = arena.take<uint8_t>(kVnniRows * kBytes);
    int8_t* b = arena.take<int8_t>(32 * kBytes);
    int32_t* sums = arena.take<int32_t>(kVnniRows * 32);
    __builtin_memset(a, 0, uint64_t(arena.used));
    for (int64_t i = 0; i < rounds; ++i) vnni_block(a, b, kBytes / 4, sums, 32, sums);
    return rounds * kVnniRows * 32 * kBytes * 2;
  }
#elif defined(INTERNVIT_AVX2_ALONE)
  if (dtype == kInt8) {
    constexpr int64_t kDepth = 256;
    ScratchArena arena{static_cast<char*>(executor.scratch((kMaddRows + 32) * kDepth * 2 + kMaddRows * 32 * 4))};
    int16_t *a = arena.take<int16_t>(kMaddRows * kDepth), *b = arena.take<int16_t>(32 * kDepth);
    int32_t* sums = arena.take<int32_t>(kMaddRows * 32);
    __builtin_memset(a, 0, uint64_t(arena.used));
    for (int64_t i = 0; i < rounds; ++i)
      for (int64_t half = 0; half < 32; half += 16)
        madd_block(a, b + half * 2, kDepth / 2, sums + half, 32, sums + half);
    return rounds * kMaddRows * 32 * kDepth * 2;
  }
#endif
  constexpr int64_t kDepth = 128, kColumns = kBlockVectors * kLanes;
  ScratchArena arena{
      static_cast<char*>(executor.scratch((kBlockRows * kDepth + kColumns * kDepth + kBlockRows * kColumns) * 4))};
  float *a = arena.take<float>(kBlockRows * kDepth), *b = arena.take<float>(kColumns * kDepth);
  float* sums = arena.take<float>(kBlockRows * kColumns);
  __builtin_memset(a, 0, uint64_t(arena.used));
  for (int64_t i = 0; i < rounds; ++i)
    multiply(kBlockRows, kColumns, kDepth, {a, kDepth, 1}, row_major(b, kColumns), sums, kColumns, true);
  return rounds * kBlockRows * kColumns * kDepth * 2;
}

void peak(const PeakParams& p, const Executor& executor) {
  parallel(executor, p.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) p.flops[i] = peak_of_thread(p.dtype, p.rounds, executor);
  });
}

}  // namespace internvit::INTERNVIT_ISA
