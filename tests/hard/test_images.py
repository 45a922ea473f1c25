"""Images: of any mode, size, orientation and format the upright picture is seen; a damaged file is a reason to skip."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image
from properties import holds

from edgeprune.common.images import UnreadableImage, decoded

pytestmark = pytest.mark.filterwarnings("ignore")  # that transparent parts are white; Pillow's of damaged files
MODES = {
    "PNG": ("1", "L", "LA", "P", "P+key", "RGB", "RGB+key", "RGBA", "I;16", "L+key"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA", "L"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "F"),
    "GIF": ("L", "P", "P+key"),
    "BMP": ("1", "L", "P", "RGB"),
}
PAIRS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
"""How a camera of each EXIF orientation stores an upright picture."""
CASE = {
    "kind": st.sampled_from(PAIRS), "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
    "exif": st.sampled_from([None, *range(10)]), "seed": st.integers(0, 2**16),
    "smooth": st.booleans(),
}  # fmt: skip
Array = np.ndarray[Any, Any]


def picture(mode: str, size: list[int], seed: int, smooth: bool) -> tuple[Image.Image, Array]:
    """Return an upright picture in a mode, and what a viewer shows of it: RGB on white (height, width, 3)."""
    width, height = size
    g = np.random.default_rng(seed)
    if smooth:
        x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
        ramps = g.uniform(0, 1, (4, 3)) / 3
        values = np.stack([a + b * x + c * y for a, b, c in ramps], -1)
    else:
        values = g.uniform(0, 1, (height, width, 4))
    bytes_ = np.rint(values * 255).astype(np.uint8)
    rgb, alpha = bytes_[..., :3].astype(float), bytes_[..., 3:].astype(float) / 255
    grey = np.repeat(rgb[..., :1], 3, -1)
    base = mode.removesuffix("+key")
    if base == "1":
        return Image.fromarray(bytes_[..., 0] > 127), (grey > 127) * 255.0
    if base in ("I;16", "I;16B"):
        deep = np.rint(values[..., 0] * 65535)
        image = Image.fromarray(deep.astype(np.uint16 if base == "I;16" else ">u2"))
        return image, np.repeat(deep[..., None] / 257, 3, -1)
    if base == "F":
        return Image.fromarray(values[..., 0].astype(np.float32)), np.repeat(values[..., :1] * 255, 3, -1)
    if base == "P":
        image = Image.fromarray(bytes_[..., 0])
        image.putpalette(g.integers(0, 256, 768, np.uint8).tobytes())
        colours = np.frombuffer(bytes(image.getpalette() or []), np.uint8).reshape(-1, 3)
        shown = colours[bytes_[..., 0]].astype(float)
        return _keyed(image, mode, int(bytes_[0, 0, 0]), shown, bytes_[..., 0] == bytes_[0, 0, 0])
    if base == "L":
        return _keyed(Image.fromarray(bytes_[..., 0]), mode, int(bytes_[0, 0, 0]), grey, grey[..., 0] == grey[0, 0, 0])
    if base == "RGB":
        key = tuple(int(v) for v in bytes_[0, 0, :3])
        return _keyed(Image.fromarray(bytes_[..., :3].copy()), mode, key, rgb, (rgb == rgb[0, 0]).all(-1))
    if base == "LA":
        image = Image.merge("LA", [Image.fromarray(bytes_[..., i].copy()) for i in (0, 3)])
        return image, grey * alpha + 255 * (1 - alpha)
    if base == "RGBA":
        return Image.fromarray(bytes_), rgb * alpha + 255 * (1 - alpha)
    if base == "YCbCr":
        return Image.fromarray(bytes_[..., :3].copy()).convert("YCbCr"), rgb
    inks = bytes_.astype(float)
    return Image.fromarray(bytes_, "CMYK"), (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255


def _keyed(image: Image.Image, mode: str, key: Any, shown: Array, hidden: Array) -> tuple[Image.Image, Array]:
    """Make the colour of the first pixel transparent, in a mode that says so."""
    if mode.endswith("+key"):
        image.info["transparency"] = key
        shown = np.where(hidden[..., None], 255.0, shown)
    return image, shown


def saved(image: Image.Image, kind: str, exif: int | None) -> bytes:
    how: dict[str, Any] = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True, "exact": True}}.get(
        kind, {}
    )
    if exif is not None and kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        tags = Image.Exif()
        tags[0x112] = exif
        how = how | {"exif": tags}
    if "transparency" in image.info:
        how = how | {"transparency": image.info["transparency"]}
    image.save(buffer := io.BytesIO(), kind, **how)
    return buffer.getvalue()


def stored(case: dict[str, Any]) -> tuple[bytes, Array]:
    """Return a file and what a viewer shows."""
    (kind, mode), exif = case["kind"], case["exif"]
    upright, shown = picture(mode, case["size"], case["seed"], case["smooth"])
    turned = kind in ("PNG", "JPEG", "WEBP", "TIFF") and exif in STORED
    image = upright.transpose(STORED[exif]) if turned else upright
    image.info = upright.info
    if kind == "TIFF" and mode == "I;16B" and turned:
        return saved(upright, kind, None), shown  # Pillow does not turn this mode
    return saved(image, kind, exif), shown


@holds(st.fixed_dictionaries(CASE), few=300)
def test_the_upright_picture_is_seen(case: dict[str, Any], place: object) -> None:
    content, shown = stored(case)
    found = decoded(content)
    assert found.mode == "RGB" and found.info == {} and not found.getexif()
    assert list(found.size) == list(case["size"])
    wrong = np.abs(np.asarray(found).astype(float) - shown)
    kind, mode = case["kind"]
    if mode == "YCbCr":
        assert wrong.max() <= (8 if kind == "TIFF" or case["smooth"] else 90)
    elif kind == "JPEG":  # of noise, single pixels may be further off
        assert wrong.mean() <= 6 and (wrong.max() <= 24 or not case["smooth"])
    else:
        assert wrong.max() <= 1.01, (wrong.max(), case)


EDIT = st.tuples(
    st.one_of(st.integers(0, 80), st.integers(0, 2000)), st.integers(0, 4), st.lists(st.integers(0, 255), max_size=6)
)


@holds(
    st.fixed_dictionaries(
        CASE | {"cut": st.one_of(st.none(), st.integers(0, 400)), "edits": st.lists(EDIT, max_size=4)}
    ),
    few=300,
)
def test_a_damaged_file_is_a_picture_or_a_reason(case: dict[str, Any], place: object) -> None:
    content = bytearray(stored(case)[0])
    for at, length, new in case["edits"]:
        at %= len(content)
        content[at : at + length] = bytes(new)
    if case["cut"] is not None:
        del content[case["cut"] % len(content) :]
    try:
        found = decoded(bytes(content))
    except UnreadableImage as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert found.mode == "RGB"
