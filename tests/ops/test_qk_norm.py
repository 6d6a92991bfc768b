import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import norm_violations, relative_error, sample
from tests.ops.cases import backends_here
from tests.ops.shapes import in_draws, norm_shapes, pooled

backends = pytest.mark.parametrize("backend", backends_here("qk_norm"))


@pytest.mark.sampled(4)
@backends
@norm_shapes
def test_contract_on_packed_views(backend, rows, width, distribution, dtype, generator) -> None:
    qkv = sample((1, pooled(rows), 3, width // 8, 8), distribution, dtype, generator)
    q, k, _ = qkv.unbind(2)
    q_weight, k_weight = (sample((width,), "normal", dtype, generator) for _ in range(2))
    draws = [part.unbind(2)[:2] for part in in_draws(qkv, rows, 1)]
    results = [ops.qk_norm(*draw, q_weight, k_weight, backend=backend) for draw in draws]
    outputs = [torch.cat(tensors, 1) for tensors in zip(*results, strict=True)]
    results = [ops.qk_norm_stats(*draw, backend=backend) for draw in draws]
    statistics = [torch.cat(tensors, 1) for tensors in zip(*results, strict=True)]
    for x, weight, y, rstd in zip((q, k), (q_weight, k_weight), outputs, statistics, strict=True):
        truth = F.rms_norm(x.flatten(2).double(), (width,), weight.double(), 1e-6)
        eager = F.rms_norm(x.flatten(2), (width,), weight, 1e-6)
        assert norm_violations(y.flatten(2), truth, eager) == []
        assert rstd.dtype == torch.float32
        assert relative_error(rstd, torch.rsqrt(x.flatten(2).double().square().mean(-1) + 1e-6)) < 5e-7
        # One more rounding, so that a statistic of one head alone would be seen: heads are normalised together.
        assert torch.equal(y, ops.rms_norm(x.flatten(2), weight, backend=backend).view(y.shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(k_weight=torch.ones(8)),
            r"k_weight must have shape \[16\] \(q's heads times head dimension\), got \[8\]",
        ),
        (dict(k=torch.ones(2, 3, 16)), r"k must have q's shape"),
        (dict(rounding="none"), "rounding must be one of"),
    ],
)
def test_bad_input(change, message) -> None:
    heads = {n: torch.ones(2, 3, 2, 8) for n in "qk"}
    with pytest.raises(ValueError, match=message):
        ops.qk_norm(**{**heads, "q_weight": torch.ones(16), "k_weight": torch.ones(16), **change})
