"""Where vLLM's own tower stays, with one line that says why; precision; no images at all."""

import contextlib
import importlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from internvit import InternViTConfig
from internvit.inference import linear_int8
from internvit.numerics import relative_error
from tests.integrations.vllm.engines import engine, features, generate, tower
from tests.support.vllm_folders import FORMATS, TEXTS, write_model

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

pytestmark = [pytest.mark.usefixtures("vllm_environment")]

CONFIG = InternViTConfig(
    image_size=56, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256
)


@contextlib.contextmanager
def warnings_of_the_plugin():
    importlib.import_module("vllm.logger")  # which sets logging up, and turns off the loggers that there are already
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.plugins.internvit")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.fixture
def folder(tmp_path, seed, request):
    layout = getattr(request, "param", "opengvlab")
    write_model(tmp_path / layout, layout, CONFIG, torch.bfloat16, seed)
    return tmp_path / layout


@pytest.mark.parametrize("folder", FORMATS, indirect=True)
def test_another_activation(folder) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["vision_config"]["hidden_act"] = "gelu_pytorch_tanh"
    (folder / "config.json").write_text(json.dumps(fields))
    with warnings_of_the_plugin() as lines, engine(folder, True) as llm:
        assert type(tower(llm)).__module__.startswith("vllm.")
        tokens, _ = generate(llm, [{"prompt": TEXTS[0]}])
    assert len(tokens[0]) == 6
    assert len(lines) == 1
    assert "hidden_act" in lines[0]


def test_an_attention_backend_asked_for(folder) -> None:
    with warnings_of_the_plugin() as lines, engine(folder, True, mm_encoder_attn_backend="TORCH_SDPA") as llm:
        assert type(tower(llm)).__module__.startswith("vllm.")
    assert len(lines) == 1
    assert "mm_encoder_attn_backend" in lines[0]


@pytest.mark.parametrize("folder", FORMATS, indirect=True)
def test_no_images(folder) -> None:
    none = {"image": 0, "video": 0}
    with engine(folder, False, limit_mm_per_prompt=none) as llm:
        expected, _ = generate(llm, [{"prompt": text} for text in TEXTS])
    with warnings_of_the_plugin() as lines, engine(folder, True, limit_mm_per_prompt=none) as llm:
        assert generate(llm, [{"prompt": text} for text in TEXTS])[0] == expected
        assert list(tower(llm).parameters()) == []
    assert lines == []


def test_int8(folder, generator) -> None:
    pixels = torch.randn(2, 3, 56, 56, generator=generator).bfloat16()
    with engine(folder, True) as llm:
        plain = features(llm, pixels)
    with engine(folder, True, additional_config={"internvit": {"precision": "int8"}}) as llm:
        int8 = features(llm, pixels)
        assert len(tower(llm)._optimized[0].int8) == 4  # of the middle layer
    differs = linear_int8.unavailable_reason() is None
    assert torch.equal(int8, plain) != differs
    assert relative_error(int8, plain) < 0.05


@pytest.mark.parametrize("settings", [{"precision": "int4"}, {"precison": "int8"}, "int8"])
def test_settings_that_do_not_exist(folder, settings) -> None:
    with (
        pytest.raises(ValueError, match="additional_config"),
        engine(folder, True, additional_config={"internvit": settings}),
    ):
        pass


@pytest.mark.parametrize(("precision", "dtype"), [("int8", "float16"), ("fp8", "bfloat16")])
def test_a_precision_that_cannot_be_ends_the_start(folder, precision, dtype) -> None:
    """It ended the engine at the first image, and with it all requests."""
    if torch.cuda.is_available():
        pytest.skip("of a CPU")
    settings = {"internvit": {"precision": precision}}
    with pytest.raises(ValueError, match=precision), engine(folder, True, dtype=dtype, additional_config=settings):
        pass


def vllm_settings(**changes):
    multimodal = SimpleNamespace(mm_encoder_tp_mode="weights", mm_encoder_attn_backend=None, mm_encoder_attn_dtype=None)
    lora = SimpleNamespace(enable_tower_connector_lora=changes.pop("tower_lora", False))
    ranks = changes.pop("ranks", 1)
    vars(multimodal).update(changes)
    return SimpleNamespace(
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
        lora_config=lora,
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        additional_config={},
    )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, None),
        ({"ranks": 2}, "tensor parallel"),
        ({"ranks": 2, "mm_encoder_tp_mode": "data"}, None),
        ({"tower_lora": True}, "lora"),
        ({"mm_encoder_attn_dtype": "fp8"}, "mm_encoder_attn_dtype"),
    ],
)
def test_unsupported_reason(changes, word) -> None:
    from internvit.integrations.vllm.models import unsupported_reason

    reason = unsupported_reason(vllm_settings(**changes))
    assert (reason is None) == (word is None)
    assert word is None or word in reason


def test_a_quantised_tower_is_vllms(monkeypatch) -> None:
    from internvit.integrations.vllm import models

    monkeypatch.setattr(models, "get_current_vllm_config", vllm_settings)
    monkeypatch.setattr(models.internvl.InternVLChatModel, "_init_vision_model", lambda *_, **__: "vLLM's")
    vision = SimpleNamespace(num_hidden_layers=3, to_dict=CONFIG.to_dict)
    config = SimpleNamespace(select_layer=-2, vision_config=vision)
    model = models.InternVLChatModel.__new__(models.InternVLChatModel)
    ours = model._init_vision_model(config, None, prefix="")
    assert len(ours.encoder.layers) == 2
    with warnings_of_the_plugin() as lines:
        awq = SimpleNamespace(get_name=lambda: "awq")
        assert model._init_vision_model(config, awq, prefix="") == "vLLM's"
    assert len(lines) == 1
    assert "awq" in lines[0]
