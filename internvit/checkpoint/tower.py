"""Which keys of a state dict belong to its InternViT.

A tower is known by its structure: a class token, a position embedding, a patch embedding and at least one whole block
under one prefix, in one layout. The number of names alone would mislead: SAM 2's trunk has more of timm's names than a
300M has of its own, and CLIP's embeddings are called as OpenGVLab's are.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from internvit.names import (
    ADAPTERS,
    EXTRAS,
    PARAMETERS,
    TOWER_BLOCK,
    TOWER_EMBEDDINGS,
    Match,
    clean,
    listed,
    match,
)

logger = logging.getLogger(__name__)

_QIANFAN_OCR = re.compile(r"(|.*\.)layers\.\d+\.layernorm_before\.weight")
_Group = tuple[str, str]  # column of the table, prefix


@dataclass(frozen=True)
class Tower:
    """The keys of a state dict, sorted by whether they are the InternViT's.

    Attributes:
        layout: one of `internvit.names.LAYOUTS`.
        prefix: before the tower's names, with its final dot.
        parameters: the tower's keys and what they mean.
        set_aside: keys known not to belong to it.
        unexpected: keys under its prefix that no InternViT has.
    """

    layout: str
    prefix: str
    parameters: dict[str, Match]
    set_aside: tuple[str, ...]
    unexpected: tuple[str, ...]


def find_tower(keys: Iterable[str], prefix: str | None = None) -> Tower:
    """The InternViT among the keys.

    Args:
        keys: of a state dict.
        prefix: which tower is meant, where there are several.

    Raises:
        ValueError: none, none of that prefix, or several and no prefix; the message lists them.
    """
    matches = {key: match(name) for key, name in _respelled(keys).items()}
    groups: dict[_Group, set[tuple[str, str]]] = defaultdict(set)
    for meaning in matches.values():
        if meaning:
            groups[meaning.name.layout, meaning.prefix].add((meaning.name.canonical, meaning.layer))
    if not groups:
        raise ValueError(_no_tower_message(list(matches)))
    towers = [group for group, held in groups.items() if _is_tower(held)]
    column, prefix = _choose(matches, groups, towers, prefix)
    others = [other for _, other in towers if other != prefix and other.startswith(prefix)]
    parameters, set_aside, unexpected = _sort(matches, column, prefix, others)
    layout = "mmseg" if column == "timm" and _is_mmseg(matches, prefix) else column
    return Tower(layout, prefix, parameters, tuple(set_aside), tuple(unexpected))


def _respelled(keys: Iterable[str]) -> dict[str, str]:
    """Each key in the spelling of the table: transformers' Qianfan-OCR has InternVL's names without `encoder.layer`."""
    names = {key: key for key in keys}
    blocks = {found[1] for found in map(_QIANFAN_OCR.match, names) if found}
    for before in blocks:
        inside = f"{before}layers."
        names.update({k: f"{before}encoder.layer.{k.removeprefix(inside)}" for k in names if k.startswith(inside)})
    return names


def _is_tower(held: set[tuple[str, str]]) -> bool:
    canonical = Counter(name for name, _ in held)
    if any(name not in canonical for name in TOWER_EMBEDDINGS):
        return False
    layers = {layer for _, layer in held if layer}
    return any(all((name, layer) in held for name in TOWER_BLOCK) for layer in layers)


def _choose(
    matches: Mapping[str, Match | None],
    groups: Mapping[_Group, set[tuple[str, str]]],
    towers: Sequence[_Group],
    prefix: str | None,
) -> _Group:
    if prefix is not None:
        wanted = clean(prefix.rstrip("."))
        same = [group for group in groups if clean(group[1].rstrip(".")) == wanted]
        same = [group for group in same if group in towers] or same
        if not same:
            described = _described(groups, towers) if towers else listed(repr(group[1]) for group in groups)
            raise ValueError(f"prefix: expected that of an InternViT, got {prefix!r}; there is {described}")
        return max(same, key=lambda group: len(groups[group]))
    if len(towers) > 1:
        # DINOv2 has timm's names and a final norm: what has parameters of its own is another network.
        others = {group: [other for _, other in towers if other != group[1]] for group in towers}
        exact = [group for group in towers if not _sort(matches, *group, others[group])[2]]
        if len(exact) == 1:
            rest = [group for group in towers if group not in exact]
            logger.info("state dict: read %s, not %s", _described(groups, exact), _described(groups, rest))
            return exact[0]
        raise ValueError(f"state dict: expected one InternViT, got {len(towers)}: {_described(groups, towers)}; "
                         f"pass the prefix of the one that is meant")  # fmt: skip
    if towers:
        return towers[0]
    # A part of a tower: a shard, or what has lost some parameters.
    class_tokens = [key for key, meaning in matches.items() if meaning and meaning.name.canonical == PARAMETERS[0][0]]
    if len(class_tokens) > 1:
        raise ValueError(f"state dict: expected one InternViT, got {len(class_tokens)}: {listed(class_tokens)}")
    votes = Counter((meaning.name.layout, meaning.prefix) for meaning in matches.values() if meaning)
    return votes.most_common(1)[0][0]


def _described(groups: Mapping[_Group, set[tuple[str, str]]], towers: Iterable[_Group]) -> str:
    return listed(
        f"prefix={prefix!r} ({column}'s names, {len({layer for _, layer in groups[column, prefix] if layer})} blocks)"
        for column, prefix in towers
    )


def _sort(
    matches: Mapping[str, Match | None], column: str, prefix: str, others: Sequence[str]
) -> tuple[dict[str, Match], list[str], list[str]]:
    """The keys that are the tower's, that are known not to be, and that are under its prefix and unknown."""
    parameters: dict[str, Match] = {}
    set_aside: list[str] = []
    unexpected: list[str] = []
    inner = tuple(other for other in others if other.startswith(prefix))
    for key, meaning in matches.items():
        if meaning and (meaning.name.layout, meaning.prefix) == (column, prefix):
            parameters[key] = meaning
            continue
        name = clean(key.removeprefix(prefix))
        # A batch norm before the classifier; a final norm over the tokens would change the features.
        head_norm = name.startswith("norm.") and f"{prefix}norm.running_mean" in matches
        of_another = not key.startswith(prefix) or bool(inner and key.startswith(inner))
        known = of_another or head_norm or EXTRAS.fullmatch(name)
        (set_aside if known else unexpected).append(key)
    return parameters, set_aside, unexpected


def _is_mmseg(matches: Mapping[str, Match | None], prefix: str) -> bool:
    """Whether timm's names are those of an mmseg backbone: QK-norm, or a backbone's other parts beside them."""
    if prefix.endswith("backbone."):
        return True
    if any(meaning and meaning.prefix == prefix and meaning.name.canonical.endswith("q_norm.weight")
           for meaning in matches.values()):  # fmt: skip
        return True
    beside = tuple(f"{prefix}{part}." for part in ("up1", "up2", "up3", "up4", "decode_head", "auxiliary_head",
                                                   "roi_head", "rpn_head", "neck"))  # fmt: skip
    return any(key.startswith(beside) for key in matches)


def _no_tower_message(keys: Sequence[str]) -> str:
    adapters = [key for key in keys if ADAPTERS.search(key)]
    if adapters:
        return adapter_message(adapters)
    return (
        f"state dict: expected the keys of an InternViT as OpenGVLab, transformers, timm or mmseg name them, "
        f"got {listed(keys) or 'no keys'}"
    )


def adapter_message(keys: Sequence[str]) -> str:
    return (
        f"state dict: expected plain weights, got those of an adapter beside them: {listed(keys)}; "
        f"merge it first (PEFT: model.merge_and_unload())"
    )
