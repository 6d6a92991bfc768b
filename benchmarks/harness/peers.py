"""Other people's code for the same work, imported where it is installed."""

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvit.benchmarks.harness.cases import MissingPeerError, Setting, needs
from internvit.benchmarks.harness.machine_limits import bfloat16_products
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.config import InternViTConfig

PIP = "pip install 'internvit[bench]'"


def liger(setting: Setting, name: str, eps: float = 1e-6) -> dict[str, Callable[[], Callable]]:
    """Liger's Triton norm as a peer; `name` is LigerRMSNorm or LigerLayerNorm."""

    def build() -> Callable:
        if not setting.device.startswith("cuda"):
            raise MissingPeerError("Liger's kernels need a GPU")
        needs("liger_kernel", PIP)
        from liger_kernel.ops import layer_norm, rms_norm

        if name == "LigerRMSNorm":
            return lambda x, weight: rms_norm.LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)
        return lambda x, weight, bias: layer_norm.LigerLayerNormFunction.apply(x, weight, bias, eps)

    return {name: build}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention on [B, N, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def sdpa_kernels(setting: Setting) -> dict[str, Callable[[], Callable]]:
    """Each of the kernels under PyTorch's attention on a GPU; the one that SDPA takes by itself is "SDPA"."""
    if not setting.device.startswith("cuda"):
        return {}

    def build(kernel: SDPBackend) -> Callable:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return sdpa(q, k, v)

        return run

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
    }
    return {f"SDPA {name}": functools.partial(build, kernel) for name, kernel in kernels.items()}


def flash_attn(setting: Setting) -> Mapping[str, Callable[[], Callable]]:
    """The flash-attn package on q, k, v [B, N, H, D]."""

    def build() -> Callable:
        if not setting.device.startswith("cuda"):
            raise MissingPeerError("flash-attn needs a GPU")
        needs("flash_attn", "pip install 'internvit[flash]'")
        from flash_attn import flash_attn_func

        return flash_attn_func

    return {"flash-attn": build}


def triton_tutorial(setting: Setting) -> Mapping[str, Callable[[], Callable]]:
    """The kernel of Triton's fused attention tutorial on q, k, v [B, N, H, D] that lie as [B, H, N, D], forward alone.

    It takes float16 and whole tiles of 128 tokens, and computes something else with others.
    """

    def build() -> Callable:
        if not setting.device.startswith("cuda"):
            raise MissingPeerError("Triton's tutorial needs a GPU")
        path = setting.triton_tutorial
        if path is None:
            raise MissingPeerError("its file 06-fused-attention.py is not here: --triton-tutorial PATH")
        needs("pytest", "pip install pytest, which the tutorial imports")
        found = importlib.util.spec_from_file_location("triton_tutorial_fused_attention", path)
        if found is None or found.loader is None or not path.is_file():
            raise MissingPeerError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            heads_first = (t.transpose(1, 2).contiguous() for t in (q, k, v))
            out: Tensor = module.attention(*heads_first, False, q.shape[-1] ** -0.5)
            return out.transpose(1, 2)

        return run

    return {"Triton's tutorial": build}


def transformers_model(config: InternViTConfig, weights: dict[str, Tensor]) -> Any:
    """transformers' InternVLVisionModel with SDPA and the weights of ours."""
    needs("transformers", PIP)
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    theirs = InternVLVisionConfig.from_dict(config.to_dict("transformers"), attn_implementation="sdpa")
    with torch.device("meta"):
        model = InternVLVisionModel(theirs)
    model.load_state_dict(convert_state_dict(weights, to="transformers"), strict=True, assign=True)
    return model.eval()


def timm_model(config: InternViTConfig, weights: dict[str, Tensor]) -> Any:
    """timm's VisionTransformer made as its vit_intern300m_patch14_448, with the weights of ours."""
    if config.qk_normalization:
        raise MissingPeerError("timm's QK-norm is per head, the 6B's over all heads")
    needs("timm", PIP)
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        model = VisionTransformer(
            img_size=config.image_hw,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            qkv_bias=config.qkv_bias,
            init_values=0.1,
            num_classes=0,
            final_norm=False,
            norm_layer=functools.partial(nn.LayerNorm, eps=config.layer_norm_eps),
        )
    model.load_state_dict(convert_state_dict(weights, to="timm"), strict=True, assign=True)
    return model.eval()


def freezing(model: nn.Module, backend: str = "inductor") -> Callable[[Tensor], Tensor]:
    """torch.compile with weights as constants."""
    from torch._inductor import config as inductor

    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=False, backend=backend)

    def run(*inputs: Tensor) -> Tensor:
        with inductor.patch(freezing=True), torch.no_grad():
            return compiled(*inputs)

    return run


def zentorch(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """AMD's zentorch, a backend of torch.compile for EPYC processors; a wheel of it fits one torch."""
    needs("zentorch", "pip install zentorch, the version of your torch")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        raise MissingPeerError("zentorch optimises nothing without AVX-512")
    import zentorch  # registers the backend

    return freezing(model, zentorch.__name__)


class _Features(nn.Module):
    """A transformers model in float32 whose only output is a tensor, for exporters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.float()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state


def openvino(model: nn.Module, pixels: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """OpenVINO for latency on as many threads as torch has, computing in `dtype`; int8 by NNCF, the rest in bfloat16.

    In float32 instead where the CPU emulates bfloat16: an int8 300M of 448 px took 16 s with it on Cascade Lake.

    NNCF calibrates on inputs like those that are timed, as favourable as it gets.
    """
    needs("openvino", PIP)
    import openvino

    converted = openvino.convert_model(_Features(model).eval(), example_input=pixels.float())
    converted.reshape(list(pixels.shape))
    if dtype == torch.int8:
        needs("nncf", PIP)
        import nncf

        samples = [pixels, *(torch.randn_like(pixels) for _ in range(3))]
        dataset = nncf.Dataset([x.float().numpy() for x in samples])
        converted = nncf.quantize(converted, dataset, model_type=nncf.ModelType.TRANSFORMER)
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype != torch.float32 and bfloat16_products("cpu") else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(converted, "CPU", settings)
    return lambda x: torch.from_numpy(compiled(x.float().numpy())[0])


def onnxruntime(model: nn.Module, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """onnxruntime's CPU provider, which computes in float32, on as many threads as torch has."""
    for package in ("onnxruntime", "onnxscript"):
        needs(package, PIP)
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        path = Path(folder) / "model.onnx"
        torch.onnx.export(_Features(model).eval(), (pixels.float(),), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.float().numpy()})[0])
