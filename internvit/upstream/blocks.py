"""Where each upstream's block keeps its parts, and whether a block is one that the fused ops can stand for.

    x = x + drop_path(attention(norm1(x)) * gamma1);  x = x + drop_path(fc2(gelu(fc1(norm2(x)))) * gamma2)

One row of names for each of OpenGVLab's remote code, transformers, and timm (whose names OpenGVLab's mmseg, mmdet and
classification code shares). A block is known by structure: every part of the row is there, nothing else is, and each
part is of a class whose arithmetic is the one above. `why_unsupported` says what speaks against a block for good,
`why_not_now` what does at this moment: a hook, an adapter, a quantised weight, dropout.
"""

import sys
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from internvit.model.fused_block import Norm
from internvit.model.hooks import is_plain_linear

_PARAMETERS = (nn.Parameter, FakeTensor)  # torch.export traces with fake parameters


@dataclass(frozen=True)
class Layout:
    """The names of a block's parts, relative to the block.

    Attributes:
        name: as in `internvit.names.LAYOUTS`.
        classes: of the block, its attention and its MLP.
        qkv: the packed projection, or those of q, k and v.
        gammas: LayerScale, each a parameter, or a module with one named gamma.
        drop_paths: empty where the upstream has none.
        dropouts: modules, or attributes that hold the probability.
        idle: modules that must be absent or an Identity.
        inside: modules whose work the fused attention does itself.
    """

    name: str
    classes: tuple[tuple[str, ...], str, str]
    norms: tuple[str, str]
    attention: str
    qkv: tuple[str, ...]
    qk_norms: tuple[str, str]
    proj: str
    mlp: str
    fc1: str
    activation: str
    fc2: str
    gammas: tuple[str, str]
    drop_paths: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.proj, self.fc1, self.fc2)

    @property
    def names(self) -> tuple[str, ...]:
        """Every module or parameter that a block may have."""
        values = [getattr(self, field.name) for field in fields(self) if field.name not in ("name", "classes")]
        return tuple(name for value in values for name in ((value,) if isinstance(value, str) else value))


OPENGVLAB = Layout(
    name="opengvlab",
    classes=(("InternVisionEncoderLayer",), "InternAttention", "InternMLP"),
    norms=("norm1", "norm2"),
    attention="attn",
    qkv=("attn.qkv",),
    qk_norms=("attn.q_norm", "attn.k_norm"),
    proj="attn.proj",
    mlp="mlp",
    fc1="mlp.fc1",
    activation="mlp.act",
    fc2="mlp.fc2",
    gammas=("ls1", "ls2"),
    drop_paths=("drop_path1", "drop_path2"),
    dropouts=("attn.attn_drop", "attn.proj_drop"),
    inside=("attn.inner_attn",),
)
LAYOUTS = (
    OPENGVLAB,
    Layout(
        name="transformers",
        classes=(("InternVLVisionLayer",), "InternVLVisionAttention", "InternVLVisionMLP"),
        norms=("layernorm_before", "layernorm_after"),
        attention="attention",
        qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        qk_norms=("attention.q_norm", "attention.k_norm"),
        proj="attention.projection_layer",
        mlp="mlp",
        fc1="mlp.fc1",
        activation="mlp.activation_fn",
        fc2="mlp.fc2",
        gammas=("lambda_1", "lambda_2"),
        dropouts=("dropout", "attention.projection_dropout", "attention.attention_dropout"),
    ),
    replace(
        OPENGVLAB,
        name="timm",
        classes=(("Block",), "Attention", "Mlp"),
        dropouts=("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"),
        idle=("attn.norm", "attn.gate", "mlp.norm"),
    ),
)

# Attributes that change what an attention of a known class computes.
_FOREIGN = ("window_size", "rel_pos", "rope")
_RMS_NORMS = ("InternRMSNorm", "InternVLVisionRMSNorm", "RMSNorm", "RmsNorm", "FusedRMSNorm")


def part(block: nn.Module, name: str) -> Any:
    """The part of that dotted name, None where it is absent."""
    owner: Any = block
    for attribute in name.split("."):
        owner = getattr(owner, attribute, None)
    return owner


def _working_class(module: Any) -> str:
    """The name of the class whose forward runs; FSDP2 puts one of its own in front."""
    owner = next((c for c in type(module).__mro__ if "forward" in c.__dict__), type(module))
    return owner.__name__.removeprefix("FSDP")


