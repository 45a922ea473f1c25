"""The one place where an image file is opened: for training data, scores and user studies alike.

Every image becomes RGB of 8 bits as a viewer shows it: turned by its EXIF orientation, its first frame, what is
transparent on white, 16 bits and floats scaled, CMYK converted by its own profile. Other colour profiles are not
applied, as trainers do not.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from edgeprune.common.errors import InputError
from edgeprune.common.files import is_out_of_memory

MAX_PIXELS = 2**26
"""A larger image is refused without being decoded."""
ON_WHITE = "images: transparent parts are shown on white"
_WITH_ALPHA = ("RGBA", "RGBa", "LA", "La", "PA")
_ORIENTATION = 0x0112
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (Exif 2.32, tag 0x0112)."""


class UnreadableImage(Exception):
    """The image cannot be used; the text says why."""


def open_image(path: Path) -> Image.Image:
    """Open an image file as RGB.

    Raises:
        InputError: the file is not an image that can be used.
    """
    try:
        return decoded(path)
    except UnreadableImage as error:
        raise InputError(f"{path}: {error}") from error


def decoded(file: Path | bytes) -> Image.Image:
    """Decode an image to RGB: a file, or the content of one.

    Raises:
        UnreadableImage: the image cannot be used, whatever its decoder raised. Running out of memory is no such
            reason: the error passes through.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.width * image.height > MAX_PIXELS:
                found = f"found {image.width} x {image.height}"
                raise UnreadableImage(f"{found}, expected at most {MAX_PIXELS} pixels")
            image.load()  # before EXIF is read: of a TIFF, Pillow turns the pixels itself
            turn = _TURNED.get(image.getexif().get(_ORIENTATION, 1))
            upright = image if turn is None else image.transpose(turn)
            rgb, transparent = _rgb(upright)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.strerror:  # of the file, not of its content
            raise UnreadableImage(error.strerror.lower()) from error
        raise UnreadableImage(f"not a readable image ({type(error).__name__})") from error
    if transparent:
        warnings.warn(ON_WHITE, stacklevel=2)
    return rgb


def _rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """Return an image as RGB without metadata, and whether parts of it are transparent."""
    transparent = False
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        transparent = image.getchannel("A").getextrema()[0] != 255
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode == "CMYK" and image.info.get("icc_profile"):
        image = _by_profile(image)
    rgb = image.convert("RGB")
    rgb.info.clear()
    return rgb, transparent


def _scaled(image: Image.Image) -> Image.Image:
    """Return a grey image of more than 8 bits as one of 8.

    Raises:
        UnreadableImage: which number is white cannot be told from the file.
    """
    values: Any = np.asarray(image)
    least, most = values.min(), values.max()
    if image.mode == "F":
        if not (least >= 0 and most <= 1):  # so NaN is refused too
            raise UnreadableImage(f"found floats from {least:g} to {most:g}, expected 0 to 1")
        white = 1.0
    else:
        # Pillow reads some 16-bit files as 32-bit integers. Of 32 bits with small numbers, white may be 255 or 65535.
        if image.mode == "I" and (least < 0 or most > 65535 or 0 < most < 256):
            raise UnreadableImage(f"found 32-bit integers from {least} to {most}, expected 16 bits: 0 to 65535")
        white = 65535.0
    grey = Image.fromarray(np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # one grey is transparent
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _by_profile(image: Image.Image) -> Image.Image:
    """Return a CMYK image as sRGB, converted by the profile in the file.

    Raises:
        UnreadableImage: the profile cannot be used.
    """
    try:
        from PIL import ImageCms

        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except Exception as error:  # of a damaged profile, or of a Pillow that was built without the library
        if is_out_of_memory(error):
            raise
        raise UnreadableImage(f"its CMYK profile cannot be used ({type(error).__name__})") from error
    assert converted is not None  # only in place it is
    return converted
