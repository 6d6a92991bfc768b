"""vLLM with the plug-in and without it: the same tokens, as exact features, the weights of the checkpoint.

`make test-vllm` makes an environment with vLLM for it and runs this.
"""

from pathlib import Path

import pytest
import torch

from internvit import InternViT, InternViTConfig
from internvit.numerics import product_violations, relative_error
from tests.integrations.vllm.engines import engine, features, generate, prompts, tower
from tests.support.vllm_folders import FORMATS, write_model

pytest.importorskip("vllm", reason="vLLM is not installed; `make test-vllm` makes an environment with it")

pytestmark = [pytest.mark.usefixtures("vllm_environment")]

_TINY = dict(image_size=56, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256)
CONFIGS = {
    "300m": InternViTConfig(**_TINY, norm_type="layer_norm", qkv_bias=True, qk_normalization=False),
    "6b": InternViTConfig(**_TINY),
}


@pytest.fixture
def write(tmp_path, seed):
    def write(layout: str, kind: str, dtype: torch.dtype, more: int = 0) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = tmp_path / f"{layout}-{kind}-{more}"
        return folder, write_model(folder, layout, CONFIGS[kind], dtype, seed + more)

    return write


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layout", FORMATS)
def test_float32_tokens_and_logprobs(write, seed, layout, kind) -> None:
    folder, weights = write(layout, kind, torch.float32)
    asked = prompts(layout, seed)
    with engine(folder, False, dtype="float32") as llm:  # installed, and not enabled
        assert type(tower(llm)).__module__.startswith("vllm.")
        expected, expected_logprobs = generate(llm, asked)
    with engine(folder, True, dtype="float32") as llm:
        assert type(tower(llm)).__name__ == "InternViTTower"
        stored = tower(llm).state_dict()
        assert stored.keys() == weights.keys()
        assert all(torch.equal(stored[name], weights[name]) for name in weights)
        tokens, logprobs = generate(llm, asked)
        assert tokens == expected
        alone = [generate(llm, [one])[0][0] for one in asked]
        assert alone == expected
    assert relative_error(logprobs, expected_logprobs) < 2e-5
    assert len({tuple(one) for one in tokens}) == len(tokens)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layout", FORMATS)
def test_bfloat16_features(write, seed, generator, layout, kind) -> None:
    folder, weights = write(layout, kind, torch.bfloat16)
    pixels = torch.randn(5, 3, 56, 56, generator=generator).bfloat16()
    with engine(folder, False, dtype="bfloat16") as llm:
        emulation, (_, plain) = features(llm, pixels), generate(llm, prompts(layout, seed))
    with engine(folder, True, dtype="bfloat16") as llm:
        ours, (_, with_plugin) = features(llm, pixels), generate(llm, prompts(layout, seed))
        assert all(torch.equal(tensor, weights[name]) for name, tensor in tower(llm).state_dict().items())
    exact = InternViT(CONFIGS[kind], dtype=torch.float64).eval()
    exact.load_state_dict(weights)
    with torch.no_grad():
        truth = exact(pixels.double()).last_hidden_state
    assert product_violations(ours, truth, emulation) == []
    with engine(folder, False, dtype="float32") as llm:
        _, exact_logprobs = generate(llm, prompts(layout, seed))
    # Of the first tokens, which have one context: the language model's own rounding, 0.4 to 0.7 % with either tower.
    errors = [relative_error(logprobs[:, 0], exact_logprobs[:, 0]) for logprobs in (with_plugin, plain)]
    assert errors[0] < 2 * errors[1]
