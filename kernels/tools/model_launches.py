"""Every way of running a published model on a GPU, and the kernel launches that it makes.

What is compiled by the static profile, the budget and the tests, and measured by the tuner, comes from here.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import internvit
from internvit import InternViT, InternViTConfig
from internvit.config import VARIANTS
from internvit.kernels.common import launch
from internvit.kernels.common.launch import Launch
from internvit.kernels.common.target import Target
from internvit.kernels.tools.compile_only import Specialization, compile_only
from internvit.kernels.tools.roofline import kernel_work

LAYERS = 2  # a block after a block is all there is
BATCH = 2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def architectures() -> dict[str, InternViTConfig]:
    """One published configuration for each (width, heads, norm, QK-norm, image size)."""
    distinct = {
        (c.hidden_size, c.num_attention_heads, c.norm_type, c.qk_normalization, c.image_size): c
        for c in reversed(VARIANTS.values())
    }
    return {str(c.name): c for c in distinct.values()}


def tower(config: InternViTConfig, dtype: torch.dtype, layers: int = LAYERS, **changes: Any) -> InternViT:
    """The first blocks of a model, uninitialised."""
    config = config.replace(name=None, num_hidden_layers=layers, **{"drop_path_rate": 0.0, **changes})
    return InternViT(config, device="meta").to_empty(device="cpu").to(dtype)


def pixels(config: InternViTConfig, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.empty(BATCH, 3, *(size or (config.image_size,) * 2), dtype=dtype)


def _train(model: nn.Module, images: Tensor) -> None:
    output = model.train()(images)
    output = output if isinstance(output, Tensor) else output[0]
    output.float().sum().backward()


def _evaluate(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model.eval()(images)


def _sum_columns(model: nn.Module, images: Tensor) -> None:
    model.eval()(images, output_attentions="columns")
    # With gradients: on a CPU, where these tensors lie, images of a list go alone without.
    model([*images, images[0, :, : images.shape[2] // 2]], output_attentions="columns")


def _train_packed(model: nn.Module, images: Tensor) -> None:
    output: Any = model.train()([*images, images[0, :, : images.shape[2] // 2]])
    output.last_hidden_state.values.float().sum().backward()


def _optimize(model: InternViT, images: Tensor, fold_norms: bool = False) -> None:
    # As on a GPU: packed weights and a float32 stream by default are for CPUs, which these tensors lie on.
    optimized = internvit.optimize_for_inference(model.eval(), pack=False, residual_dtype=None, fold_norms=fold_norms)
    _evaluate(optimized, images)


@dataclass(frozen=True)
class Mode:
    """A way of running a model: what is done to it, and how it is called.

    Attributes:
        dtypes: in which it differs from others.
        changes: to the configuration.
        prepare: what a user does to the model first.
        run: called with the model and its pixels.
        size: of the image, the native one by default.
        autocast: the weights are float32, and products run in this dtype.
        backend: of the ops.
    """

    dtypes: tuple[torch.dtype, ...] = DTYPES
    changes: tuple[tuple[str, Any], ...] = ()
    prepare: Callable[[InternViT], Any] = lambda model: None
    run: Callable[[Any, Tensor], None] = _evaluate
    size: tuple[int, ...] = ()
    autocast: torch.dtype | None = None
    backend: str = "triton"

    def __call__(self, config: InternViTConfig, dtype: torch.dtype, layers: int = LAYERS) -> None:
        model = tower(config, dtype, layers, **dict(self.changes))
        self.prepare(model)
        autocast = torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)
        with internvit.backend(self.backend), autocast:
            self.run(model, pixels(config, dtype, *self.size))


def _keep_residual_in_float32(model: InternViT) -> None:
    model.residual_dtype = torch.float32


def _train_only(*names: str) -> Callable[[InternViT], None]:
    def freeze(model: InternViT) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in name for part in names))

    return freeze


class _LoRA(nn.Module):
    """A Linear with a low-rank update beside it, as peft's."""

    def __init__(self, base: nn.Linear, rank: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def _add_lora(model: InternViT) -> None:
    model.requires_grad_(False)
    layers: Any = model.encoder.layers
    for layer in layers:
        layer.attn.qkv, layer.mlp.fc2 = _LoRA(layer.attn.qkv), _LoRA(layer.mlp.fc2)


def _multiply(op: Any, rows: Sequence[Tensor], out: int, residual: Tensor | None = None, **settings: Any) -> Tensor:
    """A Linear of quantised rows: x_q, x_scale, x_zero."""
    x_q, scale, zero = rows
    weight, vector = x_q.new_empty(out, x_q.shape[-1]), scale.new_empty(out)
    zeros = (zero,) if op is internvit.ops.linear_int8 else ()
    product: Tensor = op(x_q, scale, weight, vector, vector, *zeros, residual, **settings)
    return product


def _quantized(to: torch.dtype, own_gemm: bool = False) -> Callable[[Any, Tensor], None]:
    """The ops of a block with operands of dtype `to`, as they follow one another."""

    def run(model: InternViT, images: Tensor) -> None:
        config, x = model.config, model.embeddings(images)
        float8 = to != torch.int8
        if float8 and own_gemm and not launch.target_of(images).multiplies_float8:
            return
        linear = internvit.ops.linear_fp8 if float8 else internvit.ops.linear_int8
        how: dict[str, Any] = {"symmetric": float8, "dtype": to}
        weight, stream = x.new_empty(config.hidden_size), {"dtype": x.dtype}
        layer_norm = config.norm_type == "layer_norm"
        rows: Sequence[Tensor]
        if layer_norm:
            rows = internvit.ops.layer_norm_quant(x, weight, weight, **how)
        else:
            rows = internvit.ops.rms_norm_quant(x, weight, **how)
        _multiply(linear, rows, 3 * config.hidden_size, **stream)
        branch = _multiply(linear, internvit.ops.per_token_quant(x, **how), config.hidden_size, **stream)
        add = internvit.ops.layer_scale_residual_norm_quant
        norm_bias = weight if layer_norm else None
        x, *rows = add(x, branch, weight, norm_bias, weight, norm_type=config.norm_type, **how)
        z = _multiply(linear, rows, config.intermediate_size, gelu=True, **stream)
        _multiply(linear, internvit.ops.gelu_quant(z, **how), config.hidden_size, x, **stream)

    return lambda model, images: torch.no_grad()(run)(model, images)


_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_FLOAT32 = (torch.float32,)
_BFLOAT16 = (torch.bfloat16,)
MODES: dict[str, Mode] = {
    "eval": Mode(),
    "optimize_for_inference": Mode(run=_optimize),
    "train": Mode(run=_train),
    "train, DropPath": Mode(changes=(("drop_path_rate", 0.1),), run=_train),
    "train, LayerScale folded": Mode(prepare=lambda m: m.set_layer_scale_folding(True), run=_train),
    "train, selective checkpointing": Mode(prepare=lambda m: m.set_gradient_checkpointing("selective"), run=_train),
    "train, block checkpointing": Mode(prepare=lambda m: m.set_gradient_checkpointing("block"), run=_train),
    "train, norms alone": Mode(prepare=_train_only("norm"), run=_train),
    "train, LayerScale alone": Mode(prepare=_train_only("ls1", "ls2"), run=_train),
    "train, qkv alone": Mode(prepare=_train_only("qkv"), run=_train),
    "train, LoRA": Mode(prepare=_add_lora, run=_train),
    "train, rounding of the reference": Mode(prepare=lambda m: m.set_rounding("reference"), run=_train),
    "eval, rounding of the reference": Mode(prepare=lambda m: m.set_rounding("reference")),
    "eval, wide image": Mode(size=(448, 532)),  # 1217 tokens: neither whole tiles nor one more
    "train, small image": Mode(run=_train, size=(70, 98)),  # 36 tokens
    "train, packed": Mode(run=_train_packed),
    "eval, column sums": Mode(run=_sum_columns),  # of a batch and of packed images
    "eval, float32 residual": Mode(_SIXTEEN_BITS, prepare=_keep_residual_in_float32),
    "optimize_for_inference, float32 residual": Mode(_SIXTEEN_BITS, prepare=_keep_residual_in_float32, run=_optimize),
    "train, float32 residual": Mode(_SIXTEEN_BITS, prepare=_keep_residual_in_float32, run=_train),
    "train, float32 residual, DropPath": Mode(
        _SIXTEEN_BITS, (("drop_path_rate", 0.1),), prepare=_keep_residual_in_float32, run=_train
    ),
    "eval, autocast": Mode(_FLOAT32, autocast=torch.bfloat16),
    "train, autocast": Mode(_FLOAT32, run=_train, autocast=torch.bfloat16),
    "eval, Triton GEMMs": Mode(backend="triton_gemm"),
    "optimize_for_inference, Triton GEMMs, norms folded": Mode(
        run=functools.partial(_optimize, fold_norms=True), backend="triton_gemm"
    ),
    "train, Triton GEMMs": Mode(run=_train, backend="triton_gemm"),
    "train, Triton GEMMs, LayerScale folded": Mode(
        prepare=lambda m: m.set_layer_scale_folding(True), run=_train, backend="triton_gemm"
    ),
    "int8": Mode(_BFLOAT16, run=_quantized(torch.int8)),
    "float8": Mode(_BFLOAT16, run=_quantized(torch.float8_e4m3fn)),
    "int8, Triton GEMMs": Mode(_BFLOAT16, run=_quantized(torch.int8, True), backend="triton_gemm"),
    "float8, Triton GEMMs": Mode(_BFLOAT16, run=_quantized(torch.float8_e4m3fn, True), backend="triton_gemm"),
    "eval, Triton GEMMs, autocast": Mode(_FLOAT32, autocast=torch.bfloat16, backend="triton_gemm"),
}


def _upstream_transformers(config: InternViTConfig, dtype: torch.dtype) -> nn.Module | None:
    from transformers import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    size: Any = (config.image_size, config.patch_size)
    upstream = InternVLVisionConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=LAYERS,
        norm_type=config.norm_type,
        attention_bias=config.qkv_bias,
        use_qk_norm=config.qk_normalization,
        image_size=[size[0]] * 2,
        patch_size=[size[1]] * 2,
    )
    with torch.device("meta"):
        model: nn.Module = InternVLVisionModel(upstream)
    return model.to_empty(device="cpu").to(dtype)


