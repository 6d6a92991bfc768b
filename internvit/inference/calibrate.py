"""`calibrate`: weights of a float32 model rounded for int8 and bfloat16 by what its inputs are on given images.

Block by block, with inputs from the blocks before as they are by then: int8 weights, inputs quantised to int8.

1. Norm weights, LayerScale and what else has no moments are rounded to bfloat16; the Linears beside them take up the
   difference, exactly.
2. Outlier channels move from a Linear's input into its weight (`internvit.inference.smoothing`).
3. The weight and the bias are rounded together (`internvit.inference.gptq`), once to int8 and once to bfloat16.
4. On images that steps 2 and 3 have not seen, the Linears that add most to the error stay bfloat16, until it is within
   the target.

The result is an `InternViT` in bfloat16, whose int8 weights are such numbers exactly (`internvit.inference.int8_grid`).
"""

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from internvit.inference import linear_int8
from internvit.inference.compare import state_error
from internvit.inference.gptq import BFloat16Grid, Int8Grid, round_weight
from internvit.inference.int8_grid import round_rows
from internvit.inference.optimize import optimize_for_inference
from internvit.inference.packed_block import LINEARS
from internvit.inference.smoothing import migrate, smoothing_factors
from internvit.model.block import InternViTLayer, is_unmodified
from internvit.model.hooks import refuse_global_hooks
from internvit.model.vit import InternViT

logger = logging.getLogger("internvit")

TARGET = 0.015
_RANKED = 4  # held-out images by which Linears are ranked
_SAMPLE = 2048  # rows by which smoothing is chosen


@dataclass(frozen=True)
class Calibration:
    """A calibrated model, and its errors on images held out.

    Attributes:
        model: in bfloat16; `optimize_for_inference(model, precision="int8")` computes its int8 Linears in int8.
        skipped: the Linears that stay bfloat16, the worst first.
        errors: of each held-out image, with those skipped: at the end, against float32, the median channel's.
        everywhere, bfloat16: the same with every Linear in int8, and with none.
        alone: what each Linear in int8 adds to the error at the end by itself, over the first held-out images.
    """

    model: InternViT
    skipped: list[str]
    errors: list[float]
    everywhere: list[float]
    bfloat16: list[float]
    alone: dict[str, float]

    @property
    def share(self) -> float:
        """The int8 Linears' share of all Linears' weights, and so of their multiplications."""
        state = self.model.state_dict()
        sizes = {name: state[f"{name}.weight"].numel() for name in self.alone}
        return 1 - sum(sizes[name] for name in self.skipped) / sum(sizes.values())


class _Rounded:
    """One Linear's weight and bias after calibration, as both kinds of Linear compute with them."""

    def __init__(self, linear: nn.Linear, moments: Tensor) -> None:
        weight = linear.weight.detach().double()
        if linear.bias is not None:
            weight = torch.cat([weight, linear.bias.detach().double().unsqueeze(1)], 1)
        else:
            moments = moments[:-1, :-1]
        depth = linear.in_features
        int8 = round_weight(weight, moments, _WithBias(Int8Grid(weight[:, :depth]), depth))
        half = round_weight(weight, moments, BFloat16Grid())
        self.exact_int8 = int8[:, :depth].float()
        self.int8, self.bfloat16 = ((t[:, :depth].bfloat16(), t[:, depth:].bfloat16()) for t in (int8, half))

    def put(self, linear: nn.Linear, int8: bool) -> None:
        """Gives a bfloat16 Linear its weight and bias."""
        _assign(linear, *(self.int8 if int8 else self.bfloat16))

    def emulate(self, linear: nn.Linear) -> Any:
        """Lets a float32 Linear compute as in int8; returns the hook that quantises its input."""
        _assign(linear, self.exact_int8, self.int8[1])
        return linear.register_forward_pre_hook(lambda module, arguments: (round_rows(arguments[0]),))