def norm_of(module: Any) -> Norm | None:
    """An upstream norm module as ours, None where its class is not known to compute the same."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or getattr(module, "_fast_norm", False):
        return None
    if _working_class(module) == "LayerNorm" and isinstance(module, nn.LayerNorm):
        return Norm("layer_norm", weight, bias, eps)
    return Norm("rms_norm", weight, None, eps) if _working_class(module) in _RMS_NORMS and bias is None else None


def gamma_of(block: nn.Module, name: str) -> Tensor | None:
    """LayerScale's weight, None for an Identity."""
    layer_scale = part(block, name)
    return layer_scale if isinstance(layer_scale, Tensor) else getattr(layer_scale, "gamma", None)


def _is_absent(module: Any) -> bool:
    return module is None or type(module) is nn.Identity


def layout_of(block: nn.Module) -> Layout | None:
    """The row of a block's class, if the module is a block."""
    name = _working_class(block)
    for layout in LAYOUTS:
        if name in layout.classes[0] and part(block, layout.attention) is not None:
            return layout
    return None


def why_unsupported(block: nn.Module, layout: Layout) -> str | None:
    """Why the fused ops cannot stand for this block; None when they can."""
    for owner in ("", layout.attention, layout.mlp):
        module = part(block, owner) if owner else block
        if module is None:
            return f"it has no {owner}"
        for child in (*module._modules, *module._parameters):
            path = f"{owner}.{child}".lstrip(".")
            if path not in layout.names and part(block, path) is not None:
                return f"it has a part that is not known here, {path}"
    for owner, expected in ((layout.attention, layout.classes[1]), (layout.mlp, layout.classes[2])):
        if _working_class(part(block, owner)) != expected:
            return f"{owner} is a {_working_class(part(block, owner))}, expected {expected}"
    attention = part(block, layout.attention)
    foreign = [name for name in _FOREIGN if getattr(attention, name, None)]
    if foreign:
        return f"{layout.attention} has {foreign[0]}"
    missing = [name for name in (*layout.norms, *layout.linears, layout.activation) if part(block, name) is None]
    missing += [name for name in layout.gammas if not hasattr(block, name)]
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
        if not _is_absent(part(block, name)) and _working_class(part(block, name)) != "DropPath":
            return f"{name} is a {type(part(block, name)).__name__}, not DropPath"
    for name in layout.idle:
        if not _is_absent(part(block, name)):
            return f"it has {name}"
    return None


class Inner(NamedTuple):
    """A module inside a block, as it was when the block was patched.

    Attributes:
        path: the parts of its dotted name.
    """

    name: str
    path: tuple[str, ...]
    module_class: type


def inner_modules(block: nn.Module, layout: Layout) -> tuple[Inner, ...]:
    """The modules that a block has; a Linear may be of another class now, and plain again later."""
    modules = {name: part(block, name) for name in layout.names}
    return tuple(
        Inner(name, tuple(name.split(".")), nn.Linear if name in layout.linears else type(module))
        for name, module in modules.items()
        if isinstance(module, nn.Module)
    )


def why_not_now(block: nn.Module, layout: Layout, inner: tuple[Inner, ...]) -> str | None:
    """Why a supported block must run its own forward now.

    It runs at each call of each block, so it reads the modules' dictionaries (17 us a block on one Xeon core;
    through nn.Module's __getattr__ it was 147).
    """
    for name, path, module_class in inner:
        module: Any = block
        for child in path:
            module = module._modules.get(child)
            if module is None:
                return f"it has no {name}"
        present = type(module)
        if present is not module_class:
            return f"{name} is a {present.__module__}.{present.__qualname__}"
        if _is_hooked(module):
            return f"{name} has a hook, or attention maps are asked for"
        is_parameter = module_class is not nn.Linear or type(module._parameters.get("weight")) in _PARAMETERS
        if not is_parameter and not is_plain_linear(module):
            return f"{name}.weight is a {type(module.weight).__name__}"
    if block.training:
        for name in layout.dropouts:
            dropout = part(block, name)
            owner = dropout if isinstance(dropout, nn.Module) else part(block, name.rpartition(".")[0])
            probability = getattr(dropout, "p", 0.0) if isinstance(dropout, nn.Module) else dropout
            if probability and owner.training:
                return f"{name} is {probability} in training"
    return None


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


def mixed(block: nn.Module, layout: Layout, hidden_states: Tensor) -> str | None:
    """Why the fused ops would not give the dtype, or take the shape, that the block's own forward does."""
    if hidden_states.dim() != 3 or not hidden_states.is_floating_point():
        return f"hidden states of shape {list(hidden_states.shape)} and {hidden_states.dtype}"
    vectors = [part(block, name).weight for name in layout.norms] + [gamma_of(block, name) for name in layout.gammas]
    dtypes: set[torch.dtype] = {t.dtype for t in vectors if t is not None} - {hidden_states.dtype}
    return f"parameters of {dtypes.pop()} beside hidden states of {hidden_states.dtype}" if dtypes else None
