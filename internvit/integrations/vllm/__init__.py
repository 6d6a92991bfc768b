"""vLLM's InternVL models with this package's vision tower: `register` is an entry point of `vllm.general_plugins`.

vLLM calls it in each of its processes. Set INTERNVIT_VLLM=1, or name the plug-in `internvit` in VLLM_PLUGINS; otherwise
nothing happens. docs/vllm.md says what is supported.
"""

import os

VLLM_VERSIONS = ("0.32",)
"""The versions of vLLM whose models `internvit.integrations.vllm.models` subclasses."""

_CLASSES = {
    "InternVLChatModel": "InternVLChatModel",
    "InternS1ForConditionalGeneration": "InternS1ForConditionalGeneration",
    "InternVLForConditionalGeneration": "InternS1ForConditionalGeneration",
}


def register() -> None:
    """Puts this package's classes into vLLM's registry of models, where the plug-in is enabled; again does no harm.

    Another version of vLLM, or an INTERNVIT_VLLM that is neither 0 nor 1, gives one warning and leaves vLLM as it is.
    """
    setting = os.environ.get("INTERNVIT_VLLM", "")
    listed = os.environ.get("VLLM_PLUGINS", "").split(",")
    if setting == "0" or (setting == "" and "internvit" not in listed):
        return
    import vllm
    from vllm.logger import init_logger

    logger = init_logger("vllm.plugins.internvit")
    if setting not in ("", "1"):
        logger.warning("internvit: vLLM's own vision tower is used: expected INTERNVIT_VLLM=0 or 1, got %r", setting)
    elif ".".join(vllm.__version__.split(".")[:2]) not in VLLM_VERSIONS:
        logger.warning(
            "internvit: vLLM's own vision tower is used: expected vLLM %s, got %s",
            " or ".join(VLLM_VERSIONS),
            vllm.__version__,
        )
    else:
        for architecture, name in _CLASSES.items():
            vllm.ModelRegistry.register_model(architecture, f"internvit.integrations.vllm.models:{name}")
