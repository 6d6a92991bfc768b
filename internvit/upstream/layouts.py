"""Where the block of each family of vision transformers keeps its parts.

    x = x + drop_path(attention(norm1(x)) * gamma1);  x = x + drop_path(fc2(gelu(fc1(norm2(x)))) * gamma2)

One row of names for each spelling of this block; `register_layout` adds one.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Layout:
    """The names of a block's parts, relative to the block.

    Attributes:
        name: of the spelling, as `print(internvit.patch(model))` shows it.
        classes: (block, attention, MLP), the names of the classes that spell their parts so. Names of parts alone do
            not say what a forward computes, as with windows, rotary embeddings or a gate.
        qkv: the packed projection, whose rows are those of q, k and v, each head by head; or the three projections.
        gammas: LayerScale, each a parameter or a module with one named gamma or lambda1; empty for a block without.
        drop_paths: of the two branches, the same name twice for one module; empty where there is none.
        dropouts: modules, or attributes that hold the probability.
        idle: modules that must be absent or an Identity.
        inside: modules whose work the fused attention does itself.
        num_heads, scale: attributes of the attention; without a `scale` it is 1 / sqrt(head_dim).
    """

    name: str
    classes: tuple[tuple[str, str, str], ...]
    norms: tuple[str, str]
    attention: str
    qkv: tuple[str, ...]
    qk_norms: tuple[str, str]
    proj: str
    mlp: str
    fc1: str
    activation: str
    fc2: str
    gammas: tuple[str, ...] = ()
    drop_paths: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    num_heads: str = "num_heads"
    scale: str = "scale"

    def __post_init__(self) -> None:
        sizes = {"qkv": (1, 3), "gammas": (0, 2), "drop_paths": (0, 2)}
        for field, allowed in sizes.items():
            count = len(getattr(self, field))
            if count not in allowed:
                expected = " or ".join(map(str, allowed))
                raise ValueError(f"Layout: {field} must be {expected} names, got {getattr(self, field)!r}")
        if not self.classes or any(len(names) != 3 for names in self.classes):
            raise ValueError(f"Layout: classes must be names of (block, attention, MLP), got {self.classes!r}")

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.qkv, self.proj, self.fc1, self.fc2)

    @property
    def names(self) -> tuple[str, ...]:
        """Every module or parameter that a block may have."""
        other = ("name", "classes", "num_heads", "scale")
        values = [getattr(self, field.name) for field in fields(self) if field.name not in other]
        return tuple(name for value in values for name in ((value,) if isinstance(value, str) else value))

    def gamma(self, branch: int) -> str | None:
        """The name of a branch's LayerScale."""
        return self.gammas[branch] if self.gammas else None


def part(block: nn.Module, name: str) -> Any:
    """The part of that dotted name, None where it is absent."""
    owner: Any = block
    for attribute in name.split("."):
        owner = getattr(owner, attribute, None)
    return owner


OPENGVLAB = Layout(
    name="opengvlab",  # Skywork-R1V, Sa2VA and InternVL-U carry copies of these classes
    classes=(("InternVisionEncoderLayer", "InternAttention", "InternMLP"),),
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
TRANSFORMERS = Layout(
    name="transformers",
    classes=tuple(
        (f"{family}VisionLayer", f"{family}VisionAttention", f"{family}VisionMLP")
        for family in ("InternVL", "QianfanOCR", "InternS1")
    ),
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
    drop_paths=("drop_path1", "drop_path2"),
    dropouts=("dropout", "attention.projection_dropout", "attention.attention_dropout"),
)
TIMM = replace(
    OPENGVLAB,
    name="timm",
    classes=(("Block", "Attention", "Mlp"),),
    dropouts=("attn.attn_drop", "attn.proj_drop", "mlp.drop1", "mlp.drop2"),
    idle=("attn.norm", "attn.gate", "mlp.norm"),
)
DINOV2 = replace(
    TRANSFORMERS,
    name="dinov2",
    classes=tuple(
        (f"{family}Layer", f"{family}Attention", f"{family}MLP")
        for family in ("Dinov2", "Dinov2WithRegisters", "Radio")
    ),
    norms=("norm1", "norm2"),
    proj="attention.o_proj",
    gammas=("layer_scale1", "layer_scale2"),
    drop_paths=("drop_path", "drop_path"),
    dropouts=("attention.attention_dropout",),
    num_heads="num_attention_heads",
    scale="scaling",
)
DINOV2_ORIGINAL = replace(
    OPENGVLAB,
    name="dinov2 (facebookresearch)",
    classes=(("Block", "MemEffAttention", "Mlp"), ("NestedTensorBlock", "MemEffAttention", "Mlp")),
    # In training it drops images before a branch computes them, by a ratio of its own.
    dropouts=("attn.attn_drop", "attn.proj_drop", "mlp.drop", "sample_drop_ratio"),
)

LAYOUTS = (OPENGVLAB, TRANSFORMERS, TIMM, DINOV2, DINOV2_ORIGINAL)
_layouts = list(LAYOUTS)


def known_layouts() -> tuple[Layout, ...]:
    """Every layout that `internvit.patch` knows, those registered last first."""
    return tuple(reversed(_layouts))


def register_layout(layout: Layout) -> None:
    """Makes `internvit.patch` fuse the blocks of one more family.

    Args:
        layout: the names of its block's parts; most families differ from a known one in a few.

    Raises:
        TypeError: not a `Layout`.
        ValueError: another layout has its name.

    Example:
        >>> from internvit.upstream import OPENGVLAB, register_layout
        >>> register_layout(
        ...     dataclasses.replace(
        ...         OPENGVLAB, name="mine", classes=(("MyBlock", "MyAttention", "MyMLP"),), proj="attn.out"
        ...     )
        ... )
        >>> internvit.patch(model, verify=True)  # compares each block with its own forward
    """
    if not isinstance(layout, Layout):
        raise TypeError(f"layout: expected an internvit.upstream.Layout, got {type(layout).__name__}")
    if any(known.name == layout.name and known != layout for known in _layouts):
        raise ValueError(f"layout: there is another one of the name {layout.name!r}")
    if layout not in _layouts:
        _layouts.append(layout)
