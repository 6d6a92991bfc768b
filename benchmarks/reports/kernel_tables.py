"""docs/gpu-kernels.md: what the compilers make of the Triton kernels, and the times that follow from it.

    python -m internvit.benchmarks.reports.kernel_tables [--check]

From tests/proofs/triton/budget.json and versions.json, and from `predict`. Nothing is compiled and no GPU is needed.
`--check` writes nothing and exits 1 where the page is out of date.
"""

import json
import re
import sys
from collections.abc import Iterator

from internvit.benchmarks.harness.results import FOLDER
from internvit.benchmarks.reports import predict
from internvit.benchmarks.reports.table import markdown, write_page
from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools import roofline

ROOT = FOLDER.parents[1]
PAGE = ROOT / "docs/gpu-kernels.md"
VERSIONS = ROOT / "tests/proofs/triton/versions.json"

PUBLISHED = {
    ("sm_90", 64, "forward"): "FA2 306, Triton 382, cuDNN 373, FA3 392 [1]",
    ("sm_90", 128, "forward"): "FA2 350, Triton 372, cuDNN 574, FA3 565 [1]",
    ("sm_90", 64, "forward and backward"): "FA2 254 [2]",
    ("sm_90", 128, "forward and backward"): "FA2 294 [2]",
    ("sm_80", 64, "forward and backward"): "FA2 153, Triton 102 [3]",
    ("sm_80", 128, "forward and backward"): "FA2 173 [3]",
}
"""TFLOP/s at about 1024 tokens, no mask; read from plots, or as their authors give them."""
SOURCES = (
    "[1] flash-attention, `assets/flash3_fp16_fwd.png`, 1k tokens, no mask, H100 SXM, float16; "
    "[2] `assets/flash2_h100_fwd_bwd_benchmark.png`; [3] `assets/flash2_a100_fwd_bwd_benchmark.png`, both no mask."
)
KERNELS = {"forward": ("attention_kernel",), "backward": ("attention_grad_kv_kernel", "attention_grad_q_kernel")}
PRODUCTS = {"forward": 2, "backward": 5}
"""Products over all pairs of tokens by which TFLOP/s are counted; backward's kernels compute seven."""


def short(config: str) -> str:
    """A configuration without what all have in common, and without the peeled token's flags."""
    drop = r"BLOCK_D|STRIDE_UNIT|BLOCK_C|PEEL_\w+|TAIL|GROUP|WHOLE_K|SMALL_EPS|ROUNDING"
    words = [word for word in config.split() if not re.match(rf"(?:{drop})=|\w+%16$", word)]
    return " ".join(words)


def versions_section() -> str:
    record = json.loads(VERSIONS.read_text())
    rows, left = [], []
    for version, targets in record.items():
        for arch in TARGETS:
            for dtype, entry in targets.get(arch, {}).items():
                spilled = entry["spills"]
                compiled = entry["kernels"] - len(entry["failures"])
                most = max(spilled.values(), default=0)
                numbers = entry["modes"], f"{compiled} of {entry['kernels']}", len(spilled), most
                rows.append([version, arch, dtype, *map(str, numbers)])
                left += [f"* {version}, {arch}, {dtype}: `{short(name)}`: {n} bytes" for name, n in spilled.items()]
    headings = ["Triton", "target", "dtype", "modes", "kernels compiled", "that spill", "bytes at most"]
    total = sum(
        entry["modes"] for targets in record.values() for entries in targets.values() for entry in entries.values()
    )
    names = "\n".join(left) or "No kernel spills."
    return (
        f"{total} combinations of a way to run a model, a target and a Triton were compiled: every published "
        "configuration in evaluation and training, optimised, with LoRA, autocast, checkpointing, frozen parts, odd "
        "image sizes, and as patched upstream models. `python -m tests.proofs.triton.versions` compiles them and "
        f"writes the record.\n\n{markdown(headings, rows)}\n\nBytes that a thread spills, by kernel:\n\n{names}"
    )


def matrix_section() -> str:
    rows = []
    for (arch, kernel, config), (registers, shared, stack, *loop) in sorted(predict.budget().items(), key=_order):
        if not roofline.multiplies(kernel):
            continue
        cycles = [f"{n:g}" for n in loop] or ["-"] * 4
        name, (_, *words) = kernel.removesuffix("_kernel"), short(config).split()
        rows.append([f"`{name}` {' '.join(words)}", arch, f"{registers}", f"{shared}", f"{stack}", *cycles])
    headings = ["kernel", "target", "registers", "shared", "stack", "issue", "tensor", "exp", "issued ÷ needed"]
    return markdown(headings, rows)


def _order(item: tuple[tuple[str, str, str], list[float]]) -> tuple[str, str, int]:
    arch, kernel, config = item[0]
    return kernel, short(config).split(" BLOCK")[0], list(TARGETS).index(arch)


