"""The decode command, run as a user runs it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from models import random_latents
from PIL import Image
from tqdm import tqdm

from mlx_vae import AutoencoderKL, memory
from mlx_vae.decode import PROGRESS, _show, decode_files, main
from mlx_vae.images import to_bytes
from mlx_vae.latents import Latents, save_latents


@pytest.fixture
def own(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "own latent.safetensors"
    z = random_latents((1, 5, 7, 4))
    save_latents(path, Latents(z, model=str(model), scaled=True, height=18, width=27))
    return path


def picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def expected(model: Path, z: mx.array, scaled: bool = True) -> np.ndarray:
    vae = AutoencoderKL.from_pretrained(model)
    return to_bytes(vae.decode(vae.unscale(z) if scaled else z).sample[0])


def test_a_file_of_our_own_needs_no_flag(tmp_path: Path, model: Path, own: Path) -> None:
    assert main([str(own), "-o", str(tmp_path / "out.png")]) == 0
    assert np.array_equal(picture(tmp_path / "out.png"), expected(model, random_latents((1, 5, 7, 4)))[:18, :27])


def test_a_file_of_others_needs_a_model(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    z = random_latents((1, 5, 7, 4))
    np.save(tmp_path / "z.npy", np.array(z.transpose(0, 3, 1, 2)))
    arguments = [str(tmp_path / "z.npy"), "-o", str(tmp_path / "out.png")]
    assert main(arguments) == 2
    assert "z.npy: does not say which model made it; name one with --model" in capsys.readouterr().err
    assert main([*arguments, "--model", str(model)]) == 0
    assert "z.npy: does not say whether it is scaled; taken as scaled" in capsys.readouterr().err
    assert np.array_equal(picture(tmp_path / "out.png"), expected(model, z))
    assert main([*arguments, "--model", str(model), "--unscaled"]) == 0
    assert "taken as scaled" not in capsys.readouterr().err
    assert np.array_equal(picture(tmp_path / "out.png"), expected(model, z, scaled=False))


def test_a_batch_makes_numbered_pictures(tmp_path: Path, model: Path, own: Path) -> None:
    z = random_latents((10, 2, 3, 4))
    np.save(tmp_path / "batch.npy", np.array(z))
    made = decode_files([own, tmp_path / "batch.npy"], tmp_path / "out.jpg", model=str(model), scaled=False)
    assert [path.name for path in made] == [f"out-{i:02}.jpg" for i in range(1, 12)]
    assert all(path.is_file() for path in made)


def test_a_folder_keeps_the_names(tmp_path: Path, model: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "batch.npy", np.array(random_latents((2, 2, 3, 4))))
    folder = tmp_path / "a new folder"
    arguments = [str(own), str(tmp_path / "batch.npy"), "-o", f"{folder}/", "--model", str(model), "--scaled"]
    for _ in range(2):
        assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        f"{folder}/own latent.png",
        f"{folder}/batch-1.png",
        f"{folder}/batch-2.png",
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["batch-1.png", "batch-2.png", "own latent.png"]
    assert main([str(own), str(own), "-o", str(folder)]) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(tmp_path: Path, own: Path, dtype: str) -> None:
    for name in ("float32", dtype):
        assert main([str(own), "-o", str(tmp_path / f"{name}.png"), "--dtype", name]) == 0
    difference = picture(tmp_path / "float32.png").astype(float) - picture(tmp_path / f"{dtype}.png")
    assert 0 < np.abs(difference).max() < 12


def test_tile(tmp_path: Path, own: Path) -> None:
    for name, flags in (("whole", []), ("tiled", ["--tile"])):
        assert main([str(own), "-o", str(tmp_path / f"{name}.png"), *flags]) == 0
    assert not np.array_equal(picture(tmp_path / "whole.png"), picture(tmp_path / "tiled.png"))


def test_max_memory(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    z = random_latents((1, 200, 150, 4))
    np.save(tmp_path / "z.npy", np.array(z))
    out = tmp_path / "out"
    arguments = [str(tmp_path / "z.npy"), "--model", str(model), "--unscaled", "--max-memory"]
    for wrong, message in (
        ("1MB", "z.npy: max_memory is 1.00MB: 1 x 200 x 150 needs at least"),
        ("much", "wanted bytes"),
    ):
        assert main([*arguments, wrong, "-o", f"{out}/"]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    with pytest.raises(SystemExit):
        main([*arguments, "4GB", "--tile", "-o", f"{out}/"])
    with pytest.raises(ValueError, match="exclude each other"):
        decode_files([tmp_path / "z.npy"], tmp_path / "a.png", model=str(model), tile=True, max_memory="4GB")
    vae = AutoencoderKL.from_pretrained(model)
    assert main([*arguments, memory.describe(vae.decode_memory(z.shape).least), "-o", f"{out}/"]) == 0
    exact = to_bytes(vae._decode(z)[0]).astype(int)
    assert np.abs(picture(out / "z.png") - exact).max() <= 1


def test_progress_is_shown_within_a_picture() -> None:
    bar = tqdm(total=3, bar_format=PROGRESS, file=io.StringIO())
    for done, share in ((0, 0.25), (0, 1.0), (1, 0.5), (1, 1.0), (2, 1.0)):
        _show(bar, done, share)
        assert bar.n == done + share
    assert "100%" in str(bar)
    assert "3.0 of 3 pictures" in str(bar)


def test_layout(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    z = random_latents((1, 4, 4, 4))
    np.save(tmp_path / "z.npy", np.array(z))
    arguments = [str(tmp_path / "z.npy"), "-o", str(tmp_path / "out.png"), "--model", str(model), "--scaled"]
    assert main(arguments) == 2
    assert "z.npy: latents of shape (1, 4, 4, 4) may be NCHW or NHWC" in capsys.readouterr().err
    assert main([*arguments, "--layout", "nhwc"]) == 0
    assert np.array_equal(picture(tmp_path / "out.png"), expected(model, z))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.npy", "-o", "out.png"], "missing.npy: no such file"),
        (["{own}", "-o", "out.txt"], "out.txt: .txt ending"),
        (["{own}", "-o", "no/such/folder/out.png"], "no such folder"),
        (["{own}", "-o", "out.png", "--model", "no-such-folder"], "no-such-folder"),
        (["{bad}", "-o", "out.png"], "bad.safetensors: not a readable .safetensors file"),
        (["{own}", "{bad}", "-o", "out.png"], "bad.safetensors: not a readable .safetensors file"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path,
    own: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nothing")
    monkeypatch.chdir(tmp_path)
    assert main([argument.format(own=own, bad=bad) for argument in arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "own latent.safetensors"]


def test_a_picture_that_overflows_is_an_error(
    tmp_path: Path, model: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = AutoencoderKL.from_pretrained(model)
    vae.decoder.conv_out.weight = mx.full(vae.decoder.conv_out.weight.shape, 6e4)
    vae.save_pretrained(tmp_path / "hot")
    arguments = [str(own), "-o", str(tmp_path / "out.png"), "--model", str(tmp_path / "hot"), "--dtype", "float16"]
    with pytest.warns(RuntimeWarning, match="float16 overflows"):
        assert main(arguments) == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_as_a_module(tmp_path: Path, own: Path) -> None:
    command = [sys.executable, "-m", "mlx_vae.decode", str(own), "-o", str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out.png")
    done = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--unscaled" in done.stdout
