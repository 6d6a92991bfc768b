"""`optimize_for_inference`: a model's forward, faster on this machine, without gradients.

It computes what the model computes now: with its weights, hooks and modules as they are at the call. Only what cannot
become stale, or is verified at each call, is derived from them:

* On a CPU the residual stream of a 16-bit model is float32: the same time, and a third of the error (0.35 % instead of
  1.2 % for the 300M in bfloat16 with random weights). What is returned has the model's dtype.
* On a CPU with AVX2, each block's bfloat16 Linears have packed copies of their weights, LayerScale folded in where the
  stream is of their dtype; without AVX-512 those of float32 as well. Each forward reads every weight once and compares
  row checksums (`internvit.inference.linear`); a block whose weights have changed is packed again. 0.6 GB for
  InternViT-300M, 34 ms of one EPYC core beside a forward of 0.8 s on two. A layer with hooks, adapters or replaced
  parts runs as it is.
* On a GPU, CUDA graphs read the weights where they lie. Each forward checks that modules, hooks, settings and addresses
  are those of the capture; if not, the graphs are captured again, or the blocks run without.
"""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvit.config import InternViTConfig
from internvit.inference import linear_int8
from internvit.inference.block_run import BlockRun, Pieces
from internvit.inference.cuda_graph import LIMIT, CaptureGuard, GraphedFunction
from internvit.inference.packed_block import LINEARS, PackedBlock, can_pack
from internvit.inference.precision import quantised_linears
from internvit.inference.save import save_quantized
from internvit.model import recompute
from internvit.model.attention_summary import AttentionSummary
from internvit.model.block import is_unmodified
from internvit.model.embeddings import embed
from internvit.model.encoder import InternViTEncoder
from internvit.model.fused_block import run_block
from internvit.model.hooks import has_hooks, is_exactly, runs_as_written
from internvit.model.packed import PackedTokens, packed_output
from internvit.model.vit import InternViT
from internvit.ops.core.autocast import autocast_dtype
from internvit.ops.core.select import requested
from internvit.ops.core.sequences import Sequences
from internvit.output import InternViTOutput, attention_kind


