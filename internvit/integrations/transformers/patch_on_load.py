"""Fused blocks in every model that transformers builds, by its registry of replaced classes.

>>> from internvit.integrations.transformers import patch_on_load
>>> patch_on_load()
>>> model = AutoModelForImageTextToText.from_pretrained("OpenGVLab/InternVL3-1B-hf")  # its vision blocks run fused

`from_pretrained` and `from_config` of transformers build a subclass instead of each block class below. A block of it
does what one does after `internvit.patch`: it runs fused where it can, decided at each call, and
`PatchHandle.of(model)` shows it and undoes it. Parameters, keys and saved files are those of the class itself.
"""

import functools
import importlib
import importlib.util
from typing import Any

from torch import nn

from internvit.upstream.blocks import layout_of, why_unsupported
from internvit.upstream.patch import FusedBlock

LAYERS = {
    "InternVLVisionLayer": "internvl",
    "QianfanOCRVisionLayer": "qianfan_ocr",
    "Dinov2Layer": "dinov2",
    "Dinov2WithRegistersLayer": "dinov2_with_registers",
    "RadioLayer": "radio",
}
"""The block classes and transformers' folders that define them."""


class _Replaces(type):
    """transformers 5.24 records hidden states of instances of the replacing class, and goes on with it when the
    registration has ended: a block of the replaced class has to count as one."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__mro__[1])


@functools.cache
def fused_layer(name: str) -> type[nn.Module]:
    """The subclass of a block class whose instances are patched."""
    module = importlib.import_module(f"transformers.models.{LAYERS[name]}.modeling_{LAYERS[name]}")
    base = getattr(module, name)

    def build(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, *args, **kwargs)
        layout = layout_of(self)
        if layout is not None and why_unsupported(self, layout) is None:
            FusedBlock(self, layout).install()

    # Its name stays the base's: `_no_split_modules` and FSDP's wrapping policies go by names.
    body = {"__init__": build, "__module__": __name__, "__doc__": base.__doc__}
    layer: Any = _Replaces(name, (base,), body)
    return layer


def __getattr__(name: str) -> type[nn.Module]:
    """The replacing classes by name, for pickle."""
    if name in LAYERS:
        return fused_layer(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def patch_on_load(enabled: bool = True) -> list[str]:
    """Has transformers build fused blocks from now on, or, with `enabled` false, its own again.

    Models that exist stay as they are.

    Args:
        enabled: whether to register the replacements with `transformers.monkey_patching`, or to take them back.

    Returns:
        The names of the block classes that are replaced now: those that the installed transformers has.

    Raises:
        ImportError: transformers has no registry of replaced classes; it is in 5.24.
        ValueError: another library replaces one of the classes.
    """
    try:
        from transformers import monkey_patching
    except ImportError as error:
        raise ImportError(
            "patch_on_load needs transformers 5.24 or newer; `internvit.patch(model)` works with older ones"
        ) from error
    present = {name: fused_layer(name) for name in LAYERS if _is_present(name)}
    # transformers searches a class's name for each key: "Dinov2Layer" alone would replace Dinov2LayerScale too.
    keys = {f"^{name}$": layer for name, layer in present.items()}
    replaced = monkey_patching.get_patch_mapping()
    for key, layer in keys.items():
        for other in (key, layer.__name__):
            if replaced.get(other, layer) is not layer:
                raise ValueError(f"patch_on_load: {layer.__name__} is replaced by {replaced[other].__module__} already")
    if not enabled:
        monkey_patching.unregister_patch_mapping([key for key in keys if key in replaced])
        return []
    monkey_patching.register_patch_mapping({key: layer for key, layer in keys.items() if key not in replaced})
    return list(present)


def _is_present(name: str) -> bool:
    return importlib.util.find_spec(f"transformers.models.{LAYERS[name]}") is not None
