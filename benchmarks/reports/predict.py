"""Predicts the time of a layer and of a model on a GPU that is not there: arithmetic, never a measured figure.

    python -m internvit.benchmarks.reports.predict [--gpu sm_90] [--model NAME] [--batch 1 8] [--mode train] [--fp8]

A model's own launches and GEMMs are recorded without a device (`kernels.tools.compile_only`). Each costs:

* a GEMM, its products at `GEMM_SHARE` of the data sheet's rate;
* a kernel over rows, or over weights, the bytes of its tensors, each moved once, at `COPY_SHARE` of the data sheet's
  bandwidth;
* an attention kernel, the cycles of its main loop by unit (tests/proofs/triton/budget.json, from machine code) at
  `SUSTAINED` of the clock of the data sheet's rate. Expected: schedulers and tensor cores take turns, exponentials are
  hidden. Bounds: all units overlap, or none does. Where a target's code has no such figures, `ATTENTION_SHARE`.

Launches, host time, embeddings and the idle ends of a grid are left out. --fp8 runs the Linears alone in 8 bits, at
`FP8_GAIN` times the rate, with operands quantised by token: by a pass of its own before each Linear, or by the kernel
that writes the operand, for no bytes but fewer.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from internvit.benchmarks.harness.results import FOLDER
from internvit.benchmarks.reports.table import markdown
from internvit.config import InternViTConfig
from internvit.kernels.common.launch import Launch
from internvit.kernels.common.target import TARGETS, Target
from internvit.kernels.tools import roofline
from internvit.kernels.tools.compile_only import WithoutComputing, intercepting, triton_takes_cpu_tensors
from internvit.kernels.tools.model_launches import BATCH, LAYERS, MODES
from internvit.ops.core.flops import FORMULAS

BUDGET = FOLDER.parents[1] / "tests/proofs/triton/budget.json"
MODELS = ("internvit-300m-448px", "internvit-6b-448px-v2.5")
GEMM_SHARE = {1024: 0.63, 3200: 0.71}
"""By width. 620 and 700 TFLOP/s on an H100: an estimate of cuBLASLt at these shapes, until it is measured."""
COPY_SHARE = 0.87
"""2.9 TB/s on an H100."""
SUSTAINED = 0.8
"""Of the boost clock, under the power limit."""
ATTENTION_SHARE = 0.35
FP8_TARGETS = ("sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
FP8_GAIN = 1.6
"""Over bfloat16 GEMMs of these shapes; the data sheet says 2."""


@dataclass(frozen=True)
class Seconds:
    """A time with the bounds that the overlap of units leaves open."""

    least: float
    expected: float
    most: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.least + other.least, self.expected + other.expected, self.most + other.most)

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(self.least * factor, self.expected * factor, self.most * factor)


def exactly(seconds: float) -> Seconds:
    return Seconds(seconds, seconds, seconds)


def ceiling(target: str) -> roofline.Ceiling:
    return next(c for c in roofline.CEILINGS if c.target == target)


def loop_seconds(target: str, flops: float, loop: dict[str, float]) -> Seconds:
    """Of `flops` in a kernel whose main loop costs `loop` cycles by unit; tensor cores alone would run at peak."""
    issue, tensor, exp = (loop[unit] for unit in ("issue", "tensor", "exp"))
    peak = flops / (ceiling(target).flops * SUSTAINED) / tensor * loop["products"]
    return Seconds(peak * max(issue, tensor, exp), peak * (issue + tensor), peak * (issue + tensor + exp))


def loops() -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """(target, kernel, configuration, cycles by unit and products) of the budget's kernels with such figures."""
    for (arch, kernel, config), (_, _, _, *figures) in budget().items():
        if figures:
            yield arch, kernel, config, dict(zip(("issue", "tensor", "exp", "products"), figures, strict=True))


