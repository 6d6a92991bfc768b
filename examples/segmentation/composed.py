"""A composed segmentation set, made of data that scikit-image and scikit-learn ship: no download.

    python examples/segmentation/composed.py FOLDER       # images/, annotations/, classes.txt, as train.py reads them

Each picture is 224 x 224 and grey: two of scikit-image's photographed textures (brick, grass, gravel) with a wavy
border between them, and two to four objects pasted on: coins cut out of its photograph of coins by a threshold, its
horse's silhouette, and handwritten digits of scikit-learn's (8 x 8, enlarged), the last two filled with one random grey
each; then another brightness, contrast and noise. Training and validation share no part of a texture (left and right
of one photograph), no coin and no digit; the horse's silhouette is one and the same, turned, mirrored and scaled.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

NAMES = ("brick", "grass", "gravel", "coin", "horse", "digit")
SIZE = 224
COUNTS = {"training": 160, "validation": 48}


def coins() -> list[tuple[np.ndarray, np.ndarray]]:
    """Each coin's pixels and mask, from left to right."""
    from skimage import data, filters, measure, morphology, segmentation

    photo = data.coins()
    mask = morphology.closing(photo > filters.threshold_otsu(photo), morphology.footprint_rectangle((3, 3)))
    labels = measure.label(segmentation.clear_border(mask))
    regions = [r for r in measure.regionprops(labels) if r.area > 500]
    regions.sort(key=lambda r: r.centroid[1])
    return [(photo[r.slice], ndimage.binary_fill_holes(r.image)) for r in regions]


class Sources:
    """What one split is composed of."""

    def __init__(self, split: str) -> None:
        from skimage import data
        from sklearn.datasets import load_digits

        training = split == "training"
        columns = slice(0, 300) if training else slice(312, 512)
        self.textures = [getattr(data, name)()[:, columns] for name in NAMES[:3]]
        cut = coins()
        self.coins = cut[: len(cut) * 2 // 3] if training else cut[len(cut) * 2 // 3 :]
        digits = load_digits().images
        self.digits = digits[:1200] if training else digits[1200:]
        self.horse = ~data.horse()

    def texture(self, k: int, rng: np.random.Generator) -> np.ndarray:
        """A part of a texture, enlarged to the picture's size."""
        photo, side = self.textures[k], int(rng.integers(120, 181))
        y, x = (int(rng.integers(n - side + 1)) for n in photo.shape)
        part = Image.fromarray(photo[y : y + side, x : x + side])
        part = part.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return np.asarray(part if rng.random() < 0.5 else part.transpose(Image.Transpose.FLIP_LEFT_RIGHT), np.float32)

    def thing(self, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pixels and mask of an object of class k, turned, mirrored and scaled."""
        if NAMES[k] == "coin":
            photo, mask = self.coins[rng.integers(len(self.coins))]
            side, turn = rng.uniform(44, 84), rng.uniform(0, 360)
        else:
            mask = self.horse
            side, turn = rng.uniform(80, 150), rng.uniform(-20, 20)
            if NAMES[k] == "digit":
                mask = self.digits[rng.integers(len(self.digits))] / 16
                side, turn = rng.uniform(60, 100), rng.uniform(-15, 15)
            photo = np.full(mask.shape, rng.uniform(30, 225))
        scale = side / max(mask.shape)
        photo, mask = (ndimage.zoom(np.asarray(x, np.float32), scale, order=1) for x in (photo, mask))
        photo = ndimage.rotate(photo, turn, order=1, mode="nearest")
        mask = ndimage.rotate(mask, turn, order=1) > 0.5
        if NAMES[k] == "horse" and rng.random() < 0.5:
            photo, mask = photo[:, ::-1], mask[:, ::-1]
        return photo, mask

    def picture(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An image [224, 224, 3] and its classes [224, 224], uint8."""
        first, second = rng.permutation(3)[:2]
        y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
        angle = rng.uniform(0, 2 * np.pi)
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        side = across + 14 * np.sin(along / rng.uniform(12, 30) + rng.uniform(0, 6)) > rng.uniform(-50, 50)
        image = np.where(side, self.texture(first, rng), self.texture(second, rng))
        classes = np.where(side, first, second).astype(np.uint8)
        free = np.ones((SIZE, SIZE), bool)
        for _ in range(int(rng.integers(2, 5))):
            k = int(rng.integers(3, 6))
            photo, mask = self.thing(k, rng)
            height, width = mask.shape
            for _ in range(20):  # a place that is free
                top, left = (int(rng.integers(max(SIZE - n, 0) + 1)) for n in (height, width))
                area = (slice(top, min(top + height, SIZE)), slice(left, min(left + width, SIZE)))
                inside = mask[: area[0].stop - top, : area[1].stop - left]
                if free[area][inside].all():
                    image[area][inside] = photo[: inside.shape[0], : inside.shape[1]][inside]
                    classes[area][inside] = k
                    free[area] &= ~inside
                    break
        image = (image - 128) * rng.uniform(0.6, 1.2) + 128 + rng.uniform(-35, 35) + rng.normal(0, 4, image.shape)
        return np.repeat(image.clip(0, 255).astype(np.uint8)[..., None], 3, -1), classes


def compose(folder: Path, seed: int = 0) -> None:
    """Writes both splits; the same seed gives the same pictures."""
    for split, count in COUNTS.items():
        sources = Sources(split)
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, classes = sources.picture(np.random.default_rng([seed, len(split), i]))
            Image.fromarray(image).save(folder / "images" / split / f"{i:03}.png")
            Image.fromarray(classes).save(folder / "annotations" / split / f"{i:03}.png")
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")


if __name__ == "__main__":
    compose(Path(sys.argv[1]))
