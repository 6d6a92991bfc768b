// The kernels compiled for: AVX-512 F, BW, DQ, VL, VNNI (Cascade Lake, Ice Lake). Its flags stand in setup.py.
#define INTERNVIT_ISA avx512_vnni
#define INTERNVIT_KERNELS kAvx512VnniKernels
#include "cpu/isa/unit.inc"
