"""The examples: their measures against scikit-image and by hand, and runs of them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import SMALL, random_images, random_latents, random_model
from pictures import random_picture
from PIL import Image

from mlx_vae.latents import Latents, save_latents

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


reconstruct, pipeline, benchmark = example("reconstruct"), example("pipeline"), example("benchmark")


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


ADAPTER = """
import numpy as np

class Nearest:
    def decode(self, z):
        print("what an adapter prints is not the result")
        return np.repeat(np.repeat(z[..., :3], 4, axis=1), 4, axis=2)

def load(config, dtype):
    assert (config["latent_channels"], dtype) == (4, "float32")
    return Nearest()
"""


def test_benchmark(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nearest.py").write_text(ADAPTER)
    (tmp_path / "broken.py").write_text("def load(config, dtype):\n    raise MemoryError('no room')\n")
    adapters = [str(tmp_path / "nearest.py"), str(tmp_path / "broken.py")]
    options = ["--model", model, "--sizes", "32", "64", "--contenders", "ours", "--repeats", "1", "--parts", "decode"]
    assert benchmark.main(["-o", str(tmp_path / "out" / "b"), *options, "--adapter", *adapters]) == 0

    report = json.loads((tmp_path / "out" / "b.json").read_text())
    assert report["config"]["block_out_channels"] == [8, 12, 16]
    assert report["platform"]["mlx"]
    found = [(m["size"], m["contender"], m.get("error")) for m in report["measurements"]]
    failed = "MemoryError: no room"
    assert found == [
        (size, *rest) for size in (32, 64) for rest in (("ours", None), ("nearest", None), ("broken", failed))
    ]
    for m in report["measurements"]:
        assert "error" in m or (m["seconds"] > 0 and m["peak_bytes"] >= m["before_bytes"] > 1 << 20)
    assert report["measurements"][0]["mlx_peak_bytes"] > 0
    table = capsys.readouterr().out
    assert f"decode    64 broken       failed: {failed}" in table
    if importlib.util.find_spec("matplotlib"):
        with Image.open(tmp_path / "out" / "b.png") as chart:
            assert chart.width > 500


@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("contender", ["ours", "bounded", "tiled", "whole"])
def test_contenders(contender: str, part: str) -> None:
    """Each gives what the model gives, but for the tiles."""
    x = benchmark.random_input(SMALL, part, 32)
    result = getattr(benchmark.CONTENDERS[contender](SMALL.to_dict(), "float32"), part)(x)
    vae = benchmark.random_model(SMALL, mx.float32)
    wanted = np.array(vae.decode(mx.array(x)).sample if part == "decode" else vae.encode(mx.array(x)).latent_dist.mean)
    assert result.shape == wanted.shape
    assert np.allclose(result, wanted, atol=1e-4) == (contender != "tiled")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("class C: encode = None\n    return C()", None),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import sys; sys.exit(0)", "exit status 0, without a result"),
        ("import time; time.sleep(60)", "not done after 1 s"),
        ("class C: decode = lambda self, z: z\n    return C()", "gave shape (1, 8, 8, 4), wanted (1, 32, 32, 3)"),
    ],
)
def test_benchmark_goes_on(tmp_path: Path, body: str, error: str | None) -> None:
    adapter = tmp_path / "adapter.py"
    adapter.write_text(f"def load(config, dtype):\n    {body}\n")
    job = {"contender": "adapter", "adapter": str(adapter), "part": "decode", "size": 32, "dtype": "float32"}
    result = benchmark.measure(job | {"config": SMALL.to_dict()}, timeout=1 if "sleep" in body else 60)
    assert result is None if error is None else error in result["error"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--contenders", "ours", "theirs"], "no contender is called 'theirs'"),
        (["--sizes", "32", "33"], "size 33: wanted a multiple of 4"),
        (["--sizes", "0"], "size 0: wanted a multiple of 4"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--adapter", "nowhere.py"], "nowhere.py: no such file"),
        (["--adapter", "no_load.py"], "no_load.py: it defines no function load(config, dtype)"),
        (["--adapter", "no_python.py"], "no_python.py: not Python"),
        (["--adapter", "ours.py"], "ours.py: there is a contender 'ours' already"),
        (["--plot", "no_load.py"], "no_load.py: not a report of this program"),
    ],
)
def test_benchmark_of_bad_input(
    tmp_path: Path,
    model: str,
    options: list[str],
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("no_load.py").write_text("import nothing_of_that_name\n")
    Path("no_python.py").write_text("def load(\n")
    Path("ours.py").write_text(ADAPTER)
    assert benchmark.main(["-o", "out/b", "--model", model, *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert error in lines[0]
    assert not Path("out").exists()


def test_benchmark_interrupted(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = iter([{"seconds": 1.5, "peak_bytes": 2 << 30, "before_bytes": 1 << 30, "mlx_peak_bytes": None}])

    def measure(job: dict[str, Any], timeout: float | None) -> dict[str, Any]:
        for result in results:
            return result
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "measure", measure)
    assert benchmark.main(["-o", str(tmp_path / "b"), "--model", model, "--contenders", "ours"]) == 130
    assert len(json.loads((tmp_path / "b.json").read_text())["measurements"]) == 1
    captured = capsys.readouterr()
    assert "decode   256 ours            1.500" in captured.out
    assert "interrupted" in captured.err


def test_benchmark_table() -> None:
    def measured(contender: str, seconds: float) -> dict[str, Any]:
        at = {"part": "decode", "size": 64, "contender": contender, "seconds": seconds}
        return at | {"peak_bytes": 3 << 29, "before_bytes": 1 << 30, "mlx_peak_bytes": None}

    times = {"ours": (2, 1, 9), "other": (6, 5, 4)}
    measurements = [measured(name, seconds) for name, all_seconds in times.items() for seconds in all_seconds]
    rows = benchmark.table({"contenders": list(times), "measurements": measurements}).splitlines()[1:]
    assert [" ".join(row.split()) for row in rows] == [
        "decode 64 ours 2.000 1.000 9.000 1.00 1.50 1.00 -",
        "decode 64 other 5.000 4.000 6.000 2.50 1.50 1.00 -",
    ]


def test_plot_seams(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot_seams = example("plot_seams")
    save_latents(
        tmp_path / "large.safetensors", Latents(random_latents((1, 5, 9, 4)), scaled=True, height=20, width=36)
    )
    save_latents(
        tmp_path / "small.safetensors", Latents(random_latents((1, 4, 3, 4)), scaled=True, height=16, width=12)
    )
    for latents in ([], ["--latents", str(tmp_path / "large.safetensors")]):
        assert plot_seams.main([str(tmp_path / "seams.png"), "--model", model, *latents]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert "tiles of 16 px: the largest" in lines[0]
        assert "of 255 levels" in lines[0]
        assert "of a level" in lines[1]
        with Image.open(tmp_path / "seams.png") as picture:
            assert picture.mode == "P"
        (tmp_path / "seams.png").unlink()
    arguments = [str(tmp_path / "seams.png"), "--model", model, "--latents", str(tmp_path / "small.safetensors")]
    assert plot_seams.main(arguments) == 2
    assert "fits into a tile of 16 px" in capsys.readouterr().err
    assert not (tmp_path / "seams.png").exists()
