"""transformers' registry of replaced classes: `from_pretrained` gives fused blocks, and they train as before."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from internvit import PatchHandle
from internvit.numerics import relative_error
from tests.support import ROOT
from tests.support.models import counted, random_weights

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
monkey_patching = pytest.importorskip("transformers.monkey_patching", reason="transformers before 5.24")
loading = pytest.importorskip("internvit.integrations.transformers.patch_on_load")

VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": [28, 28],
    "patch_size": [7, 7],
}
TEXT = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
IMAGE_TOKEN = 127


def internvl(**vision) -> nn.Module:
    """A tiny InternVL of random weights."""
    config = transformers.InternVLConfig(
        vision_config=VISION | vision, text_config=TEXT, image_token_id=IMAGE_TOKEN, image_seq_length=4
    )
    model = transformers.InternVLForConditionalGeneration(config).eval()
    random_weights(model.model.vision_tower)
    return model


def inputs(batch: int = 2) -> dict[str, Tensor]:
    text = torch.randint(0, 100, (batch, 6))
    ids = torch.cat([torch.full((batch, 4), IMAGE_TOKEN), text], dim=1)
    return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 28, 28), "labels": ids.masked_fill(ids > 100, -100)}


@pytest.fixture
def patched():
    """Inside, transformers builds fused blocks."""
    loading.patch_on_load()
    yield
    loading.patch_on_load(False)
    assert not monkey_patching.get_patch_mapping()


@pytest.fixture
def folder(tmp_path):
    """A saved tiny InternVL and its logits of some inputs."""
    model, given = internvl(), inputs()
    model.save_pretrained(tmp_path)
    return tmp_path, given, model(**given).logits.detach()


def load(folder) -> nn.Module:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_every_layer_that_the_table_names_is_replaced(patched) -> None:
    mapping = monkey_patching.get_patch_mapping()
    assert list(mapping) == [f"^{name}$" for name in loading.LAYERS], "the installed transformers has all of them"
    assert [layer.__name__ for layer in mapping.values()] == list(loading.LAYERS)
    assert loading.patch_on_load() == list(loading.LAYERS), "again: the same"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager", "internvit"])
def test_from_pretrained_gives_fused_blocks(folder, patched, attn_implementation) -> None:
    path, given, expected = folder
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, attn_implementation=attn_implementation)
    with counted() as ran:
        logits = model.eval()(**given).logits
    assert ran == list(model.model.vision_tower.encoder.layer)
    assert relative_error(logits, expected) <= 1e-5
    handle = PatchHandle.of(model)
    assert len(handle.fused) == 2
    handle.undo()
    with counted() as ran:
        model(**given)
    assert not ran


def test_models_built_after_the_end_are_transformers_own(folder) -> None:
    path, given, expected = folder
    loading.patch_on_load()
    fused = load(path)
    loading.patch_on_load(False)
    plain = load(path)
    with counted() as ran:
        tower = plain.model.vision_tower(given["pixel_values"], output_hidden_states=True)
    assert not ran
    assert len(tower.hidden_states) == 3, "transformers' recorder still takes the replacing class"
    states = fused.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(states, tower.hidden_states, strict=True))
    assert torch.equal(plain(**given).logits, expected)


@pytest.mark.sampled(2)
def test_copies_pickles_and_saved_folders(folder, patched, tmp_path) -> None:
    path, given, expected = folder
    model = load(path)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    model.save_pretrained(tmp_path / "again")
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False), load(tmp_path / "again")):
        with counted() as ran:
            assert relative_error(other(**given).logits, expected) <= 1e-5
        assert ran == list(other.model.vision_tower.encoder.layer)
    written = {p.name for p in (tmp_path / "again").iterdir()}
    assert written == {p.name for p in path.iterdir() if p.is_file()}


def test_a_block_that_cannot_be_fused_is_left(folder, patched) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14, use_swiglu_ffn=True
    )
    with monkey_patching.apply_patches():
        model = Dinov2Model(config)
    with pytest.raises(ValueError, match="expected a patched model"):
        PatchHandle.of(model)


def test_a_class_that_another_library_replaces_is_refused() -> None:
    class Other(nn.Module):
        pass

    monkey_patching.register_patch_mapping({"Dinov2Layer": Other})
    try:
        with pytest.raises(ValueError, match=r"Dinov2Layer is replaced by tests\.integrations"):
            loading.patch_on_load()
    finally:
        monkey_patching.unregister_patch_mapping(["Dinov2Layer"])
    assert not monkey_patching.get_patch_mapping()


class Samples(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.given = inputs(8)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: tensor[i] for name, tensor in self.given.items()}


def train(model: nn.Module, folder, samples: Samples, resume: bool = False, **changes) -> dict[str, Tensor]:
    """A Trainer's weights after four steps of two samples, with a checkpoint after two."""
    arguments = {
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "seed": 1,
        "remove_unused_columns": False,
        **changes,
    }
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(folder), **arguments), train_dataset=samples
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "use_reentrant",
    [pytest.param(None, marks=pytest.mark.slow), False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["no checkpointing", "checkpointing", "reentrant"],
)
def test_a_trainer_trains_and_resumes(folder, patched, tmp_path, use_reentrant) -> None:
    path, _, _ = folder
    changes = {}
    if use_reentrant is not None:
        changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    samples, start = Samples(), load(path).state_dict()
    fused, own = {}, {}
    for resume in (False, True):
        with counted() as ran:
            fused = train(load(path), tmp_path / "fused", samples, resume, **changes)
        assert ran
        plain = load(path)
        PatchHandle.of(plain).undo()
        with counted() as ran:
            own = train(plain, tmp_path / "own", samples, resume, **changes)
        assert not ran
        moved = {name: (own[name] - start[name], fused[name] - start[name]) for name in own}
        # AdamW divides by the gradient's size: a key's bias, whose gradient is rounding alone, moves by its sign.
        errors = {n: relative_error(b, a) for n, (a, b) in moved.items() if a.any() and not n.endswith("k_proj.bias")}
        assert len(errors) > 30
        assert max(errors.values()) <= 2e-2, max(errors, key=errors.get)


DDP = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from internvit.integrations.transformers import patch_on_load
from tests.integrations.test_patch_on_load import Samples, load, train
from tests.support.models import counted
torch.manual_seed(0)
patch_on_load()
with counted() as ran:
    weights = train(load(sys.argv[1]), Path(sys.argv[2]), Samples(), per_device_train_batch_size=1,
                    ddp_backend="gloo", ddp_find_unused_parameters=False)
assert ran and dist.get_world_size() == 2
if dist.get_rank() == 0:
    torch.save(weights, sys.argv[3])
"""


@pytest.mark.slow
def test_a_trainer_on_two_ranks_trains_as_on_one(folder, patched, tmp_path) -> None:
    path, _, _ = folder
    script, out = tmp_path / "run.py", tmp_path / "weights.pt"
    script.write_text(DDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, str(path), str(tmp_path / "two"), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    torch.manual_seed(0)
    expected = train(load(path), tmp_path / "one", Samples())
    weights = torch.load(out)
    assert max(relative_error(weights[name], expected[name]) for name in expected) <= 1e-3


@pytest.mark.sampled(3)  # 11 s
def test_it_needs_no_import_of_transformers_models_before_it_is_asked() -> None:
    code = (
        "import sys, internvit; assert 'transformers' not in sys.modules;"
        "import internvit.integrations.transformers;"
        "assert 'transformers.models.dinov2.modeling_dinov2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
