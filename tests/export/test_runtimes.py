"""Networks of real widths and a trained one on photographs, in each runtime against PyTorch."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from internvit.export import export_model
from internvit.export.targets import TARGETS
from internvit.images import to_pixels
from internvit.model.vit import InternViT
from tests.support import ROOT
from tests.support.models import CONFIGS, random_weights

sys.path.insert(0, str(ROOT / "examples"))
import trained_vit_s as trained

pytestmark = pytest.mark.slow
NETWORKS = ("300m-2-layers", "6b-2-layers", "trained-vit-s")
SIZES = {"native": None, "336x504": (336, 504), "dynamic": "dynamic"}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> InternViT:
    if request.param == "trained-vit-s":
        return trained.TrainedViTS().tower
    model = InternViT(CONFIGS[request.param]).eval()
    random_weights(model)
    return model


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("to", TARGETS)
def test_errors_and_cosines(network: InternViT, to: str, size: str, tmp_path: Path) -> None:
    for module in TARGETS[to].modules:
        pytest.importorskip(module)
    wanted = SIZES[size]
    sides = [network.config.image_hw, (336, 504)] if wanted == "dynamic" else [wanted or network.config.image_hw]
    photo = trained.photo("astronaut", 512)[0]
    images = [to_pixels(photo, side) for side in sides]
    path = tmp_path / f"model{TARGETS[to].suffix}"
    result = export_model(network, path, to, size=wanted, images=images, batch=1)
    assert set(result.errors) == set(sides)
    assert max(result.errors.values()) <= 1e-4
    with torch.no_grad():
        expected = network(images[0][None]).last_hidden_state
    tokens = TARGETS[to].run(path, images[0][None])[0]
    cosine = F.cosine_similarity(tokens.double(), expected.double(), dim=-1).min().item()
    print(f"{to} {size}: {result.errors}, smallest cosine {cosine:.9f}")
    assert cosine >= 0.99999
