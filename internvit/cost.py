"""What each variant costs: parameters, FLOPs and memory, and which one to take for a task.

The byte counts follow the tensors that this library's ops leave, in units of one [N, C] tensor of a batch (see
`model/recompute.py`), and agree with a measured run within 5 % (tests/test_cost.py). CPUs that emulate a 16-bit dtype
hold float32 copies of one product's operands beside them (`ops/linear.py`): 35 MB for the 300M at 448 px.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from internvit.config import VARIANTS, InternViTConfig

if TYPE_CHECKING:
    from internvit.parallel.plan import TensorParallelPlan

TASKS = {
    "simple": "features of whole images: retrieval, classification, similarity",
    "segmentation": "dense maps from several blocks, with an FPN",
    "detection": "dense maps at large sizes, one map to a pyramid",
    "multimodal": "tokens for a language model, tiles of 448 px",
}
DEFAULT_SIZE = {"simple": 448, "segmentation": 504, "detection": 896, "multimodal": 448}


@dataclass(frozen=True)
class Cost:
    """The cost of one variant; bytes for the whole batch, FLOPs (2 per multiply-add) for one image's forward.

    Attributes:
        weights: of the parameters.
        inference: activations at the peak of a forward pass without gradients.
        training: activations kept for backward, at the peak.
        folded: the same with LayerScale folded into the Linears (`InternViT.set_layer_scale_folding`).
        selective: the same as training with selective checkpointing (`InternViT.set_gradient_checkpointing`).
        checkpointing: the same with every block recomputed.
        optimizer: gradients and AdamW's two float32 moments, and float32 master weights beside 16-bit parameters.
    """

    variant: str
    parameters: int
    tokens: int
    flops: int
    weights: int
    inference: int
    training: int
    folded: int
    selective: int
    checkpointing: int
    optimizer: int

    def total(self, train: bool, checkpointing: str = "none") -> int:
        """All bytes of one use; `checkpointing` is "none", "selective" or "block"."""
        if not train:
            return self.weights + self.inference
        activations = {"none": self.training, "selective": self.selective, "block": self.checkpointing}
        return self.weights + self.optimizer + activations[checkpointing]


def flops(config: InternViTConfig, size: tuple[int, int]) -> int:
    """Multiplications and additions of one image's forward: the GEMMs and attention."""
    tokens = tokens_of(config, size)
    width, inner = config.hidden_size, config.intermediate_size
    block = tokens * (4 * width * width + 2 * width * inner) + 2 * tokens * tokens * width
    patches = (tokens - 1) * config.num_channels * config.patch_size**2 * width
    return 2 * (config.num_hidden_layers * block + patches)


def recomputed_flops(config: InternViTConfig, size: tuple[int, int], mode: str) -> int:
    """Operations that a backward of one image repeats; `mode` is of checkpointing, "none", "selective" or "block"."""
    if mode == "selective":  # proj and the MLP
        width, inner = config.hidden_size, config.intermediate_size
        return 2 * config.num_hidden_layers * tokens_of(config, size) * width * (width + 2 * inner)
    return flops(config, size) if mode == "block" else 0


def cost(
    config: InternViTConfig,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    maps: int = 0,
    split: "TensorParallelPlan | None" = None,
) -> Cost:
    """The cost of `config` on a batch of images of size (height, width); `maps` hidden states are kept for dense tasks.

    With `split` parameters and bytes are those of the rank with the most heads, padding included.

    Raises:
        ValueError: a size off the patch grid.
    """
    heads = 1.0 if split is None else max(split.heads) / config.num_attention_heads
    hidden = 1.0 if split is None else max(split.hidden) / config.intermediate_size
    # A sum over ranks of a 16-bit tensor: each rank's part in float32, of which one more is the scattered one's.
    summed = 4 / dtype.itemsize if split is not None and split.ranks > 1 else 0
    item = dtype.itemsize
    tokens, width, layers = tokens_of(config, size), config.hidden_size, config.num_hidden_layers
    unit = batch * tokens * width * item
    inner = hidden * config.intermediate_size / width
    attention_statistics = batch * tokens * 4 * (heads * config.num_attention_heads + 2)
    statistics = batch * tokens * 4 * (6 if config.norm_type == "layer_norm" else 4) + attention_statistics
    # x, qkv (3), attention, its projection, the stream between, fc1's pre-activation, fc2's output
    kept = (4 + 4 * heads + inner) * unit + statistics
    # One block's backward: GELU's output and gradient, the pre-activation's gradient, and gradients of the stream.
    working = (2 * inner + 2 + summed) * unit
    # Recomputed in a checkpoint, where nothing is rematerialized: proj's output, the stream between, its norm, the
    # pre-activation, GELU and fc2's output, when GELU's gradient and those of the stream are there.
    recomputed = (3 * inner + 5 + summed) * unit
    parameters = config.num_parameters() if split is None else split.local_numel()
    wide = item < 4
    return Cost(
        variant=config.name or f"{width} wide, {layers} layers",
        parameters=parameters,
        tokens=tokens,
        flops=flops(config, size),
        weights=parameters * item,
        # The embeddings, a layer's input and its normed form, the stream between and its, beside qkv, attention and its
        # projection, or beside fc1's pre-activation and its GELU, or the GELU and fc2's output.
        inference=round((5 + max(1 + 4 * heads, 2 * inner, inner + 1, heads + summed, inner + summed) + maps) * unit),
        training=round(layers * kept + unit + working),
        # Folded, the scaled gradient of a branch is alive beside the stream's.
        folded=round(layers * (kept - 2 * unit) + 2 * unit + working),
        selective=round(layers * ((1 + 4 * heads) * unit + attention_statistics) + unit + recomputed),
        # And norm1, qkv, attention.
        checkpointing=round(layers * unit + unit + recomputed + (1 + 4 * heads) * unit + statistics),
        optimizer=parameters * (item + 8 + (4 if wide else 0)),
    )