class OptimizedInternViT(nn.Module):
    """What `optimize_for_inference` returns: an `InternViT`'s forward and state_dict, no gradients.

    Attributes:
        model: the `InternViT`. What is done to it is done to this one.
        residual_dtype, out_dtype: as in `optimize_for_inference`.
        int8: the names of the Linears that are computed in int8 wherever their layer is packed.
        float8: those of the Linears that are computed in float8 wherever nothing in their layer was modified.
        fold_norms: as in `optimize_for_inference`.
    """

    def __init__(
        self,
        model: InternViT,
        pack: bool,
        graphs: GraphedFunction | None = None,
        residual_dtype: torch.dtype | str | None = "auto",
        out_dtype: torch.dtype | None = None,
        int8: Collection[str] = (),
        float8: Collection[str] = (),
        fold_norms: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.pack = pack
        self.residual_dtype = residual_dtype
        self.out_dtype = out_dtype
        self.int8, self.float8 = frozenset(int8), frozenset(float8)
        self.fold_norms = fold_norms
        self._graphs = graphs
        self._guard: CaptureGuard | None = None
        self._packed: dict[int, PackedBlock] = {}
        self._packed_blocks()
        self.register_load_state_dict_pre_hook(_as_the_models)

    def _packed_blocks(self) -> list[PackedBlock | None]:
        """Each layer's packed Linears, packed again where its weights have changed; None where the layer is called."""
        fold = self._folds_layer_scale()
        return [self._packed_block(index, fold) for index in range(len(self.model.encoder.layers))]

    def _packed_block(self, index: int, fold: bool) -> PackedBlock | None:
        layer = self.model.encoder.layers[index]
        if not self.pack or not can_pack(layer):
            return None
        block, int8 = self._packed.get(index), self._int8_of(index)
        if block is None or (block.requested, block.fold) != (int8, fold) or not block.is_current(layer):
            block = self._packed[index] = PackedBlock(layer, int8, fold)
        return block

    def _folds_layer_scale(self) -> bool:
        """Whether GEMMs add the residual stream, which is in the weights' dtype then, and scale what they add."""
        tokens = torch.empty(0, dtype=self.model.dtype, device=self.model.device)
        return self._stream_dtype(self.model.encoder.cast_residual(tokens)) == self.model.dtype

    def _int8_of(self, index: int) -> tuple[str, ...]:
        """The layer's Linears in int8; none on a machine without it, to which a pickled model may come."""
        names = _of_layer(index, self.int8)
        return names if names and linear_int8.unavailable_reason() is None else ()

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        pixel_embeds: Tensor | PackedTokens | None = None,
        output_attentions: bool | str = False,
    ) -> InternViTOutput | tuple:
        """As `InternViT.forward`, without gradients; whole attention maps run on the model itself."""
        model, kind = self.model, attention_kind(output_attentions)
        if kind == "maps" or not self._replaces_forward():
            output = model(pixel_values, output_hidden_states, return_dict, pixel_embeds, output_attentions)
            return output if self.out_dtype is None else _cast(output, self.out_dtype)
        tokens = embed(model.embeddings, pixel_values, pixel_embeds)
        summaries = [AttentionSummary(kind) for _ in model.encoder.layers] if kind else []
        if isinstance(tokens, PackedTokens):
            embedded = model.encoder.cast_residual(tokens.values)
            x, *hidden = self._run_blocks(embedded, output_hidden_states, tokens.sequences, summaries)
            attentions: Any = tuple(summary.of_images() for summary in summaries) or None
            output = packed_output(tokens, x, hidden if output_hidden_states else None, attentions)
        else:
            embedded = model.encoder.cast_residual(tokens)
            x, *hidden = self._encode(embedded, output_hidden_states, summaries)
            attentions = tuple(summary.of_batch() for summary in summaries) or None
            output = InternViTOutput(x, x[:, 0], tuple(hidden) if output_hidden_states else None, attentions)
        output = _cast(output, self.out_dtype or embedded.dtype)
        return output if return_dict else output.to_tuple()

    def _stream_dtype(self, embedded: Tensor) -> torch.dtype:
        """The residual stream's dtype for embedded tokens in the dtype in which the model itself would carry it."""
        if isinstance(self.residual_dtype, torch.dtype):
            return self.residual_dtype
        wide = self.residual_dtype == "auto" and embedded.is_cpu and embedded.dtype.itemsize == 2
        return torch.float32 if wide else embedded.dtype

    def _replaces_forward(self) -> bool:
        """Whether the forward here may stand for the model's own now.

        Not in a program that is traced, which would keep packed weights for good, nor for derivatives, nor where
        autocast wants another dtype than that of weights which may be packed.
        """
        model, encoder = self.model, self.model.encoder
        may_pack = model.dtype.itemsize == 2 or model.device.type == "cpu"
        if may_pack and autocast_dtype(model.device.type) not in (None, model.dtype):
            return False
        if recompute.is_transformed() or _makes_graph() or has_hooks(model):
            return False
        return runs_as_written(model, InternViT) and is_exactly(encoder, InternViTEncoder)

    def _encode(
        self, embedded: Tensor, output_hidden_states: bool, summaries: Sequence[AttentionSummary] = ()
    ) -> tuple[Tensor, ...]:
        """The last hidden state and, where asked for, all L + 1; by a CUDA graph if there are graphs, but with
        `summaries`."""
        graphs = self._graphs
        as_they_are = embedded.numel() == 0 or bool(summaries)
        if graphs is None or as_they_are or torch.cuda.is_current_stream_capturing() or not self._can_capture():
            return self._run_blocks(embedded, output_hidden_states, None, summaries)
        variant = (output_hidden_states, requested(), self.residual_dtype, self.fold_norms)
        return graphs(lambda static: self._run_blocks(static, output_hidden_states), embedded, variant)

    def _can_capture(self) -> bool:
        """Whether graphs may stand for the encoder now; those of an encoder that has changed are freed."""
        if self._guard is None or not self._guard.holds():
            if self._graphs is not None:
                self._graphs.clear()
            self._guard = None if _modified_layers(self.model) else CaptureGuard(self.model.encoder)
        return self._guard is not None

    def _run_blocks(
        self,
        embedded: Tensor,
        output_hidden_states: bool,
        sequences: Sequences | None = None,
        summaries: Sequence[AttentionSummary] = (),
    ) -> tuple[Tensor, ...]:
        """The last hidden state, and all; with `sequences` of packed images [total, C]. Fills `summaries`, one
        for each block, or none."""
        layers: list[Any] = list(self.model.encoder.layers)
        blocks = self._packed_blocks()
        x = embedded.to(self._stream_dtype(embedded))
        # Images go through the blocks one by one where the GEMMs want that: nothing is copied between them.
        images = Pieces(x, sequences, any(b is not None and b.one_image for b in blocks))
        folds = self.fold_norms and x.dtype == self.model.dtype and not torch.is_autocast_enabled(x.device.type)
        given: Sequence[AttentionSummary | None] = summaries or [None] * len(layers)
        runs = [
            BlockRun(layer, block, embedded.dtype, _of_layer(index, self.float8), images, folds, summary)
            for index, (layer, block, summary) in enumerate(zip(layers, blocks, given, strict=True))
        ]
        hidden_states = [x]
        states: list[tuple[Tensor, Any]] = [(piece, None) for piece in images.split(x)]
        for index, run in enumerate(runs):
            if run.parts is None:
                states = [(piece, None) for piece in images.call(run, states)]
            else:
                next_norm = runs[index + 1].first_norm if index + 1 < len(runs) else None
                states = [run_block(run.parts, piece, normed, next_norm) for piece, normed in states]
            if output_hidden_states:
                hidden_states.append(images.join(states))
        return (images.join(states), *hidden_states) if output_hidden_states else (images.join(states),)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        layout: str = "opengvlab",
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> Path:
        """Writes config.json and safetensors, the Linears of `int8` as int8 values with a scale for each row.

        `InternViT.from_pretrained(folder)` reads it as floating point; optimised again with precision="int8", which
        then takes the same Linears by itself, it computes the same bits. Otherwise as `InternViT.save_pretrained`.
        """
        return save_quantized(self.model, self.int8, folder, layout, max_shard_size, overwrite)

    def undo(self) -> InternViT:
        """The model; CUDA graphs are freed now, packed copies with this object."""
        if self._graphs is not None:
            self._graphs.clear()
        return self.model

    @property
    def settings(self) -> str:
        """What results depend on beside the weights: two objects of equal settings and weights compute the same."""
        int8 = sorted(self.int8) if linear_int8.unavailable_reason() is None else []
        names = f"int8 {' '.join(int8) or 'none'}, float8 {' '.join(sorted(self.float8)) or 'none'}"
        return f"residual {self.residual_dtype}, out {self.out_dtype}, {names}" + ", norms folded" * self.fold_norms

    @property
    def config(self) -> InternViTConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model.state_dict(*args, **kwargs)

    @property
    def embeddings(self) -> nn.Module:
        """The model's, where keys of `state_dict()` say that it is."""
        return self.model.embeddings

    @property
    def encoder(self) -> nn.Module:
        """The model's."""
        return self.model.encoder

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights into the model; the next forward computes with them."""
        return self.model.load_state_dict(state_dict, strict, assign)

    def _replicate_for_data_parallel(self) -> "OptimizedInternViT":
        """A replica lives for one forward: it packs nothing."""
        replica = super()._replicate_for_data_parallel()
        replica.pack, replica._packed, replica._graphs = False, {}, None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the model: packed weights are one machine's, graphs one process's."""
        graphs = self._graphs and (self._graphs.limit, self._graphs.batches)
        return {**self.__dict__, "_packed": {}, "_guard": None, "_graphs": graphs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "_graphs": state["_graphs"] and GraphedFunction(*state["_graphs"])})
        self._packed_blocks()

    def extra_repr(self) -> str:
        layers = self.model.encoder.layers
        packed = sum(can_pack(layer) for index, layer in enumerate(layers) if index in self._packed)
        int8 = sum(len(block.int8) for block in self._packed.values())
        quantised = "".join(
            f", {n} Linears in {name}" for n, name in ((int8, "int8"), (len(self.float8), "float8")) if n
        )
        graphs = "" if self._graphs is None else ", CUDA graph by shape"
        return f"{packed} of {len(layers)} layers packed{quantised}{graphs}"


