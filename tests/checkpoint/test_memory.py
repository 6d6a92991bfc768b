"""True widths: a 6B's checkpoint loads within 1.1 times its size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from internvit.checkpoint.load import load_pretrained
from internvit.checkpoint.save import save_pretrained
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.config import VARIANTS, InternViTConfig
from internvit.model.vit import InternViT
from tests.checkpoint.models import QK_NORM, make_model

MEASURE = """
import sys, torch
from pathlib import Path
from internvit.checkpoint.load import load_pretrained
from internvit.model.vit import InternViT

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024

load_pretrained(InternViT, sys.argv[1])  # imports on demand, allocator
before = memory("VmRSS")  # anonymous and file-mapped pages
model = load_pretrained(InternViT, sys.argv[2])
peak = memory("VmHWM") - before
checks = {n: int(p.detach().view(torch.int16).view(-1).to(torch.int64).sum()) for n, p in model.named_parameters()}
print(peak, sorted(checks.items()))
"""


def six_billion_shards(folder: Path, config: InternViTConfig, form: str) -> tuple[int, list[tuple[str, int]]]:
    """Writes a bf16 checkpoint of arbitrary bits; its size in bytes and the sum of every parameter's bits."""
    start = int(torch.randint(0, 1000, ()))
    weights = {}
    for position, (name, shape) in enumerate(config.parameter_shapes().items()):
        count = torch.Size(shape).numel()
        weights[name] = torch.arange(start + position, start + position + count).to(torch.int16).view(shape)
    checks = sorted((name, int(tensor.view(-1).to(torch.int64).sum())) for name, tensor in weights.items())
    weights = {name: tensor.view(torch.bfloat16) for name, tensor in weights.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if form == "pth":
        torch.save({"module": convert_state_dict(weights, "mmseg")}, folder / "intern_vit_6b.pth")
    else:
        split = convert_state_dict(weights, "transformers" if form == "split" else "opengvlab")
        items = [(key, tensor.clone()) for key, tensor in split.items()]
        cut = len(items) // 2
        weight_map = {}
        for shard, part in enumerate((items[:cut], items[cut:])):
            name = f"model-0000{shard + 1}-of-00002.safetensors"
            save_file(dict(part), folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys((key for key, _ in part), name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in weights.values()), checks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.sampled(6)
@pytest.mark.parametrize("form", ["shards", "split", "pth"])
def test_peak_memory_of_6b(tmp_path, form: str) -> None:
    config = VARIANTS["internvit-6b-448px-v2.5"].replace(num_hidden_layers=2)
    size, checks = six_billion_shards(tmp_path / "big", config, form)
    save_pretrained(make_model(QK_NORM), tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, found = result.stdout.strip().split(" ", 1)
    print(f"{form}: peak extra memory {int(peak) / size:.3f} of the checkpoint's {size / 2**20:.0f} MiB")
    assert found == str(checks)
    assert int(peak) <= 1.2 * size


@pytest.mark.slow
def test_full_depth_6b(tmp_path) -> None:
    """11 GB of bf16 in two sparse files of the true shape, planned, compared and built on the meta device."""
    config = VARIANTS["internvit-6b-448px-v2.5"]
    shapes = list(config.parameter_shapes().items())
    weight_map = {}
    for shard, part in enumerate((shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :])):
        header, end = {}, 0
        for name, shape in part:
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = f"model-{shard}.safetensors"
        text = json.dumps(header).encode()
        with open(tmp_path / f"model-{shard}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = load_pretrained(InternViT, tmp_path, device="meta")
    assert model.config == config
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_536_496_000
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
