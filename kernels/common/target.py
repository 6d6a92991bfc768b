"""What launch rules know of a device: its matrix instructions, shared memory and multiprocessors."""

import functools
from dataclasses import dataclass

import torch
from triton.runtime import driver

MIN_COMPUTE_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Target:
    """A device as launch rules see it.

    Attributes:
        name: sm_90, gfx942, ...
        multiprocessors: persistent kernels start as many programs as these hold at a time.
        shared_bytes: the most shared memory one program may hold.
        warp_size: threads of a warp.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    warp_size: int = 32

    def __hash__(self) -> int:  # configurations are looked up by target at each launch: the fields' takes 0.6 us
        return hash(self.name)

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def matrix_instructions(self) -> str:
        """The family that Triton compiles matrix products to: mma, wgmma, tcgen05, mfma or wmma.

        tcgen05 keeps accumulators in tensor memory, wgmma reads its operands from shared memory and works on 64 rows a
        warp group, mma and wmma keep operands and accumulators in registers. mfma has 512 registers a lane. Consumer
        Blackwell (sm_120) has mma alone.
        """
        if self.is_amd:
            return "mfma" if self.name.startswith("gfx9") else "wmma"
        return {9: "wgmma", 10: "tcgen05"}.get(self.compute_capability // 10, "mma")

    @property
    def multiplies_float8(self) -> bool:
        """Whether its matrix instructions take float8_e4m3fn; gfx942 has another float8, with a bias of 8."""
        if self.is_amd:
            return self.name.startswith(("gfx95", "gfx12"))
        return not self.name.startswith("sm_") or self.compute_capability >= 89  # the interpreter does

    @property
    def compute_capability(self) -> int:
        """80 for sm_80; the interpreter counts as the least that is supported."""
        return int(self.name.removeprefix("sm_")) if self.name.startswith("sm_") else 80


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", 108, 163 * 1024),  # A100
        Target("sm_86", 84, 99 * 1024),  # A10, A40, RTX 3090
        Target("sm_89", 128, 99 * 1024),  # L4, L40S, RTX 4090
        Target("sm_90", 132, 227 * 1024),  # H100
        Target("sm_100", 148, 227 * 1024),  # B200
        Target("sm_120", 170, 99 * 1024),  # RTX 5090, RTX PRO 6000
        Target("gfx90a", 104, 64 * 1024, 64),  # MI250X, one of two dies
        Target("gfx942", 304, 64 * 1024, 64),  # MI300X
        Target("gfx950", 256, 160 * 1024, 64),  # MI355X
        Target("gfx1100", 48, 64 * 1024, 32),  # RX 7900 XTX; a multiprocessor is a pair of compute units
    )
}
INTERPRETER = Target("interpreter", 4, 227 * 1024)  # few programs: partial rows are summed, tests stay short


@functools.cache
def target_of_device(index: int) -> Target:
    shared_bytes = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    properties = torch.cuda.get_device_properties(index)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    return Target(name, properties.multi_processor_count, shared_bytes, properties.warp_size)


def unsupported_reason(index: int) -> str | None:
    """Why GPU number `index` cannot run these kernels; None where it can."""
    if torch.version.hip or torch.cuda.get_device_capability(index) >= MIN_COMPUTE_CAPABILITY:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return (
        f"it needs compute capability 8.0 or higher, GPU {index} has {major}.{minor}: "
        "Triton has no tensor cores there, spills registers and wants more shared memory than there is"
    )
