"""vLLM's two families of InternVL models with `InternViTTower` as their vision tower."""

from typing import Any

from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.models import interns1, internvl

from internvit.config import InternViTConfig
from internvit.inference.precision import PRECISIONS, quantised_linears
from internvit.integrations.vllm.tower import InternViTTower
from internvit.multimodal.connector import state_index

logger = init_logger("vllm.plugins.internvit")


class InternVLChatModel(internvl.InternVLChatModel):
    """OpenGVLab's format. Its encoder can be data parallel and is captured in CUDA graphs as vLLM's is."""

    def _init_vision_model(self, config: Any, quant_config: Any, *, prefix: str) -> nn.Module:
        vision, selected = config.vision_config, config.select_layer
        num_layers = state_index(selected, vision.num_hidden_layers)  # vLLM's own runs one more from 0 on
        reason = None if quant_config is None else f"a quant_config ({quant_config.get_name()})"
        tower = make_tower(vision, num_layers, reason)
        return tower or super()._init_vision_model(config, quant_config, prefix=prefix)


class InternS1ForConditionalGeneration(interns1.InternS1ForConditionalGeneration):
    """transformers' format, InternVLForConditionalGeneration's as well. vLLM quantises nothing in its tower either."""

    def _init_vision_model(self, config: Any, quant_config: Any, *, prefix: str) -> nn.Module:
        tower = make_tower(config.vision_config, config.vision_config.num_hidden_layers)
        return tower or super()._init_vision_model(config, quant_config, prefix=prefix)


def make_tower(vision_config: Any, num_layers: int, reason: str | None = None) -> InternViTTower | None:
    """The tower of a model that vLLM is building now; None, with one warning, where vLLM's own must stay.

    Args:
        vision_config: of the checkpoint, of either format.
        num_layers: of its blocks that run.
        reason: why vLLM's own must stay, if the caller knows one.

    Raises:
        ValueError: settings of ours in vLLM's additional_config that do not exist.
    """
    vllm_config = get_current_vllm_config()
    precision = requested_precision(vllm_config)
    reason = reason or unsupported_reason(vllm_config)
    try:
        config = InternViTConfig.from_dict(vision_config.to_dict())
    except ValueError as error:
        reason = reason or str(error)
    if reason is not None:
        logger.warning("internvit: vLLM's own vision tower is used: %s", reason)
        return None
    tower = InternViTTower(config, num_layers, precision, vllm_config.parallel_config.tensor_parallel_size > 1)
    if next(tower.parameters()).device.type != "meta":  # as it is where no images are asked for
        quantised_linears(tower._model[0], precision, ())  # a precision that cannot be ends the start, no later request
    logger.info("internvit: the vision tower is %s", tower.extra_repr())
    return tower


def unsupported_reason(vllm_config: VllmConfig) -> str | None:
    """What in vLLM's settings the tower does not do; None for nothing."""
    multimodal = vllm_config.model_config.get_multimodal_config()
    lora = vllm_config.lora_config
    if vllm_config.parallel_config.tensor_parallel_size > 1 and multimodal.mm_encoder_tp_mode != "data":
        return "a tensor parallel encoder; InternVLChatModel with --mm-encoder-tp-mode data runs ours on each rank"
    if lora is not None and lora.enable_tower_connector_lora:
        return "enable_tower_connector_lora"
    for setting in ("mm_encoder_attn_backend", "mm_encoder_attn_dtype"):
        if getattr(multimodal, setting) is not None:
            return f"{setting}={getattr(multimodal, setting)}"
    return None


def requested_precision(vllm_config: VllmConfig) -> str | None:
    """`additional_config["internvit"]["precision"]`."""
    given = vllm_config.additional_config
    settings = given.get("internvit", {}) if isinstance(given, dict) else {}
    if not isinstance(settings, dict) or settings.keys() - {"precision"}:
        raise ValueError(f"additional_config['internvit']: expected {{'precision': ...}}, got {settings!r}")
    precision = settings.get("precision")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"additional_config['internvit']['precision']: expected {', '.join(PRECISIONS)}, got {precision!r}"
        )
    return precision
