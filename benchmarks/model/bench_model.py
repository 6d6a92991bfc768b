"""InternViT end to end in bfloat16, next to transformers, torch.compile, zentorch, timm, OpenVINO and onnxruntime.

Random weights, the same in every model; the result of ours is judged against the reference in float32, and every one's
error to that stands beside its time. Ours in int8 quantises every block.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvit import InternViT, InternViTConfig, optimize_for_inference, reference
from internvit.benchmarks.harness import peers
from internvit.benchmarks.harness.cases import FORWARD, OURS, BenchmarkCase, Implementation, MissingPeerError, Setting
from internvit.benchmarks.harness.machine_limits import bfloat16_products
from internvit.inference import linear_int8
from internvit.numerics import product_violations, relative_error


@functools.lru_cache(maxsize=1)
def trained_like(config: InternViTConfig) -> dict[str, Tensor]:
    """Weights under which no activation dies or explodes: unit-variance Linears, norms near 1, LayerScale near 0.1."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, p in InternViT(config, device="meta").state_dict().items():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            found[name] = 1 + 0.1 * noise
        elif name.endswith(("ls1", "ls2")):
            found[name] = 0.1 + 0.02 * noise
        elif p.dim() > 1 and "embedding" not in name:
            found[name] = noise * p.shape[1] ** -0.5
        else:
            found[name] = 0.02 * noise
    return found


@functools.lru_cache(maxsize=2)
def rounded(config: InternViTConfig, device: str, dtype: torch.dtype, of: torch.dtype) -> dict[str, Tensor]:
    """`trained_like` weights rounded to `dtype` and held in `of`: one memory for all who take them as they are."""
    return {k: v.to(device, dtype).to(of) for k, v in trained_like(config).items()}


def in_float32(linear: nn.Linear, x: Tensor) -> Tensor:
    """linear(x) with float32 products and one rounding."""
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(x.float(), linear.weight.float(), bias).to(x.dtype)


