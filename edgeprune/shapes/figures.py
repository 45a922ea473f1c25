"""How things look: shapes, characters, words and textures as ink in [0, 1]. Nothing ever rotates."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from edgeprune.common.errors import InputError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "green": (34, 150, 58),
    "blue": (36, 74, 206),
    "yellow": (246, 212, 22),
    "orange": (248, 132, 12),
    "purple": (136, 40, 168),
    "cyan": (40, 198, 214),
    "black": (24, 24, 24),
}
BACKGROUND = (238, 238, 238)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("striped", "dotted", "checked")

Pixels = NDArray[np.uint8]
"""One image: (size, size, 3), RGB."""
Ink = NDArray[np.float32]
"""How much of each pixel is covered, in [0, 1]: (h, w)."""

_OVERSAMPLE = 8


def _coverage(image: Image.Image) -> Ink:
    """Return a grey image as ink in [0, 1]."""
    return np.asarray(image, dtype=np.float32) / np.float32(255)


@functools.cache
def _glyph(char: str) -> Ink:
    """Draw a large character as ink in [0, 1], cropped to its box."""
    font = ImageFont.load_default(size=256)
    image = Image.new("L", (400, 400), 0)
    ImageDraw.Draw(image).text((80, 40), char, fill=255, font=font, stroke_width=10)
    box = image.getbbox()
    assert box is not None
    return _coverage(image.crop(box))


@functools.cache
def glyph_of(char: str, height: int) -> Ink:
    """Draw a character `height` pixels high: (h, w)."""
    ink = Image.fromarray((_glyph(char) * 255).astype(np.uint8))
    width = max(1, round(height * ink.width / ink.height))
    return _coverage(ink.resize((width, height), Image.Resampling.BOX))


@functools.cache
def word_of(word: str, height: int) -> Ink:
    """Draw a word `height` pixels high: (h, w). Letters are so far apart that a VAE of factor 8 keeps them apart."""
    gap = np.zeros((height, height // 4), np.float32)
    parts = [part for char in word for part in (gap, glyph_of(char, height))]
    return np.concatenate(parts[1:], axis=1)


@functools.cache
def ink_of(shape: str, extent: int) -> Ink:
    """Draw a shape whose longer side is `extent` pixels: (h, w).

    Raises:
        InputError: there is no such shape.
    """
    n = extent * _OVERSAMPLE
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, n - 1, n - 1), fill=255)
        if shape == "ring":
            draw.ellipse((n * 0.25, n * 0.25, n * 0.75, n * 0.75), fill=0)
    elif shape == "square":
        draw.rectangle((0, 0, n, n), fill=255)
    elif shape == "triangle":
        draw.polygon([(n / 2, 0), (n, n), (0, n)], fill=255)
    elif shape == "cross":
        draw.rectangle((n * 0.33, 0, n * 0.67, n), fill=255)
        draw.rectangle((0, n * 0.33, n, n * 0.67), fill=255)
    elif shape == "star":
        turn = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 0.5, 0.21) * n
        # The upper point touches the box; a five-pointed star is slightly wider than tall.
        points = np.stack([n / 2 + radius * np.cos(turn), n / 2 + radius * np.sin(turn)], 1)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    else:
        raise InputError(f"shape: found {shape!r}, expected one of {', '.join(SHAPES)}")
    return _shrunk(image)


@functools.cache
def texture_of(texture: str, extent: int) -> Ink:
    """Draw where a texture shows its second colour: (extent, extent).

    It grows with the thing, so it looks the same at every size. No texture is its own negative, so it is clear which of
    the two colours is the second: stripes begin and end with the first, and of nine checks it has the corners.
    """
    n = extent * _OVERSAMPLE
    image = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(image)
    if texture == "striped":
        for top in (0.2, 0.6):
            draw.rectangle((0, n * top, n, n * (top + 0.2)), fill=255)
    elif texture == "dotted":
        for y, x in ((0.5, 0.5), (0.2, 0.5), (0.8, 0.5), (0.5, 0.2), (0.5, 0.8)):
            draw.ellipse((n * (x - 0.13), n * (y - 0.13), n * (x + 0.13), n * (y + 0.13)), fill=255)
    else:
        for cell in range(1, 9, 2):
            y, x = divmod(cell, 3)
            draw.rectangle((n * x / 3, n * y / 3, n * (x + 1) / 3, n * (y + 1) / 3), fill=255)
    return _shrunk(image)


def _shrunk(image: Image.Image) -> Ink:
    extent = image.width // _OVERSAMPLE
    return _coverage(image.resize((extent, extent), Image.Resampling.BOX))
