"""Two ranks of tensor parallelism, each with the whole tower and its share of the tiles."""

import pytest
import torch

from internvit import InternViTConfig
from internvit.numerics import relative_error
from tests.integrations.vllm.engines import engine, generate, prompts
from tests.support.vllm_folders import FORMATS, write_model

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

CONFIG = InternViTConfig(
    image_size=56, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
)


def tower_class(model: torch.nn.Module) -> str:
    return type(getattr(model, model._tower_model_names[0])).__name__


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
@pytest.mark.parametrize("layout", FORMATS)
def test_two_ranks(tmp_path, seed, layout, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for a function that goes to the ranks
    write_model(tmp_path / "model", layout, CONFIG, torch.float32, seed)
    asked = prompts(layout, seed)
    ranks = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data"}
    with engine(tmp_path / "model", True, dtype="float32", **ranks) as llm:
        classes, (tokens, logprobs) = llm.apply_model(tower_class), generate(llm, asked)
    # vLLM has no data parallel encoder in transformers' format: it answers with "weights", and so its own tower.
    ours = layout == "opengvlab"
    assert classes == ["InternViTTower" if ours else "InternS1VisionModel"] * 2
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND")
    with engine(tmp_path / "model", False, dtype="float32") as llm:
        expected, expected_logprobs = generate(llm, asked)
    assert tokens == expected
    assert relative_error(logprobs, expected_logprobs) < 2e-5
