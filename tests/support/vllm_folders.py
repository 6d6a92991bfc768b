"""Folders of InternVL models for vLLM, of random weights, in OpenGVLab's format and transformers'."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from internvit import InternViT, InternViTConfig
from internvit.checkpoint.state_dict import convert_state_dict
from tests.support.models import random_weights

FORMATS = ("opengvlab", "transformers")
ARCHITECTURES = {"opengvlab": "InternVLChatModel", "transformers": "InternVLForConditionalGeneration"}
SPECIAL = ("<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<video>")
TEXTS = ("what is in this picture of a dog and a red house", "describe it : the sky over two trees is blue and wide")
LANGUAGE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": 0,
}

# Remote code as OpenGVLab's folders bring it, the configuration alone: vLLM has the model.
_REMOTE_CODE = """
from transformers import AutoConfig, PretrainedConfig


class VisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = VisionConfig(**(vision_config or {}))
        llm_config = dict(llm_config or {"model_type": "qwen2"})
        self.llm_config = AutoConfig.for_model(llm_config.pop("model_type"), **llm_config)
"""


def image_prompt(layout: str, text: str, images: int = 1) -> str:
    return ("<image>" if layout == "opengvlab" else "<IMG_CONTEXT>") * images + " " + text


def write_model(folder: Path, layout: str, config: InternViTConfig, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Writes a whole model, and gives the tower's weights under OpenGVLab's names."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = InternViT(config)
    random_weights(model)
    tower = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    language = {name: tensor.to(dtype) for name, tensor in _language_weights(vocabulary).items()}
    connector = {name: tensor.to(dtype) for name, tensor in _connector_weights(config).items()}
    torch.set_rng_state(generator_state)
    if layout == "opengvlab":
        _write_json(folder / "config.json", _opengvlab_config(config, vocabulary, dtype))
        (folder / "configuration_internvl_chat.py").write_text(_REMOTE_CODE)
        tensors = {f"vision_model.{name}": tensor for name, tensor in tower.items()}
        tensors |= {f"language_model.{name}": tensor for name, tensor in language.items()}
        names = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias")
        tensors |= {f"mlp1.{name}": tensor for name, tensor in zip(names, connector.values(), strict=True)}
    else:
        _write_transformers_config(folder, config, vocabulary, dtype)
        own = convert_state_dict(tower, to="transformers")
        tensors = {f"model.vision_tower.{name}": tensor.contiguous() for name, tensor in own.items()}
        tensors |= {
            name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1): tensor
            for name, tensor in language.items()
        }
        tensors |= {f"model.multi_modal_projector.{name}": tensor for name, tensor in connector.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tower


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1))


def _write_tokenizer(folder: Path) -> int:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    fast.save_pretrained(folder)
    return len(fast)


def _language_weights(vocabulary: int) -> dict[str, Tensor]:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, **LANGUAGE))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _connector_weights(config: InternViTConfig) -> dict[str, Tensor]:
    joined, out = 4 * config.hidden_size, LANGUAGE["hidden_size"]
    return {
        "layer_norm.weight": torch.ones(joined),
        "layer_norm.bias": torch.zeros(joined),
        "linear_1.weight": torch.randn(out, joined) * joined**-0.5,
        "linear_1.bias": torch.zeros(out),
        "linear_2.weight": torch.randn(out, out) * 2 * out**-0.5,
        "linear_2.bias": torch.zeros(out),
    }


def _opengvlab_config(config: InternViTConfig, vocabulary: int, dtype: torch.dtype) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "vision_config": config.to_dict(),
        "llm_config": {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": vocabulary,
            "torch_dtype": name,
            **LANGUAGE,
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": config.image_size,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": name,
        "use_thumbnail": True,
    }


def _write_transformers_config(folder: Path, config: InternViTConfig, vocabulary: int, dtype: torch.dtype) -> None:
    from transformers import InternVLConfig

    vision = config.to_dict("transformers")
    text = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": vocabulary, **LANGUAGE}
    whole = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL.index("<IMG_CONTEXT>"),
        image_seq_length=(config.num_tokens - 1) // 4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    whole.architectures = ["InternVLForConditionalGeneration"]
    whole.dtype = dtype
    whole.save_pretrained(folder)
    size = {"height": config.image_hw[0], "width": config.image_hw[1]}
    pixels = {
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 4,
        "size": size,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    _write_json(folder / "preprocessor_config.json", {"image_processor_type": "GotOcr2ImageProcessor", **pixels})
    video = {key: value for key, value in pixels.items() if "patches" not in key}
    _write_json(folder / "video_preprocessor_config.json", {"video_processor_type": "InternVLVideoProcessor", **video})
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": (config.num_tokens - 1) // 4}
    _write_json(folder / "processor_config.json", processor)
