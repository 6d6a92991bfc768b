// The kernels compiled for: AVX-512 F, BW, DQ, VL, BF16, VNNI (Zen 4 and 5, Cooper Lake). Its flags stand in setup.py.
#define INTERNVIT_ISA avx512_bf16
#define INTERNVIT_KERNELS kAvx512Bf16Kernels
#include "cpu/isa/unit.inc"
