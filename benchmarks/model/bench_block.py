"""One block of the 300M and of the 6B, forward and backward, next to transformers' and timm's with SDPA.

Where a CPU emulates bfloat16, peers compute in float32, as in bench_model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from internvit import InternViT, InternViTConfig, reference
from internvit.benchmarks.harness import peers
from internvit.benchmarks.harness.cases import BOTH, FORWARD, OURS, BenchmarkCase, Implementation, Setting
from internvit.benchmarks.harness.machine_limits import bfloat16_products
from internvit.benchmarks.model.bench_model import emulated_products, trained_like
from internvit.numerics import product_violations, relative_error


class _Plain(nn.Module):
    """The reference's block without its attention map."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


class In(nn.Module):
    """A block that computes in `dtype`, from and to tensors of another."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = block.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.to(self.dtype)).to(x.dtype)


VARIANTS = ("internvit-300m-448px", "internvit-6b-448px-v2.5")


def flops_of(config: InternViTConfig, images: int, tokens: int) -> float:
    """Of one block's forward: four Linears and two products of attention."""
    linears = 2.0 * tokens * config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
    return images * (linears + 4.0 * tokens**2 * config.hidden_size)


def block_case(setting: Setting, name: str, images: int, tokens: int, dtype: torch.dtype) -> BenchmarkCase:
    config = InternViTConfig.from_name(name, num_hidden_layers=1, drop_path_rate=0.0)
    generator = setting.generator()

    def weights() -> dict[str, Tensor]:
        return {k: v.to(setting.device, dtype) for k, v in trained_like(config).items()}

    def ours() -> nn.Module:
        model = InternViT(config, device="meta")
        model.load_state_dict(weights(), assign=True)
        return model.eval().encoder.layers[0]

    def eager() -> nn.Module:
        model = reference.InternViT(config).to(setting.device, dtype)
        model.load_state_dict(weights())
        return _Plain(model.eval().encoder.layers[0])

    # Without bfloat16 products nobody would run these in bfloat16. Weights are those of bfloat16 all the same.
    usual = dtype if bfloat16_products(setting.device) else torch.float32
    mark = "" if usual == dtype else " float32"

    def transformers() -> nn.Module:
        return In(peers.transformers_model(config, weights()).encoder.layer[0], usual)

    def timm() -> nn.Module:
        return In(peers.timm_model(config, weights()).blocks[0], usual)

    def judges() -> tuple[nn.Module, nn.Module]:
        """The plain block in `dtype` and in float64."""
        emulation, truth = eager(), eager().double()
        if usual != dtype:
            emulated_products(emulation)
        return emulation, truth

    def violations(result: Tensor, inputs: tuple[Tensor]) -> list[str]:
        with torch.no_grad():
            plain, exact = judges()
            emulation, truth = plain(inputs[0]), exact(inputs[0].double())
        return product_violations(result, truth, emulation, 1.1)

    def gradient_violations(grads: tuple[Tensor, ...], inputs: tuple[Tensor], incoming: tuple[Tensor]) -> list[str]:
        plain, exact = judges()
        (emulation,) = torch.autograd.grad(plain(inputs[0]), inputs[0], incoming)
        wide = inputs[0].detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(exact(wide), wide, incoming[0].double())
        error, allowed = relative_error(grads[0], truth), 1.1 * relative_error(emulation, truth)
        return [] if error <= allowed else [f"gradient: relative error {error:.2e}, allowed {allowed:.2e}"]

    def inputs() -> tuple[Tensor]:
        return (torch.randn(images, tokens, config.hidden_size, generator=generator).to(setting.device, dtype),)

    builds: dict[str, Callable[[], nn.Module]] = {
        f"{OURS} block": ours,
        f"transformers SDPA{mark}": transformers,
        f"timm{mark}": timm,
        f"eager{mark}": lambda: In(eager(), usual),
    }
    flops = flops_of(config, images, tokens)
    return BenchmarkCase(
        "block",
        f"{name.split('-')[1].upper()} {images}x{tokens}x{config.hidden_size}",
        dtype,
        inputs,
        tuple(Implementation(name, build) for name, build in builds.items()),
        violations,
        gradient_violations,
        flops={FORWARD: flops, BOTH: 3 * flops},
        sizes={"batch": images, "tokens": tokens},
    )


def cases(setting: Setting) -> list[BenchmarkCase]:
    tokens = 257 if setting.quick else 1025
    batches = (1, 8) if setting.device.startswith("cuda") else (1,)
    names = VARIANTS[:1] if setting.quick else VARIANTS
    return [block_case(setting, name, images, tokens, torch.bfloat16) for name in names for images in batches]


def test_block(timed) -> None:
    timed()
