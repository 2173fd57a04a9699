"""Picture files. Arrays are (H, W, C) with values in [-1, 1], as the autoencoder wants them; colours are sRGB."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageOps, PngImagePlugin, UnidentifiedImageError

from mlx_vae.files import replacing
from mlx_vae.png import write_png16
from mlx_vae.version import __version__

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "HEIF")
"""What is read: kinds that are known by their first bytes, and that no other program is run for (as for EPS)."""

HEIF_ENDINGS = (".heic", ".heif", ".hif")
HEIF_HINT = "HEIC pictures need an extra: pip install 'mlx-vae[heif]'"

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
"""Pillow's greyscale modes of more than 8 bits."""


class Picture(NamedTuple):
    """A picture (H, W, 3) of float32 in [-1, 1], and a sentence for each thing that was done to it unasked."""

    values: np.ndarray
    notices: list[str]


# Reading


@functools.cache
def picture_endings() -> frozenset[str]:
    """The endings of the files that are taken for pictures in a folder."""
    registered = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in registered if kind in FORMATS) | frozenset(HEIF_ENDINGS)


def load_image(
    path: str | os.PathLike[str],
    background: str = "white",
    resize: tuple[int, int] | None = None,
    max_side: int | None = None,
) -> Picture:
    """Reads a picture upright, in sRGB, on a `background` (a colour as CSS writes it) where it is transparent.

    `resize` is the (width, height) to give it; `max_side` only shrinks, and keeps the proportions.
    Raises ValueError, in a sentence that names the file, for what can't be read whole, and for more than
    `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    notices: list[str] = []
    colour = ImageColor.getrgb(background)[:3]
    try:
        image = _srgb(_opened(Path(path), notices), colour, notices)
    except Exception as error:  # a damaged file makes Pillow's readers raise anything
        raise ValueError(f"{path}: {_reason(Path(path), error)}") from None
    width, height = image.size
    if resize is not None:
        if width * resize[1] != height * resize[0]:
            notices.append(f"{width}x{height} is stretched to {resize[0]}x{resize[1]}")
        image = image.resize(resize, Image.Resampling.LANCZOS)
    elif max_side is not None and max(width, height) > max_side:
        scale = max_side / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    values = np.array(image, dtype=np.float32)
    values /= 127.5
    values -= 1
    np.clip(values, -1, 1, out=values)  # Lanczos overshoots where there are more than 8 bits
    return Picture(values if values.ndim == 3 else np.repeat(values[..., None], 3, axis=2), notices)


def pad_to_multiple(values: np.ndarray, factor: int) -> np.ndarray:
    """(H, W, C) -> the same with H and W multiples of `factor`: mirrored at the right and at the bottom."""
    H, W, _ = values.shape
    return np.pad(values, ((0, -H % factor), (0, -W % factor), (0, 0)), mode="symmetric")


def _opened(path: Path, notices: list[str]) -> Image.Image:
    """The first picture of a file, decoded and turned upright."""
    with path.open("rb") as file, Image.open(file, formats=_readable()) as image:
        limit, (width, height) = Image.MAX_IMAGE_PIXELS, image.size
        if limit is not None and width * height > limit:  # Pillow itself warns here, and refuses at twice the limit
            raise Image.DecompressionBombError(f"{width}x{height}")
        kind, ending = image.format, path.suffix.lower()
        if kind not in ("MPO", Image.registered_extensions().get(ending)) and ending not in HEIF_ENDINGS:
            notices.append(f"is a {kind} file, whatever its ending says")
        count = getattr(image, "n_frames", 1)
        if count > 1 and kind != "MPO":  # which is a photo with its preview
            notices.append(f"holds {count} pictures; the first is taken")
        image.load()
        try:
            return ImageOps.exif_transpose(image)
        except Exception:
            notices.append("its EXIF data is damaged; the picture is taken as upright")
            return image.copy()


@functools.cache
def _readable() -> list[str]:
    """Those of FORMATS that this Pillow reads; HEIF where pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _srgb(image: Image.Image, background: tuple[int, ...], notices: list[str]) -> Image.Image:
    """Any mode -> RGB, or F with levels in [0, 255] for greyscale of more than 8 bits."""
    if image.mode in WIDE_MODES:
        return _wide(image, notices)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if image.mode == "P":
            image = image.convert("RGBA")
        colours = _colours(image.convert("L" if image.mode in ("L", "LA") else "RGB"), notices)
        if alpha.getextrema() == (255, 255):
            return colours
        notices.append(f"is transparent; composited on #{bytes(background).hex()}")
        return Image.composite(colours, Image.new("RGB", image.size, background), alpha)
    return _colours(image, notices)


