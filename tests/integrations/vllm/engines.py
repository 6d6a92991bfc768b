"""vLLM engines of one folder, with the plug-in and without it, and what they answer."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests.support.vllm_folders import TEXTS, image_prompt

SIZES = ((56, 56), (112, 56), (60, 200))
"""Of the images; with 56-pixel tiles one, two and, with a thumbnail, four and more tiles."""


@contextlib.contextmanager
def engine(folder: Path, plugin: bool, **settings: Any) -> Iterator[Any]:
    """An LLM in this process. vLLM looks for plug-ins anew, by their entry points; its registry is restored after."""
    import vllm.plugins
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    link = folder.with_name(f"{folder.name}-{'plugin' if plugin else 'plain'}")  # vLLM keeps a folder's model class
    if not link.exists():
        link.symlink_to(folder)
    registered = dict(vllm.ModelRegistry.models)
    common = dict(
        trust_remote_code=True,
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=4,
        max_logprobs=-1,
        limit_mm_per_prompt={"image": 4, "video": 0},
        disable_log_stats=True,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INTERNVIT_VLLM", "1" if plugin else "0")
        patch.setattr(vllm.plugins, "plugins_loaded", False)
        llm = None
        try:
            llm = vllm.LLM(str(link), **{**common, **settings})
            yield llm
        finally:  # also where it cannot be built
            if llm is not None:
                llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()
            vllm.ModelRegistry.models.update(registered)


def prompts(layout: str, seed: int) -> list[dict[str, Any]]:
    """An image of one tile, of two, of more; two images in one prompt; no image."""
    random = np.random.default_rng(seed)
    images = [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]
    asked = [
        {"prompt": image_prompt(layout, TEXTS[i % 2]), "multi_modal_data": {"image": image}}
        for i, image in enumerate(images)
    ]
    asked.append({"prompt": image_prompt(layout, TEXTS[0], 2), "multi_modal_data": {"image": images[:2]}})
    return [*asked, {"prompt": TEXTS[1]}]


def generate(llm: Any, asked: Sequence[dict[str, Any]]) -> tuple[list[list[int]], Tensor]:
    """The greedy tokens of each prompt, and the log-probabilities [prompts, tokens, vocabulary] they were chosen by."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=6, logprobs=-1, ignore_eos=True)
    outputs = [request.outputs[0] for request in llm.generate(asked, sampling, use_tqdm=False)]
    logprobs = [[[step[token].logprob for token in sorted(step)] for step in output.logprobs] for output in outputs]
    return [list(output.token_ids) for output in outputs], torch.tensor(logprobs)


def tower(llm: Any) -> nn.Module:
    """The vision tower, which lies in this process."""
    return llm.apply_model(lambda model: getattr(model, model._tower_model_names[0]))[0]


def features(llm: Any, pixels: Tensor) -> Tensor:
    with torch.inference_mode():
        return tower(llm)(pixel_values=pixels).clone()
