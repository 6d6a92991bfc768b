"""Passes over memory: how many activation tensors [N, C] a block reads and writes, whatever the clock says.

    python -m internvit.benchmarks.reports.memory_passes [--update]    the table; --update writes memory_passes.json

Every op that PyTorch dispatches is seen with its inputs and outputs; a tensor with a row per token counts by its size
in units of one [N, C] tensor, once as input and once as output. Views cost nothing, parameters are left out, and what
an op does inside, such as attention's scores in cache, is its own.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvit import InternViT, InternViTConfig, optimize_for_inference, reference
from internvit.benchmarks.harness import peers
from internvit.benchmarks.harness.cases import BOTH, FORWARD, MissingPeerError
from internvit.benchmarks.model.bench_block import VARIANTS
from internvit.benchmarks.model.bench_model import trained_like

BUDGET = Path(__file__).with_name("memory_passes.json")
TOKENS = 17
"""A number that no width, head or group has: a tensor with a dimension of it has a row per token."""


class Traffic(TorchDispatchMode):
    """Sums the elements of token tensors that dispatched ops read and write."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.elements = tokens, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # What oneDNN has packed is opaque: a parameter.
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and not t.is_mkldnn]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        memory = {t.untyped_storage().data_ptr() for t in inputs}
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
        if not writes and outputs and all(t.untyped_storage().data_ptr() in memory for t in outputs):
            return result  # a view
        if func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            return result
        seen = {(t.data_ptr(), t.shape): t for t in inputs}
        self.elements += sum(self._size(t) for t in seen.values())
        self.elements += sum(self._size(t) for t in outputs)
        return result

    def _size(self, t: Tensor) -> int:
        return t.numel() if self.tokens in t.shape or TOKENS * TOKENS in t.shape else 0


def units(function: Callable[[Tensor], Any], width: int, dtype: torch.dtype, mode: str) -> float:
    """Units of [N, C] that a forward, or a forward and backward to the input and the parameters, moves."""
    x = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    if mode == FORWARD:
        with torch.no_grad(), Traffic(TOKENS) as traffic:
            function(x)
    else:
        x.requires_grad_()
        incoming = torch.ones_like(x)
        with Traffic(TOKENS) as traffic:
            function(x).backward(incoming)
    return traffic.elements / (TOKENS * width)


def blocks(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], Callable[[Tensor], Any]]]:
    """Every way to compute one block of a variant."""
    config = InternViTConfig.from_name(name, num_hidden_layers=1, drop_path_rate=0.0)

    def weights() -> dict[str, Tensor]:
        return {k: v.to(dtype) for k, v in trained_like(config).items()}

    def ours() -> InternViT:
        model = InternViT(config, device="meta")
        model.load_state_dict(weights(), assign=True)
        return model.eval()

    def eager() -> Callable[[Tensor], Any]:
        model = reference.InternViT(config).to(dtype).eval()
        model.load_state_dict(weights())
        return lambda x: model.encoder.layers[0](x)[0]

    def optimized(pack: bool) -> Callable[[Tensor], Any]:
        fast = optimize_for_inference(ours(), pack=pack)
        return lambda x: fast(pixel_embeds=x)

    def first(layers: nn.Module) -> Callable[[Tensor], Any]:
        return lambda x: layers.eval()(x)

    return {
        "internvit InternViT": lambda: first(ours().encoder.layers[0]),
        "internvit optimize_for_inference, not packed": lambda: optimized(False),
        "internvit optimize_for_inference, packed": lambda: optimized(True),
        "reference": eager,
        "transformers SDPA": lambda: first(peers.transformers_model(config, weights()).encoder.layer[0]),
        "timm": lambda: first(peers.timm_model(config, weights()).blocks[0]),
    }


def measure() -> dict[str, dict[str, float | str]]:
    """Variant and mode -> way -> units, or why it cannot be counted."""
    found: dict[str, dict[str, float | str]] = {}
    for name in VARIANTS:
        width = InternViTConfig.from_name(name).hidden_size
        for mode in (FORWARD, BOTH):
            row = found[f"{name} {mode}"] = {}
            for way in blocks(name):
                packed = way.endswith(", packed")
                if mode == BOTH and "optimize" in way:
                    continue
                dtype = torch.bfloat16 if packed else torch.float32
                try:
                    row[way] = round(units(blocks(name, dtype)[way](), width, dtype, mode), 2)
                except MissingPeerError as gap:
                    row[way] = str(gap)
    return found


def table(found: dict[str, dict[str, float | str]]) -> str:
    """Markdown: a row per way, a column per variant and mode."""
    ways = list(dict.fromkeys(way for row in found.values() for way in row))
    heads = [where.replace("internvit-", "").replace("-448px", "").replace("-v2.5", "") for where in found]
    lines = [f"| way | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for way in ways:
        counts = [row.get(way, "") for row in found.values()]
        lines.append(f"| {way} | {' | '.join(c if isinstance(c, str) else f'{c:.0f}' for c in counts)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m internvit.benchmarks.reports.memory_passes", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the counts as the new budget")
    update = parser.parse_args(arguments).update
    found = measure()
    print(table(found))
    if update:
        BUDGET.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
