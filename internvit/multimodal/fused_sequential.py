"""A row of LayerNorms, Linears, GELUs and Dropouts on the fused ops."""

from collections.abc import Iterable

from torch import Tensor, nn

from internvit.model.fused_block import cast_for_linear, fc1_gelu, linear_per_image
from internvit.model.hooks import has_hooks, is_exactly, is_plain
from internvit.ops import layer_norm


def run_sequential(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    """`nn.Sequential(*modules)(x)`; without gradients, the same bits for an image alone and in any batch.

    A Linear and the GELU behind it are one op, and a LayerNorm writes the dtype of 16-bit weights. A module that is not
    what its class built (hooks, as of FSDP, adapters, quantised weights) is called, an `nn.Sequential` as a whole.
    """
    if isinstance(modules, nn.Sequential) and has_hooks(modules):
        return modules(x)
    layers = list(modules)
    while layers:
        layer = layers.pop(0)
        if layers and _is_exact_gelu(layers[0]):
            layers.pop(0)
            x = fc1_gelu(layer, x)
        elif is_plain(layer, nn.LayerNorm):
            x = cast_for_linear(layer_norm(x, layer.weight, layer.bias, eps=layer.eps), layer.weight.dtype)
        elif isinstance(layer, nn.Linear):
            x = linear_per_image(layer, x)
        else:
            x = layer(x)
    return x


def _is_exact_gelu(module: nn.Module) -> bool:
    return is_exactly(module, nn.GELU) and module.approximate == "none"
