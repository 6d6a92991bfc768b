// Which of the units in this library this machine can run, and what does not depend on the instruction set.
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace internvit {

#if defined(__x86_64__)
// A library may be built without some of them (INTERNVIT_CPU_UNITS): their addresses are null.
extern const Kernels kAvx2Kernels __attribute__((weak));
extern const Kernels kAvx512Kernels __attribute__((weak));
extern const Kernels kAvx512VnniKernels __attribute__((weak));
extern const Kernels kAvx512Bf16Kernels __attribute__((weak));
extern const Kernels kAmxKernels __attribute__((weak));
#endif

namespace {

#if defined(__x86_64__)

bool bit(uint32_t value, int index) { return value >> index & 1; }

// A CPU may have registers that the operating system does not save: XCR0 says which it does.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux hands tiles out on request only, to the whole process at once.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Supported {
  const Kernels* list[7] = {};
  int count = 0;

  void add(const Kernels* unit) {
    if (unit) list[count++] = unit;
  }

  Supported() {
    add(&kGenericKernels);
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = bit(c, 12), os_saves = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
    if (!os_saves || !avx || !fma || !f16c || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const uint64_t state = saved_state();
    if ((state & 0x6) != 0x6 || !bit(b, 5)) return;  // xmm, ymm; AVX2
    add(&kAvx2Kernels);
    const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);  // F, DQ, BW, VL
    if ((state & 0xe0) != 0xe0 || !avx512) return;                             // opmask, zmm
    add(&kAvx512Kernels);
    if (!bit(c, 11)) return;  // AVX512-VNNI
    add(&kAvx512VnniKernels);
    const bool amx = bit(d, 22) && bit(d, 24) && bit(d, 25);             // AMX-BF16, -TILE, -INT8
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !bit(a, 5)) return;  // AVX512-BF16
    add(&kAvx512Bf16Kernels);
    if ((state & 0x60000) == 0x60000 && amx && tiles_permitted()) add(&kAmxKernels);
  }
};

#else

struct Supported {
  const Kernels* list[2] = {&kGenericKernels, nullptr};
};

#endif

}  // namespace

const Kernels* const* supported_kernels() {
  static const Supported supported;
  return supported.list;
}

int64_t norm_backward_chunks(int64_t rows) {
  // 16 rows a chunk at least, and no more chunks than keep 64 threads busy: `partial` is read once more.
  const int64_t chunks = (rows + 15) / 16;
  return chunks < 64 ? chunks : 64;
}

int64_t packed_weight_size(int64_t out_features, int64_t in_features) {
  return (out_features + 31) / 32 * 32 * ((in_features + 31) / 32 * 32);
}

int64_t packed_weight_int8_size(int64_t out_features, int64_t in_features, bool grouped) {
  // 32 rows of a panel by 64 of depth, and an int32 for each row; with groups an int32 and a float for each.
  const int64_t groups = (in_features + kInt8GroupSize - 1) / kInt8GroupSize;
  return (out_features + 31) / 32 * 32 * ((in_features + 63) / 64 * 64 + (grouped ? groups * 8 : 4));
}

}  // namespace internvit
