"""A model in a file for another runtime, written once that runtime's result is the model's."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvit.export.decompositions import LIBRARIES
from internvit.export.program import ExportedModel, check_shape, export_program
from internvit.export.targets import ONNX, TARGETS, Target
from internvit.files import staging
from internvit.images import MEAN, STD, open_photo, to_pixels
from internvit.model.vit import InternViT
from internvit.multimodal.connector import InternVLConnector
from internvit.numerics import relative_error


@dataclass(frozen=True)
class Export:
    """What `export_model` wrote.

    Attributes:
        paths: the files; the model first, the description of its input last.
        outputs: the names of its outputs.
        errors: for each size that was run, (height, width) -> the largest relative error of an output to PyTorch's.
    """

    paths: tuple[Path, ...]
    outputs: tuple[str, ...]
    errors: dict[tuple[int, int], float]


def export_model(
    model: InternViT,
    path: Path | str,
    to: str = "onnx",
    *,
    layers: Sequence[int] | None = None,
    connector: InternVLConnector | None = None,
    size: tuple[int, int] | str | None = None,
    batch: int | str = "dynamic",
    opset: int | None = None,
    precision: str | None = None,
    backend: str | None = None,
    images: Sequence[Tensor | Path | str] = (),
    overwrite: bool = False,
) -> Export:
    """Writes a model for another runtime, runs the file in it, and compares the results with PyTorch's.

    The file holds PyTorch's or the runtime's ops alone. Beside it, `PATH.json` describes the input: size, mean,
    standard deviation, outputs. Nothing is left behind where the results differ by more than 1e-4 in float32, 5e-3 in
    float16, 3e-2 in bfloat16 and 0.1 in int8.

    Args:
        model: in eval mode on the CPU, or for backend="cuda" on a GPU, in the dtype to export.
        path: the file to write: `.onnx`, `.xml` with the weights beside it in `.bin` (openvino), or `.pt2`.
        to: "onnx" (needs onnxscript and onnxruntime), "openvino" (openvino), "aoti" (a C++ compiler) or "pt2".
        layers, connector: what it computes; see `ExportedModel`.
        size: (height, width) in pixels, "dynamic" for any on the patch grid, or None for the native size.
        batch: a number of images, or "dynamic".
        opset: of ONNX, 18 by default; 23 and later hold its own Attention and RMSNormalization.
        precision: "int8" for Linears in int8, of a float32 model in ONNX.
        backend: "cpu" or "cuda" for an AOTInductor package that calls this library's kernels; a process without Python
            loads `internvit_cpu.so` or `internvit_cuda.so` before it. No GPU has run a package of "cuda" yet.
        images: files of photographs to compare on, or pixels [channels, height, width] of any size that the file
            takes; by default smooth random ones. A file that takes any size is run at two.
        overwrite: replaces files that exist.

    Raises:
        FileExistsError: a file exists and overwrite is False.
        FileNotFoundError: the folder of `path` is not there.
        ImportError: the runtime is not installed.
        ValueError: another argument than above, a dtype that the runtime does not compute in, or results that differ.
    """
    target = _target(to, opset, precision, backend)
    wrapped = ExportedModel(model, layers, connector)
    kind = to if precision is None else f"{to} in {precision}"
    device = "cuda" if backend == "cuda" else "cpu"
    if model.device.type != device:
        where = "the CPU" if device == "cpu" else "a CUDA device for backend='cuda'"
        raise ValueError(f"export: model must be on {where}, got {model.device}")
    if model.dtype not in target.dtypes:
        raise ValueError(f"export: {kind} takes {' or '.join(map(str, target.dtypes))} here, got {model.dtype}")
    height_width, number = _shape(wrapped, size, batch)
    path = Path(path)
    sidecar = _sidecar(path, target.suffix)
    _check_free((path, sidecar), overwrite)
    batches = _batches(wrapped, images, height_width, number)
    target.check_installed()
    program = export_program(wrapped, height_width, number, backend)
    description = _description(wrapped, height_width, number, precision, backend)
    metadata = {f"internvit.{key}": json.dumps(value) for key, value in description.items()}
    with staging(path.parent, path.name) as stage:
        staged = stage.path(path.name)
        target.write(program, staged, wrapped.output_names, metadata)
        errors = _compare(wrapped, target, staged, batches)
        stage.path(sidecar.name).write_text(json.dumps(description, indent=2) + "\n")
        names = sorted(file.name for file in staged.parent.iterdir())
        names = [*(name for name in names if name not in (path.name, sidecar.name)), path.name, sidecar.name]
        _check_free([path.with_name(name) for name in names], overwrite)
        stage.flush()
        stage.publish({name: name for name in names})
    written = (path, *(path.with_name(name) for name in names if name != path.name))
    return Export(written, wrapped.output_names, errors)


def _target(to: str, opset: int | None, precision: str | None, backend: str | None) -> Target:
    if to not in TARGETS:
        raise ValueError(f"export: to must be one of {', '.join(map(repr, TARGETS))}, got {to!r}")
    if opset is not None and to != "onnx":
        raise ValueError(f"export: opset={opset!r} is for onnx, got to={to!r}")
    if opset is not None and (not isinstance(opset, int) or opset < 18):
        raise ValueError(f"export: opset must be at least 18, got {opset!r}")
    if precision not in (None, "int8"):
        raise ValueError(f"export: precision must be 'int8' or None, got {precision!r}")
    if precision and to != "onnx":
        raise ValueError(f"export: precision='int8' is for onnx, got to={to!r}")
    if backend not in (None, *LIBRARIES):
        raise ValueError(f"export: backend must be 'cpu', 'cuda' or None, got {backend!r}")
    if backend and to != "aoti":
        raise ValueError(
            f"export: backend={backend!r} is for aoti, got to={to!r}: no other runtime has this library's ops"
        )
    return ONNX(opset or 18, precision == "int8") if to == "onnx" else TARGETS[to]


def _sidecar(path: Path, suffix: str) -> Path:
    if not path.name.endswith(suffix) or path.name == suffix:
        raise ValueError(f"export: path must end in {suffix}, got {path.name!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: there is no folder {path.parent}")
    return path.with_name(path.name + ".json")  # model.onnx and model.pt2 have a description each


def _check_free(files: Iterable[Path], overwrite: bool) -> None:
    for file in files:
        if (file.exists() or file.is_symlink()) and not overwrite:
            raise FileExistsError(f"{file} exists; give another name or allow overwriting")


def _shape(
    model: ExportedModel, size: tuple[int, int] | str | None, batch: int | str
) -> tuple[tuple[int, int] | None, int | None]:
    """(height, width) and the number of images; None where any will do."""
    if size is None:
        size = model.model.config.image_hw
    if size != "dynamic" and (isinstance(size, str) or len(size) != 2):
        raise ValueError(f"export: size must be (height, width) or 'dynamic', got {size!r}")
    if batch != "dynamic" and not isinstance(batch, int):
        raise ValueError(f"export: batch must be a number or 'dynamic', got {batch!r}")
    height_width = None if isinstance(size, str) else (size[0], size[1])
    number = None if isinstance(batch, str) else batch
    check_shape(model, height_width, number)
    return height_width, number


def _description(
    model: ExportedModel, size: tuple[int, int] | None, batch: int | None, precision: str | None, backend: str | None
) -> dict[str, Any]:
    """What one must know to feed the file, and where it comes from."""
    from internvit import __version__

    config = model.model.config
    return {
        "input": "pixel_values",
        "shape": [batch or "batch", config.num_channels, *(size or ("height", "width"))],
        "multiple": model.multiple,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "precision": precision,
        "backend": backend,
        "rescale": 1 / 255,
        "image_mean": MEAN,
        "image_std": STD,
        "resample": "bicubic",
        "outputs": list(model.output_names),
        "config": config.to_dict(),
        "version": __version__,
    }


def _batches(
    model: ExportedModel, images: Sequence[Tensor | Path | str], size: tuple[int, int] | None, batch: int | None
) -> list[Tensor]:
    """Pixels to compare on: of each image, and in a fixed batch of the image shifted; another size is an error."""
    sides = [size] if size else _two_sizes(model)
    pixels = []
    for image in images:
        if isinstance(image, Tensor):
            if image.dim() != 3 or (size is not None and tuple(image.shape[-2:]) != size):
                wanted = f"{size[0]}x{size[1]}" if size else "[channels, height, width]"
                raise ValueError(f"export: images must be {wanted}, got shape {tuple(image.shape)}")
            pixels.append(image)
        else:
            photo = open_photo(image)
            pixels += [to_pixels(photo, side) for side in sides]
    generator, channels = torch.Generator().manual_seed(0), model.model.config.num_channels
    for side in sides if not images else ():
        smooth = torch.randn(1, channels, 8, 8, generator=generator)
        pixels.append(torch.nn.functional.interpolate(smooth, side, mode="bicubic")[0])
    return [
        torch.stack([x.roll(16 * i, -1) for i in range(batch or 1)]).to(model.model.device, model.model.dtype)
        for x in pixels
    ]


def _two_sizes(model: ExportedModel) -> list[tuple[int, int]]:
    """The native size, or one near it that the connector takes, and one of another shape."""
    rows, columns = (max(2, side // model.multiple) for side in model.model.config.image_hw)
    grids = (rows, columns), (max(2, rows * 3 // 4), columns * 9 // 8)
    return [(model.multiple * height, model.multiple * width) for height, width in grids]


@torch.no_grad()
def _compare(
    model: ExportedModel, target: Target, path: Path, batches: Sequence[Tensor]
) -> dict[tuple[int, int], float]:
    errors: dict[tuple[int, int], float] = {}
    for pixels in batches:
        expected, actual = model(pixels), target.run(path, pixels)
        shapes = [list(t.shape) for t in expected], [list(t.shape) for t in actual]
        if shapes[0] != shapes[1]:
            raise ValueError(f"export: the file returns shapes {shapes[1]}, the model {shapes[0]}")
        worst = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        side = pixels.shape[-2], pixels.shape[-1]
        errors[side] = max(worst, errors.get(side, 0.0))
    worst, limit = max(errors.values()), target.limit(model.model.dtype)
    if not worst <= limit:
        raise ValueError(
            f"export: the file's results differ from PyTorch's by {worst:.1e}, more than {limit:.0e}; it is not written"
        )
    return errors