def budget() -> dict[tuple[str, str, str], list[float]]:
    """(target, kernel, configuration) -> registers, shared and stack bytes, and the loop's figures where known."""
    rows = {}
    for key, row in json.loads(BUDGET.read_text())["rows"].items():
        name, _, config = key.partition(": ")
        arch, kernel = name.split()
        rows[arch, kernel, config] = row
    return rows


def loop_of(target: str, kernel: str, head_dim: int, folded: bool) -> dict[str, float] | None:
    """The cycles of an attention kernel at a published model's tokens; None where its code has no figures."""
    for arch, name, config, loop in loops():
        plain = "without" in config and ("q_weight" in config or "rstd_k" in config)
        if arch == target and name == kernel and f" D={head_dim} " in config and plain != folded:
            return loop
    return None


@dataclass
class Work:
    """What a layer asks of a GPU.

    Attributes:
        gemms: flops of torch's matrix products.
        rows: bytes of kernels over rows.
        attention: kernel, head dimension, whether QK-norm is folded -> flops.
        unit: bytes of one [N, C] tensor of the batch.
        weights: bytes of kernels over weights, the same for any batch.
    """

    gemms: float = 0.0
    rows: float = 0.0
    attention: dict[tuple[str, int, bool], float] = field(default_factory=dict)
    unit: float = 0.0
    weights: float = 0.0

    def receive(self, one: Launch) -> None:
        tensors = [a for a in one.args if isinstance(a, Tensor)]
        name = one.kernel.fn.__name__
        moved, flops = roofline.kernel_work(name, tensors)
        if name in roofline.MATRIX_PRODUCTS:
            folded = any("rstd_k" in parameter and given is not None for parameter, given in _named(one))
            key = name, tensors[0].shape[-1], folded
            self.attention[key] = self.attention.get(key, 0.0) + flops
        elif name in roofline.GEMMS:
            self.gemms += flops
        elif name == "fold_norm_kernel":
            self.weights += moved
        else:
            self.rows += moved


def _named(one: Launch) -> Iterator[tuple[str, Any]]:
    return zip(one.kernel.arg_names, one.args, strict=False)


class _Gemms(TorchDispatchMode):
    """Adds the flops of torch's matrix products, and of the ops that call them, to `work`."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            inner = args[-1].shape[0]
            self.work.gemms += 2.0 * inner * result.numel()
        elif func.namespace == "internvit" and func._opname.startswith("linear") and args[-1] != "triton_gemm":
            self.work.gemms += FORMULAS[func._opname](*tree_map(_shape, args), **tree_map(_shape, kwargs or {}))
        return result


def _shape(x: Any) -> Any:
    return x.shape if isinstance(x, Tensor) else x


def work_of(config: InternViTConfig, target: Target, mode: str, layers: int) -> Work:
    """Of a model of so many layers on `BATCH` images in bfloat16, with what its embeddings and ends need."""
    work = Work(unit=2.0 * BATCH * config.num_tokens * config.hidden_size)
    with intercepting(target, work.receive), triton_takes_cpu_tensors(), WithoutComputing(), _Gemms(work):
        MODES[mode](config, torch.bfloat16, layers)
    return work


def layer_of(config: InternViTConfig, target: Target, mode: str) -> Work:
    """One layer's share of a model: what a deeper model asks for beyond a shallower one."""
    deep, shallow = (work_of(config, target, mode, LAYERS * n) for n in (2, 1))
    attention = {key: (flops - shallow.attention[key]) / LAYERS for key, flops in deep.attention.items()}
    gemms, rows, weights = (
        (getattr(deep, name) - getattr(shallow, name)) / LAYERS for name in ("gemms", "rows", "weights")
    )
    return Work(gemms, rows, attention, deep.unit, weights)


@dataclass(frozen=True)
class Prediction:
    """Of one layer of one batch."""

    gemms: Seconds
    attention: Seconds
    rows: Seconds

    @property
    def layer(self) -> Seconds:
        return self.gemms + self.attention + self.rows


