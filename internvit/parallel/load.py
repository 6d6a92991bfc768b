"""Reading a checkpoint into a model that is spread over ranks: each reads what it stores, a few rows at a time."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from internvit.checkpoint.files import Checkpoint
from internvit.checkpoint.hub import locate
from internvit.checkpoint.state_dict import compare_shapes, infer_config, target_shapes
from internvit.config import InternViTConfig
from internvit.model.vit import InternViT
from internvit.parallel.parallelize import parallelize
from internvit.parallel.plan import Region
from internvit.parallel.shards import plan_of, shard

Model = TypeVar("Model", bound=nn.Module)

_PART = 4 * 2**20
"""Bytes that are read at once."""


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    mesh: DeviceMesh,
    *,
    config: InternViTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    prefix: str | None = None,
    **settings: Any,
) -> InternViT:
    """A tensor-parallel InternViT with a checkpoint's weights, in eval mode; each rank reads its own part.

    Rows of qkv and fc1 that belong to other ranks are not read. Of proj and fc2 a rank reads all rows, 4 MiB at a time,
    and keeps its columns. At its peak a rank holds its part and 4 MiB.

    Args:
        name_or_path: as for `InternViT.from_pretrained`; the file is read by every rank, so let one process fill a
            hub's cache first.
        mesh: as for `parallelize`.
        config: the architecture; by default that of `config.json`, or else of the weights.
        dtype: of the parameters; by default as stored.
        device: of the parameters; by default the mesh's current one.
        prefix: of the tower in the checkpoint, where it holds several.
        settings: rounding and residual_dtype, of `InternViT`.

    Raises:
        ValueError: as for `InternViT.from_pretrained` and `parallelize`.
        FileNotFoundError: no such checkpoint.
    """
    path = locate(name_or_path, prefix=prefix)
    with Checkpoint(path, prefix, with_config=config is None) as checkpoint:
        shapes = target_shapes(checkpoint.plan, checkpoint.shapes(checkpoint.plan.sources()))
        config = config or checkpoint.config or infer_config(shapes)
        if dtype is None:
            key = checkpoint.plan.targets["embeddings.class_embedding"][0].key
            dtype = checkpoint.file(checkpoint.keys[key]).dtype(key)
        model = parallelize(InternViT(config, device="meta", dtype=dtype, **settings), mesh)
        _fill(model, checkpoint, device)
    return model.eval()


def load_weights(
    model: Model, name_or_path: str | os.PathLike[str], *, device: torch.device | str | None = None
) -> Model:
    """Reads a checkpoint's weights into an InternViT, split by `parallelize`, wrapped by FSDP2, both or neither.

    Args:
        model: an `InternViT`; parameters on the meta device are allocated, the others overwritten.
        name_or_path: a folder or file of any layout, or a hub id.
        device: of parameters that are allocated; by default the mesh's current one.

    Raises:
        ValueError: weights that do not fit the model, or a checkpoint that is broken.
    """
    with Checkpoint(locate(name_or_path), with_config=False) as checkpoint:
        _fill(model, checkpoint, device)
    return model


def _fill(model: nn.Module, checkpoint: Checkpoint, device: torch.device | str | None) -> None:
    path, plan = checkpoint.path, checkpoint.plan
    shapes = target_shapes(plan, checkpoint.shapes(plan.sources()))
    config = getattr(model, "config", None)
    if not isinstance(config, InternViTConfig):
        raise ValueError(f"model: must be an InternViT, got {type(model).__name__}")
    compare_shapes(shapes, config, plan.unexpected, source=str(path))
    _allocate(model, device)
    split_plan = plan_of(model)
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            part = shard(name, parameter, split_plan)
            for region in part.regions:
                _read(checkpoint, name, region, part.local[region.local_index])
    for file_name in dict.fromkeys(checkpoint.keys[key] for key in plan.sources()):
        checkpoint.file(file_name).unmap()
        checkpoint.file(file_name).check_unchanged()


def _allocate(model: nn.Module, device: torch.device | str | None) -> None:
    """Memory for parameters on the meta device; padding is zero."""
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    model.to_empty(device=device or (meshes[0].device_type if meshes else torch.get_default_device()))
    with torch.no_grad():
        for parameter in model.parameters():
            (parameter.to_local() if isinstance(parameter, DTensor) else parameter).zero_()


def _read(checkpoint: Checkpoint, name: str, region: Region, target: Tensor) -> None:
    """Reads a region of a parameter: its rows a few at a time, of which the columns are kept."""
    pieces = checkpoint.plan.targets[name]
    rows_each = checkpoint.file(checkpoint.keys[pieces[0].key]).shapes[pieces[0].key][0]
    columns = region.source[1:]
    row, end = region.offsets[0], region.offsets[0] + region.sizes[0]
    while row < end:
        index, first = divmod(row, rows_each)
        key = pieces[index].key
        file = checkpoint.file(checkpoint.keys[key])
        row_bytes = max(1, torch.Size(file.shapes[key][1:]).numel() * file.dtype(key).itemsize)
        count = min(end - row, rows_each - first, max(1, _PART // row_bytes))
        part = file.read(key, first, first + count)
        start = row - region.offsets[0]
        target[start : start + count].copy_(part[(slice(None), *columns)])
        row += count


def checkpoint_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder)
    if not (path / ".metadata").exists():
        raise ValueError(f"{path}: expected a checkpoint of torch.distributed.checkpoint, which has a file .metadata")
    return path
