// The AMX unit on emulated tiles. It takes the place of the AVX512-BF16 unit, whose instructions it needs besides.
#include "tiles.h"
#define INTERNVIT_ISA amx_emulated
#define INTERNVIT_KERNELS kAvx512Bf16Kernels
#include "cpu/isa/unit.inc"