def predict(layer: Work, target: str, width: int, batch: int, fp8: str = "") -> Prediction:
    """A layer's time; `fp8` is "pass" or "written", how the operands of its Linears are quantised."""
    sheet = ceiling(target)
    bandwidth = sheet.bandwidth * COPY_SHARE
    share = GEMM_SHARE[min(GEMM_SHARE, key=lambda known: abs(known - width))]
    gemms, rows = layer.gemms / (sheet.flops * share), layer.rows / bandwidth
    if fp8:
        # The operands of a layer's Linears are 1 + 1 + 1 + 4 tensors [N, C], of a byte an element where quantised.
        operands = 7 * layer.unit
        gemms /= FP8_GAIN
        rows += 1.5 * operands / bandwidth if fp8 == "pass" else -0.5 * operands / bandwidth
    attention = exactly(0.0)
    for (kernel, head_dim, folded), flops in layer.attention.items():
        loop = loop_of(target, kernel, head_dim, folded)
        attention += (
            exactly(flops / (sheet.flops * ATTENTION_SHARE)) if loop is None else loop_seconds(target, flops, loop)
        )
    scale = batch / BATCH
    passes = rows * scale + layer.weights / bandwidth
    return Prediction(exactly(gemms * scale), attention * scale, exactly(passes))


MODES_PREDICTED = (
    "eval",
    "optimize_for_inference",
    "train",
    "eval, Triton GEMMs",
    "optimize_for_inference, Triton GEMMs, norms folded",
)

HEADER = [
    "GPU",
    "model",
    "batch",
    "Linears",
    "GEMMs, us",
    "attention, us",
    "rows, us",
    "layer, us",
    "model, ms",
    "images/s",
]


def in_units(time: Seconds, unit: float, digits: int) -> str:
    expected, least, most = (f"{unit * t:.{digits}f}" for t in (time.expected, time.least, time.most))
    return f"{expected} ({least} - {most})"


def rows(gpus: list[str], models: list[str], batches: list[int], mode: str, fp8: bool) -> Iterator[list[str]]:
    """A row of the table for each GPU, model, batch and dtype of the Linears."""
    variants = {"bfloat16": ""} | (
        {"fp8, quantised in a pass": "pass", "fp8, quantised where written": "written"} if fp8 else {}
    )
    for model in models:
        config = InternViTConfig.from_name(model)
        for gpu in gpus:
            layer = layer_of(config, TARGETS[gpu], mode)
            for batch in batches:
                for name, how in variants.items():
                    found = predict(layer, gpu, config.hidden_size, batch, how)
                    whole = found.layer * config.num_hidden_layers
                    yield [
                        ceiling(gpu).device,
                        model.split("-")[1].upper(),
                        str(batch),
                        name,
                        f"{1e6 * found.gemms.expected:.0f}",
                        in_units(found.attention, 1e6, 0),
                        f"{1e6 * found.rows.expected:.0f}",
                        f"{1e6 * found.layer.expected:.0f}",
                        in_units(whole, 1e3, 1),
                        f"{batch / whole.expected:.0f}",
                    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvit.benchmarks.reports.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", nargs="+", default=["sm_80", "sm_90", "sm_100"], choices=list(TARGETS))
    parser.add_argument("--model", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--mode", default="optimize_for_inference", choices=[*MODES_PREDICTED])
    parser.add_argument("--fp8", action="store_true", help="the Linears in 8 bits beside bfloat16")
    asked = parser.parse_args(arguments)
    if min(asked.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(asked.batch)}")
    if asked.fp8 and (asked.mode == "train" or set(asked.gpu) - set(FP8_TARGETS)):
        parser.error(f"--fp8 is of inference, on --gpu {' '.join(FP8_TARGETS)}")
    print(f"Prediction, not measured; {asked.mode}, 448 px")
    print(markdown(HEADER, list(rows(asked.gpu, asked.model, asked.batch, asked.mode, asked.fp8))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
