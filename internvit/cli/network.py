"""What several commands ask for: a network and a size."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from click.core import ParameterSource

from internvit.config import HUB_IDS, VARIANTS, InternViTConfig
from internvit.inference.precision import PRECISIONS

if TYPE_CHECKING:
    from internvit.model.vit import InternViT

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ARCHITECTURE = (  # what the weights of one network have in common; an image size may be another
    *("num_channels", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("norm_type", "qkv_bias", "qk_normalization"),
)


class Size(click.ParamType):
    """N or HxW, in pixels."""

    name = "N|HxW"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", str(value))
        if match is None:
            self.fail(f"expected N or HxW in pixels, got {value!r}", param, ctx)
        height = int(match[1])
        return height, int(match[2] or height)


class Layers(click.ParamType):
    """Comma-separated numbers of blocks."""

    name = "I,J,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        try:
            return tuple(int(x) for x in str(value).split(","))
        except ValueError:
            self.fail(f"expected numbers of blocks such as 7,11,15,23, got {value!r}", param, ctx)


def network_options(command: Callable) -> Callable:
    """IMAGES, --model, --weights, --prefix and --size, as `features` and `precision` have them."""
    images = click.argument("images", nargs=-1, required=True)
    options = (
        click.option("--model", type=click.Choice(list(VARIANTS)), help="A published variant; weights from the hub."),
        click.option("--weights", help="A checkpoint folder, a .safetensors or .pth file, or a hub id."),
        click.option("--prefix", help="Before the tower's names in --weights, if it holds several towers."),
        click.option("--size", type=Size(), help="Height and width in pixels, multiples of the patch; native if none."),
    )
    for option in reversed(options):
        command = option(command)
    return images(command)


def precision_options(command: Callable) -> Callable:
    """--precision and --skip, as `optimize_for_inference` has them."""
    precision = click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        help="Compute by optimize_for_inference, the blocks' Linears in this; the rest in bfloat16.",
    )
    skip = click.option("--skip", multiple=True, help="Linears that stay bfloat16, such as encoder.layers.0.")
    return precision(skip(command))


def load_network(
    model: str | None, weights: str | None, prefix: str | None, dtype: str, device: str
) -> "tuple[InternViT, str]":
    """The network in eval mode, and where its weights come from."""
    from internvit.model.vit import InternViT

    source, config = source_of(model, weights), configuration(model, weights)
    network = InternViT.from_pretrained(source, config=config, dtype=DTYPES[dtype], device=device, prefix=prefix)
    return network.eval(), source


def load_in_precision(
    precision: str | None, skip: tuple[str, ...], dtype: str, network: "Callable[[str], tuple[InternViT, str]]"
) -> tuple[Any, str]:
    """The network that `network` loads in a dtype; with a precision optimised for inference."""
    from internvit.inference.optimize import optimize_for_inference

    loaded, source = network(dtype_beside(precision, skip, dtype))
    if precision is None:
        return loaded, source
    return optimize_for_inference(loaded, precision=precision, skip=skip or None), source


def dtype_beside(precision: str | None, skip: tuple[str, ...], dtype: str) -> str:
    """--dtype, which is bfloat16 with a precision."""
    if precision is None:
        if skip:
            raise click.UsageError("--skip names Linears that --precision int8 or fp8 leaves out")
        return dtype
    given = click.get_current_context().get_parameter_source("dtype")
    if dtype != "bfloat16" and given is not ParameterSource.DEFAULT:
        raise click.UsageError(f"--precision {precision} computes in bfloat16, got --dtype {dtype}")
    return "bfloat16"


def source_of(model: str | None, weights: str | None) -> str:
    """Where the weights come from."""
    if not (model or weights):
        raise click.UsageError("name the network: --model NAME, --weights PATH, or both")
    return weights or HUB_IDS[model or ""]


def configuration(model: str | None, weights: str | None) -> InternViTConfig | None:
    """The configuration where there is none beside the weights; refuses one that is of another network than `model`."""
    if not (weights and model):
        return None
    path = Path(weights)
    named, place = InternViTConfig.from_name(model), (path if path.is_dir() else path.parent) / "config.json"
    if not place.exists():
        return named
    stored = InternViTConfig.from_json(place)
    differing = [
        f"{name} {getattr(stored, name)}, not {getattr(named, name)}"
        for name in _ARCHITECTURE
        if getattr(stored, name) != getattr(named, name)
    ]
    if differing:
        raise click.UsageError(
            f"--model {model}: expected the network of {place}, which has {', '.join(differing)}; leave --model out"
        )
    return None
