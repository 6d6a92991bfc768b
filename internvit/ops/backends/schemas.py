"""The schemas of the raw ops: setup.py compiles them into the libraries, which load without Python."""

from internvit.ops.core.registration import OPS as DEFINED

ROW_OPS = (
    "rms_norm",
    "layer_norm",
    "layer_scale_residual",
    "layer_scale_residual_norm",
    "qk_norm_stats",
    "qk_norm",
    "gelu",
)
"""Ops that both libraries have, each with its `_backward`."""

RAW_SCHEMAS = {
    # Backward ops that fill gradients which the caller made, so that three of them may be views of one packed buffer.
    "qk_norm_stats_backward": (
        "qk_norm_stats_backward(Tensor grad_rstd_q, Tensor grad_rstd_k, Tensor q, Tensor k, Tensor rstd_q,"
        " Tensor rstd_k, Tensor(a!) grad_q, Tensor(b!) grad_k) -> ()"
    ),
    "attention_backward": (
        "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
        " Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q, Tensor? rstd_k, Tensor(a!) grad_q, Tensor(b!) grad_k,"
        " Tensor(c!) grad_v) -> (Tensor grad_q_weight, Tensor grad_k_weight, Tensor row_dot_q, Tensor row_dot_k)"
    ),
    # Linears with a packed weight.
    "packs_linear": "packs_linear(ScalarType dtype) -> bool",
    "pack_weight": "pack_weight(Tensor weight) -> Tensor",
    "linear_packed": (
        "linear_packed(Tensor x, Tensor packed_weight, int out_features, Tensor? bias, Tensor? residual, bool gelu)"
        " -> Tensor"
    ),
    # The instruction set in use, for tests and benchmarks.
    "instruction_sets": "instruction_sets() -> str",
    "use_instruction_set": "use_instruction_set(str name) -> str",
    "peak": "peak(ScalarType dtype, int rounds, int threads) -> int",
}
"""Schemas of raw ops that are not the public op's without `str backend`."""

_CPU_OPS = ("packs_linear", "pack_weight", "linear_packed", "instruction_sets", "use_instruction_set", "peak")

OPS: dict[str, tuple[str, ...]] = {
    "internvit_cuda": tuple(op for name in ROW_OPS for op in (name, f"{name}_backward")),
    "internvit_cpu": (
        *(op for name in (*ROW_OPS, "attention") for op in (name, f"{name}_backward")),
        *_CPU_OPS,
    ),
}
"""The raw ops of each library."""


def schemas(library: str) -> list[str]:
    """The schemas of `library`'s raw ops: the public op's without `str backend`, or the one in RAW_SCHEMAS."""
    return [RAW_SCHEMAS.get(op) or DEFINED[op].schema for op in OPS[library]]
