"""Each upstream's model patched in place, next to the same model unpatched, on the CPU.

    python -m benchmarks.bench_patch [--layers 4] [--rounds 7]

InternViT-300M's width at 448 px, batch 1, random weights; mmseg's backbone has RMSNorm and QK-norm. Both in one
process, interleaved. OpenGVLab's and mmseg's classes are restated in tests/upstream/; without flash-attn their
attention is the naive one.
A result that breaks the contract is not timed: `patch` verifies it first.
"""

import argparse
import copy

import torch

import internvit
from benchmarks.timing import interleaved, rows_of, write
from tests import judges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    name = "internvit-300m-448px"
    layer_norm = internvit.InternViTConfig.from_name(name, num_hidden_layers=arguments.layers, drop_path_rate=0.0)
    rms_norm = layer_norm.replace(norm_type="rms_norm", qkv_bias=False, qk_normalization=True)
    upstreams = {
        "OpenGVLab": (judges.opengvlab_judge, layer_norm),
        "transformers": (judges.transformers_judge, layer_norm),
        "timm": (judges.timm_judge, layer_norm),
        "mmseg": (judges.mmseg_judge, rms_norm),
    }
    rows = []
    for upstream, (judge, config) in upstreams.items():
        source = internvit.InternViT(config)
        judges.random_weights(source)
        for dtype in (torch.float32, torch.bfloat16):
            plain = judge(config, source.state_dict()).to(dtype)
            patched = copy.deepcopy(plain)
            internvit.patch(patched, verify=True)
            pixels = judges.images(config, 1).to(dtype)
            with torch.no_grad():
                candidates = {
                    "patched": lambda m=patched, x=pixels: judges.features(m, x),
                    "unpatched": lambda m=plain, x=pixels: judges.features(m, x),
                }
                times = interleaved(candidates, arguments.rounds)
            kind = str(dtype).removeprefix("torch.")
            rows += rows_of(f"{upstream}, {arguments.layers} layers, 448 px, batch 1, {kind}", times, "patched")
    write("patch", rows, 2)


if __name__ == "__main__":
    main()
