"""Tensor parallelism at the published widths, two blocks, at 224 pixels: float32 and bfloat16 against one process."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from internvit import InternViT
from internvit.numerics import relative_error
from internvit.parallel import from_pretrained
from tests.parallel.test_tensor_parallel import check_gradients, gradients
from tests.support.models import CONFIGS, images, random_weights
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow


def check_large(folder: str) -> dict[str, float]:
    """Every rank reads its part of the weights; of one process there are the output and the gradients."""
    expected = torch.load(f"{folder}/expected.pt", mmap=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = from_pretrained(folder, mesh)
    out = gradients(split, expected["pixels"])
    errors = {"output": relative_error(out, expected["out"])}
    errors["gradients"] = check_gradients(split, expected["gradients"], 1e-5)
    split.bfloat16()
    with torch.no_grad():
        half = split(expected["pixels"]).last_hidden_state
    errors["bfloat16"] = relative_error(half, expected["truth"]) / expected["bfloat16"]
    return errors


@pytest.mark.parametrize("name", ["300m-2-layers", "6b-2-layers"])
def test_published_widths(name, seed, tmp_path) -> None:
    config = CONFIGS[name].replace(image_size=224)
    torch.manual_seed(seed)
    model = InternViT(config).eval()
    random_weights(model)
    model.save_pretrained(tmp_path)
    pixels = images(config, 1).bfloat16().float()
    out = gradients(model, pixels)
    expected = {"pixels": pixels, "out": out, "gradients": {n: p.grad for n, p in model.named_parameters()}}
    model.zero_grad()
    model.bfloat16()
    with torch.no_grad():
        half = model(pixels).last_hidden_state
        expected["truth"] = model.float()(pixels).last_hidden_state  # its error is 1e-4 of bfloat16's
    expected["bfloat16"] = relative_error(half, expected["truth"])
    torch.save(expected, tmp_path / "expected.pt")
    del model, expected, half, out
    for ranks in (2, 3, 4, 8):
        results = run_ranks(ranks, check_large, str(tmp_path))
        worst = {what: max(r[what] for r in results) for what in results[0]}
        print(f"{name}, {ranks} ranks: {worst}")
        assert worst["output"] <= 1e-5
        assert worst["bfloat16"] <= 1.02
