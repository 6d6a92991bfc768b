"""One block of InternViT as a module."""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internvit.config import InternViTConfig
from internvit.model import recompute
from internvit.model.attention_summary import AttentionSummary
from internvit.model.fused_block import (
    BlockParts,
    BranchOutput,
    Defer,
    Function,
    Norm,
    PendingBranch,
    add_pending,
    attention_output,
    call_module,
    fc1_gelu,
    identity,
    linear_or_folded,
    run_after_attention,
    run_block,
)
from internvit.model.hooks import (
    fusible_class,
    has_global_hooks,
    has_hooks,
    is_exactly,
    is_plain_linear,
    is_unhooked_linear,
    runs_as_written,
)
from internvit.model.layers import MLP, Attention, is_plain_norm, make_norm, norm_before
from internvit.model.packed import one_by_one, per_token
from internvit.ops.core.sequences import Sequences
from internvit.reference import drop_path_scale


@dataclass
class TrainingOptions:
    """How the blocks of one encoder train. The encoder and its blocks share one object.

    Attributes:
        checkpointing: "none", "selective" or "block"; see `InternViT.set_gradient_checkpointing`.
        fold_layer_scale: see `InternViT.set_layer_scale_folding`.
    """

    checkpointing: str = "none"
    fold_layer_scale: bool = False


@fusible_class
class InternViTLayer(nn.Module):
    """One pre-norm block with LayerScale and DropPath.

    x = x + drop_path(attn(norm1(x)) * ls1);  x = x + drop_path(mlp(norm2(x)) * ls2)

    Attributes:
        shares_heads: whether ranks share the block's heads (`internvit.parallel`).
        wrapping_hooks: ids of hooks that gather and free parameters, and leave inputs and outputs as they are.
    """

    shares_heads = False
    wrapping_hooks: frozenset[int] = frozenset()

    def __init__(
        self,
        config: InternViTConfig,
        drop_path_rate: float = 0.0,
        rounding: str = "fused",
        options: TrainingOptions | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(config, rounding, **factory)
        self.attn = Attention(config, rounding, **factory)
        self.norm2 = make_norm(config, rounding, **factory)
        self.mlp = MLP(config, **factory)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor, **factory))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor, **factory))
        self.drop_path_rate = drop_path_rate
        self.options = TrainingOptions() if options is None else options

    def forward(
        self,
        hidden_states: Tensor,
        pending: PendingBranch | None = None,
        defer: bool = False,
        sequences: Sequences | None = None,
    ) -> Any:
        """The block's output [B, N, C], or [total, C] of packed images.

        Between two wrapped blocks, whose parameters are there in their own forward alone, the branch is passed on
        instead of the normed tensor: `pending` is that of the block before; with `defer`, the stream before this
        block's last branch, and that branch, are returned.
        """
        with recompute.scope():
            normed = None
            if pending is not None:
                hidden_states, normed = add_pending(hidden_states, pending, self.parts().norm1)
            out, passed_on = self.forward_fused(hidden_states, normed, Defer.BRANCH if defer else None, sequences)
        return (out, passed_on) if defer else out

    def forward_fused(
        self,
        hidden_states: Tensor,
        normed: Tensor | None,
        next_norm: Norm | Defer | None,
        sequences: Sequences | None = None,
        summary: AttentionSummary | None = None,
    ) -> tuple[Tensor, Any]:
        """The block between two neighbours; see `internvit.model.fused_block.run_block`."""
        parts = self.parts(sequences, summary)
        if self.options.checkpointing != "selective" or not self.training or not recompute.can_checkpoint():
            return run_block(parts, hidden_states, normed, next_norm)
        if normed is None:
            normed = parts.norm1(hidden_states)

        def after_attention(hidden_states: Tensor, attended: Tensor) -> tuple[Tensor, Any]:
            return run_after_attention(self.parts(sequences), hidden_states, attended, next_norm)

        # DropPath draws inside, so that its random numbers are replayed.
        attended = parts.attention(normed)
        out, next_normed = checkpoint(after_attention, hidden_states, attended, use_reentrant=False)
        return out, next_norm.rematerialize(out, next_normed) if isinstance(next_norm, Norm) else next_normed

    def parts(self, sequences: Sequences | None = None, summary: AttentionSummary | None = None) -> BlockParts:
        """What the block computes with now; a branch whose module has hooks or is another one is called as a whole."""
        fold = self.options.fold_layer_scale
        row_scale = partial(self._row_scale, sequences) if self.training and self.drop_path_rate > 0 else None
        attn, mlp = self.attn, self.mlp
        attention: Function = partial(_call_attention, attn, sequences)
        hidden: Function = partial(call_module, mlp)
        proj, fc2 = (BranchOutput(identity, gamma, row_scale) for gamma in (self.ls1, self.ls2))
        if is_exactly(attn, Attention):
            attention, proj = (
                partial(attention_output, attn.parts(sequences, summary)),
                linear_or_folded(attn.proj, self.ls1, fold, row_scale),
            )
        if is_exactly(mlp, MLP):
            hidden = partial(fc1_gelu, mlp.fc1)
            fc2 = linear_or_folded(mlp.fc2, self.ls2, fold, row_scale)
        norm1, norm2 = self._first_norm(), norm_before(getattr(mlp, "fc1", None), self.norm2)
        return BlockParts(norm1, attention, proj, norm2, hidden, fc2)

    def _first_norm(self) -> Norm | nn.Module:
        return norm_before(getattr(self.attn, "qkv", None), self.norm1)

    def first_norm(self) -> Norm | None:
        """The norm that the block begins with, where the pass before it may compute it."""
        norm = self._first_norm()
        return norm if isinstance(norm, Norm) else None

    def attention_map(self, hidden_states: Tensor, kind: str = "maps") -> Tensor:
        """The softmax probabilities [B, H, N, N] of the block's attention; see `Attention.attention_map`."""
        return self.attn.attention_map(self.norm1(hidden_states), kind)

    def summarizes_attention(self) -> bool:
        """Whether the block's own attention reports an `AttentionSummary`: it is InternViT's, called by its parts."""
        return is_exactly(self.attn, Attention)

    def has_plain_parts(self, quantised: bool = False) -> bool:
        """Whether nothing but InternViT's own forward happens in the block's parts; `quantised`: as `is_unmodified`."""
        attn, mlp = self.attn, self.mlp
        if not (is_exactly(attn, Attention) and is_exactly(mlp, MLP)):
            return False
        norms = [self.norm1, self.norm2, *((attn.q_norm, attn.k_norm) if attn.qk_normalization else ())]
        is_own = is_unhooked_linear if quantised else is_plain_linear
        return all(map(is_own, (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))) and all(map(is_plain_norm, norms))

    def _row_scale(self, sequences: Sequences | None, branch: Tensor) -> Tensor:
        if sequences is None:
            return drop_path_scale(branch.shape[0], self.drop_path_rate, branch.device)
        factors = drop_path_scale(sequences.cu_seqlens.shape[0] - 1, self.drop_path_rate, branch.device)
        return per_token(factors, sequences, branch.shape[0])

    def extra_repr(self) -> str:
        return f"drop_path_rate={self.drop_path_rate:.3g}" if self.drop_path_rate else ""


