// Attention for bf16 with VDPBF16PS, on what attention_bf16.h describes.
//
// A task packs K and V of a head once; a unit is a strip of 12 queries. Keys go by in blocks of 512: their scores are
// turned into probabilities in the registers they were summed in and leave for L1 as bf16; then the block's product
// with V is added to the strip's output. K and V stream from L2, 64 bytes every six cycles.
//
// The output is divided by the sum of the probabilities as rounded: their weights add up to 1, and a lone key's value
// comes back to the bit. The log-sum-exp takes the sum before rounding.
#pragma once

#include "cpu/ops/attention_bf16.h"
#include "cpu/simd/vdpbf16.h"

namespace internvit::INTERNVIT_ISA {

constexpr int64_t kKeyBlock = 512, kMaxHeadDim = 128;  // keys of a block; the largest head dimension

struct AttentionAvx512Bf16Scratch : PackedHead {
  bf16* queries;               // [12][128]
  bf16* probabilities;         // [12][512]
  float* out;                  // [12][D]
  float *sums, *rounded_sums;  // [12][16 lanes]
  float* shift;                // [12]
  int64_t bytes;
  AttentionAvx512Bf16Scratch(ScratchArena arena, int64_t n_keys, int64_t head_dim)
      : PackedHead(arena, n_keys, head_dim) {
    queries = arena.take<bf16>(kVdpbf16Rows * kMaxHeadDim);
    probabilities = arena.take<bf16>(kVdpbf16Rows * kKeyBlock);
    out = arena.take<float>(kVdpbf16Rows * depth * 32);
    sums = arena.take<float>(kVdpbf16Rows * kLanes);
    rounded_sums = arena.take<float>(kVdpbf16Rows * kLanes);
    shift = arena.take<float>(kVdpbf16Rows);
    bytes = arena.used;
  }
};

// The scores of one group of keys, before key_scale.
INTERNVIT_INLINE void vdpbf16_scores(const AttentionAvx512Bf16Scratch& s, int64_t group, Vdpbf16Block& block) {
  const bf16* keys = s.keys + group * 2 * s.depth * kTile;
  block.zero();
  for (int64_t d = 0; d < s.depth; ++d)
    block.add<kMaxHeadDim, 2, 32>(s.queries + d * 32, keys + d * kTile, keys + (s.depth + d) * kTile, 16);
}

// Each row's exact maximum of score * key_scale, into shift.
inline void exact_shift_avx512bf16(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s) {
  Vec top[kVdpbf16Rows];
  for (Vec& t : top) t = broadcast(-__builtin_inff());
  for (int64_t g = 0; g < s.groups; ++g) {
    Vdpbf16Block block;
    vdpbf16_scores(s, g, block);
    const uint32_t there = last_group_mask(p.keys, g);
    for (int half = 0; half < 2; ++half) {
      const Vec key_scale = load(s.key_scale + g * kGroup + half * 16);
      const __mmask16 lanes = __mmask16(there >> half * 16);
      for (int64_t i = 0; i < kVdpbf16Rows; ++i) {
        const __m512 x = _mm512_mul_round_ps(block.acc[i][half], key_scale.v, 8);
        // NaN stays: max returns its second operand where either is NaN, and a NaN on the left is put back.
        const __m512 higher = _mm512_mask_max_ps(top[i].v, lanes, top[i].v, x);
        top[i] = {_mm512_mask_mov_ps(higher, _mm512_cmp_ps_mask(top[i].v, top[i].v, _CMP_UNORD_Q), top[i].v)};
      }
    }
  }
  for (int64_t i = 0; i < kVdpbf16Rows; ++i) {
    const bool nan = _mm512_cmp_ps_mask(top[i].v, top[i].v, _CMP_UNORD_Q);
    s.shift[i] = nan ? __builtin_nanf("") : max_lane(top[i]);
  }
}

template <bool kExact>
void attention_pass_avx512bf16(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s) {
  constexpr int64_t kGroupsOfBlock = kKeyBlock / kGroup;
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __builtin_memset(s.sums, 0, sizeof(float) * kVdpbf16Rows * kLanes);
  __builtin_memset(s.rounded_sums, 0, sizeof(float) * kVdpbf16Rows * kLanes);
  for (int64_t first = 0; first < s.groups; first += kGroupsOfBlock) {
    const int64_t groups = min_of(kGroupsOfBlock, s.groups - first);
    for (int64_t g = 0; g < groups; ++g) {
      Vdpbf16Block block;
      vdpbf16_scores(s, first + g, block);
      const float* key_scale = s.key_scale + (first + g) * kGroup;
      const Vec left_scale = load(key_scale), right_scale = load(key_scale + 16);
      const uint32_t there = last_group_mask(p.keys, first + g);
#pragma GCC unroll 12
      for (int i = 0; i < kVdpbf16Rows; ++i) {
        const Vec shift = broadcast(s.shift[i]);
        Vec left = probability<kExact>({block.acc[i][0]}, left_scale, shift);
        Vec right = probability<kExact>({block.acc[i][1]}, right_scale, shift);
        left = {_mm512_maskz_mov_ps(__mmask16(there), left.v)};
        right = {_mm512_maskz_mov_ps(__mmask16(there >> 16), right.v)};
        const __m512i pair = narrow_pair(left, right);
        float *sum = s.sums + i * kLanes, *rounded_sum = s.rounded_sums + i * kLanes;
        store(sum, load(sum) + (left + right));
        store(rounded_sum, {_mm512_dpbf16_ps(load(rounded_sum).v, (__m512bh)pair, ones)});
        _mm512_store_si512(s.probabilities + i * kKeyBlock + g * kGroup, pair);
      }
    }
    for (int64_t d = 0; d < s.depth; ++d) {
      float* out = s.out + d * kVdpbf16Rows * 32;
      Vdpbf16Block block;
      if (first == 0) {
        block.zero();
      } else {
        block.load_from(out, 32);
      }
      const bf16* values = s.values + (d * s.groups + first) * 2 * kTile;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t keys = min_of(kGroup, p.keys - (first + g) * kGroup);
        const bf16* v = values + g * 2 * kTile;
        block.add<kKeyBlock, 2, 32>(s.probabilities + g * kGroup, v, v + kTile, (keys + 1) / 2);
      }
      block.store_to(out, 32);
    }
  }
}