def _assign(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    linear.weight.data.copy_(weight)
    if linear.bias is not None:
        linear.bias.data.copy_(bias.view(-1))


_Layer: TypeAlias = dict[str, _Rounded]


class _WithBias:
    """The grid of a weight of `depth` columns with the bias, in bfloat16, as one more."""

    def __init__(self, grid: Int8Grid, depth: int) -> None:
        self.grid, self.depth = grid, depth

    def nearest(self, column: Tensor, index: int) -> Tensor:
        return (BFloat16Grid() if index == self.depth else self.grid).nearest(column, index)


class _Inputs:
    """What a Linear's inputs are on the calibration images: moments as quantised, sizes and a sample as they are."""

    def __init__(self, linear: nn.Linear, images: int) -> None:
        self.linear, self.images = linear, images
        self.largest = torch.zeros(linear.in_features)
        self.rows: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.largest += x.abs().amax(0) / self.images
        step = max(1, len(x) * self.images // _SAMPLE)
        self.rows.append(x[::step].clone())


class _ReachedError(Exception):
    """The input that was asked for is known: the rest of the block need not run."""


def _for_each_input(layer: InternViTLayer, name: str, states: Sequence[Tensor], use: Callable[[Tensor], None]) -> None:
    """Calls `use` with the Linear's input [N, K] for each image's hidden states before the layer."""

    def reached(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        use(arguments[0].flatten(0, -2))
        raise _ReachedError

    handle = layer.get_submodule(name).register_forward_pre_hook(reached, prepend=True)
    try:
        for x in states:
            try:
                layer(x)
            except _ReachedError:
                continue
    finally:
        handle.remove()


def _moments(layer: InternViTLayer, name: str, states: Sequence[Tensor]) -> Tensor:
    """The mean of [x, 1] [x, 1]^T over all rows of the quantised input, [K + 1, K + 1] float64."""
    depth = _linear(layer, name).in_features
    total, count = torch.zeros(depth + 1, depth + 1, dtype=torch.float64), 0

    def add(x: Tensor) -> None:
        nonlocal count
        rows = torch.nn.functional.pad(round_rows(x), (0, 1), value=1.0)
        total.add_((rows.T @ rows).double())
        count += len(rows)

    _for_each_input(layer, name, states, add)
    return total / count


def _prepare_layer(layer: InternViTLayer, states: Sequence[Tensor], smooth: bool) -> None:
    """Leaves nothing to round but the layer's Linears, and no outlier channels; it computes what it did."""
    _round_layer_scale(layer)
    for name in LINEARS[:3] if smooth else ():
        linear = _linear(layer, name)
        inputs = _Inputs(linear, len(states))
        _for_each_input(layer, name, states, inputs.add)
        migrate(layer, name, smoothing_factors(torch.cat(inputs.rows), inputs.largest, linear.weight.detach()))
    for norm, name in ((layer.norm1, "attn.qkv"), (layer.norm2, "mlp.fc1")):
        _round_norm(norm, _linear(layer, name))


def _round_linears(layer: InternViTLayer, states: Sequence[Tensor]) -> tuple[_Layer, list[Any]]:
    """Rounds the layer's Linears to int8, one after the other; also returns the hooks that quantise their inputs."""
    rounded, hooks = {}, []
    for name in LINEARS:
        linear = _linear(layer, name)
        rounded[name] = _Rounded(linear, _moments(layer, name, states))
        hooks.append(rounded[name].emulate(linear))
    return rounded, hooks


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    return parent.get_submodule(name)  # type: ignore[return-value]


def _round(parameter: Tensor) -> Tensor:
    """Rounds a parameter to bfloat16 in place; returns what it was over what it is."""
    before = parameter.detach().clone()
    parameter.data.copy_(before.bfloat16())
    return torch.where(parameter != 0, before.double() / parameter.double(), 1.0).float()


def _round_layer_scale(layer: InternViTLayer) -> None:
    """LayerScale in bfloat16; the rows of the Linears before it take up the difference."""
    for gamma, linear in ((layer.ls1, layer.attn.proj), (layer.ls2, layer.mlp.fc2)):
        ratio = _round(gamma)
        linear.weight.data.mul_(ratio.unsqueeze(1))
        if linear.bias is not None:
            linear.bias.data.mul_(ratio)
    if layer.attn.qk_normalization:
        for norm in (layer.attn.q_norm, layer.attn.k_norm):
            _round(norm.weight)


def _round_norm(norm: Any, linear: nn.Linear) -> None:
    """A norm's parameters in bfloat16; the Linear behind it takes up the difference."""
    exact = None if norm.bias is None else norm.bias.detach().double().clone()
    before = linear.weight.detach().double()
    linear.weight.data.mul_(_round(norm.weight))
    if exact is not None:
        _round(norm.bias)
        if linear.bias is not None:
            linear.bias.data.add_((before @ exact - linear.weight.double() @ norm.bias.double()).float())


def _alone(floating: InternViT, rounded: Mapping[str, _Rounded], images: Sequence[Tensor]) -> dict[str, float]:
    """What each Linear in int8 by itself adds to the error at the end, in float32.

    In bfloat16 any change of one Linear moves all roundings after it, by 0.4 % at the end of a trained ViT-S: as much
    as most Linears add.
    """
    layers: Any = floating.encoder.layers
    states = [[floating.embeddings(x) for x in images]]
    for layer in layers:
        states.append([layer(x) for x in states[-1]])
    alone = {}
    for name, linear in rounded.items():
        module: Any = floating.get_submodule(name)
        weight, bias = module.weight.detach().clone(), None if module.bias is None else module.bias.detach().clone()
        hook = linear.emulate(module)
        first = int(name.split(".")[2])
        ends = list(states[first])
        for layer in layers[first:]:
            ends = [layer(x) for x in ends]
        alone[name] = state_error(ends, states[-1]).channel
        hook.remove()
        _assign(module, weight, weight if bias is None else bias)
    return alone


class _Selection:
    """Which Linears are int8, tried on images that were held out."""

    def __init__(self, half: InternViT, rounded: Mapping[str, _Rounded], images: Sequence[Tensor], truth: list[Tensor]):
        self.rounded, self.images, self.truth = rounded, images, truth
        for name, linear in rounded.items():
            linear.put(_linear(half, name), True)
        self.fast = optimize_for_inference(half, out_dtype=torch.float32, precision="int8", skip=())

    def outputs(self, int8: Collection[str]) -> list[Tensor]:
        """Of each image, with these Linears in int8 and the others in bfloat16."""
        for name, linear in self.rounded.items():
            if (name in int8) != (name in self.fast.int8):
                linear.put(_linear(self.fast.model, name), name in int8)
        self.fast.int8 = frozenset(int8)
        return [self.fast(x).last_hidden_state for x in self.images]

    def errors(self, int8: Collection[str]) -> list[float]:
        return [
            state_error([ours], [exact]).channel for ours, exact in zip(self.outputs(int8), self.truth, strict=True)
        ]

    def skipped(self, alone: Mapping[str, float], target: float) -> list[str]:
        """The fewest Linears, by their size, that must stay bfloat16 for an error within the target on every image."""

        def gain(name: str) -> float:
            return alone[name] ** 2 / self.rounded[name].int8[0].numel()

        order = sorted(self.rounded, key=gain, reverse=True)
        low, high = 0, len(order)  # the fewest lie in low..high
        while low < high:
            middle = (low + high) // 2
            if max(self.errors(order[middle:])) <= target:
                high = middle
            else:
                low = middle + 1
        return order[:low]


@torch.no_grad()
def calibrate(
    model: InternViT,
    images: Sequence[Tensor],
    held_out: Sequence[Tensor],
    target: float = TARGET,
    smooth: bool = True,
    progress: Callable[[Sequence[int]], Iterable[int]] = lambda layers: layers,
) -> Calibration:
    """Rounds a model's weights for int8 by images, and chooses the Linears that stay bfloat16.

    Args:
        model: in float32 on a CPU, in eval mode; it is not changed.
        images: pixels [1, 3, height, width] each, to round by.
        held_out: others like them, to measure by.
        target: the largest error at the end of any held-out image, against float32, in the median channel.
        smooth: move outlier channels into the weights.
        progress: wraps the iteration over the blocks, as tqdm does.

    Returns:
        The calibrated model and what was measured.

    Raises:
        ValueError: a model of another dtype, in training mode, with hooks, adapters or replaced parts; no images, no
            images held out; a target that is not positive.
        RuntimeError: a machine without int8 Linears, on which nothing can be measured.
    """
    _check(model, images, held_out, target)
    truth = [model(x).last_hidden_state for x in held_out]
    work, floating = copy.deepcopy(model), copy.deepcopy(model)
    for parameter in work.embeddings.parameters():
        _round(parameter)
    states = [work.embeddings(x) for x in images]
    rounded: dict[str, _Rounded] = {}
    hooks: list[Any] = []
    for index in progress(range(len(work.encoder.layers))):
        layer: Any = work.encoder.layers[index]
        _prepare_layer(layer, states, smooth)
        floating.encoder.layers[index].load_state_dict(layer.state_dict())
        linears, added = _round_linears(layer, states)
        rounded |= {f"encoder.layers.{index}.{name}": linear for name, linear in linears.items()}
        hooks += added
        states = [layer(x) for x in states]
    for hook in hooks:
        hook.remove()
    alone = _alone(floating, rounded, held_out[:_RANKED])
    del floating
    selection = _Selection(work.bfloat16(), rounded, held_out, truth)
    skipped = selection.skipped(alone, target)
    everywhere, bfloat16 = selection.errors(rounded), selection.errors(())
    errors = selection.errors(rounded.keys() - set(skipped))
    if max(errors) > target:
        logger.warning("calibrate: bfloat16 alone is off by %.2f %%, more than the target", 100 * max(errors))
    return Calibration(selection.fast.undo(), skipped, errors, everywhere, bfloat16, alone)


def _check(model: InternViT, images: Sequence[Tensor], held_out: Sequence[Tensor], target: float) -> None:
    if not isinstance(model, InternViT):
        raise ValueError(f"calibrate: model must be an InternViT, got {type(model).__name__}")
    if model.dtype != torch.float32 or model.device.type != "cpu" or model.training:
        mode = "training" if model.training else "eval"
        raise ValueError(
            f"calibrate: model must be float32 on a CPU in eval mode, got {model.dtype} on {model.device} in {mode}"
        )
    refuse_global_hooks("calibrate")
    modified = [i for i, layer in enumerate(model.encoder.layers) if not is_unmodified(layer)]
    if modified:
        raise ValueError(f"calibrate: layers {modified} have hooks, adapters or replaced parts; remove or merge them")
    if not images or not held_out:
        raise ValueError(
            f"calibrate: expected images and others held out, got {len(images)} images and {len(held_out)} held out"
        )
    if not 0 < target < math.inf:
        raise ValueError(f"calibrate: target must be a positive number, got {target!r}")
    reason = linear_int8.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"calibrate: nothing can be measured: {reason}")