def _upstream_timm(config: InternViTConfig, dtype: torch.dtype) -> nn.Module | None:
    if config.norm_type != "layer_norm":
        return None
    import timm

    model = timm.create_model("vit_intern300m_patch14_448", depth=LAYERS, device="meta")
    return model.to_empty(device="cpu").to(dtype)


def _run_patched(
    build: Callable[[InternViTConfig, torch.dtype], nn.Module | None],
    run: Callable[[Any, Tensor], None],
    config: InternViTConfig,
    dtype: torch.dtype,
) -> None:
    model = build(config, dtype)
    if model is not None:
        with internvit.patch(model):
            run(model, pixels(config, dtype))


UPSTREAMS: dict[str, Callable[[InternViTConfig, torch.dtype], None]] = {
    f"patched {name}, {way}": functools.partial(_run_patched, build, run)
    for name, build in (("transformers", _upstream_transformers), ("timm", _upstream_timm))
    for way, run in (("eval", _evaluate), ("train", _train))
}


@dataclass
class KernelUse:
    """A kernel as models launch it.

    Attributes:
        modes: where it occurs, as "internvit-300m-448px bfloat16: train".
        bytes_moved, flops: the least work of its first launch (see `roofline`).
    """

    specialization: Specialization
    modes: list[str]
    bytes_moved: float
    flops: float


