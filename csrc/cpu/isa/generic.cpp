// The kernels compiled for: plain C++17, for every machine. Its flags stand in setup.py.
#define INTERNVIT_ISA generic
#define INTERNVIT_KERNELS kGenericKernels
#include "cpu/isa/unit.inc"
