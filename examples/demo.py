"""What this library does, in a minute: a trained network on photographs, and InternViT-300M fused beside the reference.

python examples/demo.py demo/
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import trained_vit_s

import internvit
from internvit.cli.environment import cpu_flags, cpu_name
from internvit.numerics import relative_error
from internvit.ops.core.select import resolve
from internvit.ops.linear import cpu_multiplies


def fused_beside_reference(budget: float = 20.0) -> None:
    """InternViT-300M at 448 px in bfloat16: error against float32, and time, interleaved in one process.

    It is timed in 1 to 5 rounds, as fit `budget` seconds. Where a CPU emulates bfloat16 the reference is timed in
    float32, which takes it a quarter of the time.
    """
    config = internvit.InternViTConfig.from_name("internvit-300m-448px-v2.5")
    torch.manual_seed(0)
    print(f"InternViT-300M, 448 px, 1025 tokens, bfloat16, batch 1, random weights, {torch.get_num_threads()} threads")
    reference = internvit.reference.InternViT(config).eval()
    pixels = torch.randn(1, 3, 448, 448)
    dtype = torch.bfloat16 if cpu_multiplies(torch.bfloat16) else torch.float32
    with torch.inference_mode():
        truth = reference(pixels).last_hidden_state if dtype == torch.bfloat16 else None
        reference.to(dtype)
        model = internvit.InternViT(config, dtype=torch.bfloat16, device="meta").to_empty(device="cpu").eval()
        model.load_state_dict(reference.state_dict())
        label = "plain PyTorch" if dtype == torch.bfloat16 else "PyTorch, float32"
        optimized = internvit.optimize_for_inference(model)
        networks = {f"reference ({label})": reference, "internvit": model, "optimize_for_inference": optimized}
        inputs = {name: pixels.to(dtype if m is reference else torch.bfloat16) for name, m in networks.items()}
        for name, m in networks.items():  # what a first call prepares, on an image that takes no time
            m(inputs[name][..., :112, :112])
        seconds: dict[str, list[float]] = {name: [] for name in networks}
        errors: dict[str, float] = {}
        began = time.perf_counter()
        for rounds in range(1, 6):
            for name, m in networks.items():
                start = time.perf_counter()
                features = m(inputs[name]).last_hidden_state
                seconds[name].append(time.perf_counter() - start)
                truth = features if truth is None else truth  # the reference comes first
                errors.setdefault(name, relative_error(features, truth))
            if (time.perf_counter() - began) * (rounds + 1) > budget * rounds:
                break
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    for name in networks:
        print(f"  {name:30} {medians[name]:6.2f} s   error against float32 {errors[name]:.2e}")
    plain, *_, fused = medians.values()
    x = pixels.bfloat16()
    chosen = f"norms on {resolve('rms_norm', x)}, attention on {resolve('attention', x, head_dim=64)}"
    machine = f"{cpu_name()}, {' '.join(cpu_flags())}"
    runs = f"medians of {rounds}" if rounds > 1 else "one run each"
    print(f"  {plain / fused:.2f} times as fast ({chosen}; {runs}; {machine})")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    print("A trained ViT-S/14 of InternViT's block on three photographs:")
    trained_vit_s.main(str(folder / "pca.png"))
    fused_beside_reference()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
