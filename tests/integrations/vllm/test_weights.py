"""Weights that vLLM loads, reloads and updates: the next forward computes with them, to the bit."""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file

from internvit import InternViT, InternViTConfig
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.inference.optimize import optimize_for_inference
from internvit.numerics import relative_error
from tests.integrations.vllm.engines import engine, features, generate, prompts, tower
from tests.support.vllm_folders import FORMATS, write_model

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

pytestmark = [pytest.mark.usefixtures("vllm_environment")]

CONFIG = InternViTConfig(
    image_size=56, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, qkv_bias=True
)


def expected(weights, pixels) -> torch.Tensor:
    model = InternViT(CONFIG, dtype=torch.bfloat16).eval()
    model.load_state_dict(weights)
    return optimize_for_inference(model)(pixels).last_hidden_state


@pytest.mark.parametrize("layout", FORMATS)
def test_reload_and_update(tmp_path, seed, generator, layout) -> None:
    first = write_model(tmp_path / "first", layout, CONFIG, torch.bfloat16, seed)
    second = write_model(tmp_path / "second", layout, CONFIG, torch.bfloat16, seed + 1)
    pixels, asked = torch.randn(2, 3, 56, 56, generator=generator).bfloat16(), prompts(layout, seed)
    with engine(tmp_path / "first", True, dtype="bfloat16") as llm:
        tokens, _ = generate(llm, asked)
        assert torch.equal(features(llm, pixels), expected(first, pixels))
        addresses = [parameter.data_ptr() for parameter in tower(llm).parameters()]
        for folder, weights in (("second", second), ("first", first)):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path / folder)})
            stored = tower(llm).state_dict()
            assert all(torch.equal(stored[name], weights[name]) for name in weights)
            assert torch.equal(features(llm, pixels), expected(weights, pixels))
            assert (generate(llm, asked)[0] == tokens) == (folder == "first")
        assert [parameter.data_ptr() for parameter in tower(llm).parameters()] == addresses  # of CUDA graphs

        name = "encoder.layers.1.attn.qkv.weight"
        stored_names = convert_state_dict({**first, name: second[name]}, to=layout)
        prefix = "vision_model." if layout == "opengvlab" else "model.vision_tower."
        keys = [
            key
            for key in stored_names
            if key.startswith(("encoder.layers.1.attn.qkv.w", "encoder.layer.1.attention.q"))
        ]
        key = next(key for key in keys if key.endswith("weight") and "norm" not in key)  # all of qkv, or q alone
        llm.apply_model(lambda model: model.load_weights([(prefix + key, stored_names[key])]) and None)
        changed = second[name] if layout == "opengvlab" else torch.cat([second[name][:128], first[name][128:]])
        assert torch.equal(features(llm, pixels), expected({**first, name: changed}, pixels))
        unloaded = weakref.ref(tower(llm))
    assert unloaded() is None


@pytest.mark.parametrize("parts", [("q_proj",), ("q_proj", "v_proj")])
def test_a_reload_of_some_of_q_k_and_v_leaves_the_others(tmp_path, seed, generator, parts) -> None:
    """vLLM reloads into new memory: rows of qkv that it was not given were whatever lay there."""
    first = write_model(tmp_path / "first", "transformers", CONFIG, torch.bfloat16, seed)
    second = write_model(tmp_path / "second", "transformers", CONFIG, torch.bfloat16, seed + 1)
    pixels = torch.randn(2, 3, 56, 56, generator=generator).bfloat16()
    names = [f"vision_tower.encoder.layer.1.attention.{part}." for part in parts]
    stored = load_file(tmp_path / "second/model.safetensors")
    given = [(key, tensor) for key, tensor in stored.items() if any(name in key for name in names)]
    assert len(given) == 2 * len(parts)  # weights and biases
    merged = dict(first)
    for kind in ("weight", "bias"):
        name = f"encoder.layers.1.attn.qkv.{kind}"
        rows = zip(("q_proj", "k_proj", "v_proj"), first[name].chunk(3), second[name].chunk(3), strict=True)
        merged[name] = torch.cat([new if part in parts else old for part, old, new in rows])
    with engine(tmp_path / "first", True, dtype="bfloat16") as llm:
        features(llm, pixels)
        for _ in range(2):
            freed = [torch.full((384, 128), float("nan"), dtype=torch.bfloat16) for _ in range(200)]
            del freed  # what new memory holds then
            llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(given)})
            assert torch.equal(features(llm, pixels), expected(merged, pixels))
        bias = torch.randn(256, generator=generator).bfloat16()
        name = "encoder.layers.1.mlp.fc1.bias"
        prefix = next(n for n, p in llm.apply_model(lambda m: list(m.named_parameters()))[0] if n.endswith(name))
        how = {"weights_iterator": iter([(prefix, bias)]), "is_checkpoint_format": False}
        llm.collective_rpc("reload_weights", kwargs=how)
        assert torch.equal(features(llm, pixels), expected({**merged, name: bias}, pixels))


