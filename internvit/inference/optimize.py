"""A model prepared for inference on one machine: LayerScale folded into the GEMMs, weights packed for its kernels.

    proj' = gamma1 * proj,  fc2' = gamma2 * fc2        (weight and bias, in float64, rounded once)

Passes over one [N, C] tensor per block in bf16 with epilogues: 26. norm1 2, qkv 4, attention 4, proj with its residual
3, norm2 2, fc1 with GELU 5, fc2 with its residual 6. The two norms stay passes of their own because a row's statistics
need all columns, which the threads of the GEMM before share.

On a GPU the Linears are torch's and everything between them the fused ops; the blocks can run as one CUDA graph.
"""

import logging
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from internvit.inference.cuda_graph import GraphedFunction
from internvit.model.layers import MLP, Attention, LayerNorm, RMSNorm, has_hooks, is_plain_linear, is_plain_norm
from internvit.model.vit import InternViT, InternViTLayer, is_plain_layer
from internvit.ops import layer_scale_residual, layer_scale_residual_norm, linear_gelu, qk_norm_attention_qkvpacked
from internvit.ops.backends import native
from internvit.ops.core.select import requested
from internvit.ops.linear import linear
from internvit.ops.linear_layer_scale import float16_holds
from internvit.output import InternViTOutput

logger = logging.getLogger("internvit")


class _PlainLinear:
    """A Linear by PyTorch; the residual is added by the op that follows."""

    adds_residual = False

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        return linear_gelu(x, self.weight, self.bias) if gelu else linear(x, self.weight, self.bias)


class _PackedLinear:
    """A Linear of the CPU library with a packed copy of its weight; GELU or the residual ride in the epilogue."""

    adds_residual = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = torch.ops.internvit_cpu.pack_weight(weight)
        self.out_features = weight.shape[0]
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        return torch.ops.internvit_cpu.linear_packed(x, self.packed, self.out_features, self.bias, residual, gelu)


class _PrepackedLinear:
    """A Linear by oneDNN with a prepacked weight; GELU or the residual ride in the epilogue.

    oneDNN's bits depend on the number of rows, so it gets one image at a time (`OptimizedInternViT.forward`).
    """

    adds_residual = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1025)  # a hint, not a limit
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        pointwise = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return pointwise.binary(x, residual, self.packed, self.bias, "add")
        if gelu:
            return pointwise(x, self.packed, self.bias, "gelu", [], "none")
        return pointwise(x, self.packed, self.bias, "none", [], "")


def _onednn_packs() -> bool:
    """Whether this torch has oneDNN's prepacked Linear, a private op, for bfloat16 on this machine."""
    ops = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available() and all(hasattr(ops, n) for n in names) and ops._is_mkldnn_bf16_supported()
    )


def _linear_for(weight: Tensor, pack: bool) -> type[_PlainLinear] | type[_PackedLinear] | type[_PrepackedLinear]:
    """The fastest Linear for this weight, never by the number of rows.

    bfloat16 at 1025 rows, the four Linears of a 300M block with their epilogues: one Xeon core with AMX, CPU time:
    oneDNN prepacked 30.5 ms, PyTorch 35.3, own tiles 37.5. Two cores of an EPYC (Zen 5), VDPBF16PS, medians of 20:
    oneDNN prepacked 27.4 ms (0.94 TFLOP/s, 91 % of the peak), own 28.7.
    """
    if not pack or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return _PlainLinear
    if _onednn_packs():
        return _PrepackedLinear
    if native.unavailable_reason("internvit_cpu") is None and torch.ops.internvit_cpu.packs_linear(weight.dtype):
        return _PackedLinear
    return _PlainLinear


