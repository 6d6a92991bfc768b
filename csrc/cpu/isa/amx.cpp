// The kernels compiled for: AVX-512 with BF16, and AMX bf16 tiles. Its flags stand in setup.py.
#define INTERNVIT_ISA amx
#define INTERNVIT_KERNELS kAmxKernels
#include "cpu/isa/unit.inc"
