// The kernels compiled for: AVX-512 F, BW, DQ, VL. Its flags stand in setup.py.
#define INTERNVIT_ISA avx512
#define INTERNVIT_KERNELS kAvx512Kernels
#include "cpu/isa/unit.inc"
