"""InternViT-300M end to end on the CPU in bf16, next to transformers, timm, torch.compile and OpenVINO where installed.

    python -m benchmarks.bench_cpu_model [--layers 24] [--batch 1 4] [--size 448] [--rounds 7] [--compile] [--openvino]

Random weights; all candidates in one process, interleaved. OpenVINO converts the transformers model.
"""

import argparse
from collections.abc import Callable

import torch

import internvit
from benchmarks.timing import interleaved, rows_of, write


def transformers_model(layers: int, size: int) -> torch.nn.Module:
    from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    config = InternVLVisionConfig(
        num_hidden_layers=layers,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        image_size=size,
        patch_size=14,
        attention_bias=True,
        use_qk_norm=False,
        norm_type="layer_norm",
        attn_implementation="sdpa",
    )
    return InternVLVisionModel(config).bfloat16().eval()


def openvino_model(model: torch.nn.Module, pixels: torch.Tensor) -> Callable[[], object]:
    import openvino

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.model(pixels).last_hidden_state

    converted = openvino.convert_model(Features().float().eval(), example_input=pixels.float())
    converted.reshape(list(pixels.shape))
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.compile_model(converted, "CPU", settings)
    model.bfloat16()
    array = pixels.float().numpy()
    return lambda: compiled(array)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--openvino", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    import timm

    config = internvit.InternViTConfig.from_name("internvit-300m-448px").replace(
        num_hidden_layers=arguments.layers, image_size=arguments.size, name=None
    )
    model = internvit.InternViT(config, dtype=torch.bfloat16).eval()
    optimized = internvit.optimize_for_inference(model)
    theirs = transformers_model(arguments.layers, arguments.size)
    vit = timm.create_model(
        "vit_intern300m_patch14_448", depth=arguments.layers, img_size=arguments.size, num_classes=0
    )
    vit = vit.bfloat16().eval()
    rows = []
    for batch in arguments.batch:
        pixels = torch.randn(batch, 3, arguments.size, arguments.size, dtype=torch.bfloat16)
        candidates: dict[str, Callable[[], object]] = {
            "optimize_for_inference": lambda x=pixels: optimized(x),
            "InternViT": lambda x=pixels: model(x),
            "transformers SDPA": lambda x=pixels: theirs(x),
            "timm": lambda x=pixels: vit.forward_features(x),
        }
        if arguments.compile:
            import torch._inductor.config as inductor

            inductor.freezing = True
            compiled = torch.compile(theirs)
            candidates["transformers, torch.compile freezing"] = lambda x=pixels, f=compiled: f(x)
        if arguments.openvino:
            candidates["OpenVINO bf16"] = openvino_model(transformers_model(arguments.layers, arguments.size), pixels)
        with torch.no_grad():
            times = interleaved(candidates, arguments.rounds)
        case = f"300M, {arguments.layers} layers, {arguments.size} px, batch {batch}"
        rows += rows_of(case, times, "optimize_for_inference")
    write("cpu_model", rows, 2)


if __name__ == "__main__":
    main()
