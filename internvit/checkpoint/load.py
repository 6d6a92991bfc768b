"""Reading InternViT checkpoints: streamed and strict.

Find the files -> plan the conversion from their keys -> compare every shape -> only then allocate and copy, a few rows
at a time. Files of torch.save are mapped; mapped pages count as the process's memory until the mapping goes, so a file
is mapped anew after each sixteenth of the checkpoint.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from internvit.checkpoint.files import CONFIG, Checkpoint, TensorFile, naming
from internvit.checkpoint.hub import locate
from internvit.checkpoint.quantized import check_scale, read_scales
from internvit.checkpoint.resample import resize_embeddings
from internvit.checkpoint.state_dict import Piece, compare_shapes, infer_config, target_shapes
from internvit.config import InternViTConfig
from internvit.names import SCALES, listed

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

# Bytes that are read at once: few enough to stay in a cache on their way to the parameter.
_PART = 4 * 2**20
_Shapes = Mapping[str, tuple[int, ...]]
_Device = torch.device | str | int | None


def load_pretrained(
    model_class: type[Model],
    name_or_path: str | os.PathLike[str],
    *,
    config: InternViTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: _Device = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strict: bool = True,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    patch_resampling: str = "bicubic",
    prefix: str | None = None,
) -> Model:
    """A model with the weights of a checkpoint, in eval mode, in OpenGVLab's, transformers', timm's or mmseg's layout.

    Args:
        model_class: called with a configuration; its parameters have OpenGVLab's names.
        name_or_path: a folder, a `.safetensors`, `.pth` or `.bin` file, a name of `internvit.config.HUB_IDS`, or a
            hub id. Of a whole InternVL only the vision tower is read.
        config: the architecture; by default that of `config.json` beside the weights, or else `infer_config`'s.
        dtype: of the parameters, of 16 to 64 bits; by default as stored. Weights that are not finite in it are
            loaded, and a warning names the first.
        device: of the parameters; by default PyTorch's default device.
        revision, cache_dir, token, local_files_only: of the hub.
        strict: missing and unexpected keys are an error; otherwise they are logged, and what is missing keeps the
            model's own initial values. Wrong shapes are an error always.
        image_size: native (height, width) to resize the position embedding to; by default the checkpoint's.
        patch_size: to resample the patch embedding to, such as 16; without image_size the grid stays (448 -> 512).
        patch_resampling: "bicubic" (OpenGVLab's) or "pi" (timm's); see `resample.resample_patch_embedding`.
        prefix: before the tower's names, such as "vision_model.", where the checkpoint holds several.

    Raises:
        ValueError: a broken file, pickled objects, several towers and no prefix, weights that do not fit the
            configuration (the message lists them), float8 or other quantised weights but int8 ones as
            `OptimizedInternViT.save_pretrained` writes them, which become floating point.
        FileNotFoundError: no such checkpoint, or one of its files is missing.
        OSError: the hub cannot be reached, or has no such repository.
        ImportError: a hub id without huggingface_hub.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"dtype: expected a floating-point torch.dtype of 16 to 64 bits or None, got {dtype!r}")
    path = locate(name_or_path, revision, cache_dir, token, local_files_only, prefix)
    with Checkpoint(path, prefix, with_config=config is None) as checkpoint:
        model = _load(model_class, checkpoint, config or checkpoint.config, dtype, device, strict)
    if image_size is not None or patch_size is not None:
        resize_embeddings(model, image_size, patch_size, patch_resampling)
    return model.eval()


def _load(
    model_class: type[Model],
    checkpoint: Checkpoint,
    config: InternViTConfig | None,
    dtype: torch.dtype | None,
    device: _Device,
    strict: bool,
) -> Model:
    path, plan = checkpoint.path, checkpoint.plan
    scales = read_scales(path, checkpoint.folder / CONFIG, plan.unexpected, plan.sources())
    unexpected = [key for key in plan.unexpected if key not in scales.values()]
    unread = [key for key in unexpected if SCALES.fullmatch(key)]
    if unread:
        raise ValueError(f"{path}: expected plain weights, got quantised ones with their scales: {listed(unread)}")
    sources = checkpoint.shapes(plan.sources())
    with naming(path):
        shapes = target_shapes(plan, sources)
        if config is None:
            config = infer_config(shapes)
            head_dim = config.head_dim
            logger.warning("%s: no config.json; from the weights, with head_dim=%d: %s", path, head_dim, config)
    plan.log_set_aside(str(path))
    compare_shapes(shapes, config, unexpected, source=str(path), strict=strict)
    with torch.device("meta"):
        model = model_class(config)
    expected = [name for name, _ in model.named_parameters()]
    if any(name not in shapes for name in expected):
        model = model_class(config)  # its own initial values
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name not in shapes}
    where = torch.get_default_device() if device is None else device
    parameters = {name: tensor.to(device=where, dtype=dtype) for name, tensor in parameters.items()}
    wanted = {name: shapes[name] for name in expected if name in shapes}
    parameters.update(_read_parameters(checkpoint, wanted, scales, dtype, device))
    model.load_state_dict(parameters, assign=True)
    return model


class _Copy(NamedTuple):
    """One stored tensor and the parameter that it belongs to."""

    file: TensorFile
    piece: Piece
    name: str  # of the parameter
    position: int  # of the piece in it
    scale: Tensor | None = None  # [rows, 1] float32, of int8 values
    dtype: torch.dtype | None = None  # what the checkpoint's weights are in that are not int8

    def stored(self) -> torch.dtype:
        return self.file.dtype(self.piece.key) if self.scale is None or self.dtype is None else self.dtype


