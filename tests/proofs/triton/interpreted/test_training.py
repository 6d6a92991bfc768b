"""A 2-block InternViT trained through interpreted kernels follows the reference: loss and every parameter."""

import pytest
import torch
from torch import Tensor, nn

from internvit.ops import (
    backend,
    layer_norm,
    layer_scale_residual,
    layer_scale_residual_norm,
    linear_gelu,
    qk_norm_attention_qkvpacked,
    rms_norm,
)

STEPS = 20
WIDTH, HEADS, TOKENS, BATCH = 32, 2, 9, 2


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=kind == "layer_norm")
        self.proj, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.norms = nn.Parameter(torch.ones(2, WIDTH))
        self.biases = nn.Parameter(torch.zeros(2, WIDTH)) if kind == "layer_norm" else None
        self.qk = nn.Parameter(torch.ones(2, WIDTH)) if kind == "rms_norm" else None
        self.gammas = nn.Parameter(torch.full((2, WIDTH), 0.5))


class Model(nn.Module):
    """The block of InternViT, made of the ops; the norms of a seam run in the pass that adds the branch."""

    def __init__(self, kind: str, drop_path: float) -> None:
        super().__init__()
        self.kind, self.drop_path = kind, drop_path
        self.blocks = nn.ModuleList(Block(kind) for _ in range(2))

    def row_scale(self) -> Tensor | None:
        if not self.drop_path:
            return None
        keep = 1 - self.drop_path
        return torch.empty(BATCH).bernoulli_(keep) / keep

    def forward(self, x: Tensor) -> Tensor:
        seams = []
        for block in self.blocks:
            bias = (None, None) if block.biases is None else block.biases
            seams += [(block.norms[0], bias[0]), (block.norms[1], bias[1])]
        weight, bias = seams[0]
        normed = rms_norm(x, weight) if self.kind == "rms_norm" else layer_norm(x, weight, bias)
        for i, block in enumerate(self.blocks):
            qk = (None, None) if block.qk is None else block.qk
            qkv = block.qkv(normed).view(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS)
            branch = block.proj(qk_norm_attention_qkvpacked(qkv, *qk).flatten(2))
            x, normed = self.seam(x, branch, block.gammas[0], *seams[2 * i + 1])
            branch = block.fc2(linear_gelu(normed, block.fc1.weight, block.fc1.bias))
            if i + 1 < len(self.blocks):
                x, normed = self.seam(x, branch, block.gammas[1], *seams[2 * i + 2])
        return layer_scale_residual(x, branch, block.gammas[1], self.row_scale())

    def seam(self, x: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None):
        return layer_scale_residual_norm(x, branch, weight, bias, gamma, self.row_scale(), norm_type=self.kind)


def train(name: str, kind: str, dtype: torch.dtype, drop_path: float) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = Model(kind, drop_path)
    pixels, target = torch.randn(2, BATCH, TOKENS, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    with backend(name):
        for _ in range(STEPS):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = (model(pixels).float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses, {k: v.detach() for k, v in model.named_parameters()}


CASES = [(k, d, p) for k in ("rms_norm", "layer_norm") for d in (torch.float32, torch.bfloat16) for p in (0.0, 0.3)]
SHORT = [("rms_norm", torch.float32, 0.3), ("layer_norm", torch.bfloat16, 0.0)]  # 10 s each


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("kind", "dtype", "drop_path"), SHORT + [pytest.param(*c, marks=pytest.mark.slow) for c in CASES if c not in SHORT]
)
def test_training_follows_the_reference(kind, dtype, drop_path):
    torch.manual_seed(0)
    start = dict(Model(kind, drop_path).named_parameters())
    losses, parameters = train("triton", kind, dtype, drop_path)
    expected_losses, expected = train("reference", kind, dtype, drop_path)
    assert losses[-1] < 0.9 * losses[0], "the model does not learn"
    exact = dtype == torch.float32
    torch.testing.assert_close(
        torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-4 if exact else 0.02, atol=0
    )
    for name, value in parameters.items():
        moved = (expected[name] - start[name]).norm()
        apart = (value - expected[name]).norm()
        assert apart <= (1e-3 if exact else 0.1) * moved, f"{name}: {apart / moved:.1e} of its way off the reference's"
