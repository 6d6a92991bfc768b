"""docs/api/ops.md from the specs of the ops: what each moves and multiplies, the least time for it, and its reference.

    python -m internvit.benchmarks.reports.op_tables [--check]

Bytes count each tensor that an op, and its backward, reads or writes once; the least time is that, or the products, at
a data sheet's rates. Arithmetic, no measurement. `--check` writes nothing and exits 1 where the page is out of date.
"""

import sys

import torch

from internvit import ops
from internvit.benchmarks.harness.results import FOLDER
from internvit.benchmarks.reports.table import markdown, write_page
from internvit.kernels.tools.roofline import CEILINGS
from internvit.ops.core.spec import SIZES, Inputs, cost, every_spec

PAGE = FOLDER.parents[1] / "docs" / "api" / "ops.md"


def table(model: str) -> str:
    """A row an op and example: megabytes and GFLOP forward and backward, and the least time for both on each device."""
    rows = []
    for spec in every_spec().values():
        for variant in spec.examples:
            least = cost(spec, SIZES[model], torch.bfloat16, variant)
            given = spec.examples[variant](Inputs(SIZES[model], dtype=torch.bfloat16, device="meta")).values()
            eight_bits = any(isinstance(a, torch.Tensor) and a.element_size() == 1 for a in given)
            bfloat16_flops = least.both_flops / (2 if eight_bits else 1)  # int8 and float8 have twice the rate
            times = [1e6 * c.seconds(least.both_bytes, bfloat16_flops) for c in CEILINGS]
            rows.append(
                [
                    f"`{spec.name}`" + (f" {variant}" if variant else ""),
                    f"{least.forward_bytes / 1e6:.1f}",
                    f"{(least.both_bytes - least.forward_bytes) / 1e6:.1f}",
                    f"{least.forward_flops / 1e9:.1f}",
                    f"{(least.both_flops - least.forward_flops) / 1e9:.1f}",
                    *(f"{t:.0f}" for t in times),
                ]
            )
    devices = [f"{c.device}, us" for c in CEILINGS]
    return markdown(["op", "MB forward", "MB backward", "GFLOP forward", "GFLOP backward", *devices], rows)


def page() -> str:
    """The whole page."""
    sections = [
        "# Ops",
        "Written by `python -m internvit.benchmarks.reports.op_tables` from the ops' specs. The least that one image "
        "of 448 pixels costs in bfloat16, forward and backward: each tensor read or written once, and the least time "
        "for that and the products at data-sheet rates, of int8 and float8 at twice bfloat16's. Arithmetic, not "
        "measured.",
    ]
    for model, size in SIZES.items():
        if model != "tiny":
            sections += [f"## {model}: {size.tokens} tokens, {size.heads} heads of {size.head_dim}", table(model)]
    sections.append("## Reference")
    sections += [f"::: internvit.ops.{name}" for name in ops.__all__]
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    sys.exit(write_page(PAGE, page(), __doc__, "internvit.benchmarks.reports.op_tables"))