def _call_attention(attn: nn.Module, sequences: Sequences | None, x: Tensor) -> Tensor:
    """The branch by calling its module; one that knows nothing of packed images gets them one by one."""
    if sequences is None:
        return call_module(attn, x)
    if isinstance(attn, Attention):
        return call_module(attn, x, sequences)
    return one_by_one(partial(call_module, attn), x, sequences)


def is_plain_layer(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether calling `layer` is nothing but its own forward, which may be run in parts instead."""
    if not isinstance(layer, InternViTLayer) or has_hooks(layer) or not runs_as_written(layer, InternViTLayer):
        return False
    return type(layer) is InternViTLayer or layer.shares_heads


def runs_between_neighbours(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether the encoder may run `layer` between its neighbours instead of calling it; one that `layer.compile()`
    has compiled, as PyTorch's regional compilation does, is called."""
    return is_plain_layer(layer) and layer._compiled_call_impl is None


def passes_branch(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether `layer` is wrapped, has no hooks but the wrapper's, and takes and gives a `PendingBranch`."""
    if not isinstance(layer, InternViTLayer) or not layer.wrapping_hooks or "forward" in layer.__dict__:
        return False
    if has_global_hooks():
        return False
    hooks = {*layer._forward_hooks, *layer._forward_pre_hooks}
    return hooks == layer.wrapping_hooks and not (layer._backward_hooks or layer._backward_pre_hooks)


def is_unmodified(layer: nn.Module, quantised: bool = False) -> TypeGuard[InternViTLayer]:
    """Whether nothing but InternViT's own forward happens in `layer` and its parts: no hook, adapter or replacement.

    With `quantised` a Linear's weight may be a tensor subclass, as torchao's are: the Linear is called then.
    """
    return is_plain_layer(layer) and layer.has_plain_parts(quantised)
