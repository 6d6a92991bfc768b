"""The tower is found among other networks, and under the names that wrappers make."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internvit.checkpoint.state_dict import conversion_plan, convert_state_dict, detect_layout, infer_config
from internvit.names import LAYOUTS
from tests.checkpoint.test_state_dict import PLAIN, QK_NORM, assert_same
from tests.support.strategies import random_weights


def beside(weights: dict[str, Tensor], **others: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with other networks' tensors, under their prefixes."""
    return {**{f"{name}.{k}": v for name, other in others.items() for k, v in other.items()}, **weights}


def timm_like(blocks: int, **more: Tensor) -> dict[str, Tensor]:
    """A ViT with timm's names and LayerScale, without class token."""
    names = [f"{part}.{leaf}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for leaf in ("weight", "bias")]  # fmt: skip
    names += ["ls1.gamma", "ls2.gamma"]
    trunk = {f"blocks.{i}.{name}": torch.zeros(2) for i in range(blocks) for name in names}
    return {**trunk, "pos_embed": torch.zeros(2), "patch_embed.proj.weight": torch.zeros(2), **more}


def clip_like() -> dict[str, Tensor]:
    """transformers' CLIP: its embeddings have OpenGVLab's names."""
    embeddings = ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
    layer = ("self_attn.q_proj.weight", "layer_norm1.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    names = [f"embeddings.{n}" for n in embeddings] + [f"encoder.layers.{i}.{n}" for i in range(24) for n in layer]
    return {f"vision_model.{name}": torch.zeros(2) for name in names}


DINO = timm_like(12, **{"cls_token": torch.zeros(2), "norm.weight": torch.zeros(2), "mask_token": torch.zeros(2)})
NEIGHBOURS = {
    "a SAM 2 trunk of more blocks": {"grounding_encoder.image_encoder.trunk": timm_like(48)},
    "DINOv2": {"dino": DINO},
    "CLIP": {"clip": clip_like()},
    "all of them": {"grounding_encoder.trunk": timm_like(48), "teacher.backbone": DINO, "clip": clip_like()},
}


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
@pytest.mark.parametrize("neighbours", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize("layout", ["opengvlab", "transformers", "mmseg"])
def test_the_tower_is_known_by_its_structure(layout: str, neighbours: dict, prefix: str) -> None:
    weights = random_weights(PLAIN)
    stored = {prefix + key: value for key, value in convert_state_dict(weights, layout).items()}
    both = beside(stored, **neighbours)
    if prefix == "" and neighbours != NEIGHBOURS["DINOv2"]:  # whatever is there could be the tower's
        with pytest.raises(ValueError, match=r"unexpected keys|expected one InternViT"):
            convert_state_dict(both)
        return
    assert detect_layout(both)[1] == prefix
    assert_same(convert_state_dict(both, config=PLAIN), weights)
    assert infer_config(both) == PLAIN


def test_several_towers_are_listed_and_chosen_by_prefix() -> None:
    student, teacher, momentum = (random_weights(PLAIN, seed=seed) for seed in range(3))
    both = {f"teacher.{k}": v for k, v in teacher.items()}
    both |= {f"student.model.{k}": v for k, v in convert_state_dict(student, "transformers").items()}
    with pytest.raises(ValueError, match="expected one InternViT, got 2: ") as error:
        convert_state_dict(both)
    assert "prefix='student.model.' (transformers's names, 2 blocks)" in str(error.value)
    assert "prefix='teacher.' (opengvlab's names, 2 blocks)" in str(error.value)
    for prefix, expected in (("teacher.", teacher), ("teacher", teacher), ("student.model.", student)):
        assert_same(convert_state_dict(both, prefix=prefix, config=PLAIN), expected)
        assert infer_config(both, prefix=prefix) == PLAIN
    with pytest.raises(ValueError, match=r"prefix: expected that of an InternViT, got 'vit\.'; there is prefix='"):
        convert_state_dict(both, prefix="vit.")
    nested = {**momentum, **both}
    assert_same(convert_state_dict(nested, prefix="", config=PLAIN), momentum)
    assert_same(convert_state_dict(nested, prefix="teacher.", config=PLAIN), teacher)
    with pytest.raises(ValueError, match="got 3: "):
        detect_layout(nested)


# ---- wrappers inside names ----


def test_wrapper_parts_anywhere() -> None:
    weights = random_weights(QK_NORM)
    patterns = {
        "compiled blocks": lambda k: k.replace("layers.0.", "layers.0._orig_mod."),
        "checkpointed and compiled": lambda k: k.replace(
            "layers.1.", "layers.1._checkpoint_wrapped_module._orig_mod."
        ),
        "FSDP at every level": lambda k: (
            "_fsdp_wrapped_module." + k.replace("layers.0.", "layers.0._fsdp_wrapped_module.")
        ),
        "DDP around a compiled model": lambda k: "module._orig_mod.vision_model." + k,
        "compiled Linears": lambda k: k.replace("fc1.", "fc1._orig_mod.").replace("qkv.", "qkv._orig_mod."),
        "a compiled encoder": lambda k: k.replace("encoder.", "encoder._orig_mod."),
    }  # fmt: skip
    for name, rename in patterns.items():
        wrapped = {rename(key): value for key, value in weights.items()}
        assert wrapped.keys() != weights.keys()
        assert_same(convert_state_dict(wrapped, config=QK_NORM), weights), name
        neighbours = {"language_model.model.layers.0._orig_mod.mlp.gate_proj.weight": torch.zeros(2)}
        outer = {f"vision_model.{key}": value for key, value in wrapped.items()}
        assert_same(convert_state_dict({**outer, **neighbours}, config=QK_NORM), weights), name
    theirs = convert_state_dict(weights, "transformers")
    wrapped = {key.replace("attention.", "attention._orig_mod."): value for key, value in theirs.items()}
    assert_same(convert_state_dict(wrapped, "transformers", config=QK_NORM), theirs)
    twice = {**weights, "encoder.layers.0._orig_mod.ls1": torch.zeros(256)}
    with pytest.raises(ValueError, match="expected one key a parameter"):
        convert_state_dict(twice)


PARTS = [name for layout in LAYOUTS[:3] for name in convert_state_dict(random_weights(PLAIN), layout)]
PARTS += ["norm.weight", "x", "", ".", "..", "head.weight"]
PARTS += ["encoder.layers..ls1", "encoder.layers.\u0663.ls1", "encoder.layers.-1.ls1"]
PREFIXES = ["", "vit.", "module.", "_orig_mod.", "a.b.", "0.", ".."]
KEYS = st.builds(str.__add__, st.sampled_from(PREFIXES), st.sampled_from(PARTS))
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 14, 64, 256, 768, 2**40]), max_size=5).map(tuple)


@settings(max_examples=300)
@given(st.dictionaries(KEYS, SHAPES, max_size=12), st.sampled_from([None, "", "vit.", "vit", ".", "a"]), st.booleans())
def test_any_names_and_shapes_end_in_a_value_error(shapes: dict, prefix: str | None, whole: bool) -> None:
    shapes = {**(PLAIN.parameter_shapes() if whole else {}), **shapes}
    with contextlib.suppress(ValueError):
        infer_config(shapes, prefix=prefix)
    with contextlib.suppress(ValueError):
        assert set(conversion_plan(shapes, "transformers", prefix).sources()) <= shapes.keys()