def rows_section() -> str:
    found: dict[str, dict[str, str]] = {}
    for (arch, kernel, config), (registers, shared, *_) in sorted(predict.budget().items(), key=_order):
        if not roofline.multiplies(kernel):
            name = re.sub(r" (?:ROWS|warps|stages|BLOCK\w*)=\w+", "", short(config))
            cells = found.setdefault(f"`{kernel.removesuffix('_kernel')}` {name}", {})
            cells[arch] = f"{registers}, {shared}"
    rows = [[name, *(cells.get(arch, "") for arch in TARGETS)] for name, cells in found.items()]
    return markdown(["kernel", *TARGETS], rows)


def rate(target: str, passes: tuple[str, ...], head_dim: int, folded: bool) -> predict.Seconds | None:
    """TFLOP/s predicted of attention's forward, backward or both: its products by the formula over its time."""
    time = predict.exactly(0.0)
    for one in passes:
        for kernel in KERNELS[one]:
            loop = predict.loop_of(target, kernel, head_dim, folded)
            if loop is None:
                return None
            time += predict.loop_seconds(target, roofline.MATRIX_PRODUCTS[kernel], loop)
    flops = sum(PRODUCTS[one] for one in passes)
    return predict.Seconds(*(flops / t / 1e12 for t in (time.most, time.expected, time.least)))


def attention_section() -> str:
    rows = []
    for target in TARGETS:
        for head_dim, folded in ((64, False), (128, True)):
            for passes in (("forward",), ("backward",), ("forward", "backward")):
                found, title = rate(target, passes, head_dim, folded), " and ".join(passes)
                if found is None:
                    continue
                published = PUBLISHED.get((target, head_dim, title), "")
                norm = ", QK-norm inside" if folded else ""
                spread = f"{found.least:.0f} - {found.most:.0f}"
                device = predict.ceiling(target).device
                rows.append([device, f"{head_dim}{norm}", title, f"{found.expected:.0f}", spread, published])
    headings = ["GPU", "head_dim", "pass", "predicted TFLOP/s", "nothing overlaps - all does", "published"]
    return markdown(headings, rows)


def model_section() -> Iterator[str]:
    for mode, fp8 in (("optimize_for_inference", True), ("train", False)):
        gpus = ["sm_90"] if fp8 else ["sm_80", "sm_90"]
        yield f"`{mode}`:"
        yield markdown(predict.HEADER, list(predict.rows(gpus, list(predict.MODELS), [1, 8], mode, fp8)))


HEAD = """\
Written by `python -m internvit.benchmarks.reports.kernel_tables`. Registers, shared memory, spills and cycles are read
from machine code that Triton makes for a target; times and rates are **predictions, not measured**. No GPU has run
these kernels."""
MATRIX = """\
Published models at 448 px, bfloat16. Cycles of a multiprocessor for 64 x 64 scores of attention (for 64 x 64 outputs
and BLOCK_K terms of `linear`): instructions issued, tensor cores, exponentials; each unit as if it waited for no other.
The last column is products issued over products that the formula needs. `-`: this target's instructions name no shape,
or its code is AMD's."""
ATTENTION = """\
The cycles above at the data sheet's rate and 0.8 of its clock. Predicted: schedulers and tensor cores take turns and
exponentials are hidden. Loads that are waited for, the ends of the grid and `delta` are left out. TFLOP/s count 2
products forward and 5 backward, as the published ones do; these are others' measurements of others' kernels, without
QK-norm."""
MODELS = """\
448 px, bfloat16 besides the Linears named. Assumed: GEMMs at 63 % (300M) and 71 % (6B) of the peak, 8-bit ones 1.6
times faster, kernels over rows at 87 % of the bandwidth. In brackets: all units of attention overlap, or none does.
Launches, host time and embeddings are left out. `optimize_for_inference(precision="fp8")` quantises where norms and
GELU write, attention's output in a pass; only `triton_gemm` scales 8-bit products inside the GEMM.
`python -m internvit.benchmarks.reports.predict` has other GPUs, batches and ways to run a model."""


def page() -> str:
    """The whole page."""
    sections = {
        "Every launch compiles": [versions_section()],
        "Kernels with matrix products": [MATRIX, matrix_section()],
        "Kernels over rows": ["Registers of a thread, and bytes of shared memory.", rows_section()],
        "Attention: prediction beside published figures": [ATTENTION, attention_section(), SOURCES],
        "Models: prediction": [MODELS, *model_section()],
    }
    parts = ["# GPU kernels without a GPU", HEAD]
    for title, texts in sections.items():
        parts += [f"## {title}", *texts]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(write_page(PAGE, page(), __doc__, "internvit.benchmarks.reports.kernel_tables"))
