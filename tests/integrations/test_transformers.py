"""InternViT behind transformers' Auto classes, as an attention function, and as InternVL's tower."""

import json

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, images, random_weights, transformers_judge

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
hf = pytest.importorskip("internvit.integrations.transformers.model")

transformers_5 = not transformers.__version__.startswith("4.")
both = pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])


def made(name: str) -> hf.InternVisionModel:
    config = hf.InternVisionConfig(**{k: v for k, v in CONFIGS[name].to_dict().items() if k != "model_type"})
    model = hf.InternVisionModel(config).eval()
    random_weights(model)
    return model


@pytest.fixture
def repository(tmp_path):
    """A folder as OpenGVLab's repositories are: its own code named in auto_map, keys that nobody knows."""
    model = internvit.InternViT(CONFIGS["tiny-rms_norm"]).eval()
    random_weights(model)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    }
    config |= {"use_flash_attn": True, "num_experts": 8, "dropout": 0.0, "torch_dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("configuration_intern_vit", "modeling_intern_vit"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('remote code ran')")
    return tmp_path, model


def test_auto_model_loads_an_opengvlab_repository_without_its_code(repository) -> None:
    folder, ours = repository
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is hf.InternVisionModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not model.training
    pixels = images(CONFIGS["tiny-rms_norm"], 2)
    expected = ours(pixels)
    out = model(pixels)
    assert torch.equal(out.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(out.pooler_output, expected.pooler_output)
    config = transformers.AutoConfig.from_pretrained(folder)
    assert type(config) is hf.InternVisionConfig
    assert config.to_internvit() == ours.config
    half = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@both
def test_saves_and_loads(name, tmp_path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path)
    pixels = images(CONFIGS[name], 1)
    expected = model(pixels).last_hidden_state
    again = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(pixels).last_hidden_state, expected)
    native = internvit.InternViT.from_pretrained(tmp_path)
    assert torch.equal(native(pixels).last_hidden_state, expected)
    del again
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["encoder.layers.0.ls1"], tensors["embeddings.class_embedding"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embeddings\.class_embedding, encoder\.layers\.0\.ls1 missing"):
        transformers.AutoModel.from_pretrained(tmp_path)


@both
def test_outputs(name) -> None:
    model = made(name)
    judge = transformers_judge(CONFIGS[name], {k: v.clone() for k, v in model.state_dict().items()})
    pixels = images(CONFIGS[name], 2)
    ours = model(pixels, output_hidden_states=True)
    assert len(ours.hidden_states) == 4
    assert torch.equal(ours.hidden_states[-1], ours.last_hidden_state)
    if transformers_5:  # before, its tower gives no hidden states
        for a, b in zip(ours.hidden_states, judge(pixels, output_hidden_states=True).hidden_states, strict=True):
            assert relative_error(a, b) <= 1e-5
    assert relative_error(ours.last_hidden_state, judge(pixels).last_hidden_state) <= 1e-5
    assert torch.equal(model(pixels).last_hidden_state, ours.last_hidden_state)
    assert model(pixels).hidden_states is None
    assert torch.equal(model(pixels, return_dict=False)[0], ours.last_hidden_state)
    picked = model(pixels, output_hidden_states=[1, -1]).hidden_states
    assert [state is not None for state in picked] == [False, True, False, True]
    assert torch.equal(picked[1], ours.hidden_states[1])
    last = model(pixels, output_hidden_states=-1).hidden_states
    assert [state is not None for state in last] == [False, False, False, True]
    assert len(model(pixels, output_attentions=True).attentions) == 3
    assert torch.equal(model(pixel_embeds=ours.hidden_states[0]).last_hidden_state, ours.last_hidden_state)
    larger = torch.randn(1, 3, 70, 84)
    assert model(larger).last_hidden_state.shape == (1, 31, 96)
    with pytest.raises(ValueError, match="got neither"):
        model()


@both
def test_gradient_checkpointing(name) -> None:
    model = made(name).train()
    pixels = images(CONFIGS[name], 2)

    def grads() -> list[Tensor]:
        model.zero_grad()
        model(pixels).last_hidden_state.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = grads()
    model.gradient_checkpointing_enable()
    assert model.encoder.gradient_checkpointing
    assert all(map(torch.equal, grads(), plain))
    model.gradient_checkpointing_disable()
    assert not model.encoder.gradient_checkpointing


@both
def test_attention_function(name) -> None:
    config = CONFIGS[name]
    model = internvit.InternViT(config)
    random_weights(model)
    judge = transformers_judge(config, model.state_dict())
    pixels = images(config, 2)
    results = []
    for implementation in ("eager", "internvit"):
        judge.set_attn_implementation(implementation)
        judge.zero_grad()
        out = judge(pixels).last_hidden_state
        out.square().mean().backward()
        results.append((out, {n: p.grad for n, p in judge.named_parameters()}))
    (expected, expected_grads), (out, out_grads) = results
    assert relative_error(out, expected) <= 1e-5
    for n, grad in out_grads.items():
        if not n.endswith("k_proj.bias"):  # zero but for rounding
            assert relative_error(grad, expected_grads[n]) <= 1e-5, n


def test_attention_function_is_ours_only_where_it_may(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(hf, "sdpa_attention_forward", lambda *a, **k: calls.append(k) or ("sdpa", None))
    module = nn.Module()
    q = torch.randn(1, 2, 5, 8)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    out, maps = hf.attention_forward(module, q, q, q, None, is_causal=False, scaling=0.5)
    expected = nn.functional.scaled_dot_product_attention(q, q, q, scale=0.5).transpose(1, 2)
    assert relative_error(out, expected) <= 1e-5
    assert maps is None
    assert not calls
    for arguments in (
        {"attention_mask": mask, "is_causal": False},
        {"attention_mask": None, "is_causal": True},
        {"attention_mask": None},
        {"attention_mask": None, "is_causal": False, "dropout": 0.1},
        {"attention_mask": None, "is_causal": False, "position_bias": mask},
    ):
        assert hf.attention_forward(module, q, q, q, **arguments)[0] == "sdpa"
    assert hf.attention_forward(module, q, q[:, :1], q[:, :1], None, is_causal=False)[0] == "sdpa"
    assert len(calls) == 6


def internvl(vision_config) -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

    text = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    config = InternVLConfig(vision_config=vision_config, text_config=text, image_token_id=63, image_seq_length=4)
    return InternVLForConditionalGeneration(config).eval()


@both
@pytest.mark.parametrize("how", ["tower", "patch", "attention"])
def test_internvl_end_to_end(name, how, tmp_path) -> None:
    """The same logits, loss and gradients as transformers' own InternVL."""
    if how == "tower" and not transformers_5:
        pytest.skip("InternVLConfig of transformers 4 takes no other vision_config than its own")
    config = CONFIGS[name]
    judge = transformers_judge(config, internvit.reference.InternViT(config).state_dict())
    random_weights(judge)
    theirs = internvl(judge.config)
    theirs.model.vision_tower.load_state_dict(judge.state_dict())
    if how == "tower":
        ours = internvl(made(name).config)
        tower = ours.model.vision_tower
        assert type(tower) is hf.InternVisionModel
        tower.load_state_dict(convert_state_dict(judge.state_dict()))
        rest = {k: v for k, v in theirs.state_dict().items() if "vision_tower" not in k}
        assert not ours.load_state_dict(rest, strict=False).unexpected_keys
    else:
        ours = internvl(judge.config)
        ours.load_state_dict(theirs.state_dict())
        if how == "patch":
            assert len(internvit.patch(ours).fused) == 3
        else:
            ours.set_attn_implementation("internvit")
    ids = torch.tensor([[5, 63, 63, 63, 63, 7, 8], [9, 63, 63, 63, 63, 3, 4]])
    inputs = {"input_ids": ids, "pixel_values": images(config, 2), "labels": ids.clamp_max(62)}
    a, b = ours(**inputs), theirs(**inputs)
    assert relative_error(a.logits, b.logits) <= 1e-5
    a.loss.backward()
    b.loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if "vision_tower" not in n} for m in (ours, theirs)]
    towers = [
        convert_state_dict({n: p.grad for n, p in m.model.vision_tower.named_parameters() if "k_proj.bias" not in n})
        if how != "tower" and config.qk_normalization
        else {}
        for m in (ours, theirs)
    ]
    if how == "tower":
        mine = {n: p.grad for n, p in ours.model.vision_tower.named_parameters()}
        towers = [mine, convert_state_dict({n: p.grad for n, p in theirs.model.vision_tower.named_parameters()})]
        width = config.hidden_size
        for tower in towers:  # the gradient of k's bias is zero but for rounding
            for n in [n for n in tower if n.endswith("qkv.bias")]:
                tower[n] = torch.cat([tower[n][:width], tower[n][2 * width :]])
    for mine, judged in (grads, towers):
        assert mine.keys() == judged.keys()
        for n, grad in mine.items():
            assert relative_error(grad, judged[n]) <= 2e-5, n
    with torch.no_grad():
        tokens = [
            m.generate(**{k: v for k, v in inputs.items() if k != "labels"}, max_new_tokens=4) for m in (ours, theirs)
        ]
        assert torch.equal(*tokens)
    if how == "tower":
        ours.save_pretrained(tmp_path)
        again = type(ours).from_pretrained(tmp_path, config=ours.config)
        assert torch.equal(again(**inputs).logits, a.logits)