def fold_layer_scale(weight: Tensor, bias: Tensor | None, gamma: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """gamma * weight and gamma * bias, computed in float64; None where float16 cannot hold them as normal numbers."""
    folded = gamma.double().unsqueeze(1) * weight.double()
    if weight.dtype == torch.float16 and not float16_holds(folded, weight):
        return None
    return folded.to(weight.dtype), None if bias is None else (gamma.double() * bias.double()).to(bias.dtype)


class _Block:
    """One layer's inference: what `InternViTLayer.step` computes, LayerScale folded."""

    def __init__(self, layer: InternViTLayer, pack: bool) -> None:
        self.layer = layer
        make = _linear_for(layer.attn.qkv.weight, pack)
        self.gammas: list[Tensor | None] = []
        ends = []
        for module, gamma in ((layer.attn.proj, layer.ls1), (layer.mlp.fc2, layer.ls2)):
            weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
            folded = fold_layer_scale(weight, bias, gamma.detach())
            if folded is None:
                logger.info("LayerScale is kept out of a float16 Linear: gamma * weight leaves the normal range")
            self.gammas.append(gamma.detach() if folded is None else None)
            ends.append(make(*(folded or (weight, bias))))
        self.proj, self.fc2 = ends
        self.qkv = make(layer.attn.qkv.weight.detach(), layer.attn.qkv.bias)
        self.fc1 = make(layer.mlp.fc1.weight.detach(), layer.mlp.fc1.bias)
        self.one_image = make is _PrepackedLinear

    def __call__(
        self, x: Tensor, normed: Tensor | None, next_norm: RMSNorm | LayerNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        layer, attn = self.layer, self.layer.attn
        normed = layer.norm1(x) if normed is None else normed
        qkv = self.qkv(normed).unflatten(-1, (3, attn.num_heads, attn.head_dim))
        if attn.qk_normalization:
            out = qk_norm_attention_qkvpacked(
                qkv, attn.q_norm.weight, attn.k_norm.weight, eps=attn.q_norm.eps, rounding=attn.rounding
            )
        else:
            out = qk_norm_attention_qkvpacked(qkv)
        x, normed = self._add(self.proj, out.flatten(2), x, self.gammas[0], layer.norm2)
        return self._add(self.fc2, self.fc1(normed, gelu=True), x, self.gammas[1], next_norm)

    @staticmethod
    def _add(end: Any, hidden: Tensor, x: Tensor, gamma: Tensor | None, norm: Any) -> tuple[Tensor, Any]:
        if end.adds_residual and x.dtype == hidden.dtype:
            x = end(hidden, residual=x)
            return x, None if norm is None else norm(x)
        branch = end(hidden)
        if norm is None:
            return layer_scale_residual(x, branch, gamma), None
        return layer_scale_residual_norm(
            x, branch, norm.weight, norm.bias, gamma, eps=norm.eps, norm_type=norm.kind, rounding=norm.rounding
        )


def _can_fold(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether nothing but InternViT's own forward happens in `layer` and its parts."""
    if not isinstance(layer, InternViTLayer) or not is_plain_layer(layer):
        return False
    attn, mlp = layer.attn, layer.mlp
    if type(attn) is not Attention or type(mlp) is not MLP or has_hooks(attn) or has_hooks(mlp):
        return False
    norms = [layer.norm1, layer.norm2, *((attn.q_norm, attn.k_norm) if attn.qk_normalization else ())]
    linears = [attn.qkv, attn.proj, mlp.fc1, mlp.fc2]
    return all(map(is_plain_linear, linears)) and all(map(is_plain_norm, norms))


class OptimizedInternViT(nn.Module):
    """What `optimize_for_inference` returns: an `InternViT`'s forward and state_dict, no gradients."""

    def __init__(self, model: InternViT, pack: bool, cuda_graph: bool = False) -> None:
        super().__init__()
        self.model = model
        self._graphs = GraphedFunction() if cuda_graph else None
        self._blocks = [_Block(layer, pack) if _can_fold(layer) else None for layer in model.encoder.layers]
        self._stamp = self._weights_stamp()

    def _weights_stamp(self) -> list[tuple[int, int]]:
        # An inference tensor counts no versions.
        parameters = list(self.model.encoder.parameters())
        return [(p.data_ptr(), -1 if p.is_inference() else p._version) for p in parameters]

    @torch.no_grad()
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        pixel_embeds: Tensor | None = None,
        output_attentions: bool = False,
    ) -> InternViTOutput | tuple:
        """As `InternViT.forward`, without gradients; attention maps run on the model itself.

        Raises:
            RuntimeError: a weight has changed since the model was optimised.
        """
        if output_attentions:
            return self.model(pixel_values, output_hidden_states, return_dict, pixel_embeds, output_attentions)
        if self._stamp != self._weights_stamp():
            raise RuntimeError("the weights have changed since optimize_for_inference: call .undo() and optimise again")
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError(f"give pixel_values or pixel_embeds, got {'neither' if pixel_embeds is None else 'both'}")
        x = self.model.encoder.enter(self.model.embeddings(pixel_values) if pixel_embeds is None else pixel_embeds)
        x, *hidden_states = self._encode(x, output_hidden_states)
        output = InternViTOutput(x, x[:, 0], tuple(hidden_states) if output_hidden_states else None, None)
        return output if return_dict else output.to_tuple()

    def _encode(self, x: Tensor, output_hidden_states: bool) -> tuple[Tensor, ...]:
        """The last hidden state and, where asked for, all L + 1; by a CUDA graph if there are graphs."""
        if (
            self._graphs is None
            or x.numel() == 0
            or torch.compiler.is_compiling()
            or torch.cuda.is_current_stream_capturing()
        ):
            return self._run_blocks(x, output_hidden_states)
        variant = (output_hidden_states, requested())
        return self._graphs(lambda static: self._run_blocks(static, output_hidden_states), x, variant)

    def _run_blocks(self, x: Tensor, output_hidden_states: bool) -> tuple[Tensor, ...]:
        hidden_states = [x]
        layers: list[Any] = list(self.model.encoder.layers)
        # Images go through the blocks one by one where the GEMMs want that: nothing is copied between them.
        pieces = x.split(1) if any(b is not None and b.one_image for b in self._blocks) and x.shape[0] > 1 else (x,)
        states: list[tuple[Tensor, Tensor | None]] = [(piece, None) for piece in pieces]
        for index, block in enumerate(self._blocks):
            if block is None:
                x = layers[index](torch.cat([piece for piece, _ in states]))
                states = [(piece, None) for piece in (x.split(1) if len(states) > 1 else (x,))]
            else:
                follows = index + 1 < len(layers) and self._blocks[index + 1] is not None
                next_norm = layers[index + 1].norm1 if follows else None
                states = [block(piece, normed, next_norm) for piece, normed in states]
            if output_hidden_states:
                hidden_states.append(torch.cat([piece for piece, _ in states]))
        x = torch.cat([piece for piece, _ in states]) if len(states) > 1 else states[0][0]
        return (x, *hidden_states) if output_hidden_states else (x,)

    def undo(self) -> InternViT:
        """The model as it was; CUDA graphs are freed now, packed copies with this object."""
        if self._graphs is not None:
            self._graphs.clear()
        return self.model

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        packed = sum(b is not None and b.qkv.adds_residual for b in self._blocks)
        folded = sum(b is not None for b in self._blocks)
        graphs = "" if self._graphs is None else ", CUDA graph by shape"
        return f"{folded} of {len(self._blocks)} layers folded, {packed} packed{graphs}"


def optimize_for_inference(model: InternViT, pack: bool = True, cuda_graph: bool = False) -> OptimizedInternViT:
    """Prepares a model for inference on this machine: the same forward, faster, without gradients.

    LayerScale is folded into proj and fc2 (in float64; left out of a float16 layer where gamma * weight would leave the
    normal range). On a CPU the four Linears of each bfloat16 block get a packed copy of their weights, beside
    the originals: 0.6 GB for InternViT-300M, 11 GB for 6B. A layer with hooks, adapters or replaced parts runs as
    it is.

    Args:
        model: an `InternViT` in eval mode; it is not changed.
        pack: False folds, and leaves the GEMMs to PyTorch; proj and fc2 are then held twice.
        cuda_graph: on a GPU, capture the blocks as a CUDA graph for each shape of input (at most eight; what was
            unused for longest is freed first) and replay it. The first call of a shape runs three times. Calls must not
            overlap on several streams. Unmeasured: no GPU has run this yet.

    Returns:
        A module with the model's forward and state_dict; `.undo()` gives the model back.

    Raises:
        ValueError: not an `InternViT`, or in training mode; `cuda_graph` for a model that is not on a GPU, or with
            hooks, adapters or replaced parts, whose Python a graph would run at capture only.
    """
    if not isinstance(model, InternViT):
        raise ValueError(f"optimize_for_inference: model must be an InternViT, got {type(model).__name__}")
    if model.training:
        raise ValueError("optimize_for_inference: model must be in eval mode, got training mode; call model.eval()")
    if cuda_graph and model.device.type != "cuda":
        raise ValueError(
            f"optimize_for_inference: cuda_graph=True needs a model on a CUDA device, got {model.device}; "
            "move the model first, or leave cuda_graph out"
        )
    if cuda_graph and not all(map(_can_fold, model.encoder.layers)):
        layers = [i for i, layer in enumerate(model.encoder.layers) if not _can_fold(layer)]
        raise ValueError(
            f"optimize_for_inference: cuda_graph=True cannot take layers {layers}: their hooks, adapters or replaced "
            "parts would run at capture only; remove them, or leave cuda_graph out"
        )
    return OptimizedInternViT(model, pack, cuda_graph).eval()
