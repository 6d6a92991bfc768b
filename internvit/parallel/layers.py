"""The parts of an InternViT block whose parameters are DTensors; a rank computes with its heads and hidden units.

Two sums over ranks of [B, N, C] a block forward, of what proj and fc2 give, and two backward, of the gradients that qkv
and fc1 give their inputs. The residual stream, norms, LayerScale and DropPath are the same on every rank.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from internvit.model.attention_summary import AttentionSummary
from internvit.model.block import InternViTLayer, is_plain_layer
from internvit.model.embeddings import Embeddings
from internvit.model.fused_block import BlockParts, BranchOutput, Norm, gelu_recomputed
from internvit.model.hooks import has_own_hooks
from internvit.model.layers import MLP, Attention, LayerNorm, RMSNorm
from internvit.ops import linear_gelu, qk_norm_attention_qkvpacked
from internvit.ops.core.sequences import Sequences
from internvit.parallel.group import RankGroup
from internvit.parallel.linear import column_linear, row_linear
from internvit.parallel.plan import TensorParallelPlan
from internvit.parallel.qk_norm import shared_qk_norm_attention
from internvit.reference import drop_path_scale

_NOT_RUN = "which a tensor-parallel block does not run: undo it"


def local(parameter: Tensor) -> Tensor:
    """What this rank stores of a parameter; its gradient becomes the DTensor's."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_norm(module: Any) -> Norm:
    """A norm's parameters, which every rank has."""
    if not isinstance(module, RMSNorm | LayerNorm):
        raise RuntimeError(f"a norm is a {type(module).__name__}, {_NOT_RUN}")
    bias = None if module.bias is None else local(module.bias)
    return Norm(module.norm_type, local(module.weight), bias, module.eps, module.rounding)


class _OwnGradient(torch.autograd.Function):
    """The same values; a gradient in memory of its own.

    With one image the gradients of the class token and of positions are views of one buffer. autograd copies such a
    view before it becomes a parameter's `grad`; inside a DTensor it does not see it, and what the next backward adds to
    one would be added to the other.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].clone()


class TensorParallelEmbeddings(Embeddings):
    """Embeddings with DTensor parameters, computed on every rank."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not isinstance(self.position_embedding, DTensor):  # inside the call below
            return super().forward(pixel_values)
        parameters = {name: _OwnGradient.apply(local(parameter)) for name, parameter in self.named_parameters()}
        return functional_call(self, parameters, (pixel_values,))


def _refuse_packed(sequences: Sequences | None) -> None:
    if sequences is not None:
        raise ValueError("a tensor-parallel model takes batches of images of one size, got a list of images")


class TensorParallelAttention(Attention):
    """Attention over this rank's heads.

    Attributes:
        group: of ranks.
        local_heads: of this rank.
    """

    group: RankGroup
    local_heads: int

    def forward(self, x: Tensor, sequences: Sequences | None = None) -> Tensor:
        _refuse_packed(sequences)
        return self.project(self.attention_output(x))

    def attention_output(self, x: Tensor) -> Tensor:
        """The output of this rank's heads [B, N, h * D] for normed tokens x [B, N, C]."""
        bias = None if self.qkv.bias is None else local(self.qkv.bias).flatten()
        # Of a padded part all rows are multiplied: a view of the others would be a copy of the weight.
        qkv = column_linear(x, local(self.qkv.weight).flatten(0, 1), bias, self.group)
        heads = qkv.unflatten(-1, (3, -1, self.head_dim))[:, :, :, : self.local_heads]  # [B, N, 3, h, D]
        scale = self.head_dim**-0.5
        if not self.qk_normalization:
            return qk_norm_attention_qkvpacked(heads, scale=scale).flatten(2)
        rows = self.local_heads * self.head_dim
        q, k, v = heads.unbind(2)
        out = shared_qk_norm_attention(
            *(q, k, v, local(self.q_norm.weight)[:rows], local(self.k_norm.weight)[:rows]),
            channels=self.num_heads * self.head_dim,
            eps=self.q_norm.eps,
            scale=scale,
            rounding=self.rounding,
            group=self.group,
        )
        return out.flatten(2)

    def project(self, attended: Tensor) -> Tensor:
        """The branch [B, N, C], of all heads."""
        return _row_linear(attended, self.proj, self.group)

    def attention_map(self, x: Tensor, kind: str = "maps") -> Tensor:
        raise ValueError("output_attentions: a tensor-parallel model has no attention maps; ask a model that is whole")


