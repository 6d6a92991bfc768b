"""An InternViT in the place of vLLM's vision tower: its call, its names of parameters, its loading of weights."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.vision import run_dp_sharded_vision_model

from internvit.config import InternViTConfig
from internvit.inference.optimize import OptimizedInternViT, optimize_for_inference
from internvit.model.vit import InternViT
from internvit.names import match, names_of


class InternViTTower(nn.Module):
    """Tokens of pixels, as vLLM's InternVisionModel and InternS1VisionModel give them.

    Its parameters have OpenGVLab's names, as InternVisionModel's have. What `optimize_for_inference` derives from them
    (packed copies on CPUs) it verifies in each forward, so weights may be loaded, reloaded and written at any time.

    Args:
        config: of the whole tower.
        num_layers: how many of its blocks run; the weights of the others are passed over.
        precision: of `optimize_for_inference`.
        data_parallel: every rank of the tensor parallel group has all weights and runs its share of the images.
    """

    def __init__(
        self,
        config: InternViTConfig,
        num_layers: int,
        precision: str | None = None,
        data_parallel: bool = False,
    ) -> None:
        super().__init__()
        # vLLM reads it: an adapter of the language model may name these modules too, which it then passes over.
        self.embedding_modules = ("qkv", "proj", "fc1", "fc2")
        model = InternViT(config.replace(num_hidden_layers=num_layers)).eval()
        self.embeddings, self.encoder = model.embeddings, model.encoder
        self._model = (model,)  # in a tuple, so no submodule: its parameters would have two names
        self.stored_layers, self.precision, self.data_parallel = config.num_hidden_layers, precision, data_parallel
        self._thirds: dict[str, set[int]] = {}  # of a packed parameter, those loaded since it was last whole
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(False)  # vLLM writes into its own Linears' outside of no_grad
            if ".qkv." in name:
                parameter.weight_loader = qkv_loader(parameter)  # type: ignore[attr-defined]

    @functools.cached_property
    def _optimized(self) -> tuple[OptimizedInternViT]:  # in a tuple: no submodule either
        return (optimize_for_inference(self._model[0], precision=self.precision),)

    def forward(self, pixel_values: Tensor | None = None, pixel_embeds: Tensor | None = None) -> Tensor:
        """[B, 1 + patches, C], the class token first, in the weights' dtype.

        Args:
            pixel_values: [B, channels, height, width].
            pixel_embeds: [B, 1 + patches, C], embedded already, instead.

        Raises:
            TypeError, ValueError: as `InternViT.forward`.
        """

        def encode(given: Tensor | None) -> Tensor:
            pixels, embeds = (given, None) if pixel_embeds is None else (None, given)
            return self._optimized[0](pixels, pixel_embeds=embeds).last_hidden_state

        given = pixel_values if pixel_embeds is None else pixel_embeds
        return run_dp_sharded_vision_model(given, encode) if self.data_parallel else encode(given)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copies tensors under OpenGVLab's or transformers' names into the parameters, in place.

        Returns:
            The parameters that are loaded whole: a packed qkv is with the last of q, k and v, in whatever call.

        Raises:
            ValueError: a name that no parameter of this tower has.
        """
        if self.precision is not None:  # which Linears are int8 depends on the weights
            self.__dict__.pop("_optimized", None)
        parameters = dict(self.named_parameters())
        loaded = set()
        for key, tensor in weights:
            found = match(key)
            if key == "embeddings.mask_token" or (found is not None and not found.prefix and self._is_cut(found.layer)):
                continue
            name = "" if found is None or found.prefix else names_of("opengvlab", found.name.canonical, found.layer)[0]
            if found is None or name not in parameters:
                raise ValueError(f"{key}: expected a parameter of {self.extra_repr()}")
            parameter, part = parameters[name], found.name.part
            load = getattr(parameter, "weight_loader", default_weight_loader)
            if part is None:
                load(parameter, tensor)
                loaded.add(name)
                continue
            load(parameter, tensor, part)
            thirds = self._thirds.setdefault(name, set())
            thirds.add(part)
            if len(thirds) == 3:
                loaded.add(name)
                del self._thirds[name]
        return loaded

    def _is_cut(self, layer: str) -> bool:
        """Whether the checkpoint has this layer and the tower does not run it."""
        return layer != "" and len(self.encoder.layers) <= int(layer) < self.stored_layers

    def extra_repr(self) -> str:
        return f"an InternViT of {len(self.encoder.layers)} layers, precision {self.precision}"


def qkv_loader(live: nn.Parameter) -> Callable[..., None]:
    """`load_qkv` of the parameter `live`: of q, k and v those that a reload does not bring stay as they are.

    vLLM reloads a module into a new uninitialised parameter, and copies all of it into the live one at the end; before,
    it counts elements with one on the meta device.
    """

    def load(param: nn.Parameter, loaded_weight: Tensor, shard_id: int | None = None) -> None:
        new = shard_id is not None and param is not live and not param.is_meta
        if new and param.data_ptr() != live.data_ptr() and not hasattr(param, "has_live_rows"):
            with torch.no_grad():
                param.copy_(live)
            param.has_live_rows = True  # type: ignore[attr-defined]
        load_qkv(param, loaded_weight, shard_id)

    return load


def load_qkv(param: nn.Parameter, loaded_weight: Tensor, shard_id: int | None = None) -> None:
    """Copies a packed weight or bias, or with `shard_id` the rows of q, k or v (0, 1, 2); vLLM names the arguments."""
    rows: Tensor = param.data if shard_id is None else param.data.chunk(3)[shard_id]
    if rows.shape != loaded_weight.shape:
        raise ValueError(f"qkv: expected {list(rows.shape)}, got {list(loaded_weight.shape)}")
    with torch.no_grad():
        rows.copy_(loaded_weight)
