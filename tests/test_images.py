"""Picture files."""

from __future__ import annotations

import importlib.util
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import random_images
from PIL import Image, ImageCms, features

from mlx_vae.images import Picture, check_image_path, load_image, pad_to_multiple, save_image, to_bytes


def test_levels_are_rounded_and_clipped() -> None:
    levels = np.arange(256)
    x = mx.array(levels.astype(np.float32) / 127.5 - 1)
    assert np.array_equal(to_bytes(x), levels)
    assert np.array_equal(to_bytes(x + 0.45 / 127.5), levels)
    assert np.array_equal(to_bytes(x - 0.45 / 127.5), levels)
    assert to_bytes(mx.array([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision(dtype: mx.Dtype) -> None:
    assert to_bytes(mx.array([-1, 0, 1], dtype=dtype)).tolist() == [0, 128, 255]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_keeps_every_level(tmp_path: Path, channels: int, mode: str) -> None:
    x = random_images((5, 7, channels))
    save_image(tmp_path / "a picture.png", x)
    with Image.open(tmp_path / "a picture.png") as picture:
        assert picture.mode == mode
        assert np.array_equal(np.array(picture).reshape(5, 7, channels), to_bytes(x))


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.tiff", "a.PNG"])
def test_other_kinds(tmp_path: Path, name: str) -> None:
    check_image_path(tmp_path / name)
    save_image(tmp_path / name, random_images((8, 8, 3)))
    with Image.open(tmp_path / name) as picture:
        assert picture.size == (8, 8)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_that_overflowed_is_an_error_and_no_file(tmp_path: Path) -> None:
    x = mx.array([[[0.0, float("nan"), 1.0]]])
    with pytest.raises(ValueError, match="not finite"):
        save_image(tmp_path / "a.png", x)
    assert list(tmp_path.iterdir()) == []


def test_refuses_other_endings_and_folders(tmp_path: Path) -> None:
    for name in ("a.txt", "a", "a.safetensors"):
        with pytest.raises(ValueError, match="ending; wanted one of a picture file"):
            check_image_path(tmp_path / name)
    with pytest.raises(ValueError, match="no such folder"):
        check_image_path(tmp_path / "missing" / "a.png")


def test_refuses_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\)"):
        save_image(tmp_path / "a.png", mx.zeros((1, 2, 2)))


# Writing: 16 bits, options, metadata


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_of_16_bits(tmp_path: Path, channels: int) -> None:
    levels = np.random.RandomState(0).randint(0, 65536, (5, 7, channels)).astype(np.uint16)
    save_image(tmp_path / "a.png", mx.array(levels.astype(np.float32) / 32767.5 - 1), bits=16, record={"model": "tiny"})
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text["model"] == "tiny"
        high_bytes = np.array(picture)
    if channels == 1:
        assert np.array_equal(high_bytes, levels[..., 0])
    else:
        assert np.array_equal(high_bytes, levels >> 8)  # Pillow reads no more of them
    assert np.array_equal(png_samples((tmp_path / "a.png").read_bytes()), levels)


def png_samples(data: bytes) -> np.ndarray:
    """The 16-bit samples of a PNG whose rows are stored as differences to the row above, from the format's text."""
    chunks, i = [], 8
    while i < len(data):
        length, kind = struct.unpack(">I4s", data[i : i + 8])
        assert (
            zlib.crc32(data[i + 4 : i + 8 + length]) == struct.unpack(">I", data[i + 8 + length : i + 12 + length])[0]
        )
        chunks.append((kind, data[i + 8 : i + 8 + length]))
        i += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", dict(chunks)[b"IHDR"][:10])
    assert depth == 16
    channels = {0: 1, 2: 3, 6: 4}[colour]
    rows = np.frombuffer(zlib.decompress(dict(chunks)[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 2).all()
    return np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(-1).view(">u2").reshape(height, width, channels)


def test_16_bits_are_for_png(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.jpg: .jpg ending; pictures of 16 bits are written as .png"):
        save_image(tmp_path / "a.jpg", random_images((4, 4, 3)), bits=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.png", "a16.png", "a.jpg", "a.webp", "a.tiff"])
def test_model_and_source_are_recorded(tmp_path: Path, name: str) -> None:
    record = {"model": "/models/my model", "source": "fotos/été 中.jpg"}
    save_image(tmp_path / name, random_images((8, 8, 3)), bits=16 if "16" in name else 8, record=record)
    with Image.open(tmp_path / name) as picture:
        if picture.format == "PNG":
            picture.load()
            assert {key: picture.text[key] for key in record} == record
            assert picture.text["Software"].startswith("mlx_vae ")
        else:
            exif = picture.getexif()
            assert exif[0x0131].startswith("mlx_vae ")
            assert exif[0x010E].encode("latin-1").decode() == "model: /models/my model, source: fotos/été 中.jpg"


def test_quality_and_lossless(tmp_path: Path) -> None:
    x = random_images((64, 64, 3))
    for kind in ("jpg", "webp"):
        save_image(tmp_path / f"good.{kind}", x, quality=98)
        save_image(tmp_path / f"small.{kind}", x, quality=20)
        assert (tmp_path / f"small.{kind}").stat().st_size < (tmp_path / f"good.{kind}").stat().st_size / 2
    save_image(tmp_path / "lossless.webp", x, lossless=True)
    with Image.open(tmp_path / "lossless.webp") as picture:
        assert np.array_equal(np.array(picture), to_bytes(x))


# Reading


def levels(picture: Picture) -> np.ndarray:
    assert picture.values.dtype == np.float32
    return np.rint((picture.values.astype(np.float64) + 1) * 127.5).astype(int)


def random_levels(*shape: int) -> np.ndarray:
    return np.random.RandomState(1).randint(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "ppm", "webp", "jp2"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (13, 21)])
def test_colours_are_read_exactly(tmp_path: Path, ending: str, shape: tuple[int, int]) -> None:
    pixels = random_levels(*shape, 3)
    lossless = {"webp": {"lossless": True, "exact": True}}
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", **lossless.get(ending, {}))
    picture = load_image(tmp_path / f"a.{ending}")
    assert np.array_equal(levels(picture), pixels)
    assert picture.notices == []


@pytest.mark.parametrize("ending", ["jpg", "avif"])
def test_lossy_kinds(tmp_path: Path, ending: str) -> None:
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    pixels = np.full((13, 21, 3), (200, 100, 50), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", quality=98)
    assert np.abs(levels(load_image(tmp_path / f"a.{ending}")) - pixels).max() <= 3


def test_heic(tmp_path: Path) -> None:
    pixels = np.full((64, 80, 3), (200, 100, 50), np.uint8)
    if not importlib.util.find_spec("pillow_heif"):
        (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(64))
        with pytest.raises(ValueError, match=r"a.heic: HEIC pictures need an extra: pip install 'mlx-vae\[heif\]'"):
            load_image(tmp_path / "a.heic")
        return
    load_image_of(tmp_path / "a.png", Image.new("RGB", (1, 1)))  # has Pillow know of HEIC
    Image.fromarray(pixels).save(tmp_path / "a.heic", quality=95)
    picture = load_image(tmp_path / "a.heic")
    assert np.abs(levels(picture) - pixels).max() <= 3
    assert picture.notices == []


def load_image_of(path: Path, image: Image.Image, **options: Any) -> Picture:
    image.save(path, **options)
    return load_image(path)


GREYS = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_greyscale_and_one_bit(tmp_path: Path) -> None:
    assert np.array_equal(levels(load_image_of(tmp_path / "l.png", Image.fromarray(GREYS)))[..., 1], GREYS)
    bits = Image.fromarray(GREYS > 99)
    assert bits.mode == "1"
    assert np.array_equal(levels(load_image_of(tmp_path / "1.png", bits))[..., 2], (GREYS > 99) * 255)


def test_16_bit_greyscale_keeps_its_bits(tmp_path: Path) -> None:
    wide = np.random.RandomState(0).randint(0, 65536, (9, 11)).astype(np.uint16)
    for name in ("a.png", "a.tiff"):
        values = load_image_of(tmp_path / name, Image.fromarray(wide)).values
        assert values.shape == (9, 11, 3)
        assert np.array_equal(np.rint((values[..., 0].astype(np.float64) + 1) * 32767.5), wide)


def test_float_greyscale(tmp_path: Path) -> None:
    values = np.random.RandomState(0).uniform(0, 1, (9, 11)).astype(np.float32)
    read = load_image_of(tmp_path / "a.tiff", Image.fromarray(values)).values[..., 0]
    assert np.allclose(read, values * 2 - 1, atol=1e-6)
    with pytest.raises(ValueError, match=r"a picture of values from -.* wanted 0 to 1"):
        load_image_of(tmp_path / "b.tiff", Image.fromarray(values - 0.5))
    with pytest.raises(ValueError, match=r"a picture of values from nan"):
        load_image_of(tmp_path / "c.tiff", Image.fromarray(values * np.nan))


def test_palette(tmp_path: Path) -> None:
    colours = random_levels(256, 3)
    image = Image.fromarray(GREYS)
    image.putpalette(colours.tobytes())
    for name in ("a.png", "a.gif"):
        assert np.array_equal(levels(load_image_of(tmp_path / name, image)), colours[GREYS])


def test_palette_with_transparency(tmp_path: Path) -> None:
    colours = random_levels(256, 3)
    image = Image.fromarray(GREYS)
    image.putpalette(colours.tobytes())
    picture = load_image_of(tmp_path / "a.png", image, transparency=7)
    colours[7] = 255
    assert np.array_equal(levels(picture), colours[GREYS])
    assert picture.notices == ["is transparent; composited on #ffffff"]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited(tmp_path: Path, mode: str) -> None:
    pixels = random_levels(13, 21, len(mode))
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for background, colour in (("white", (255, 255, 255)), ("#0a6414", (10, 100, 20))):
        picture = load_image(tmp_path / "a.png", background=background)
        alpha = pixels[..., -1:] / 255
        wanted = pixels[..., :-1] * alpha + np.array(colour) * (1 - alpha)
        assert np.abs(levels(picture) - wanted).max() <= 1
        assert picture.notices == [f"is transparent; composited on #{bytes(colour).hex()}"]
    pixels[..., -1] = 255
    picture = load_image_of(tmp_path / "opaque.png", Image.fromarray(pixels))
    assert np.array_equal(levels(picture)[..., 0], pixels[..., 0])
    assert picture.notices == []


def test_transparent_colour(tmp_path: Path) -> None:
    pixels = random_levels(13, 21, 3)
    pixels[3, 4] = 1, 2, 3
    picture = load_image_of(tmp_path / "a.png", Image.fromarray(pixels), transparency=(1, 2, 3))
    pixels[3, 4] = 255
    assert np.array_equal(levels(picture), pixels)


def test_cmyk(tmp_path: Path) -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 0] = 255  # cyan above, black below
    ink[8:, :, 3] = 255
    for name in ("a.tiff", "a.jpg"):
        read = levels(load_image_of(tmp_path / name, Image.fromarray(ink, mode="CMYK")))
        assert np.abs(read[2, 2] - (0, 255, 255)).max() <= 3
        assert np.abs(read[13, 13]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tiff"])
def test_exif_orientation(tmp_path: Path, orientation: int, ending: str) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 250, 20, 20  # red at the top left, blue at the bottom right
    upright[8:, 16:] = 20, 20, 250
    # What a camera stores, by the definition of the tag: which side of the scene its row 0 and its column 0 show.
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: upright.transpose(1, 0, 2)[::-1],  # right, top
        7: upright.transpose(1, 0, 2)[::-1, ::-1],  # right, bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    picture = load_image_of(tmp_path / f"a.{ending}", image, exif=exif, **({"quality": 98} if ending == "jpg" else {}))
    assert picture.values.shape == upright.shape
    assert np.abs(levels(picture)[4::8, 4::8] - upright[4::8, 4::8]).max() <= 12
    assert picture.notices == []


def test_damaged_exif(tmp_path: Path) -> None:
    picture = load_image_of(tmp_path / "a.jpg", Image.new("RGB", (8, 8), "red"), exif=b"Exif\x00\x00MM\x00*\xff\xff")
    assert np.abs(levels(picture) - (255, 0, 0)).max() <= 3


# Colour profiles: built here from their definitions, by the ICC's text and not by the library that reads them


P3_PRIMARIES = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
SRGB_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
D65, D50 = np.array([0.95047, 1.0, 1.08883]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Linear RGB -> XYZ under D50."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
    xyz = columns * np.linalg.solve(columns, D65)
    return np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ D65)) @ BRADFORD @ xyz


def profile(primaries: tuple[tuple[float, float], ...] | None) -> bytes:
    """An ICC profile with sRGB's tone curve: of RGB with these primaries, or of greys."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0) + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78), b"wtpt": xyz_tag(D50)}
    if primaries is None:
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip((b"r", b"g", b"b"), to_xyz(primaries).T, strict=True):
            tags[letter + b"XYZ"] = xyz_tag(column)
            tags[letter + b"TRC"] = curve
    table, body = b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    space = b"GRAY" if primaries is None else b"RGB "
    header = struct.pack(">IIIII", 132 + len(table) + len(body), 0, 0x04200000, 0x6D6E7472, 0)[:16] + space + b"XYZ "
    header += bytes(12) + b"acsp" + bytes(28) + fixed(*D50) + bytes(48)
    assert len(header) == 128
    return header + struct.pack(">I", len(tags)) + table + body


def xyz_tag(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def srgb_rendering(pixels: np.ndarray, primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Levels of RGB with these primaries -> levels of sRGB, in float64."""
    encoded = pixels / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    linear = linear @ (np.linalg.inv(to_xyz(SRGB_PRIMARIES)) @ to_xyz(primaries)).T
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpg", "rgba.png", "p.png"])
def test_wide_gamut_is_converted(tmp_path: Path, kind: str) -> None:
    pixels = random_levels(32, 32, 3)
    path, options = tmp_path / f"a.{kind}", {"icc_profile": profile(P3_PRIMARIES)}
    if kind == "jpg":
        pixels[:] = 220, 60, 40
        options["quality"] = 100
    image = Image.fromarray(pixels)
    if kind == "rgba.png":
        image.putalpha(255)
    if kind == "p.png":
        image = image.quantize(256)
        pixels = np.array(image.convert("RGB"))
    if kind == "webp":
        options["lossless"] = True
    picture = load_image_of(path, image, **options)
    assert np.abs(levels(picture) - srgb_rendering(pixels, P3_PRIMARIES)).max() <= 2
    assert np.abs(levels(picture) - pixels.astype(int)).max() > 10
    assert picture.notices == []


def test_srgb_profiles_change_nothing(tmp_path: Path) -> None:
    pixels = random_levels(32, 32, 3)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(levels(load_image_of(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=own)), pixels)
    picture = load_image_of(tmp_path / "b.png", Image.fromarray(pixels), icc_profile=profile(SRGB_PRIMARIES))
    assert np.abs(levels(picture) - pixels).max() <= 1


def test_grey_profile(tmp_path: Path) -> None:
    picture = load_image_of(tmp_path / "a.png", Image.fromarray(GREYS), icc_profile=profile(None))
    assert np.abs(levels(picture) - GREYS[..., None]).max() <= 1
    assert picture.notices == []


@pytest.mark.parametrize("data", [b"nonsense" * 40, profile(None), profile(P3_PRIMARIES)[:200]])
def test_profiles_that_can_not_be_used(tmp_path: Path, data: bytes) -> None:
    pixels = random_levels(8, 8, 3)
    picture = load_image_of(tmp_path / "a.png", Image.fromarray(pixels), icc_profile=data)
    assert np.array_equal(levels(picture), pixels)
    assert picture.notices == ["its colour profile can't be used; taken as sRGB"]


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for name in ("a.gif", "a.png", "a.webp", "a.tiff"):
        options: dict[str, Any] = {"lossless": True} if name == "a.webp" else {}
        picture = load_image_of(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
        assert np.array_equal(levels(picture)[0, 0], (255, 0, 0))
        assert picture.notices == ["holds 3 pictures; the first is taken"]


def test_the_ending_does_not_decide(tmp_path: Path) -> None:
    pixels = random_levels(5, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", format="PNG")
    picture = load_image(tmp_path / "a.jpg")
    assert np.array_equal(levels(picture), pixels)
    assert picture.notices == ["is a PNG file, whatever its ending says"]


def test_resize_and_max_side(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 30), (200, 100, 50)).save(path)
    assert load_image(path, max_side=20).values.shape == (10, 20, 3)
    assert load_image(path, max_side=100).values.shape == (30, 60, 3)
    assert load_image(path, max_side=1).values.shape == (1, 1, 3)
    assert load_image(path, resize=(20, 10)).notices == []
    stretched = load_image(path, resize=(16, 24))
    assert np.array_equal(levels(stretched), np.broadcast_to((200, 100, 50), (24, 16, 3)))
    assert stretched.notices == ["60x30 is stretched to 16x24"]
    wide = Image.fromarray(np.full((30, 60), 30000, np.uint16))
    wide.save(path)
    assert np.allclose(load_image(path, max_side=20).values, 30000 / 32767.5 - 1, atol=1e-6)


@pytest.mark.parametrize("height", [1, 2, 5, 8, 9])
def test_padding_mirrors_right_and_bottom(height: int) -> None:
    values = np.random.RandomState(0).uniform(-1, 1, (height, 3, 3)).astype(np.float32)
    padded = pad_to_multiple(values, 8)
    assert padded.shape == (-(-height // 8) * 8, 8, 3)
    mirrored = np.concatenate([values, values[::-1]] * 8)[: len(padded)]
    assert np.array_equal(padded, np.concatenate([mirrored, mirrored[:, ::-1]] * 2, axis=1)[:, :8])


# What can't be read


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.new("1", (2000, 1000)).save(path)
    for limit in (1_500_000, 100_000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for action in ("error", "ignore"):
            with warnings.catch_warnings():
                warnings.simplefilter(action)
                with pytest.raises(ValueError, match=r"a.png: too large .*2000.*MAX_IMAGE_PIXELS"):
                    load_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path).values.shape == (1000, 2000, 3)


def test_damaged_files_are_sentences(tmp_path: Path) -> None:
    image = Image.fromarray(random_levels(40, 40, 3))
    for kind in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        image.save(tmp_path / f"whole.{kind}")
        whole = (tmp_path / f"whole.{kind}").read_bytes()
        path = tmp_path / f"a.{kind}"
        for content in (b"", b"\0" * 99, b"no picture", whole[: len(whole) // 2], whole[:20], b"<svg/>"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=rf"a.{kind}: (the file is empty|not a )"):
                load_image(path)
    with pytest.raises(ValueError, match=r"missing.png: no such file"):
        load_image(tmp_path / "missing.png")


def test_an_unknown_background_is_no_fault_of_the_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^unknown color"):
        load_image(tmp_path / "missing.png", background="no colour")
