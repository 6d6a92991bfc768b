"""Predicted times: arithmetic on figures of machine code, and the page that shows them."""

import subprocess
import sys

import pytest

from internvit.benchmarks.reports import predict
from internvit.benchmarks.reports.predict import Seconds, Work
from internvit.kernels.tools import roofline
from tests.support import ROOT

pytest.importorskip("triton")


def test_the_pages_are_current():
    """In one process of their own, as their commands: afterwards `triton` takes CPU tensors in it."""
    code = """
import runpy, sys
sys.argv = ["page", "--check"]
for page in ("kernel_tables", "op_tables"):
    try:
        runpy.run_module(f"internvit.benchmarks.reports.{page}", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_loop_that_tensor_cores_alone_bound_runs_at_their_rate():
    peak = predict.ceiling("sm_90").flops * predict.SUSTAINED
    loop = {"issue": 100, "tensor": 256, "exp": 64, "products": 1.0}
    time = predict.loop_seconds("sm_90", peak, loop)
    assert time.least == pytest.approx(1)
    assert time.expected == pytest.approx(356 / 256)
    assert time.most == pytest.approx(420 / 256)
    twice = predict.loop_seconds("sm_90", peak, loop | {"tensor": 512, "products": 2.0})
    assert twice.least == pytest.approx(2), "products that are not needed take their time"


def test_attention_of_published_models_has_figures_with_qk_norm_and_without():
    plain, folded = (predict.loop_of("sm_90", "attention_kernel", d, f) for d, f in ((64, False), (128, True)))
    assert plain["issue"] < folded["issue"]
    assert predict.loop_of("sm_90", "attention_kernel", 72, False) is None
    assert predict.loop_of("gfx942", "attention_kernel", 64, False) is None


def test_no_kernel_issues_products_that_are_not_needed():
    assert [(arch, kernel) for arch, kernel, _, loop in predict.loops() if loop["products"] > 1.05] == []
    assert {kernel for _, kernel, _, _ in predict.loops()} == {*roofline.MATRIX_PRODUCTS, *roofline.GEMMS}


def test_a_layer_is_the_sum_of_its_parts_and_scales_with_the_batch():
    sheet = predict.ceiling("sm_90")
    layer = Work(0.63 * sheet.flops, predict.COPY_SHARE * sheet.bandwidth, {}, 0.0)
    found = predict.predict(layer, "sm_90", 1024, predict.BATCH)
    assert found.layer == Seconds(2.0, 2.0, 2.0)
    assert predict.predict(layer, "sm_90", 1024, 4 * predict.BATCH).layer.expected == pytest.approx(8)
    weights = Work(weights=predict.COPY_SHARE * sheet.bandwidth)
    assert predict.predict(weights, "sm_90", 1024, 4 * predict.BATCH).layer.expected == pytest.approx(1)
    faster = predict.predict(layer, "sm_90", 1024, predict.BATCH, "written")
    assert faster.gemms.expected == pytest.approx(1 / predict.FP8_GAIN)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--fp8", "--gpu", "sm_80"], "--fp8 is of inference, on --gpu sm_89 sm_90"),
        (["--fp8", "--gpu", "sm_90", "--mode", "train"], "--fp8 is of inference"),
    ],
)
def test_wrong_arguments_are_named(arguments, says, capsys):
    with pytest.raises(SystemExit):
        predict.main(arguments)
    assert says in capsys.readouterr().err