def _makes_graph() -> bool:
    """Whether `make_fx` records the ops that are called."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def _as_the_models(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Where a module around it loads: `state_dict()` has the model's keys, and PyTorch looks for those of a child."""
    child = f"{prefix}model."
    for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(child)]:
        state_dict[child + key[len(prefix) :]] = state_dict.pop(key)


def _of_layer(index: int, names: Collection[str]) -> tuple[str, ...]:
    """Which of a layer's Linears are among these."""
    return tuple(name for name in LINEARS if f"encoder.layers.{index}.{name}" in names)


def _cast(output: Any, dtype: torch.dtype) -> Any:
    """The features of an output in `dtype`; attention maps stay as they are."""
    if not isinstance(output, InternViTOutput):
        return tuple(t.to(dtype) if isinstance(t, Tensor) else t for t in output)
    hidden = output.hidden_states
    return output._replace(
        last_hidden_state=output.last_hidden_state.to(dtype),
        pooler_output=output.pooler_output.to(dtype),
        hidden_states=None if hidden is None else tuple(h.to(dtype) for h in hidden),
    )


def _modified_layers(model: InternViT) -> list[int]:
    """The layers whose Python a CUDA graph would run at capture only."""
    layers = enumerate(model.encoder.layers)
    return [i for i, layer in layers if layer.training or not is_unmodified(layer) or layer.shares_heads]


