"""Whether an upstream's block is one that the fused ops can stand for.

    x = x + drop_path(attention(norm1(x)) * gamma1);  x = x + drop_path(fc2(gelu(fc1(norm2(x)))) * gamma2)

A block is known by structure: every part that a `Layout` names is there, nothing else is, and each part is of a class
whose arithmetic is the one above. `why_unsupported` says what speaks against a block for good, `why_not_now` what does
at this moment: a hook, an adapter, a quantised weight, dropout.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from internvit.model.fused_block import Norm
from internvit.model.hooks import has_global_hooks, is_plain_linear, is_written_in
from internvit.upstream.layouts import Layout, known_layouts, part

_PARAMETERS = (nn.Parameter, FakeTensor)  # torch.export traces with fake parameters

# Attributes that change what an attention of a known class computes.
_FOREIGN = ("window_size", "rel_pos", "rope")
_RMS_NORMS = (
    "InternRMSNorm",
    "InternVLVisionRMSNorm",
    "QianfanOCRVisionRMSNorm",
    "InternS1VisionRMSNorm",
    "RMSNorm",
    "RmsNorm",
    "FusedRMSNorm",
)


def _owner(module: Any) -> type:
    """The class whose forward runs."""
    return next((c for c in type(module).__mro__ if "forward" in c.__dict__), type(module))


def _working_class(module: Any) -> str:
    """The name of the class whose forward runs; FSDP2 puts one of its own in front."""
    return _owner(module).__name__.removeprefix("FSDP")


def has_another_forward(module: nn.Module) -> bool:
    """Whether somebody has given the class a forward that was not written in it: then its name says nothing."""
    owner = _owner(module)
    forward = owner.__dict__.get("forward")
    if forward is None:
        return False
    return not any(is_written_in(forward, c) for c in owner.__mro__)


def norm_of(module: Any) -> Norm | None:
    """An upstream norm module as ours, None where its class is not known to compute the same."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or getattr(module, "_fast_norm", False):
        return None
    if _working_class(module) == "LayerNorm" and isinstance(module, nn.LayerNorm):
        return Norm("layer_norm", weight, bias, eps)
    return Norm("rms_norm", weight, None, eps) if _working_class(module) in _RMS_NORMS and bias is None else None


def gamma_of(block: nn.Module, name: str | None) -> Tensor | None:
    """LayerScale's weight; None for an Identity, and for a block without LayerScale."""
    layer_scale = None if name is None else part(block, name)
    if isinstance(layer_scale, Tensor):
        return layer_scale
    weights = (getattr(layer_scale, attribute, None) for attribute in ("gamma", "lambda1"))
    return next((w for w in weights if isinstance(w, Tensor)), None)


def _is_absent(module: Any) -> bool:
    return module is None or type(module) is nn.Identity


def _classes(block: nn.Module, layout: Layout) -> tuple[str, str, str]:
    return (
        _working_class(block),
        _working_class(part(block, layout.attention)),
        _working_class(part(block, layout.mlp)),
    )


def layout_of(block: nn.Module) -> Layout | None:
    """The layout of a block's classes, or of its own class alone, if the module is a block."""
    name = _working_class(block)
    found = [
        layout
        for layout in known_layouts()
        if any(name == block_class for block_class, _, _ in layout.classes)
        and part(block, layout.attention) is not None
    ]
    exact = (layout for layout in found if _classes(block, layout) in layout.classes)
    return next(exact, found[-1] if found else None)


def why_unsupported(block: nn.Module, layout: Layout) -> str | None:
    """Why the fused ops cannot stand for this block; None when they can."""
    if part(block, layout.mlp) is None:
        return f"it has no {layout.mlp}"
    _, attention_class, mlp_class = classes = _classes(block, layout)
    if classes not in layout.classes:
        known = [f"{attention} and {mlp}" for name, attention, mlp in layout.classes if name == classes[0]]
        return (
            f"{layout.attention} is a {attention_class} and {layout.mlp} a {mlp_class}, expected {' or '.join(known)}"
        )
    for owner in ("", layout.attention, layout.mlp):
        module = part(block, owner) if owner else block
        for child in (*module._modules, *module._parameters):
            path = f"{owner}.{child}".lstrip(".")
            if path not in layout.names and part(block, path) is not None:
                return f"it has a part that is not known here, {path}"
    attention = part(block, layout.attention)
    for name in ("", *layout.names):
        module = part(block, name) if name else block
        if isinstance(module, nn.Module) and has_another_forward(module):
            return f"{name or 'it'} is a {type(module).__name__} with another forward"
    foreign = [name for name in _FOREIGN if getattr(attention, name, None)]
    if foreign:
        return f"{layout.attention} has {foreign[0]}"
    missing = [name for name in (*layout.norms, *layout.linears, layout.activation) if part(block, name) is None]
    missing += [name for name in layout.gammas if not hasattr(block, name)]
    if not isinstance(getattr(attention, layout.num_heads, None), int):
        missing.append(f"{layout.attention}.{layout.num_heads}")
    if missing:
        return f"it has no {missing[0]}"
    return _why_parts_unsupported(block, layout)


