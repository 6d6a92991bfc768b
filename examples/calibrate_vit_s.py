"""Calibrating the trained ViT-S of trained_vit_s.py for int8, on photographs that installed packages bring along.

    python examples/calibrate_vit_s.py [TARGET_PERCENT]

Rounded by two pictures of each of 16 files of scikit-image and scikit-learn: the whole, and a random crop, turned over
by chance. Held out: one of scikit-image's and crops of seven files. Printed: errors of the tokens, after the network's
final LayerNorm, of three photographs that are in neither.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import trained_vit_s as trained
from torch import Tensor
from torch.nn import functional as F

import internvit
from internvit.inference.calibrate import Calibration, calibrate
from internvit.numerics import relative_error

SKIMAGE = (
    *("rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png", "camera.png"),
    *("clock_motion.png", "moon.png", "page.png", "brick.png", "grass.png", "gravel.png", "coins.png", "text.png"),
)
SKLEARN = ("china.jpg", "flower.jpg")
SIZE = 224


def pixels_of(picture: Any) -> Tensor:
    import numpy as np
    from PIL import Image

    small = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1).float() / 255
    return ((values - trained.MEAN) / trained.STD)[None].contiguous()


def crop(picture: Any, generator: torch.Generator) -> Any:
    """A random square of half the shorter side to all of it, turned over by chance."""
    from PIL import Image

    part, x, y, turn = torch.rand(4, generator=generator).tolist()
    side = int(min(picture.size) * (0.5 + 0.5 * part))
    left, top = int((picture.width - side) * x), int((picture.height - side) * y)
    square = picture.crop((left, top, left + side, top + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turn < 0.5 else square


def pictures() -> tuple[list[Tensor], list[Tensor]]:
    """Pixels to round by, and others held out."""
    import skimage
    import sklearn.datasets
    from PIL import Image

    ours = Path(skimage.__file__).parent / "data"
    paths = [ours / name for name in SKIMAGE]
    paths += [Path(sklearn.datasets.__file__).parent / "images" / name for name in SKLEARN]
    generator = torch.Generator().manual_seed(0)
    opened = {path.name: Image.open(path).convert("RGB") for path in paths}
    images = [pixels_of(p) for picture in opened.values() for p in (picture, crop(picture, generator))]
    generator.manual_seed(5)
    held_out = [pixels_of(Image.open(ours / "motorcycle_right.png"))]
    held_out += [pixels_of(crop(opened[name], generator)) for name in ("china.jpg", "rocket.jpg", "flower.jpg")]
    generator.manual_seed(6)
    more = ("motorcycle_left.png", "coins.png", "camera.png", "retina.jpg")
    held_out += [pixels_of(crop(opened[name], generator)) for name in more]
    return images, held_out


def calibrated(target: float = 0.015) -> tuple[trained.TrainedViTS, Calibration]:
    network = trained.TrainedViTS()
    return network, calibrate(network.tower, *pictures(), target=target)


@torch.no_grad()
def errors(network: trained.TrainedViTS, tower: torch.nn.Module) -> dict[str, float]:
    """The relative error of each photograph's tokens against float32."""
    measured = {}
    for name in trained.PHOTOS:
        pixels = trained.photo(name, SIZE)[1]
        states = tower(pixels).last_hidden_state.float()
        tokens = F.layer_norm(states, (states.shape[-1],), network.weight, network.bias, 1e-6)
        measured[name] = relative_error(tokens, network(pixels))
    return measured


def main(target: float) -> None:
    network, made = calibrated(target)
    print(f"{made.share:.0%} of the Linears' weights in int8; in bfloat16: {', '.join(made.skipped)}")
    for skip in ((), None):
        fast = internvit.optimize_for_inference(made.model, out_dtype=torch.float32, precision="int8", skip=skip)
        print(f"{len(fast.int8)} Linears in int8:", {k: f"{e:.2%}" for k, e in errors(network, fast).items()})


if __name__ == "__main__":
    main(float(sys.argv[1]) / 100 if len(sys.argv) > 1 else 0.015)
