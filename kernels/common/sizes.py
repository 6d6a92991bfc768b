"""Integer arithmetic of launches in plain Python: Triton's own functions, which kernels call too, take 2 us a call."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not less than n >= 1."""
    return 1 << (n - 1).bit_length()
