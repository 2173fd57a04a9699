"""The examples: their measures against scikit-image and by hand, and runs of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from models import SMALL, random_images, random_latents, random_model
from pictures import random_picture
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


reconstruct, pipeline = example("reconstruct"), example("pipeline")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "small"
    random_model(SMALL).save_pretrained(folder)
    return str(folder)


def noisy_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    a = np.array(random_images((height, width, 3)))
    return a, np.clip(a + 0.3 * np.array(random_latents((height, width, 3), seed=1)), -1, 1)


def test_psnr() -> None:
    a = np.zeros((4, 5, 3))
    assert reconstruct.psnr(a, a) == float("inf")
    assert reconstruct.psnr(a, a + 0.2) == pytest.approx(20.0)  # a tenth of the range


def test_ssim_by_hand() -> None:
    a, b = np.full((11, 12, 3), -1.0), np.full((11, 12, 3), 1.0)
    assert reconstruct.ssim(a, a) == pytest.approx(1)
    assert reconstruct.ssim(a, b) == pytest.approx(0.01**2 / (1 + 0.01**2))
    assert np.isnan(reconstruct.ssim(a[:10], b[:10]))


def test_reconstruct(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos" / "below").mkdir(parents=True)
    random_picture(30, 50).save(tmp_path / "photos" / "a.png")
    random_picture(20, 10).save(tmp_path / "photos" / "below" / "a.bmp")
    arguments = [str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--model", model]
    assert reconstruct.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == [
        "a.png",
        "below/a.bmp",
        "mean of 2",
        str(tmp_path / "out/side-by-side.png"),
    ]
    with Image.open(tmp_path / "out" / "a.png.png") as picture:
        assert picture.size == (50, 30)
    with Image.open(tmp_path / "out" / "side-by-side.png") as picture:
        assert picture.size == (2 * 50 + 8, 30 + 8 + 20)
    (tmp_path / "photos" / "bad.png").write_bytes(b"")
    assert reconstruct.main(arguments) == 1
    assert "bad.png: the file is empty" in capsys.readouterr().err


def test_the_denoiser_of_a_world_of_patches() -> None:
    style = random_latents((1, 6, 7, 4))
    denoise = pipeline.patch_denoiser(style)
    assert mx.allclose(denoise(style, 0.01), style, atol=1e-5)
    mean = mx.mean(style, axis=(1, 2), keepdims=True)
    assert mx.allclose(denoise(style, 1e4), mx.broadcast_to(mean, style.shape), atol=1e-3)


def test_the_schedule_falls_to_zero() -> None:
    sigmas = pipeline.schedule(10, strength=1.0)
    assert sigmas[0] == pytest.approx(pipeline.SIGMA_MAX)
    assert sigmas[-2:] == [pytest.approx(pipeline.SIGMA_MIN), 0]
    assert sorted(sigmas, reverse=True) == sigmas
    assert pipeline.schedule(1, strength=0.0) == [pytest.approx(pipeline.SIGMA_MIN), 0]


def test_scaled_once_each_way() -> None:
    vae = random_model(SMALL)
    x = random_images((1, 8, 12, 3))
    there_and_back = pipeline.to_pictures(vae, pipeline.to_latents(vae, x))
    assert mx.allclose(there_and_back, vae(x).sample, atol=1e-4)


def test_pipeline(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    random_picture(18, 27).save(tmp_path / "photo.png")
    random_picture(20, 20, seed=1).save(tmp_path / "style.png")
    out = tmp_path / "out.png"
    arguments = [str(tmp_path / "photo.png"), "--style", str(tmp_path / "style.png"), "-o", str(out), "--model", model]
    assert pipeline.main([*arguments, "--steps", "5"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (27, 18)
    assert pipeline.main([*arguments, "--strength", "2"]) == 2
    assert "--strength is from 0 to 1" in capsys.readouterr().err
