"""Trained weights on real photographs: onnxruntime, running the published graph, is the judge."""

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import internvit
from internvit.data.pca import pca_map
from internvit.numerics import relative_error
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import trained_vit_s as trained

photos = pytest.mark.parametrize("name", trained.PHOTOS)


@pytest.fixture(scope="module")
def network() -> tuple[trained.TrainedViTS, trained.OnnxReference]:
    graph = trained.load_graph()
    return trained.TrainedViTS(graph), trained.OnnxReference(graph)


def smallest_cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double(), b.double(), dim=-1).min().item()


@photos
def test_float32_tokens_are_the_judges(network, name) -> None:
    model, judge = network
    _, pixels = trained.photo(name, 224)
    tokens, expected = model(pixels), judge(pixels)[0]
    assert tokens.shape == (1, 257, 384)
    assert smallest_cosine(tokens, expected) >= 0.99999
    assert relative_error(tokens, expected) < 1e-5


@pytest.mark.sampled(6)
@photos
def test_16_bit_stays_close_and_as_close_as_the_reference(network, name) -> None:
    model, judge = network
    _, pixels = trained.photo(name, 224)
    expected = judge(pixels)[0]
    reference = internvit.reference.InternViT(trained.CONFIG).eval()
    reference.load_state_dict(model.tower.state_dict())
    for dtype, cosine in ((torch.bfloat16, 0.995), (torch.float16, 0.9999)):
        fused = trained.TrainedViTS().to(dtype)
        plain = trained.TrainedViTS().to(dtype)
        plain.tower = internvit.reference.InternViT(trained.CONFIG).eval()
        plain.tower.load_state_dict(model.tower.state_dict())
        plain.to(dtype)
        tokens = fused(pixels.to(dtype))
        assert smallest_cosine(tokens, expected) >= cosine
        assert relative_error(tokens, expected) <= 1.02 * relative_error(plain(pixels.to(dtype)), expected)


@pytest.mark.sampled(3)
@photos
@pytest.mark.parametrize("size", [448, 518])
def test_principal_components_show_the_object(network, name, size) -> None:
    """The leading components at a new grid predict the package's own saliency map, which comes from 224 px."""
    model, judge = network
    grid = (size // 14, size // 14)
    picture = pca_map(model(trained.photo(name, size)[1]), grid)
    assert picture.shape == (*grid, 3)
    saliency = judge(trained.photo(name, 224)[1])[1].reshape(1, 1, 224, 224)
    target = F.adaptive_avg_pool2d(saliency, grid).flatten().double()
    features = torch.cat([picture.flatten(0, 1).double(), torch.ones(grid[0] * grid[1], 1, dtype=torch.float64)], 1)
    fitted = features @ torch.linalg.lstsq(features, target[:, None]).solution
    explained = 1 - (fitted[:, 0] - target).var() / target.var()
    print(f"{name} at {size}: {explained:.2f} of the saliency's variance")
    assert explained > 0.4


def test_pca_map_checks_its_grid() -> None:
    with pytest.raises(ValueError, match=r"pca_map: expected 1 \+ 3 \* 4 tokens, got 12"):
        pca_map(torch.randn(12, 8), (3, 4))