@pytest.mark.parametrize("select_layer", [0, 1, 3, -1, -2])
def test_the_hidden_state_that_select_layer_names(tmp_path, seed, generator, select_layer) -> None:
    weights = write_model(tmp_path / "model", "opengvlab", CONFIG, torch.float32, seed)
    fields = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**fields, "select_layer": select_layer}))
    model = InternViT(CONFIG).eval()
    model.load_state_dict(weights)
    pixels = torch.randn(2, 3, 56, 56, generator=generator)
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True).hidden_states
    with engine(tmp_path / "model", True, dtype="float32") as llm:
        errors = [relative_error(features(llm, pixels), state) for state in states]
    assert errors[select_layer] < 1e-5
    assert all(error > 1e-2 for i, error in enumerate(errors) if i != select_layer % 4)


@pytest.mark.parametrize("layout", FORMATS)
def test_a_checkpoint_that_lacks_a_weight(tmp_path, seed, layout) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "model"
    write_model(folder, layout, CONFIG, torch.bfloat16, seed)
    tensors = load_file(folder / "model.safetensors")
    lacking = "encoder.layer.1.attention.k_proj.bias" if layout == "transformers" else "encoder.layers.1.attn.qkv.bias"
    save_file({name: t for name, t in tensors.items() if not name.endswith(lacking)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder\.layers\.1\.attn\.qkv\.bias"), engine(folder, True):
        pass


class TestLoadWeights:
    """`InternViTTower.load_weights` alone."""

    @pytest.fixture
    def weights(self, seed) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return InternViT(CONFIG).state_dict()

    @pytest.fixture
    def make(self, vllm_environment):
        from internvit.integrations.vllm.tower import InternViTTower

        return InternViTTower

    @pytest.mark.parametrize("layout", FORMATS)
    def test_in_any_order_and_number_of_calls(self, make, weights, layout, seed) -> None:
        tower, loaded = make(CONFIG, 3), []
        items = list(convert_state_dict(weights, to=layout).items())
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
        for _ in range(2):
            loaded = [name for i in order for name in tower.load_weights([items[i]])]
            assert sorted(loaded) == sorted(weights)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tower.state_dict().items())

    @pytest.mark.parametrize("layout", FORMATS)
    def test_layers_that_do_not_run(self, make, weights, layout) -> None:
        tower = make(CONFIG, 2)
        loaded = tower.load_weights(convert_state_dict(weights, to=layout).items())
        assert loaded == set(tower.state_dict()) == {name for name in weights if ".layers.2." not in name}
        with pytest.raises(ValueError, match=r"layers\.3"):
            tower.load_weights([("encoder.layers.3.ls1", torch.ones(128))])

    @pytest.mark.parametrize(
        "key", ["encoder.layers.0.attn.unknown", "other.encoder.layers.0.ls1", "layernorm.weight", "head.weight"]
    )
    def test_an_unknown_name(self, make, key) -> None:
        with pytest.raises(ValueError, match=key):
            make(CONFIG, 3).load_weights([(key, torch.ones(128))])

    @pytest.mark.parametrize("key", ["encoder.layers.0.attn.qkv.weight", "encoder.layer.0.attention.q_proj.weight"])
    def test_a_wrong_shape(self, make, key) -> None:
        with pytest.raises(ValueError, match=r"expected \["):
            make(CONFIG, 3).load_weights([(key, torch.ones(1, 128))])

    def test_int8_is_chosen_anew(self, make, weights) -> None:
        """Of weights on int8's grid each Linear is exact; the choice stayed that of the first checkpoint."""
        grid = dict(weights)
        for name, tensor in weights.items():
            if tensor.dim() == 2:
                grid[name] = torch.randint(-127, 128, tensor.shape) / 1024
                grid[name][:, 0] = 127 / 1024  # so that a row's scale is 1 / 1024
        pixels, counts = torch.randn(1, 3, 56, 56).bfloat16(), []
        for order in ((grid, weights), (weights, grid)):
            tower = make(CONFIG, 3, "int8").bfloat16()
            for given in order:
                tower.load_weights(given.items())
                with torch.no_grad():
                    tower(pixels)
                counts.append(len(tower._optimized[0].int8))
        assert counts == [counts[0], counts[1], counts[1], counts[0]]
        assert counts[0] != counts[1]

    def test_adapters_may_name_its_modules(self, make) -> None:
        """vLLM refused those of the language model that hold parts for the tower, which it passes over in its own."""
        from vllm.lora.utils import get_supported_lora_modules

        assert {"qkv", "proj", "fc1", "fc2"} <= set(get_supported_lora_modules(make(CONFIG, 1)))

    def test_mask_token_is_passed_over(self, make) -> None:
        assert make(CONFIG, 3).load_weights([("embeddings.mask_token", torch.ones(1, 1, 128))]) == set()