def _colours(image: Image.Image, notices: list[str]) -> Image.Image:
    """An opaque picture -> RGB, through its colour profile where it has one."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        return _through(image, ImageCms.createProfile("LAB"))
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            return _through(image, ImageCms.getOpenProfile(io.BytesIO(profile)))
        except (ImageCms.PyCMSError, OSError, ValueError):
            notices.append("its colour profile can't be used; taken as sRGB")
    return image.convert("RGB")


def _through(image: Image.Image, profile: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(
        image,
        profile,
        ImageCms.createProfile("sRGB"),
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        outputMode="RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None  # it is None only where the picture is changed in place
    return converted


def _wide(image: Image.Image, notices: list[str]) -> Image.Image:
    if "icc_profile" in image.info:
        notices.append("its colour profile is left aside: more than 8 bits of grey are taken as sRGB")
    levels = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = levels.min(), levels.max()
    if not (low >= 0 and high <= top):  # and not NaN
        raise ValueError(f"a picture of values from {low:g} to {high:g}; wanted 0 to {top:g}")
    return Image.fromarray((levels * (255 / top)).astype(np.float32))


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        limit = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        return f"too large ({error}); the limit is {limit} million pixels, PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        if path.suffix.lower() in HEIF_ENDINGS and "HEIF" not in _readable():
            return HEIF_HINT
        return "the file is empty" if path.stat().st_size == 0 else "not a picture of a kind that can be read"
    return f"not a readable picture ({str(error) or type(error).__name__})"


# Writing


def check_image_path(path: str | os.PathLike[str], bits: int = 8) -> None:
    """Raises ValueError unless a file of that ending can be written with so many bits, and its folder exists."""
    path = Path(path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: {path.suffix or 'no'} ending; wanted one of a picture file, such as .png")
    if bits == 16 and path.suffix.lower() != ".png":
        raise ValueError(f"{path}: {path.suffix} ending; pictures of 16 bits are written as .png")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such folder as {path.parent}")


def to_bytes(x: mx.array) -> np.ndarray:
    """(..., C) in [-1, 1] -> uint8: clipped, and rounded to the nearest of 256 levels, not truncated.

    Raises ValueError for values that are not finite.
    """
    return to_levels(x, 8).astype(np.uint8)


def to_levels(x: mx.array, bits: int) -> np.ndarray:
    """As `to_bytes`, for any number of bits up to 16 -> uint16."""
    x = x.astype(mx.float32)
    if not mx.all(mx.isfinite(x)).item():
        raise ValueError(
            "the picture has values that are not finite: its activations overflow. Use float32 or bfloat16"
        )
    return np.array(mx.round((mx.clip(x, -1, 1) + 1) * ((2**bits - 1) / 2)).astype(mx.uint16))


def save_image(
    path: str | os.PathLike[str],
    x: mx.array,
    bits: int = 8,
    quality: int = 95,
    lossless: bool = False,
    record: Mapping[str, str] | None = None,
) -> None:
    """Writes (H, W, C), C of 1, 3 or 4, as the kind of file that the ending of the path says.

    `bits` of 16 is for PNG; `quality` (1 to 100) for JPEG and WebP; `lossless` for WebP. What `record` says of the
    picture ("model", "source") is written into the file: as text chunks of a PNG, else as its EXIF description.
    """
    if x.ndim != 3 or x.shape[-1] not in MODES:
        raise ValueError(f"a picture of shape {x.shape} can't be written; wanted (H, W, C) with C of 1, 3 or 4")
    path, text = Path(path), {"Software": f"mlx_vae {__version__}", **(record or {})}
    check_image_path(path, bits)
    with replacing(path) as temporary:
        if bits == 16:
            with temporary.open("wb") as file:
                write_png16(file, to_levels(x, 16), text)
            return
        pixels = to_bytes(x)
        image = Image.fromarray(pixels.squeeze(-1) if x.shape[-1] == 1 else pixels)
        image.save(temporary, **_options(path, quality, lossless, text))


def _options(path: Path, quality: int, lossless: bool, text: Mapping[str, str]) -> dict[str, Any]:
    """What Pillow is told for a kind of file."""
    kind = Image.registered_extensions()[path.suffix.lower()]
    if kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for keyword, value in text.items():
            chunks.add_text(keyword, value)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    exif[0x0131] = text["Software"]
    description = ", ".join(f"{key}: {value}" for key, value in text.items() if key != "Software")
    exif[0x010E] = description.encode()  # UTF-8, as every reader of today takes it
    options: dict[str, Any] = {"exif": exif} if kind in ("JPEG", "WEBP", "TIFF") else {}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = quality
    if kind == "JPEG":
        options["subsampling"] = "4:4:4"
    if kind == "WEBP":
        options["lossless"] = lossless
    return options
