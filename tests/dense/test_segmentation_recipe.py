"""Recipes of the segmentation script: OpenGVLab's, and values that no training can have."""

import sys

import pytest

from tests.support import ROOT

EXAMPLE = ROOT / "examples" / "segmentation"
sys.path.insert(0, str(EXAMPLE))
import recipe as recipes  # noqa: E402

RECIPE = """
[model]
image_size = 56
out_indices = [1, 3]
freeze = false
drop_path_rate = 0.3
precision = "float32"
[head]
dropout = 0.2
[data]
batch = 4
micro_batch = 2
reduce_zero_label = false
[augment]
crop = 56
short_side = 56
long_side = 112
[optim]
lr = 1e-3
weight_decay = 0.05
layer_decay = 0.9
steps = 9
warmup = 3
[test]
crop = 56
stride = 28
short_side = 56
[run]
log_every = 1
checkpoint_every = 2
evaluate_every = 9
"""
COUNTS = (
    "optim.steps",
    "data.batch",
    "data.micro_batch",
    "run.log_every",
    "run.checkpoint_every",
    "run.evaluate_every",
    "augment.crop",
    "test.stride",
    "test.batch",
    "model.patch_size",
)


@pytest.mark.parametrize("name", ["linear_probing", "head_tuning", "full_tuning", "few_shot"])
def test_recipes_are_upstreams(name) -> None:
    """Facts of OpenGVLab's four ADE20K configurations, restated."""
    recipe = recipes.read_recipe(EXAMPLE / "recipes" / f"{name}.toml")
    indices = {"linear_probing": (44,), "few_shot": (47,)}.get(name, (11, 23, 35, 47))
    tuned = name in ("full_tuning", "few_shot")
    assert recipe.model.out_indices == indices
    assert (recipe.model.image_size, recipe.model.patch_size) == (504, 14)
    assert recipe.model.freeze is not tuned
    assert recipe.model.drop_path_rate == (0.4 if tuned else 0.0)
    assert recipe.optim.weight_decay == (0.0 if name == "linear_probing" else 0.05)
    assert recipe.optim.layer_decay == (0.95 if tuned else 1.0)
    assert (recipe.optim.lr, recipe.optim.betas, recipe.data.batch) == (4e-5, (0.9, 0.999), 16)
    assert recipe.optim.steps == (5000 if name == "few_shot" else 80_000)
    assert (recipe.head.kind, recipe.model.fpn) == (("upernet", True) if "_tuning" in name else ("linear", False))
    assert (recipe.test.crop, recipe.test.stride) == (504, 322)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.step=1", "optim: expected one of the keys lr, .*, got step"),
        ("optim.steps=1.5", r"optim\.steps: expected int, got 1\.5"),
        ("model.precision='fp8'", "model.precision: expected float32 or bfloat16"),
        ("head.kind='fcn'", "head.kind: expected linear or upernet"),
        ("nothing.x=1", "expected the tables model, head, .*, got nothing"),
        ("data.batch=3", "data.batch: expected a multiple of micro_batch=2, got 3"),
        ("optim", "expected TABLE.KEY=VALUE, got 'optim'"),
        ("optim.lr=fast", "not TOML"),
        *[(f"{name}=0", f"{name}: expected at least 1, got 0") for name in COUNTS],
        *[(f"{name}=-1", f"{name}: expected at least 1, got -1") for name in COUNTS],
        ("optim.lr=nan", "optim.lr: expected a number over 0, got nan"),
        ("optim.lr=inf", "optim.lr: expected a number over 0, got inf"),
        ("optim.betas=[0.9]", "optim.betas: expected two numbers"),
        ("optim.betas=['a', 'b']", "'<=' not supported"),
        ("optim.warmup=-1", "optim.warmup: expected a number from 0"),
        ("data.fraction=0.0", "data.fraction: expected a number over 0"),
        ("data.fraction=1.5", "data.fraction: expected a number from 0 to 1, got 1.5"),
        ("head.dropout=nan", "head.dropout: expected a number from 0 to 1, got nan"),
        ("augment.ratio=[2.0, 0.5]", "augment.ratio: expected two ascending numbers"),
        ("augment.crop=57", "augment.crop: expected a multiple of model.patch_size=14, got 57"),
        ("test.stride=57", "test.stride: expected at most test.crop=56, got 57"),
        ("model.out_indices=[]", "model.out_indices: expected numbers of blocks"),
        ("model.fpn=true", "model.out_indices: expected four blocks"),
        ("run.seed=-1", "run.seed: expected at least 0"),
    ],
)
def test_bad_recipes(tmp_path, change, message) -> None:
    (tmp_path / "r.toml").write_text(RECIPE)
    with pytest.raises(ValueError, match=message):
        recipes.read_recipe(tmp_path / "r.toml", [change])


def test_a_value_where_a_table_is_expected(tmp_path) -> None:
    (tmp_path / "r.toml").write_text("optim = 3")
    for changes in ([], ["optim.steps=5"]):
        with pytest.raises(ValueError, match=r"r\.toml: optim: expected a table, got 3"):
            recipes.read_recipe(tmp_path / "r.toml", changes)
    (tmp_path / "r.toml").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"r\.toml: not TOML"):
        recipes.read_recipe(tmp_path / "r.toml")