def _why_parts_unsupported(block: nn.Module, layout: Layout) -> str | None:
    for name in layout.norms:
        if norm_of(part(block, name)) is None:
            return f"{name} is a {type(part(block, name)).__name__}, not a LayerNorm or RMSNorm known here"
    activation = part(block, layout.activation)
    exact = getattr(activation, "approximate", "none") == "none"
    if _working_class(activation) not in ("GELU", "GELUActivation") or not exact:
        return f"{layout.activation} is {activation}, not the exact (erf) GELU"
    qk_norms = [part(block, name) for name in layout.qk_norms]
    if not all(map(_is_absent, qk_norms)):
        q_norm, k_norm = (norm_of(module) for module in qk_norms)
        norms = norm_of(part(block, layout.norms[0]))
        assert norms is not None
        for norm in (q_norm, k_norm):
            if norm is None or norm.norm_type != "rms_norm" or norm.weight.shape != norms.weight.shape:
                return f"{layout.qk_norms[0]} is not an RMSNorm over the whole width"
        if q_norm is not None and k_norm is not None and q_norm.eps != k_norm.eps:
            return f"{' and '.join(layout.qk_norms)} have different eps"
    for name in layout.gammas:
        if not (_is_absent(part(block, name)) or isinstance(gamma_of(block, name), Tensor)):
            return f"{name} is a {type(part(block, name)).__name__}, not LayerScale"
    for name in layout.drop_paths:
        if not _is_absent(part(block, name)) and not _working_class(part(block, name)).endswith("DropPath"):
            return f"{name} is a {type(part(block, name)).__name__}, not DropPath"
    for name in layout.idle:
        if not _is_absent(part(block, name)):
            return f"it has {name}"
    return None


class Inner(NamedTuple):
    """A module inside a block, as it was when the block was patched.

    Attributes:
        path: the parts of its dotted name.
        forward: its class's.
    """

    name: str
    path: tuple[str, ...]
    module_class: type
    forward: Any


def inner_modules(block: nn.Module, layout: Layout) -> tuple[Inner, ...]:
    """The modules that a block has; a Linear may be of another class now, and plain again later."""
    modules = {name: part(block, name) for name in layout.names}
    classes = {
        name: nn.Linear if name in layout.linears else type(module)
        for name, module in modules.items()
        if isinstance(module, nn.Module)
    }
    return tuple(Inner(name, tuple(name.split(".")), found, found.forward) for name, found in classes.items())


def why_not_now(block: nn.Module, layout: Layout, inner: tuple[Inner, ...]) -> str | None:
    """Why a supported block must run its own forward now.

    It runs at each call of each block, so it reads the modules' dictionaries (17 us a block on one Xeon core;
    through nn.Module's __getattr__ it was 147).
    """
    if has_global_hooks():
        return "all modules have a hook"
    if (why := _why_other_attention(part(block, layout.attention))) is not None:
        return f"{layout.attention} has {why}"
    for name, path, module_class, forward in inner:
        module: Any = block
        for child in path:
            module = module._modules.get(child)
            if module is None:
                return f"it has no {name}"
        present = type(module)
        if present is not module_class:
            return f"{name} is a {present.__module__}.{present.__qualname__}"
        if present.forward is not forward:
            return f"{name} is a {present.__qualname__} with another forward"
        if module.__dict__.get("approximate", "none") != "none":
            return f"{name} is not the exact (erf) GELU"
        if _is_hooked(module):
            return f"{name} has a hook, or attention maps are asked for"
        is_parameter = module_class is not nn.Linear or type(module._parameters.get("weight")) in _PARAMETERS
        if not is_parameter and not is_plain_linear(module):
            return f"{name}.weight is a {type(module.weight).__name__}"
    if block.training:
        for name in layout.dropouts:
            dropout = part(block, name)
            holder = name.rpartition(".")[0]
            owner = dropout if isinstance(dropout, nn.Module) else part(block, holder) if holder else block
            probability = getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout
            if probability and owner.training:
                return f"{name} is {probability} in training"
    return None


def _why_other_attention(attention: Any) -> str | None:
    """What transformers would call in place of softmax(q k^T) v; anybody may register a function for a name."""
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    registry = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    if name is None or name == "eager" or registry is None:
        return None
    function = registry.get(name)
    owner = getattr(getattr(function, "func", function), "__module__", "") or ""
    return None if owner.split(".")[0] in ("transformers", "internvit") else f"the attention implementation {name!r}"


def keeps_by_rounding(drop_path: Any) -> bool:
    """Whether a DropPath keeps an image where floor(rand + 1 - rate) is 1, as transformers' do."""
    return _working_class(drop_path) != "DropPath"


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    if module._forward_hooks and not all(map(_is_idle, module._forward_hooks.values())):
        return True
    return not has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether `module` runs its class's forward; transformers 4.57 leaves that very method on instances."""
    forward = module.__dict__.get("forward")
    return forward is None or (
        getattr(forward, "__self__", None) is module and getattr(forward, "__func__", None) is type(module).forward
    )


def _is_idle(hook: Any) -> bool:
    """Whether a hook is the one with which transformers 5 collects attention maps, and nobody asks for them.

    It stays on the attention for good once hidden states or maps were asked for, as InternVLModel always does.
    """
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is None:
        return False
    collected = collector.get()
    return collected is None or "attentions" not in collected


def mixed(block: nn.Module, layout: Layout, hidden_states: Any) -> str | None:
    """Why the fused ops would not give the dtype, or take the shape, that the block's own forward does."""
    if not isinstance(hidden_states, Tensor):
        return f"hidden states in a {type(hidden_states).__name__}"
    if hidden_states.dim() != 3 or not hidden_states.is_floating_point():
        return f"hidden states of shape {list(hidden_states.shape)} and {hidden_states.dtype}"
    vectors = [part(block, name).weight for name in layout.norms] + [gamma_of(block, name) for name in layout.gammas]
    dtypes: set[torch.dtype] = {t.dtype for t in vectors if t is not None} - {hidden_states.dtype}
    return f"parameters of {dtypes.pop()} beside hidden states of {hidden_states.dtype}" if dtypes else None