def tokens_of(config: InternViTConfig, size: tuple[int, int]) -> int:
    """Tokens of an image of size (height, width), with the class token.

    Raises:
        ValueError: a size off the patch grid.
    """
    if any(s <= 0 or s % config.patch_size for s in size):
        raise ValueError(f"size: expected multiples of {config.patch_size}, got {size[0]}x{size[1]}")
    return 1 + (size[0] // config.patch_size) * (size[1] // config.patch_size)


@dataclass(frozen=True)
class Plan:
    """The costs of all variants, what fits, and which to take."""

    costs: list[Cost]
    fits: dict[str, str]
    choice: str | None
    why: str

    def to_dict(self) -> dict:
        return {**asdict(self), "costs": [asdict(c) for c in self.costs]}


def plan(
    task: str,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    train: bool = False,
    memory: int | None = None,
) -> Plan:
    """Costs of every published variant for a task, and the one to take.

    Args:
        task: one of `TASKS`.
        size: (height, width); by default the task's usual size.
        batch: images at once.
        dtype: of weights and activations.
        train: fine-tuning of all weights with AdamW instead of inference.
        memory: bytes there are; None leaves out what fits.

    Raises:
        ValueError: an unknown task, a size off the patch grid, a batch below 1.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    size = size or (DEFAULT_SIZE[task],) * 2
    maps = 4 if task in ("segmentation", "detection") else 0
    costs = [cost(config, size, batch, dtype, maps) for config in VARIANTS.values()]
    fits = {c.variant: _fit(c, train, memory) for c in costs} if memory is not None else {}
    preferred = preferred_variants(task, train)
    if memory is None:
        choice = "internvit-300m-448px-v2.5"
        reason = "a twentieth of the 6B's cost; name --memory to hear whether a 6B fits"
        return Plan(costs, fits, choice, reason)
    for name in preferred:
        if fits[name] != "no":
            how = "" if fits[name] == "yes" else f" {fits[name]}"
            return Plan(costs, fits, name, f"the largest that fits{how}; {_reason(name, task)}")
    return Plan(costs, fits, None, "none fits; lower --batch or --size, or use a 16-bit --dtype")


def preferred_variants(task: str, train: bool) -> list[str]:
    """The variants to take for a task, the largest first."""
    # The newest checkpoint of a size is the better one; V1.0 and 224px keep blocks that later versions dropped.
    preferred = ["internvit-6b-448px-v2.5", "internvit-300m-448px-v2.5"]
    if task in ("segmentation", "detection") and train:
        preferred.insert(0, "internvit-6b-224px")
    return preferred


def _reason(name: str, task: str) -> str:
    if name == "internvit-6b-224px":
        return "the 48-layer checkpoint that upstream fine-tunes for dense prediction"
    if name.startswith("internvit-6b"):
        return "the newest 6B, with the last three blocks already dropped"
    return "the newest 300M, distilled from the 6B"


def _fit(c: Cost, train: bool, memory: int) -> str:
    if c.total(train) <= memory:
        return "yes"
    for mode, how in (("selective", "with selective checkpointing"), ("block", "with checkpointing")):
        if train and c.total(train, mode) <= memory:
            return how
    return "no"