class TensorParallelMLP(MLP):
    """The MLP over this rank's hidden units.

    Attributes:
        group: of ranks.
        local_hidden: units of this rank.
    """

    group: RankGroup
    local_hidden: int

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """gelu(fc1(x)), this rank's hidden units [B, N, h]."""
        weight, bias = (local(p)[: self.local_hidden] for p in (self.fc1.weight, self.fc1.bias))
        if not torch.is_grad_enabled():
            return linear_gelu(x, weight, bias)
        return gelu_recomputed(column_linear(x, weight, bias, self.group))

    def project(self, hidden: Tensor) -> Tensor:
        """The branch [B, N, C], of all hidden units."""
        return _row_linear(hidden, self.fc2, self.group)


class TensorParallelLayer(InternViTLayer):
    """A block whose ranks share its heads and hidden units; a drop-in for `InternViTLayer`.

    Attributes:
        plan: of the model that it belongs to.
    """

    shares_heads = True
    plan: TensorParallelPlan
    attn: TensorParallelAttention
    mlp: TensorParallelMLP

    def parts(self, sequences: Sequences | None = None, summary: AttentionSummary | None = None) -> BlockParts:
        _refuse_packed(sequences)
        changed = next(_changed_parts(self), None)
        if changed is not None:
            raise RuntimeError(f"{changed}, {_NOT_RUN}")
        attn, mlp = self.attn, self.mlp
        row_scale = self._shared_row_scale if self.training and self.drop_path_rate > 0 else None
        return BlockParts(
            local_norm(self.norm1),
            attn.attention_output,
            BranchOutput(attn.project, local(self.ls1), row_scale),
            local_norm(self.norm2),
            mlp.hidden,
            BranchOutput(mlp.project, local(self.ls2), row_scale),
        )

    def first_norm(self) -> Norm:
        return local_norm(self.norm1)

    def attention_map(self, x: Tensor, kind: str = "maps") -> Tensor:
        return self.attn.attention_map(x, kind)

    def has_plain_parts(self, quantised: bool = False) -> bool:
        return is_plain_layer(self) and not has_own_hooks(self) and next(_changed_parts(self), None) is None

    def _shared_row_scale(self, branch: Tensor) -> Tensor:
        """Each rank draws, so that their generators stay alike, and all take the first rank's."""
        scale = drop_path_scale(branch.shape[0], self.drop_path_rate, branch.device)
        return self.attn.group.from_first(scale)


_CLASSES: dict[str, type[nn.Module]] = {
    "attn": TensorParallelAttention,
    "mlp": TensorParallelMLP,
    **dict.fromkeys(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), nn.Linear),
}


def _changed_parts(layer: TensorParallelLayer) -> Iterator[str]:
    """Adapters and hooks put into the layer since it was split: it computes with its own parameters alone."""
    for name, expected in _CLASSES.items():
        module = layer.get_submodule(name)
        if not isinstance(module, expected) or type(module).forward is not expected.forward:
            yield f"{name} is a {type(module).__name__}"
    yield from (f"{name} has hooks" for name, module in layer.named_modules() if name and has_own_hooks(module))


def _row_linear(x: Tensor, module: nn.Linear, group: RankGroup) -> Tensor:
    return row_linear(x, local(module.weight)[:, : x.shape[-1]], local(module.bias), group)


def split_layer(layer: nn.Module, plan: TensorParallelPlan, group: RankGroup) -> None:
    """Turns a layer, whose parameters are DTensors already, into a tensor-parallel one, in place."""
    assert isinstance(layer, InternViTLayer)
    layer.__class__ = TensorParallelLayer
    layer.__dict__["plan"] = plan
    for name, module_class, size, count in (
        ("attn", TensorParallelAttention, "local_heads", plan.heads),
        ("mlp", TensorParallelMLP, "local_hidden", plan.hidden),
    ):
        module = layer.get_submodule(name)
        module.__class__ = module_class
        module.__dict__ |= {"group": group, size: count[group.rank]}