inline void attention_strip_avx512bf16(const AttentionParams& p, const AttentionAvx512Bf16Scratch& s, int64_t b,
                                       int64_t h, int64_t first, int64_t rows, float largest_key) {
  bool good = true;
  for (int64_t i = 0; i < kVdpbf16Rows; ++i) {
    bf16* query = s.queries + i * kMaxHeadDim;
    float bound = 0;
    if (i < rows) {
      bound = fold_query(p, b, h, first + i, s.depth, query, 32) * largest_key * 1.01f;
    } else {
      no_query(s.depth, query, 32);
    }
    good &= bound < kLargestBound;
    s.shift[i] = shift_for(bound);
  }
  if (good) {
    attention_pass_avx512bf16<false>(p, s);
    for (int64_t i = 0; i < rows; ++i) good &= sum(load(s.sums + i * kLanes)) > kLeastSum;
  }
  if (!good) {
    exact_shift_avx512bf16(p, s);
    attention_pass_avx512bf16<true>(p, s);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const float total = sum(load(s.sums + i * kLanes));
    const int64_t t = first + i;
    p.lse[(b * p.heads + h) * p.row_stride + t] =
        float(double(s.shift[i]) * double(kLn2) + __builtin_log(double(total)));
    bf16* out = static_cast<bf16*>(p.out) + ((b * p.tokens + t) * p.heads + h) * p.head_dim;
    const Vec inverse = broadcast(1.0f / sum(load(s.rounded_sums + i * kLanes)));
    for (int64_t d = 0; d < s.depth; ++d) {
      const float* accumulators = s.out + (d * kVdpbf16Rows + i) * 32;
      const __m512i pair = narrow_pair(load(accumulators) * inverse, load(accumulators + 16) * inverse);
      _mm512_mask_storeu_epi16(out + d * 32, half_mask(p.head_dim - d * 32), pair);
    }
  }
}

void attention_avx512bf16(const AttentionParams& p, const Executor& executor) {
  if (p.dtype != kBFloat16 || p.head_dim > kMaxHeadDim) return attention(p, executor);
  const int64_t bytes = AttentionAvx512Bf16Scratch(ScratchArena{nullptr}, p.keys, p.head_dim).bytes;
  for_images<kVdpbf16Rows>(
      p, executor, bytes, [](const AttentionParams& image, void* memory, int64_t begin, int64_t end) {
        if (image.keys == 0) return attention_without_keys<bf16>(image, kVdpbf16Rows, begin, end);
        const AttentionAvx512Bf16Scratch s(ScratchArena{static_cast<char*>(memory)}, image.keys, image.head_dim);
        float largest_key = 0;
        for_strips<kVdpbf16Rows>(
            begin, end, image.heads, image.tokens,
            [&](int64_t b, int64_t h) { largest_key = pack_head(image, s, b, h); },
            [&](int64_t b, int64_t h, int64_t first, int64_t rows) {
              attention_strip_avx512bf16(image, s, b, h, first, rows, largest_key);
            });
      });
}

}  // namespace internvit::INTERNVIT_ISA