def modes_of(config: InternViTConfig, dtypes: Iterable[torch.dtype]) -> Iterator[tuple[str, Callable[[], None]]]:
    """(what a user does, the call) for each mode of one model in `dtypes`."""
    for dtype in dtypes:
        prefix = f"{config.name} {str(dtype).removeprefix('torch.')}"
        for name, mode in MODES.items():
            if dtype in mode.dtypes:
                yield f"{prefix}: {name}", functools.partial(mode, config, dtype)
        for name, run in UPSTREAMS.items():
            yield f"{prefix}: {name}", functools.partial(run, config, dtype)


def kernel_uses(
    target: Target,
    dtypes: Iterable[torch.dtype] = DTYPES,
    configs: Iterable[InternViTConfig] | None = None,
    only: str = "",
) -> list[KernelUse]:
    """The distinct kernels that models launch on `target`, in modes whose name the pattern `only` is found in."""
    uses: dict[Specialization, KernelUse] = {}
    for config in architectures().values() if configs is None else configs:
        for name, run in modes_of(config, tuple(dtypes)):

            def receive(one: Launch, specialization: Specialization, name: str = name) -> None:
                use = uses.get(specialization)
                if use is None:
                    tensors = [a for a in one.args if isinstance(a, Tensor)]
                    work = kernel_work(specialization.function, tensors)
                    use = uses[specialization] = KernelUse(specialization, [], *work)
                if name not in use.modes:
                    use.modes.append(name)

            if re.search(only, name):
                with compile_only(target, receive):
                    run()
    return list(uses.values())
