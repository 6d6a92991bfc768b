"""`internvit.patch`: fuses the blocks of an already built upstream model in place, and takes it back.

Each block of the given model gets a `forward` of its own, on the instance; no class and nothing in torch.nn is
touched, and no module, parameter or key is added. The Linears stay what they are and are called as modules.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internvit.model import recompute
from internvit.model.block import InternViTLayer
from internvit.model.fused_block import (
    AttentionParts,
    BlockParts,
    BranchOutput,
    attention_output,
    fc1_gelu,
    linear_or_folded,
    linear_per_image,
    run_block,
)
from internvit.numerics import relative_error
from internvit.upstream.blocks import (
    gamma_of,
    has_another_forward,
    has_own_forward,
    inner_modules,
    keeps_by_rounding,
    layout_of,
    mixed,
    norm_of,
    why_not_now,
    why_unsupported,
)
from internvit.upstream.layouts import Layout, part


class FusedBlock:
    """The fused forward of one upstream block, which decides at each call whether to run or to stand aside."""

    def __init__(self, block: nn.Module, layout: Layout) -> None:
        self.block = block
        self.layout = layout
        self.inner = inner_modules(block, layout)
        self.active = False
        self._remember_forward()

    def _remember_forward(self) -> None:
        """What the block's own forward is; None where the class was given another one before."""
        self.class_forward = None if has_another_forward(self.block) else type(self.block).forward

    def __getstate__(self) -> dict[str, Any]:
        # transformers 5 wraps forwards of subclasses: a function that pickle does not find by its name.
        return {name: value for name, value in self.__dict__.items() if name != "class_forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember_forward()

    def install(self) -> None:
        self.before = self.block.__dict__.get("forward")
        self.block.forward = self.forward
        self.block._replicate_for_data_parallel = self.replicate  # type: ignore[method-assign]
        self.active = True

    def replicate(self) -> nn.Module:
        """The block's replica for DataParallel, which runs its own parameters: `forward` is bound to the block."""
        replica = type(self.block)._replicate_for_data_parallel(self.block)
        fused = copy.copy(self)
        fused.block = replica
        replica.forward, replica._replicate_for_data_parallel = fused.forward, fused.replicate
        return replica

    def remove(self) -> None:
        """Gives the block its own forward back; where someone has wrapped ours meanwhile, ours passes calls on."""
        self.active = False
        self.block.__dict__.pop("_replicate_for_data_parallel", None)
        if fused_block(self.block) is not self:
            return
        del self.block.forward
        if self.before is not None:
            self.block.forward = self.before

    def why_not(self) -> str | None:
        """Why the block would run its own forward if it were called now; None when it would run fused."""
        return why_unsupported(self.block, self.layout) or self._why_not_now()

    def _why_not_now(self) -> str | None:
        # The class itself may change: fully_shard puts one of its own in front.
        if type(self.block).forward is not self.class_forward:
            return f"it is a {type(self.block).__name__} with another forward"
        return why_not_now(self.block, self.layout, self.inner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output of hidden states [B, N, C]; any further argument, as a mask, is for its own forward."""
        block: Any = self.block
        layout = self.layout
        more = any(value is not None and value is not False for value in (*args[1:], *kwargs.values()))
        fits = self.active and args and not more and not recompute.in_forward_ad() and not self._why_not_now()
        if not fits or mixed(block, layout, args[0]):
            return type(block).forward(block, *args, **kwargs)
        hidden_states = args[0]
        if getattr(block, "with_cp", False) and hidden_states.requires_grad:  # mmseg checkpoints inside the block
            return checkpoint(self.run, hidden_states, use_reentrant=False)
        inside = type(block).__call__ is nn.Module.__call__  # transformers 4.57 checkpoints in __call__, 5 in forward
        if getattr(block, "gradient_checkpointing", False) and block.training and inside:
            return block._gradient_checkpointing_func(self.run, hidden_states)
        return self.run(hidden_states)

    def run(self, hidden_states: Tensor) -> Tensor:
        """The block's output [B, N, C], on the fused ops."""
        with recompute.scope():
            return run_block(self.parts(), hidden_states, None, None)[0]

    def parts(self) -> BlockParts:
        """What the block computes with now."""
        block, layout = self.block, self.layout
        norm1, norm2 = (norm_of(part(block, name)) for name in layout.norms)
        assert norm1 is not None
        assert norm2 is not None
        attention = part(block, layout.attention)
        qkv = tuple(partial(linear_per_image, part(block, name)) for name in layout.qkv)
        q_norm, k_norm = (norm_of(part(block, name)) for name in layout.qk_norms)
        fused = getattr(attention, "fused_attn", False)  # timm's is SDPA, which is not given its `scale`
        scale = attention.head_dim**-0.5 if fused else getattr(attention, layout.scale, None)
        return BlockParts(
            norm1,
            partial(attention_output, AttentionParts(qkv, getattr(attention, layout.num_heads), q_norm, k_norm, scale)),
            self._branch_output(0, layout.proj),
            norm2,
            partial(fc1_gelu, part(block, layout.fc1)),
            self._branch_output(1, layout.fc2),
        )

    def _branch_output(self, branch_index: int, linear: str) -> BranchOutput:
        module, gamma = part(self.block, linear), gamma_of(self.block, self.layout.gamma(branch_index))
        row_scale = partial(self._row_scale, branch_index) if self._drops(branch_index) else None
        if gamma is None:
            return BranchOutput(partial(linear_per_image, module), None, row_scale)
        return linear_or_folded(module, gamma, False, row_scale)

    def _drops(self, branch_index: int) -> bool:
        """Whether DropPath drops images of the branch now."""
        if not self.layout.drop_paths:
            return False
        drop_path = part(self.block, self.layout.drop_paths[branch_index])
        return drop_path is not None and drop_path.training and bool(getattr(drop_path, "drop_prob", None))

    def _row_scale(self, branch_index: int, branch: Tensor) -> Tensor:
        """DropPath's factor of each image, [B] float32, from the same random numbers as the upstream's."""
        drop_path = part(self.block, self.layout.drop_paths[branch_index])
        rate = drop_path.drop_prob
        gamma = gamma_of(self.block, self.layout.gamma(branch_index))
        dtype = branch.dtype if gamma is None else torch.promote_types(branch.dtype, gamma.dtype)
        kept = torch.empty(branch.shape[0], 1, 1, dtype=dtype, device=branch.device)
        kept = kept.uniform_().add_(1 - rate).floor_() if keeps_by_rounding(drop_path) else kept.bernoulli_(1 - rate)
        kept = kept.flatten().float()
        return kept / (1 - rate) if getattr(drop_path, "scale_by_keep", True) and rate < 1 else kept


def fused_block(block: nn.Module) -> FusedBlock | None:
    """The FusedBlock whose forward `block` runs, if it is patched."""
    owner = getattr(block.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, FusedBlock) else None


class PatchHandle(contextlib.AbstractContextManager):
    """What `internvit.patch` did to a model: `print` shows it, `undo` takes it back, as the end of a `with` does.

    Attributes:
        fused: the names of the blocks that would run fused if they were called now.
        left: name -> why not, of the other blocks.
    """

    def __init__(self, model: nn.Module, blocks: dict[str, FusedBlock], refused: dict[str, str]) -> None:
        self._model = type(model).__name__
        self._blocks = blocks
        self._refused = refused

    @classmethod
    def of(cls, model: nn.Module) -> "PatchHandle":
        """The handle of a model that is patched: of a deep copy of one, or of one that was loaded.

        Raises:
            ValueError: it is not patched.
        """
        blocks = {name: fused for name, m in model.named_modules() if (fused := fused_block(m)) is not None}
        if not blocks:
            raise ValueError(f"model: expected a patched model, got a {type(model).__name__} that is not")
        return cls(model, blocks, {})

    @property
    def fused(self) -> list[str]:
        return [name for name, fused in self._blocks.items() if fused.active and fused.why_not() is None]

    @property
    def left(self) -> dict[str, str]:
        reasons = {name: "undone" if not fused.active else fused.why_not() for name, fused in self._blocks.items()}
        return {**{name: reason for name, reason in reasons.items() if reason is not None}, **self._refused}

    def undo(self) -> None:
        """Gives every block its own forward back; the model computes the bits it did before."""
        for fused in self._blocks.values():
            fused.remove()

    def __exit__(self, *exc_info: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        fused, left = set(self.fused), self.left
        lines = [f"internvit.patch of {self._model}: {len(fused)} of {len(fused) + len(left)} blocks fused"]
        names = [*self._blocks, *self._refused]
        outcomes = [
            (f"fused ({self._blocks[name].layout.name}): ", "") if name in fused else ("left: ", f": {left[name]}")
            for name in names
        ]
        for (verdict, reason), group in itertools.groupby(zip(outcomes, names, strict=True), key=lambda pair: pair[0]):
            blocks = [name for _, name in group]
            span = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
            lines.append(f"  {verdict}{span}{reason}")
        return "\n".join(lines)


def patch(model: nn.Module, *, verify: bool = False) -> PatchHandle:
    """Fuses the InternViT blocks found anywhere inside `model`, in place, on this instance alone.

    Known are OpenGVLab's remote code (and its copies in Skywork-R1V, Sa2VA and InternVL-U), transformers' InternVL,
    Qianfan-OCR, Intern-S1, DINOv2 (with registers or without) and RADIO, timm's VisionTransformer, facebookresearch's
    DINOv2 and OpenGVLab's mmseg backbone, alone or inside a larger model; `internvit.upstream.register_layout` adds
    a family. Parameters, keys, hooks on blocks and above, `train()`, `.to()`,
    copies, checkpointing, DDP and FSDP are as before. A block with a hook inside, an adapter, a replaced or quantised
    Linear, dropout in training, an attention mask or attention maps asked for runs its own forward, decided at each
    call and for that block alone.

    Args:
        model: any module. Patch before `fully_shard`, DDP or torch.compile.
        verify: runs every block on random hidden states before and after, in eval mode, against float64.

    Returns:
        A handle: `print(handle)` lists what is fused and what is left and why; `handle.undo()` takes it back; in a
        `with`, the model is patched inside.

    Raises:
        ValueError: nothing in the model can be fused (the message says why), or it is patched already.
        RuntimeError: `verify` found a block beyond 1e-5 relative in float32, or beyond 1.02 times the error of its own
            forward in 16 bit; the model is as it was.

    Example:
        >>> with internvit.patch(upstream_model) as handle:
        ...     features = upstream_model(pixels)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    blocks: dict[str, FusedBlock] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        if fused_block(module) is not None:
            raise ValueError(f"model: it is patched already, at {name or 'its root'}; PatchHandle.of(model).undo()")
        layout = layout_of(module)
        if layout is None:
            continue
        reason = why_unsupported(module, layout)
        if reason is None and not has_own_forward(module):
            reason = "its forward was replaced on the instance"
        if reason is None:
            blocks[name] = FusedBlock(module, layout)
        else:
            refused[name] = reason
    if not blocks:
        raise ValueError(f"model: expected an InternViT block that can be fused in it, {_nothing(model, refused)}")
    handle = PatchHandle(model, blocks, refused)
    for fused in blocks.values():
        fused.install()
    if verify:
        try:
            for name, fused in blocks.items():
                _verify(name, fused)
        except BaseException:
            handle.undo()
            raise
    return handle


def _nothing(model: nn.Module, refused: dict[str, str]) -> str:
    if refused:
        return "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
    if any(isinstance(module, InternViTLayer) for module in model.modules()):
        return "got an internvit model, which is fused as it is"
    return f"got none in {type(model).__name__}"


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in training.items():
            m.training = mode


@torch.no_grad()
def _verify(name: str, fused: FusedBlock) -> None:
    """Compares a block's own forward and the fused one on random hidden states [2, 17, C]."""
    block = fused.block
    if fused.why_not() is not None:
        return
    weight = part(block, fused.layout.norms[0]).weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 17, weight.shape[0], generator=generator).to(weight)
    with _evaluating(block):
        after = block.forward(x)
        before = type(block).forward(block, x)
        if x.dtype in (torch.float32, torch.float64):
            error, allowed, against = relative_error(after, before), 1e-5, "its own forward"
        else:
            exact = copy.deepcopy(block).double()
            fused_copy = fused_block(exact)
            assert fused_copy is not None
            fused_copy.remove()
            truth = exact.forward(x.double())
            error, allowed = relative_error(after, truth), 1.02 * relative_error(before, truth)
            against = "float64"
    if error > allowed:
        raise RuntimeError(
            f"patch: {name or 'the model'} is off by {error:.2e} relative to {against}, allowed {allowed:.2e}"
        )
