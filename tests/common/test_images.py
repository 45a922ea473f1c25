"""The opener of images: what viewers show, as RGB of 8 bits; or the reason why a file cannot be used."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from edgeprune.common import images
from edgeprune.common.errors import InputError
from edgeprune.common.files import is_out_of_memory
from edgeprune.common.images import ON_WHITE, UnreadableImage, decoded, open_image

UPRIGHT = Image.new("RGB", (32, 64), "blue")
UPRIGHT.paste((255, 0, 0), (0, 0, 16, 32))  # red only at the top left, so that every turn is another picture
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
RAMP = np.tile(np.linspace(0, 65535, 64), (8, 1))
GREY = np.tile(np.rint(np.linspace(0, 255, 64)), (8, 1))


def saved(image: Image.Image, kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def pixels(content: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(decoded(content)).astype(int)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF", "JPEG"])
@pytest.mark.parametrize("number", STORED)
def test_exif_turns_the_picture_once(number: int, kind: str) -> None:
    way, exif = STORED[number], Image.Exif()
    exif[0x112] = number
    content = saved(
        UPRIGHT if way is None else UPRIGHT.transpose(way),
        kind,
        exif=exif,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    found = pixels(content)
    assert found.shape == (64, 32, 3)
    assert np.abs(found - np.asarray(UPRIGHT).astype(int)).mean() < 12  # JPEG and AVIF are lossy


def transparent(mode: str) -> Image.Image:
    """A square of full colour in a corner of nothing, whose hidden colour is not white."""
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([0, 0, 0, 200, 0, 0] + [0] * 762)
        image.paste(1, (2, 2, 6, 6))
        return image
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    image.paste((200, 200, 200, 255), (2, 2, 6, 6))
    return image.convert(mode)


@pytest.mark.parametrize(
    "content",
    [
        saved(transparent("RGBA"), "PNG"),
        saved(transparent("LA"), "PNG"),
        saved(transparent("P"), "PNG", transparency=0),
        saved(transparent("P"), "PNG", transparency=bytes([0, 255])),
        saved(transparent("P"), "GIF", transparency=0),
        saved(transparent("RGBA"), "WEBP", lossless=True, exact=True),
        saved(transparent("RGBA"), "TIFF"),
        saved(transparent("RGB"), "PNG", transparency=(0, 255, 0)),
        saved(Image.fromarray((GREY[:8, :8] * 0 + 1000).astype(np.uint16)), "PNG", transparency=1000),
    ],
    ids=["RGBA", "LA", "P", "P of bytes", "GIF", "WebP", "TIFF", "RGB key", "16 bits key"],
)
def test_what_is_transparent_is_white(content: bytes) -> None:
    with pytest.warns(UserWarning, match=ON_WHITE):
        found = pixels(content)
    assert found[0, 0].tolist() == [255, 255, 255]


def test_half_transparent_is_half_white_and_opaque_is_unchanged() -> None:
    with pytest.warns(UserWarning, match=ON_WHITE):
        assert abs(pixels(saved(Image.new("RGBA", (2, 2), (255, 0, 0, 128)), "PNG"))[0, 0] - [255, 127, 127]).max() <= 1
    colours = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    opaque = Image.fromarray(np.dstack([colours, np.full((16, 16), 255, np.uint8)]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(saved(opaque, "PNG")) == colours).all()


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (RAMP.astype(np.uint16), "PNG"),
        (RAMP.astype(np.uint16), "TIFF"),
        (RAMP.astype(">u2"), "TIFF"),
        (RAMP.astype(np.int32), "TIFF"),
        ((RAMP / 65535).astype(np.float32), "TIFF"),
        (RAMP.astype(np.uint16), "PPM"),
    ],
)
def test_more_than_8_bits_are_scaled(array: Any, kind: str) -> None:
    assert np.abs(pixels(saved(Image.fromarray(array), kind)) - GREY[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.array([[0, 300]], np.float32), "found floats from 0 to 300, expected 0 to 1"),
        (np.array([[0, np.nan]], np.float32), "found floats from nan to nan"),
        (np.array([[-1, 9]], np.int32), "found 32-bit integers from -1 to 9, expected 16 bits"),
        (np.array([[0, 200]], np.int32), "found 32-bit integers from 0 to 200"),
        (np.array([[0, 70000]], np.int32), "found 32-bit integers from 0 to 70000"),
    ],
)
def test_numbers_without_a_known_white_are_a_reason(array: Any, why: str) -> None:
    with pytest.raises(UnreadableImage, match=why):
        decoded(saved(Image.fromarray(array), "TIFF"))


def test_one_bit_palettes_grey_and_first_frames() -> None:
    assert pixels(saved(Image.new("1", (2, 2), 1), "PNG"))[0, 0].tolist() == [255] * 3
    assert pixels(saved(Image.new("L", (2, 2), 7), "PNG"))[0, 0].tolist() == [7] * 3
    assert pixels(saved(Image.new("RGB", (2, 2), (9, 8, 7)).convert("P", palette=1), "PNG"))[0, 0].tolist() == [9, 8, 7]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        found = pixels(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert found[4, 4].tolist() == pytest.approx([255, 0, 0], abs=8), kind


def test_cmyk_with_and_without_a_profile(tmp_path: Path) -> None:
    plain = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert pixels(saved(plain, "JPEG", quality=100))[4, 4].tolist() == pytest.approx([0, 255, 255], abs=4)
    # Pillow makes no CMYK profiles; that the file's own is asked is seen by one of another space.
    other = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with pytest.raises(UnreadableImage, match="its CMYK profile cannot be used"):
        decoded(saved(plain, "JPEG", icc_profile=other))
    with pytest.raises(UnreadableImage, match="its CMYK profile cannot be used"):
        decoded(saved(plain, "TIFF", icc_profile=b"no profile"))


def test_a_cmyk_profile_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    def converted(image: Image.Image, source: object, target: object, outputMode: str) -> Image.Image:
        assert image.mode == "CMYK" and outputMode == "RGB"
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(ImageCms, "profileToProfile", converted)
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda file: file.read())
    content = saved(Image.new("CMYK", (8, 8)), "JPEG", icc_profile=b"a profile")
    assert pixels(content)[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("error", [RuntimeError, KeyError, IndexError, AssertionError, SyntaxError, TypeError])
def test_whatever_a_decoder_raises_is_a_reason(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> None:
        raise error("from a decoder")

    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    with pytest.raises(UnreadableImage, match=f"not a readable image .{error.__name__}."):
        decoded(saved(UPRIGHT, "PNG"))


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file"), OSError(12, "no")])
def test_out_of_memory_is_no_reason_to_skip(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    with pytest.raises(type(error)) as raised:
        decoded(saved(UPRIGHT, "PNG"))
    assert is_out_of_memory(raised.value)


def test_a_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.png").write_bytes(saved(UPRIGHT, "PNG")[:50])
    with pytest.raises(InputError, match=r"bad\.png: not a readable image"):
        open_image(tmp_path / "bad.png")
    with pytest.raises(InputError, match=r"none\.png: no such file or directory"):
        open_image(tmp_path / "none.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 50)
    with pytest.raises(UnreadableImage, match="found 32 x 64, expected at most 50 pixels"):
        decoded(saved(UPRIGHT, "PNG"))
