"""What an InternViT returns."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree


class InternViTOutput(NamedTuple):
    """Features of a batch of B images with N = 1 + patches tokens; token 0 is the class token.

    Attributes:
        last_hidden_state: [B, N, C], after the last block (InternViT has no final norm).
        pooler_output: [B, C], the class token of last_hidden_state.
        hidden_states: L + 1 tensors [B, N, C], the embeddings and the output of each block; None unless asked for.
        attentions: L tensors [B, H, N, N], softmax probabilities, or [B, H, N], those of the class token, or the sums
            over the columns; None unless asked for.

    Of a list of images, last_hidden_state and each of hidden_states are `PackedTokens`, a sequence of one tensor
    [N_i, C] an image, and each of attentions is a list of [H, N_i, N_i].

    Fields are also had by name, as from transformers' outputs: `out["last_hidden_state"]`, `out.get("hidden_states")`,
    `out.keys()`, `**out`.
    """

    last_hidden_state: Any
    pooler_output: Tensor
    hidden_states: tuple[Any, ...] | None = None
    attentions: tuple[Any, ...] | None = None

    def __getitem__(self, key: Any) -> Any:
        """A field by its name or number."""
        if isinstance(key, str):
            if key not in self._fields:
                raise KeyError(f"{key!r}: expected one of {', '.join(self._fields)}")
            return getattr(self, key)
        return tuple.__getitem__(self, key)

    def __contains__(self, key: object) -> bool:
        """Whether the field of that name was asked for."""
        return isinstance(key, str) and getattr(self, key, None) is not None and key in self._fields

    def keys(self) -> tuple[str, ...]:
        """The names of the fields that were asked for."""
        return tuple(name for name in self._fields if getattr(self, name) is not None)

    def values(self) -> tuple[Any, ...]:
        return self.to_tuple()

    def items(self) -> tuple[tuple[str, Any], ...]:
        return tuple(zip(self.keys(), self.values(), strict=True))

    def get(self, key: str, default: Any = None) -> Any:
        """The field of that name, `default` where it was not asked for."""
        return dict(self.items()).get(key, default)

    def to_tuple(self) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        """The fields that were asked for, as `return_dict=False` gives them."""
        return tuple(field for field in self if field is not None)


# torch.export.save writes the output's type by this name.
_pytree._register_namedtuple(InternViTOutput, serialized_type_name="internvit.output.InternViTOutput")


def attention_kind(output_attentions: Any) -> str | None:
    """What is asked for of each block's attention: "maps", "class", the class token's rows of them, "columns", the sums
    over their columns, or None.

    Raises:
        ValueError: neither a truth value nor "class" or "columns".
    """
    if isinstance(output_attentions, str):
        if output_attentions not in ("class", "columns"):
            raise ValueError(
                f"output_attentions: expected False, True, 'class' or 'columns', got {output_attentions!r}"
            )
        return output_attentions
    return "maps" if output_attentions else None