def optimize_for_inference(
    model: InternViT,
    pack: bool = True,
    cuda_graph: bool = False,
    graph_limit: int = LIMIT,
    graph_batches: Sequence[int] = (),
    residual_dtype: torch.dtype | str | None = "auto",
    out_dtype: torch.dtype | None = None,
    precision: str | None = None,
    skip: Iterable[str] | None = None,
    fold_norms: bool = False,
) -> OptimizedInternViT:
    """Prepares a model for inference on this machine: the same forward, faster, without gradients.

    On a CPU the residual stream of a 16-bit model is float32, which takes the same time and divides the error by three;
    features are rounded once, to the model's dtype, when they are returned.

    On a CPU the four Linears of each bfloat16 block get packed copies of their weights beside the originals (in a
    stream of their dtype with LayerScale folded into proj and fc2, in float64): 0.6 GB for InternViT-300M, 11 GB for
    6B. So do those of float32 where the CPU has AVX2 and not AVX-512, at twice the size. Each forward verifies them by
    reading every weight once (34 ms of one EPYC core for the 300M, bfloat16) and packs again what has changed. A layer
    with hooks, adapters or replaced parts runs as it is, in the model's dtype, whenever they came.
    Elsewhere nothing is derived from the weights.

    Args:
        model: an `InternViT` in eval mode; it is not changed.
        pack: False for no packed copies: the model's own forward, without gradients.
        cuda_graph: on a GPU, capture the blocks as a CUDA graph for each shape of input and replay it. The first call
            of a shape runs three times. Calls must not overlap on several streams. Unmeasured: no GPU has run this yet.
        graph_limit: how many graphs are kept; the one unused for longest is freed for a new one.
        graph_batches: the batch sizes to capture graphs for, as (1, 2, 4, 8, 13) for InternVL's 1 to 13 tiles; smaller
            batches are padded to the next one. This library's own kernels give an image the same bits in each batch.
            Libraries that choose a kernel by the batch need not: cuBLAS, for the Linears of all backends, and torch's
            SDPA and flash-attn, for the attention of `cuda`, `sdpa` and `flash`.
        residual_dtype: of the residual stream between the blocks. "auto": float32 for a 16-bit model on a CPU, else as
            the model has it. torch.float32: on every device. None: as the model has it (`InternViT.residual_dtype`),
            the weights' dtype unless that was set.
        out_dtype: of last_hidden_state, pooler_output and hidden_states; by default the dtype that the model returns.
            torch.float32 returns a float32 stream as it is.
        precision: of the blocks' Linears. None or "bf16": the model's dtype. "int8" (bfloat16 models on CPUs): weights
            in int8 with a scale for each output channel; their inputs, quantised at each call, with a scale for each
            token. Attention stays bfloat16. Needs AVX2; elsewhere the Linears stay bfloat16 and a
            warning says why. "fp8" (bfloat16 models on GPUs from compute capability 8.9 on): weights and
            inputs in float8_e4m3fn, quantised at each call, with a scale for each row; unmeasured.
        skip: names or patterns of Linears, or of modules around them, that stay bfloat16 with "int8" or "fp8":
            "encoder.layers.0", "*.mlp.fc2". () for none. None: of a calibrated model, or one loaded from an int8
            checkpoint, what is not int8 in it; of others the first and the last block, which make nearly half of the
            error of a trained ViT-S.
        fold_norms: under `internvit.backend("triton_gemm")`, compute the block norms and QK-norm's statistics inside
            the GEMMs, with the norms' weights in those of qkv and fc1 (folded at each call). bfloat16 and float32;
            elsewhere, and for a stream of another dtype than the weights', it changes nothing. Unmeasured:
            docs/lower-bounds.md counts when it may pay.

    Returns:
        A module with the model's forward and state_dict, which can be copied and pickled; `.undo()` gives the model.

    Raises:
        ValueError: not an `InternViT`, or in training mode; another residual_dtype, out_dtype or precision, or one that
            the model's dtype or device does not go with; a name in skip that no Linear has; `cuda_graph` for a
            model that is not on a GPU, or with hooks, adapters or replaced parts, whose Python a graph would run at
            capture only; a limit or batch size below 1.
    """
    _check(model, residual_dtype, out_dtype, cuda_graph)
    quantised = quantised_linears(model, precision, skip)
    int8, float8 = ((), quantised) if precision == "fp8" else (quantised, ())
    if int8 and not pack:
        raise ValueError("optimize_for_inference: precision='int8' packs weights, got pack=False")
    graphs = GraphedFunction(graph_limit, graph_batches)
    return OptimizedInternViT(
        model, pack, graphs if cuda_graph else None, residual_dtype, out_dtype, int8, float8, fold_norms
    ).eval()


def _check(
    model: InternViT, residual_dtype: torch.dtype | str | None, out_dtype: torch.dtype | None, cuda_graph: bool
) -> None:
    if not isinstance(model, InternViT):
        raise ValueError(f"optimize_for_inference: model must be an InternViT, got {type(model).__name__}")
    if model.training:
        raise ValueError("optimize_for_inference: model must be in eval mode, got training mode; call model.eval()")
    if residual_dtype not in ("auto", None, torch.float32):
        raise ValueError(
            "optimize_for_inference: residual_dtype must be 'auto', torch.float32 or None (as the model has it), got "
            f"{residual_dtype!r}"
        )
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise ValueError(f"optimize_for_inference: out_dtype must be a floating dtype or None, got {out_dtype!r}")
    if cuda_graph and model.device.type != "cuda":
        raise ValueError(
            f"optimize_for_inference: cuda_graph=True needs a model on a CUDA device, got {model.device}; "
            "move the model first, or leave cuda_graph out"
        )
    modified = _modified_layers(model) if cuda_graph else []
    if modified:
        raise ValueError(
            f"optimize_for_inference: cuda_graph=True cannot take layers {modified}: their hooks, adapters or replaced "
            "parts would run at capture only; remove them, or leave cuda_graph out"
        )
