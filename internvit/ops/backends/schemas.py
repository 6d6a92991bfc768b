"""The schemas of the raw ops: setup.py compiles them into the libraries, which load without Python."""

from internvit.ops.core.registration import OPS

_CPU_OPS = (
    # Linears with a packed weight.
    "packs_linear(ScalarType dtype) -> bool",
    "pack_weight(Tensor weight) -> Tensor",
    "linear_packed(Tensor x, Tensor packed_weight, int out_features, Tensor? bias, Tensor? residual, bool gelu)"
    " -> Tensor",
    # int8 Linears; packed_weight is as pack_weight_int8 returns it.
    "multiplies_int8() -> bool",
    "pack_weight_int8(Tensor weight_q, Tensor? group_ratio=None) -> Tensor",
    "linear_int8_packed(Tensor x_q, Tensor x_scale, Tensor packed_weight, Tensor weight_scale, Tensor? bias,"
    " Tensor? x_zero, Tensor? residual, bool gelu, ScalarType dtype) -> Tensor",
    "linear_int8_dynamic(Tensor x, Tensor packed_weight, Tensor weight_scale, Tensor? bias, bool gelu) -> Tensor",
    "mlp_int8(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor fc1_weight, Tensor fc1_scale, Tensor? fc1_bias,"
    " Tensor fc2_weight, Tensor fc2_scale, Tensor? fc2_bias, ScalarType dtype) -> Tensor",
    # The instruction set in use, for tests and benchmarks.
    "instruction_sets() -> str",
    "use_instruction_set(str name) -> str",
    "peak(ScalarType dtype, int rounds, int threads) -> int",
)
"""Raw ops of `internvit_cpu` that are no public op's."""


def schemas(library: str) -> dict[str, str]:
    """The raw ops of `library` by name: those whose op files name its backend in `compiled`, and its private ones."""
    backend = library.removeprefix("internvit_")
    stated = {name: op.raw_schema for name, op in OPS.items() if backend in op.compiled}
    private = _CPU_OPS if backend == "cpu" else ()
    return stated | {schema[: schema.index("(")]: schema for schema in private}