def emulated_products(model: nn.Module) -> None:
    """Has the Linears of a bfloat16 model multiply in float32, in which its products are exact.

    For CPUs that emulate them: PyTorch takes minutes for those of a block.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(in_float32, module)  # type: ignore[method-assign]


def model_case(setting: Setting, name: str, images: int, size: int, layers: int, every_peer: bool) -> BenchmarkCase:
    dtype = torch.bfloat16
    config = InternViTConfig.from_name(name).replace(
        num_hidden_layers=layers, image_size=size, drop_path_rate=0.0, name=None
    )
    published = InternViTConfig.from_name(name).num_hidden_layers
    generator = setting.generator()
    # Without bfloat16 products nobody would run these in bfloat16. Weights are those of bfloat16 all the same.
    usual = dtype if bfloat16_products(setting.device) else torch.float32
    mark = "" if usual == dtype else " float32"

    def weights(of: torch.dtype = dtype) -> dict[str, Tensor]:
        return rounded(config, setting.device, dtype, of)

    def features(model: Callable[[Tensor], Any], of: torch.dtype = usual) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x.to(of)).last_hidden_state

    def ours(of: torch.dtype = dtype) -> InternViT:
        model = InternViT(config, device="meta")
        model.load_state_dict(weights(of), assign=True)
        return model.eval()

    def module() -> Callable[[Tensor], Tensor]:
        return features(ours(), dtype)

    def optimized(precision: str | None = None, of: torch.dtype = dtype) -> Callable[[Tensor], Tensor]:
        reason = linear_int8.unavailable_reason() if precision == "int8" else None
        if reason is not None:
            raise MissingPeerError(reason)
        model = optimize_for_inference(ours(of), precision=precision, skip=() if precision == "int8" else None)
        return features(model, of)

    def transformers() -> Callable[[Tensor], Tensor]:
        return features(peers.transformers_model(config, weights(usual)))

    def compiled() -> Callable[[Tensor], Tensor]:
        return features(peers.freezing(peers.transformers_model(config, weights(usual))))

    def zentorch() -> Callable[[Tensor], Tensor]:
        return features(peers.zentorch(peers.transformers_model(config, weights(usual))))

    def timm() -> Callable[[Tensor], Tensor]:
        model = peers.timm_model(config, weights(usual))
        return lambda x: model.forward_features(x.to(usual))

    def openvino(precision: torch.dtype = usual) -> Callable[[Tensor], Tensor]:
        return peers.openvino(peers.transformers_model(config, weights()), inputs()[0], precision)

    def onnxruntime() -> Callable[[Tensor], Tensor]:
        return peers.onnxruntime(peers.transformers_model(config, weights()), inputs()[0])

    def plain(pixels: Tensor, of: torch.dtype) -> Tensor:
        model = reference.InternViT(config).to(setting.device, of).eval()
        model.load_state_dict(weights(of))
        if of == dtype != usual:
            emulated_products(model)
        with torch.no_grad():
            return model(pixels.to(of)).last_hidden_state

    @functools.lru_cache(maxsize=1)
    def truth(pixels: Tensor) -> Tensor:
        return plain(pixels, torch.float32)

    def violations(result: Tensor, inputs: tuple[Tensor]) -> list[str]:
        return product_violations(result, truth(inputs[0]), plain(inputs[0], dtype), 1.1)

    def inputs() -> tuple[Tensor]:
        return (torch.randn(images, 3, size, size, generator=generator).to(setting.device, dtype),)

    def error(result: Tensor, inputs: tuple[Tensor]) -> float:
        return relative_error(result, truth(inputs[0]))

    name_of_int8 = f"{OURS} optimize_for_inference, int8"
    int8 = [Implementation(name_of_int8, functools.partial(optimized, "int8"), trains=False, most_error=0.03)]
    float32 = [
        Implementation(f"{OURS} optimize_for_inference{mark}", functools.partial(optimized, None, usual), trains=False)
    ]
    variants = [
        Implementation(f"{OURS} optimize_for_inference", optimized, trains=False),
        *(int8 if setting.device == "cpu" else []),
        *(float32 if mark else []),
        Implementation(f"{OURS} InternViT", module),
        Implementation(f"transformers SDPA{mark}", transformers),
        Implementation(f"timm{mark}", timm),
    ]
    if every_peer:
        name_of_compiled = f"transformers{mark}, torch.compile freezing"
        variants.append(Implementation(name_of_compiled, compiled, trains=False, compiles=True))
        if setting.device == "cpu":
            variants.append(Implementation(f"zentorch{mark}", zentorch, trains=False, compiles=True))
            variants.append(Implementation(f"OpenVINO{mark or ' bf16'}", openvino, trains=False))
            variants.append(Implementation("OpenVINO int8", functools.partial(openvino, torch.int8), trains=False))
            variants.append(Implementation("onnxruntime float32", onnxruntime, trains=False))
    tokens = 1 + (size // config.patch_size) ** 2
    from internvit.benchmarks.model.bench_block import flops_of

    depth = "" if layers == published else f", {layers} of {published} layers"
    return BenchmarkCase(
        "model",
        f"{name.split('-')[1].upper()} batch {images}, {size} px{depth}",
        dtype,
        inputs,
        tuple(variants),
        violations,
        flops={FORWARD: layers * flops_of(config, images, tokens)},
        sizes={"batch": images, "tokens": tokens, "size": size, "layers": layers},
        error=error,
    )


def cases(setting: Setting) -> list[BenchmarkCase]:
    """Every peer at 448 px; depth is cut where images are many or large, since time is linear in it."""
    small, large = "internvit-300m-448px", "internvit-6b-448px-v2.5"
    if setting.quick:
        return [model_case(setting, small, 1, 224, 2, False)]
    if setting.device.startswith("cuda"):
        cases = [
            (small, b, s, 24, s == 448)
            for s, batches in ((448, (1, 8, 32)), (224, (1, 32)), (896, (1,)))
            for b in batches
        ]
        cases += [(large, 1, 448, 6, False), (large, 8, 448, 6, False)]  # 45 layers' weights take minutes to draw
    else:
        cases = [
            (small, 1, 448, 24, True),
            (small, 4, 448, 6, True),
            (small, 1, 224, 24, False),
            (small, 1, 896, 2, False),
        ]
    return [model_case(setting, *case) for case in cases]


def test_model(timed) -> None:
    timed()
