"""Picture files."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from models import random_images
from PIL import Image

from mlx_vae.images import check_image_path, save_image, to_bytes


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