def _copies(checkpoint: Checkpoint, shapes: _Shapes, scales: Mapping[str, str]) -> Iterator[_Copy]:
    """Every stored tensor that a parameter is made of, and of int8 ones the scales."""
    plan = checkpoint.plan
    plain = {checkpoint.file(checkpoint.keys[key]).dtype(key) for key in plan.sources() if key not in scales}
    wide = [dtype for dtype in plain if dtype.is_floating_point and dtype.itemsize > 1]
    dtype = min(wide, key=lambda dtype: dtype.itemsize, default=torch.float32)
    for name in shapes:
        for index, piece in enumerate(plan.targets[name]):
            key, scale_key = piece.key, scales.get(piece.key)
            copy = _Copy(checkpoint.file(checkpoint.keys[key]), piece, name, index)
            if scale_key is not None:
                file, stored = checkpoint.file(checkpoint.keys[scale_key]), copy.stored()
                if stored != torch.int8:
                    raise ValueError(f"{copy.file.path}: expected {key} in int8, as it has a scale, got {stored}")
                scale = check_scale(file.path, scale_key, file.read(scale_key), copy.file.shapes[key][0])
                copy = copy._replace(scale=scale, dtype=dtype)
            yield copy


def _read_parameters(
    checkpoint: Checkpoint,
    shapes: _Shapes,
    scales: Mapping[str, str],
    dtype: torch.dtype | None,
    device: _Device,
) -> dict[str, Tensor]:
    """Copies parameters of these shapes out of the files, file by file in the order of the keys."""
    copies = list(_copies(checkpoint, shapes, scales))
    copies.sort(key=lambda copy: str(copy.file.path))
    files = dict.fromkeys(copy.file for copy in copies)
    # How many bytes of a file may be mapped and touched at once: a sixteenth of the checkpoint, 16 to 256 MiB.
    window = min(max(sum(file.nbytes for file in files) // 16, 16 * 2**20), 256 * 2**20)
    parameters: dict[str, Tensor] = {}
    odd: list[str] = []
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    with _progress(total, f"Loading {checkpoint.path.name}") as advance:
        for file in files:
            mapped = 0
            for copy in (copy for copy in copies if copy.file is file):
                parameter = _allocate(parameters, copy, shapes[copy.name], dtype, device)
                mapped, problem = _copy(copy, parameter, window, mapped, advance)
                odd += [problem] if problem else []
            file.unmap()
            file.check_unchanged()
    if odd:
        logger.warning("%s: %s (%d of %d tensors are not finite)", checkpoint.path, odd[0], len(odd), len(copies))
    return parameters


def _allocate(
    parameters: dict[str, Tensor], copy: _Copy, shape: tuple[int, ...], dtype: torch.dtype | None, device: _Device
) -> Tensor:
    """The parameter that a stored tensor goes to, made at its first piece."""
    stored, place = copy.stored(), f"{copy.file.path}: expected {copy.piece.key} in"
    if not stored.is_floating_point:
        raise ValueError(f"{place} floating point, got {stored}")
    if stored.itemsize == 1 and dtype is None:
        raise ValueError(f"{place} floating point of 16 to 64 bits, got {stored}; pass dtype to convert it")
    if copy.name not in parameters:
        parameters[copy.name] = torch.empty(shape, dtype=dtype or stored, device=device)
    elif dtype is None and parameters[copy.name].dtype != stored:
        raise ValueError(f"{place} {parameters[copy.name].dtype}, got {stored}")
    return parameters[copy.name]


def _copy(copy: _Copy, parameter: Tensor, window: int, mapped: int, advance: Any) -> tuple[int, str | None]:
    """Copies one stored tensor, a part at a time.

    Returns:
        How many bytes of the file are mapped now, and what is not finite.
    """
    key = copy.piece.key
    shape = copy.file.shapes[key]
    rows, numel = shape[0], torch.Size(shape).numel()
    problem = None
    if parameter.is_meta:
        advance(numel)
        return mapped, None
    step = max(1, _PART // max(1, numel // max(1, rows) * copy.file.dtype(key).itemsize))
    for start in range(0, rows, step):
        part = copy.file.read(key, start, start + step)
        if copy.scale is not None:
            part = part.float() * copy.scale[start : start + step]
        offset = copy.position * rows + start
        parameter[offset : offset + len(part)].copy_(part)
        problem = problem or _not_finite(key, part, parameter.dtype)
        mapped += part.nbytes
        advance(part.numel())
        del part
        if mapped >= window:
            copy.file.unmap()
            mapped = 0
    return mapped, problem


def _not_finite(key: str, stored: Tensor, dtype: torch.dtype) -> str | None:
    """What the log says of a tensor with NaN, infinity, or values that `dtype` does not hold."""
    if not stored.numel():
        return None
    bounds = torch.stack((stored if stored.itemsize > 1 else stored.float()).aminmax())  # NaN if there is one
    if bounds.isfinite().all():
        if bounds.to(dtype).isfinite().all():
            return None
        return f"{key} holds {bounds.abs().max().item():g}, which overflows {dtype}"
    return f"{key} holds {'NaN' if bounds.isnan().any() else 'infinity'}"


@contextmanager
def _progress(total: int, title: str) -> Iterator[Any]:
    """A bar on a terminal for what takes over three seconds, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, desc=title, unit=" parameters", unit_scale=True, delay=3, disable=None) as bar:
        yield bar.update
