"""The account of a forward's time covers all of it, and names each kernel's family."""

import pytest

from internvit.benchmarks.reports import profile_forward as where


def test_families_of_ops() -> None:
    names = {
        "mkldnn::_linear_pointwise": "Linears",
        "internvit_cpu::linear_packed": "Linears",
        "internvit_cpu::linear_int8_dynamic": "Linears",
        "internvit::qk_norm_attention_qkvpacked": "attention",
        "internvit::layer_scale_residual_norm": "norms, residuals",
        "aten::mkldnn_convolution": "patch embedding",
        "aten::cat": "rest",
    }
    assert {name: where.family(name) for name in names} == names


@pytest.mark.sampled(4)  # 8 s
def test_shares_add_up(capsys) -> None:
    found = where.measure(images=1, size=56, rounds=1, layers=1)
    for row in found["ways"].values():
        assert sum(cells["of the time"] for cells in row["kernels"].values()) == pytest.approx(1)
        assert {"Linears", "attention", "norms, residuals", "patch embedding"} <= set(row["kernels"])
        assert all(row["kernels"][part]["of its limit"] > 0 for part in ("Linears", "attention", "norms, residuals"))
    assert "of its limit" in where.table(found)
