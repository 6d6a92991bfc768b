// The kernels compiled for: AVX2, FMA and F16C. Its flags stand in setup.py.
#define INTERNVIT_ISA avx2
#define INTERNVIT_KERNELS kAvx2Kernels
#include "cpu/isa/unit.inc"
