"""`Embedder`: features of batches of images, for engines that call a class on batches, and for a plain loop."""

import copy
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from internvit.data.digest import tensors_digest
from internvit.data.finite import not_finite
from internvit.data.pooling import POOLINGS, pool, pooled_shape
from internvit.data.preprocess import MAX_PATCHES, Preprocessor
from internvit.images import normalize, printable
from internvit.inference.optimize import optimize_for_inference
from internvit.model.feature_maps import take_indices
from internvit.model.vit import InternViT
from internvit.multimodal.connector import InternVLConnector, state_index
from internvit.multimodal.flash_connector import InternVLFlashConnector
from internvit.multimodal.load import load_connector

if TYPE_CHECKING:
    from internvit.config import InternViTConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OUT_DTYPES = ("float32", "float16")
_COLUMNS = ("image", "bytes", "path", "img", "jpg", "jpeg", "png", "webp")
_Features = dict[str, np.ndarray]


class Embedder:
    """Adds an InternViT's features to batches of images; constructed once in a worker, then called.

    A batch is a dict of columns, as `ray.data.Dataset.map_batches`, Daft's and NeMo Curator's class UDFs pass it. The
    images are encoded bytes, paths or URLs, Hugging Face's {"bytes", "path"}, or 8-bit pixels. An image's features have
    the bits of `optimize_for_inference(model)` on `load_pixels(path, size)`.

    Bytes an image in float16 (float32: twice as many), for the 300M at 448 x 448, C = 1024, and the 6B, C = 3200:

        pooling        shape                  300M       6B
        class, mean    [C]                    2.0 KB     6.4 KB
        connector      [256, 4096]            2.1 MB     2.1 MB     (of a language model 4096 wide)
        tokens         [1025, C]              2.1 MB     6.6 MB
        map            [C, 32, 32]            2.1 MB     6.6 MB     for each of `layers`

    Args:
        name_or_path: a checkpoint as `InternViT.from_pretrained` takes it, or an `InternViT` in eval mode.
        dtype: of the weights: "float32" (the default), "bfloat16" or "float16".
        precision, skip, pack: of the Linears, as in `optimize_for_inference`.
        size: (height, width) or side in pixels; None for the model's native size; "image" for each image's own, rounded
            to whole patches and scaled down to `preprocess.MAX_PATCHES`.
        layers: blocks whose output is pooled, 0 the first, into the columns "features_7", ...; None for the last hidden
            state, or the one that the connector's `select_layer` names, into "features".
        pooling: "class", "mean" (of the patches), "tokens", "map", or "connector" (pixel shuffle and InternVL's MLP).
        connector: an `InternVLConnector`, which is copied, or the checkpoint of a whole InternVL to take it from. The
            router of an InternVL3.5-Flash decides about each image's tiles; features are all their tokens,
            [T, llm_hidden_size].
        tiles: cut images into at most so many tiles of `size`, and a thumbnail; features are then [tiles, ...].
        device: "cuda" if there is one, by default, else "cpu".
        batch: images or tiles in a forward pass; batches hold images of one size.
        column: of the images; by default image, bytes, path, img, jpg, jpeg, png or webp, whichever comes first.
        out_dtype: of the features, "float32" or "float16". An image with an infinite feature or NaN fails, by the range
            of this dtype or of `dtype`.
        strict: an image that fails raises; otherwise its features are null and "error" says why.
        arrow: features as pyarrow arrays, fixed-size lists with nulls, as Parquet keeps them; otherwise numpy, where a
            failed image has NaN, or nothing [0, ...] if shapes vary.
        prefix, config, revision, token: as in `InternViT.from_pretrained`.

    dtype, device and the last four say how to load: they do not go with an `InternViT`.

    Raises:
        ValueError: a setting out of these, a size off the patch grid, or a checkpoint that cannot be read.

    Example:
        >>> embed = internvit.data.Embedder("OpenGVLab/InternViT-300M-448px-V2_5", size=56)
        >>> batch = embed({"image": [torch.zeros(60, 80, 3, dtype=torch.uint8).numpy()]})
        >>> batch["features"].shape, batch["error"]  # ((1, 1024), [None])
    """

    def __init__(
        self,
        name_or_path: "str | os.PathLike[str] | InternViT",
        *,
        dtype: str | None = None,
        precision: str | None = None,
        skip: Sequence[str] | None = None,
        size: int | tuple[int, int] | str | None = None,
        layers: Sequence[int] | None = None,
        pooling: str = "class",
        connector: "InternVLConnector | InternVLFlashConnector | str | os.PathLike[str] | None" = None,
        tiles: int = 0,
        device: str | None = None,
        pack: bool = True,
        batch: int = 32,
        column: str | None = None,
        out_dtype: str = "float32",
        strict: bool = False,
        arrow: bool = False,
        prefix: str | None = None,
        config: "InternViTConfig | None" = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        _choice("dtype", dtype, (None, *_DTYPES))
        _choice("out_dtype", out_dtype, _OUT_DTYPES)
        _choice("pooling", pooling, POOLINGS)
        if batch < 1 or tiles < 0:
            raise ValueError(f"batch, tiles: expected at least 1 and 0, got {batch} and {tiles}")
        if (pooling == "connector") != (connector is not None):
            raise ValueError(f"connector: goes with pooling='connector', got {connector!r} and pooling={pooling!r}")
        loading: dict[str, Any] = dict(prefix=prefix, config=config, revision=revision, token=token)
        if isinstance(name_or_path, InternViT):
            _refuse_loading({"dtype": dtype, "device": device, **loading}, name_or_path)
            network = name_or_path
            self.source = network.config.name or "an InternViT"
        else:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            loading |= {"dtype": _DTYPES[dtype or "float32"], "device": device}
            network = InternViT.from_pretrained(name_or_path, **loading)
            self.source = os.fspath(name_or_path)
        self.config = network.config
        self.model = optimize_for_inference(network, pack=pack, precision=precision, skip=skip)
        self.layers = None if layers is None else take_indices(self.config.num_hidden_layers, layers)
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers: expected numbers of blocks, each once, got {tuple(layers or ())}")
        self.pooling, self.batch, self.column, self.strict, self.arrow = pooling, batch, column, strict, arrow
        self.out_dtype = out_dtype
        if isinstance(connector, InternVLConnector | InternVLFlashConnector):
            connector = copy.deepcopy(connector)  # `to` and `eval` change a module in place
        elif connector is not None:
            connector = load_connector(connector)
        self.connector = None if connector is None else connector.to(self.model.device, self.model.dtype).eval()
        self._states = self._hidden_states()
        # A router compares the tiles of an image, which may come from several batches.
        self._router = self.connector if isinstance(self.connector, InternVLFlashConnector) else None
        self._connector = self.connector if isinstance(self.connector, InternVLConnector) else None
        multiple = self._patches_together()
        self.preprocess = Preprocessor(self.config.patch_size, self._size(size, tiles, multiple), tiles, multiple)

    def _hidden_states(self) -> tuple[int, ...] | None:
        """Which hidden states the columns are of, 0 the embeddings; None for the last alone."""
        if self.layers is not None:
            return tuple(1 + layer for layer in self.layers)
        if self.connector is None or self.connector.select_layer == -1:
            return None
        return (state_index(self.connector.select_layer, self.config.num_hidden_layers),)

    def _patches_together(self) -> int:
        """Height and width of the patches that a connector makes one token of."""
        if self.connector is None:
            return 1
        side = round(1 / self.connector.downsample_ratio)
        return side if self._router is None else side**2  # which may take the smaller number of tokens

    def _size(self, size: int | tuple[int, int] | str | None, tiles: int, multiple: int) -> tuple[int, int] | None:
        if size == "image" and not tiles:
            return None
        pair: Any = self.config.image_hw if size is None else (size, size) if isinstance(size, int) else size
        patch = self.config.patch_size
        if not (len(pair) == 2 and all(isinstance(side, int) and side > 0 and side % patch == 0 for side in pair)):
            raise ValueError(
                f"size: expected (height, width) in multiples of {patch} pixels, None{'' if tiles else ' or image'}, "
                f"got {size!r}"
            )
        if any(side // patch % multiple for side in pair):
            raise ValueError(
                f"size: expected multiples of {multiple * patch} pixels, of which the connector makes a token, got "
                f"{pair[0]}x{pair[1]}"
            )
        if tiles and pair[0] != pair[1]:
            raise ValueError(f"size: tiles are squares, got {pair[0]}x{pair[1]}")
        return pair[0], pair[1]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the feature columns."""
        return ("features",) if self.layers is None else tuple(f"features_{layer}" for layer in self.layers)

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape of an image's features in each column; None where it varies from image to image."""
        size, patch = self.preprocess.size, self.config.patch_size
        grid = (None, None) if size is None else (size[0] // patch, size[1] // patch)
        if self._router is not None:
            return (None, self._router.get_parameter("mlp1.3.weight").shape[0])
        tiled = (None,) if self.preprocess.tiles else ()
        return tiled + pooled_shape(self.pooling, self.config, grid, self._connector)

    @property
    def max_features(self) -> int:
        """How many numbers an image has in each column, at most."""
        size, patch = self.preprocess.size, self.config.patch_size
        patches = MAX_PATCHES if size is None else size[0] * size[1] // patch**2
        shape = pooled_shape("tokens" if self._router else self.pooling, self.config, (1, patches), self._connector)
        return math.prod(filter(None, shape)) * (self.preprocess.tiles + 1 if self.preprocess.tiles else 1)

    def settings(self) -> dict[str, str]:
        """Everything that features depend on but the images; weights by a digest of their bits."""
        from internvit import __version__

        size = self.preprocess.size
        connector = None if self.connector is None else tensors_digest(self.connector.state_dict().items())
        network = self.model.model
        return {
            "internvit": __version__,
            "weights_digest": tensors_digest(network.state_dict().items()),
            "dtype": str(network.dtype).removeprefix("torch."),
            "precision": self.model.settings,  # as computed: without int8's instructions Linears stay bfloat16
            "device": network.device.type,
            "size": "image" if size is None else f"{size[0]}x{size[1]}",
            "tiles": str(self.preprocess.tiles),
            "layers": "last" if self.layers is None else ",".join(map(str, self.layers)),
            "pooling": self.pooling,
            "connector_digest": str(connector),
            "connector": "None" if self.connector is None else self.connector.extra_repr(),
            "out_dtype": self.out_dtype,
            **{f"config.{key}": repr(value) for key, value in self.config.to_dict().items()},
        }

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with a column of features for each layer, and "error": None, or why an image has none."""
        column = self.column or next((name for name in _COLUMNS if name in batch), None)
        if column is None or column not in batch:
            expected = repr(self.column) if self.column else f"one of {', '.join(_COLUMNS)}"
            raise ValueError(f"column: expected {expected} in the batch, which has {', '.join(batch)}")
        values = batch[column]
        names = batch.get("path", [f"image {i} of the batch" for i in range(len(values))])
        images = [self._decode(value, str(name)) for value, name in zip(values, names, strict=True)]
        results = self.embed(images, [str(name) for name in names])
        errors = [result if isinstance(result, str) else None for result in results]
        if self.strict and any(errors):
            raise ValueError(next(error for error in errors if error))
        rows = [None if isinstance(result, str) else result for result in results]
        return {**batch, **self._columns(rows), "error": np.array(errors, object)}

    def _decode(self, value: Any, name: str) -> np.ndarray | str:
        try:
            return self.preprocess(value, name)
        except (ValueError, OSError) as error:
            if self.strict:
                raise
            return str(error)

    @torch.inference_mode()
    def embed(self, images: Sequence[np.ndarray | str], names: Sequence[str] | None = None) -> list[_Features | str]:
        """Features of images from `preprocess`, uint8 [tiles, height, width, 3]; why an image has none stays.

        An image whose features are not finite has none; the reason begins with its name, if there are `names`.

        Tiles of one size share batches, in the order of the images, so that a list of images has the same batches
        always.
        """
        results: list[Any] = [image if isinstance(image, str) else [] for image in images]
        buckets: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        for index, image in enumerate(images):
            for tile in () if isinstance(image, str) else image:
                buckets.setdefault(tile.shape, []).append((index, tile))
        for bucket in buckets.values():
            for start in range(0, len(bucket), self.batch):
                chunk = bucket[start : start + self.batch]
                features = self._forward(torch.from_numpy(np.stack([tile for _, tile in chunk])))
                for row, (index, _) in enumerate(chunk):
                    results[index].append({name: values[row] for name, values in features.items()})
        finished: list[_Features | str] = [
            result if isinstance(result, str) else self._finish(result, self._grid(image))
            for result, image in zip(results, images, strict=True)
        ]
        for index, entry in enumerate(finished):
            if names is not None and isinstance(entry, str) and not isinstance(images[index], str):
                finished[index] = f"{printable(names[index])}: {entry}"
        return finished

    def _forward(self, pixels: Tensor) -> _Features:
        """Pooled features of a batch uint8 [B, height, width, 3], in float32 where they came so, or as they will be."""
        grid, pooling = self._grid(pixels), "tokens" if self._router else self.pooling
        chosen = self._states
        output = self.model(normalize(pixels.to(self.model.device)), output_hidden_states=chosen is not None)
        states = [output.last_hidden_state] if chosen is None else [output.hidden_states[i] for i in chosen]
        pooled = (pool(pooling, state, grid, self._connector).float() for state in states)
        return dict(zip(self.columns, (values.cpu().numpy() for values in pooled), strict=True))

    def _grid(self, pixels: Any) -> tuple[int, int]:
        """(rows, columns) of patches of pixels [B, height, width, 3]."""
        return pixels.shape[1] // self.config.patch_size, pixels.shape[2] // self.config.patch_size

    def _finish(self, tiles: list[_Features], grid: tuple[int, int]) -> _Features | str:
        """An image's features out of its tiles', in the dtype that is wanted, or why they are none."""
        finished: _Features = {}
        for name in self.columns:
            values = np.stack([tile[name] for tile in tiles]) if self.preprocess.tiles else tiles[0][name]
            if self._router is not None:
                tokens = torch.from_numpy(np.stack([tile[name] for tile in tiles]))
                tokens = tokens.to(self.model.device, self.model.dtype)
                values = self._router(tokens, grid).image_tokens.float().cpu().numpy()
            if not np.isfinite(values).all():
                return not_finite(self.model.dtype)
            with np.errstate(over="ignore"):
                finished[name] = values.astype(self.out_dtype)
            if not np.isfinite(finished[name]).all():
                return f"features up to {np.abs(values).max():g} overflow float16; take out_dtype float32"
        return finished

    def _columns(self, rows: Sequence[_Features | None]) -> dict[str, Any]:
        if self.arrow:
            from internvit.data.shard_files import arrow_columns

            return arrow_columns(rows, self.columns, self.shape, self.out_dtype)
        return {
            name: _dense([None if row is None else row[name] for row in rows], self.shape, self.out_dtype)
            for name in self.columns
        }


def _dense(rows: Iterable[np.ndarray | None], shape: tuple[int | None, ...], dtype: str) -> np.ndarray:
    """[B, ...] with NaN for None; an object array with empty rows for None where shapes vary."""
    rows = list(rows)
    sides = [side or 0 for side in shape]
    if None not in shape:
        missing = np.full(sides, np.nan, dtype)
        return np.stack([missing if row is None else row for row in rows]) if rows else np.empty((0, *sides), dtype)
    empty = np.empty(sides, dtype)
    column = np.empty(len(rows), object)
    for index, row in enumerate(rows):
        column[index] = empty if row is None else row
    return column


def _choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(filter(None, choices))}, got {value!r}")


def _refuse_loading(arguments: dict[str, Any], model: InternViT) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)}: expected None beside an InternViT, which is taken as it is, {model.dtype} on "
            f"{model.device}; move the model, or give a checkpoint"
        )
