"""Images with and without text for the detector: rendered pages, signs over photographs, photographs as they are.

Photographs are crops of those in scikit-image's wheel, read out of the file; nothing is installed. Every image is its
seed's, to the pixel. Must never import fedge.
"""

import io
import zipfile
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Images = NDArray[np.uint8]

FAMILIES = ("DejaVu Sans", "DejaVu Serif", "DejaVu Sans Mono")  # matplotlib brings them
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg",
               "rocket.jpg", "gravel.png", "grass.png", "brick.png", "camera.png", "coins.png", "moon.png")  # fmt: skip
HELD_OUT = ("motorcycle_left.png", "cell.png", "horse.png", "coffee.png", "camera.png")  # of these, only for testing
LINES = (
    "the edge device sends few bytes when link is slow cloud answers later price total invoice number street open",
    "closed exit north south platform ticket water coffee sugar bread 2024 17:35 No. 42 EUR 3.99 tel. www room floor",
)
WORDS = [word for line in LINES for word in line.split()]


def photographs(wheel: Path, *, test: bool) -> list[Image.Image]:
    """The photographs for training, or those held out. Raises FileNotFoundError, or KeyError where one is not there."""
    names = HELD_OUT if test else tuple(name for name in PHOTOGRAPHS if name not in HELD_OUT)
    with zipfile.ZipFile(wheel) as archive:
        files = [archive.read(f"skimage/data/{name}") for name in names]
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def images(photos: list[Image.Image], count: int, size: int, seed: int) -> tuple[Images, NDArray[np.int64]]:
    """`count` images uint8 [n, size, size, 3], and whether each has text; half of them do, half of those on a page."""
    random = np.random.default_rng(seed)
    has_text = np.arange(count) % 2
    made = [_with_text(random, photos, size) if text else _crop(random, photos, size) for text in has_text]
    return np.stack([np.asarray(image, np.uint8) for image in made]), has_text


def _crop(random: np.random.Generator, photos: list[Image.Image], size: int) -> Image.Image:
    photo = photos[random.integers(len(photos))]
    side = int(min(photo.size) * random.uniform(0.4, 1.0))
    left, top = random.integers(0, photo.width - side + 1), random.integers(0, photo.height - side + 1)
    crop = photo.crop((int(left), int(top), int(left) + side, int(top) + side)).resize((size, size))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.integers(2) else crop


def _with_text(random: np.random.Generator, photos: list[Image.Image], size: int) -> Image.Image:
    page = bool(random.integers(2))
    paper = tuple(int(v) for v in random.integers(150, 256, 3))
    image = Image.new("RGB", (size, size), paper) if page else _crop(random, photos, size)
    draw = ImageDraw.Draw(image)
    ink = tuple(int(v) for v in (random.integers(0, 90, 3) if page else random.integers(0, 256, 3)))
    top = float(random.uniform(5, size / 4))
    for _ in range(int(random.integers(4, 14) if page else random.integers(1, 4))):
        points = int(random.integers(11, 26) if page else random.integers(18, 48))
        font = ImageFont.truetype(_font(random), points)
        text = " ".join(random.choice(WORDS, int(random.integers(1, 7 if page else 3))))
        left = float(random.uniform(5, size / 3))
        if not page:
            box = draw.textbbox((left, top), text, font=font)
            draw.rectangle(box, fill=tuple(255 - v for v in ink)) if random.integers(2) else None
        draw.text((left, top), text, font=font, fill=ink)
        top += points * float(random.uniform(1.1, 2.0))
        if top > size - points:
            break
    return image


def _font(random: np.random.Generator) -> str:
    weight = "bold" if random.integers(2) else "normal"
    wanted = font_manager.FontProperties(family=FAMILIES[random.integers(len(FAMILIES))], weight=weight)
    return str(font_manager.findfont(wanted))
