"""What an InternViT returns."""

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree


class InternViTOutput(NamedTuple):
    """Features of a batch of B images with N = 1 + patches tokens; token 0 is the class token.

    Attributes:
        last_hidden_state: [B, N, C], after the last block (InternViT has no final norm).
        pooler_output: [B, C], the class token of last_hidden_state.
        hidden_states: L + 1 tensors [B, N, C], the embeddings and the output of each block; None unless asked for.
        attentions: L tensors [B, H, N, N], softmax probabilities; None unless asked for.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None

    def to_tuple(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """The fields that were asked for, as `return_dict=False` gives them."""
        return tuple(field for field in self if field is not None)


# torch.export.save writes the output's type by this name.
_pytree._register_namedtuple(InternViTOutput, serialized_type_name="internvit.output.InternViTOutput")
