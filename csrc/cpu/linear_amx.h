// y = epilogue(x W^T + bias) for bf16, with AMX tiles; W is packed once, the epilogue runs before the only store.
//
// x is packed into tiles first, in a parallel pass of its own. Then a task has a range of panels (32 output features)
// and goes block by block: rows in blocks and depth in blocks of 1024, so that the x block (1.1 MB) stays in L2; within
// them depth in steps of 256, so that a panel's step (16 KiB) stays in L1 while the strips of 32 rows pass by. The sums
// between steps lie in a task's scratch as float32. The order of additions over the depth depends on the depth alone.
namespace internvit::INTERNVIT_ISA {

constexpr int64_t kPanel = 32, kDepthBlock = 1024, kDepthStep = 256, kRowBlock = 17;  // kRowBlock counts strips

inline void pack_weight_amx(const PackWeightParams& p, const Executor& executor) {
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel, depth = (p.in_features + 31) / 32;
  parallel(executor, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t half = 0; half < 2; ++half) {
          const int64_t first = panel * kPanel + half * 16, rows = min_of(16, p.out_features - first);
          const bf16* w = p.weight + (rows > 0 ? first * p.in_features : 0) + d * 32;
          pack_columns(w, p.in_features, rows, p.in_features - d * 32, p.packed + ((panel * depth + d) * 2 + half) * kTile);
        }
      }
    }
  });
}

// x [rows, K] to A tiles [strip][K / 32][2].
inline void pack_rows(const LinearParams& p, int64_t strip) {
  const int64_t depth = (p.in_features + 31) / 32;
  bf16* tiles = p.packed_x + strip * depth * 2 * kTile;
  for (int64_t i = 0; i < kStrip; ++i) {
    const int64_t row = strip * kStrip + i;
    bf16* out = tiles + i / 16 * kTile + i % 16 * 32;
    for (int64_t d = 0; d < depth; ++d) {
      const __mmask32 mask = row < p.rows ? half_mask(p.in_features - d * 32) : __mmask32(0);
      _mm512_store_si512(out + d * 2 * kTile, _mm512_maskz_loadu_epi16(mask, p.x + row * p.x_stride + d * 32));
    }
  }
}

// One strip times one panel over `depth` tiles of 32; `sums` [32][32] is read unless this is the first step.
INTERNVIT_INLINE void multiply_tiles(const bf16* a, const bf16* b, int64_t depth, float* sums, bool first, const bf16* next) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    _tile_loadd(2, sums + 512, 128);
    _tile_loadd(3, sums + 528, 128);
  }
  for (int64_t d = 0; d < depth; ++d) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_loadd(7, b + kTile, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    // x streams from L2 and the hardware does not run ahead far enough: ask for the tiles two steps on, and the next
    // strip's sums (1.6 to 1.85 TFLOP/s over the four shapes, two cores of a busy Xeon with AMX).
    const bf16* ahead = d + 2 < depth ? a + 4 * kTile : next + (d + 2 - depth) * 2 * kTile;
    for (int i = 0; i < 32; ++i) _mm_prefetch(reinterpret_cast<const char*>(ahead + i * 32), _MM_HINT_T0);
    for (int i = 0; i < 8; ++i) _mm_prefetch(reinterpret_cast<const char*>(sums + 1024 + d * 128 + i * 16), _MM_HINT_T0);
    a += 2 * kTile;
    b += 2 * kTile;
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 512, 128);
  _tile_stored(3, sums + 528, 128);
}

INTERNVIT_INLINE void finish_strip(const LinearParams& p, int64_t strip, int64_t panel, const float* sums) {
  const int64_t column = panel * kPanel, columns = min_of(kPanel, p.out_features - column);
  const int64_t left = min_of(16, columns), right = columns - left;
  Vec bias[2] = {broadcast(0.0f), broadcast(0.0f)};
  if (p.bias) {
    bias[0] = load(p.bias + column, left);
    if (right > 0) bias[1] = load(p.bias + column + 16, right);
  }
  for (int64_t i = 0; i < min_of(kStrip, p.rows - strip * kStrip); ++i) {
    const int64_t row = strip * kStrip + i;
    Vec y[2] = {load(sums + i * 32) + bias[0], load(sums + i * 32 + 16) + bias[1]};
    if (p.residual) {
      const bf16* residual = p.residual + row * p.residual_stride + column;
      y[0] = y[0] + load(residual, left);
      if (right > 0) y[1] = y[1] + load(residual + 16, right);
    }
    __m512i packed = narrow_pair(y[0], y[1]);
    if (p.gelu) {  // of the pre-activation as bf16 holds it
      const Vec z[2] = {{widen(_mm512_castsi512_si256(packed))}, {widen(_mm512_extracti64x4_epi64(packed, 1))}};
      packed = narrow_pair(gelu_of<bf16>(z[0]), gelu_of<bf16>(z[1]));
    }
    _mm512_mask_storeu_epi16(p.y + row * p.out_features + column, half_mask(columns), packed);
  }
}

inline void linear_amx(const LinearParams& p, const Executor& executor) {
  const int64_t strips = (p.rows + kStrip - 1) / kStrip, depth = (p.in_features + 31) / 32;
  const int64_t panels = (p.out_features + kPanel - 1) / kPanel, row_blocks = (strips + kRowBlock - 1) / kRowBlock;
  parallel(executor, strips, 4, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) pack_rows(p, strip);
  });
  // Panels change slowest over the units, so that two tasks share no weights, and rows split where there are many tasks.
  parallel(executor, panels * row_blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first_panel = begin / row_blocks, last_panel = (end + row_blocks - 1) / row_blocks;
    float* all_sums = static_cast<float*>(executor.scratch((last_panel - first_panel) * kRowBlock * 4096));
    const TileScope tiles;
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t first_strip = strips * block / row_blocks, last_strip = strips * (block + 1) / row_blocks;
      for (int64_t outer = 0; outer < depth; outer += kDepthBlock / 32) {
        const int64_t outer_end = min_of(depth, outer + kDepthBlock / 32);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t unit = panel * row_blocks + block;
          if (unit < begin || unit >= end) continue;
          float* sums = all_sums + (panel - first_panel) * kRowBlock * 1024;
          for (int64_t d = outer; d < outer_end; d += kDepthStep / 32) {
            const int64_t step = min_of(kDepthStep / 32, outer_end - d);
            const bf16* b = p.packed_weight + (panel * depth + d) * 2 * kTile;
            for (int64_t strip = first_strip; strip < last_strip; ++strip) {
              const bf16* a = p.packed_x + (strip * depth + d) * 2 * kTile;
              const bf16* next = strip + 1 < last_strip ? a + depth * 2 * kTile : a;
              float* strip_sums = sums + (strip - first_strip) * 1024;
              multiply_tiles(a, b, step, strip_sums, d == 0, next);
              if (d + step == depth) finish_strip(p, strip, panel, strip_sums);
            }
          }
        }
      }
    }
  });
}

}  // namespace internvit::INTERNVIT_ISA
