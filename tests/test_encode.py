"""The encode command, run as a user runs it, on single pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import SMALL, random_model, relative_error
from pictures import random_picture
from PIL import Image

from mlx_vae import AutoencoderKL, AutoencoderKLConfig, decode, encode
from mlx_vae.encode import Settings, encode_files, main
from mlx_vae.images import load_image, pad_to_multiple
from mlx_vae.latents import load_latents, read_metadata


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "a picture.png"
    random_picture(18, 27).save(path)
    return path


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_the_mode_scaled_is_the_default(tmp_path: Path, model: Path, picture: Path) -> None:
    assert run(picture, "-o", tmp_path / "z.safetensors", "--model", model) == 0
    latents = load_latents(tmp_path / "z.safetensors")
    vae = AutoencoderKL.from_pretrained(model)
    x = mx.array(pad_to_multiple(load_image(picture).values, 4)[None])
    assert latents.values.shape == (1, 5, 7, 4)
    assert mx.allclose(latents.values, vae.scale(vae.encode(x).latent_dist.mode()), atol=1e-6)
    assert (latents.height, latents.width, latents.scaled, latents.own) == (18, 27, True, True)
    assert latents.model == str(model)
    assert latents.record["source"] == "a picture.png"
    assert run(picture, "-o", tmp_path / "raw.safetensors", "--model", model, "--unscaled") == 0
    raw = load_latents(tmp_path / "raw.safetensors")
    assert raw.scaled is False
    assert mx.allclose(vae.scale(raw.values), latents.values, atol=1e-6)


def test_samples_depend_on_the_seed_and_the_name(tmp_path: Path, model: Path, picture: Path) -> None:
    other = tmp_path / "other.png"
    other.write_bytes(picture.read_bytes())

    def sampled(path: Path, *flags: str) -> mx.array:
        assert run(path, "-o", tmp_path / "z.safetensors", "--model", model, *flags) == 0
        return load_latents(tmp_path / "z.safetensors").values

    first = sampled(picture, "--sample", "--seed", "7")
    assert not mx.array_equal(first, sampled(picture))
    assert mx.array_equal(first, sampled(picture, "--sample", "--seed", "7"))
    assert not mx.array_equal(first, sampled(picture, "--sample", "--seed", "8"))
    assert not mx.array_equal(first, sampled(other, "--sample", "--seed", "7"))
    assert mx.array_equal(sampled(picture, "--sample"), sampled(picture, "--sample", "--seed", "0"))
    noise = first - sampled(picture)
    assert mx.abs(noise).max().item() > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 3), (4, 4), (18, 27), (33, 64)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_the_picture_comes_back_in_its_size(tmp_path: Path, model: Path, size: tuple[int, int], mode: str) -> None:
    image = random_picture(*size)
    image = Image.fromarray(np.full(size, 40000, np.uint16)) if mode == "I;16" else image.convert(mode)
    source = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(source)
    assert run(source, "-o", tmp_path / "z.safetensors", "--model", model) == 0
    assert decode.main([str(tmp_path / "z.safetensors"), "-o", str(tmp_path / "back.png")]) == 0
    with Image.open(tmp_path / "back.png") as back:
        assert back.size == size[::-1]
        assert back.text["source"] == source.name
        assert back.text["model"] == str(model)


def test_an_upright_photo_comes_back_upright(tmp_path: Path, model: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    random_picture(20, 33).save(tmp_path / "a.jpg", exif=exif)
    assert run(tmp_path / "a.jpg", "-o", tmp_path / "z.safetensors", "--model", model) == 0
    latents = load_latents(tmp_path / "z.safetensors")
    assert (latents.height, latents.width) == (33, 20)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(tmp_path: Path, model: Path, picture: Path, dtype: str) -> None:
    for name in ("float32", dtype):
        assert run(picture, "-o", tmp_path / f"{name}.safetensors", "--model", model, "--dtype", name) == 0
    exact, rough = (load_latents(tmp_path / f"{name}.safetensors").values for name in ("float32", dtype))
    assert rough.dtype == getattr(mx, dtype)
    assert mx.allclose(rough.astype(mx.float32), exact, atol=0.1)


def test_tile(tmp_path: Path, model: Path, picture: Path) -> None:
    for name, flags in (("whole", []), ("tiled", ["--tile"])):
        assert run(picture, "-o", tmp_path / f"{name}.safetensors", "--model", model, *flags) == 0
    whole, tiled = (load_latents(tmp_path / f"{name}.safetensors").values for name in ("whole", "tiled"))
    assert whole.shape == tiled.shape
    assert not mx.array_equal(whole, tiled)


def test_max_memory(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random_picture(600, 400).save(tmp_path / "a.png")
    output = tmp_path / "z.safetensors"
    arguments = (tmp_path / "a.png", "-o", output, "--model", model, "--max-memory")
    assert run(*arguments, "1MB") == 1
    assert "a.png: max_memory is 1.00MB: 1 x 600 x 400 needs at least" in capsys.readouterr().err
    assert run(*arguments, "none") == 2
    assert not output.exists()
    vae = AutoencoderKL.from_pretrained(model)
    least = vae.encode_memory((1, 600, 400, 3)).least
    assert run(*arguments, str(least)) == 0
    bounded = load_latents(output).values
    assert run(*arguments[:-1]) == 0
    assert relative_error(bounded, load_latents(output).values) < 1e-5
    with pytest.raises(ValueError, match="exclude each other"):
        Settings(tile=True, max_memory="4GB")


def test_sizes_and_background(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    for name, flags in (("clear", ["--background", "red", "--max-side", "10"]), ("red", ["--resize", "10x5"])):
        assert run(tmp_path / f"{name}.png", "-o", tmp_path / f"{name}.safetensors", "--model", model, *flags) == 0
    assert "clear.png: is transparent; composited on #ff0000" in capsys.readouterr().err
    clear, red = (load_latents(tmp_path / f"{name}.safetensors") for name in ("clear", "red"))
    assert (clear.height, clear.width) == (5, 10)
    assert mx.array_equal(clear.values, red.values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "-o", "out"], "missing.png: no such file or folder"),
        (["empty", "-o", "out"], "empty: holds no file that ends in"),
        (["a.png", "b.png", "-o", "out.safetensors"], "out.safetensors: one file for 2 pictures; name a folder"),
        (["a.png", "-o", "no/such/out.safetensors"], "no such folder as no/such"),
        (["a.png", "-o", "b.png"], "b.png: is a file; wanted a folder"),
        (["a.png", "a.bmp", "-o", "out"], "a.png and a.bmp would both be written to out/a.safetensors; rename one"),
        (["a.png", "sub/A.png", "-o", "out"], "a.png and sub/A.png would both be written to out/A.safetensors"),
        (["a.png", "-o", "out", "--model", "no-such-model"], "no-such-model"),
        (["a.png", "-o", "out", "--background", "blurple"], "unknown color specifier: 'blurple'"),
        (["a.png", "-o", "out", "--batch-size", "0"], "must be 1 or more"),
        (["a.png", "-o", "out", "--max-side", "0"], "must be 1 or more"),
        (["a.png", "-o", "out", "--resize", "0x5"], "must be 1 or more"),
        (["a.png", "-o", "out", "--seed", "5"], "--seed is for --sample"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    tmp_path: Path,
    model: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "sub").mkdir()
    for name in ("a.png", "b.png", "a.bmp", "sub/A.png"):
        random_picture(4, 4).save(name)
    before = sorted(tmp_path.rglob("*"))
    assert run("--model", model, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", ["10", "10x", "x10", "-1x5", "axb", "10 x 10"])
def test_sizes_are_spelled_one_way(picture: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(picture, "-o", "out", "--model", "m", f"--resize={size}")
    assert "is no WIDTHxHEIGHT, such as 512x768" in capsys.readouterr().err


def test_a_model_of_other_channels_is_refused(tmp_path: Path, picture: Path) -> None:
    random_model(type(SMALL)(**{**SMALL.__dict__, "in_channels": 1})).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match=r"grey: takes pictures of 1 channels; picture files give 3"):
        encode_files([picture], tmp_path / "out", tmp_path / "grey")
    assert not (tmp_path / "out").exists()


def test_latents_that_overflow_are_a_failure(
    tmp_path: Path, model: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = AutoencoderKL.from_pretrained(model)
    vae.encoder.conv_out.bias = vae.encoder.conv_out.bias + 6e4  # what float16 still holds, but not their sum
    vae.quant_conv.weight = mx.ones_like(vae.quant_conv.weight)
    vae.save_pretrained(tmp_path / "hot")
    arguments = [picture, "-o", tmp_path / "z.safetensors", "--model", tmp_path / "hot", "--dtype", "float16"]
    with pytest.warns(RuntimeWarning, match="float16 overflows"):
        assert run(*arguments) == 1
    assert "a picture.png: its latents are not finite" in capsys.readouterr().err
    assert not (tmp_path / "z.safetensors").exists()


def test_a_bad_picture_alone(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    assert run(tmp_path / "a.png", "-o", tmp_path / "z.safetensors", "--model", model) == 1
    error = capsys.readouterr().err
    assert "a.png: not a picture of a kind that can be read" in error
    assert "0 encoded, 0 already done, 1 failed" in error


def test_no_room_left_stops_the_run(
    tmp_path: Path, model: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, "save_latents", full)
    assert run(picture, "-o", tmp_path / "out", "--model", model) == 2
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_name_that_is_too_long_is_a_failure_of_one(tmp_path: Path, model: Path, picture: Path) -> None:
    long = tmp_path / ("n" * 250 + ".png")
    long.write_bytes(picture.read_bytes())
    report = encode_files([long, picture], tmp_path / "out", model)
    assert (report.encoded, report.failed) == (1, 1)
    assert "too long" in report.failures[0]


def test_metadata_is_read_from_whole_files_alone(tmp_path: Path, model: Path, picture: Path) -> None:
    path = tmp_path / "z.safetensors"
    encode_files([picture], path, model, Settings(seed=3))
    metadata = read_metadata(path)
    assert metadata is not None
    assert metadata["posterior"] == "sample, seed 3"
    whole = path.read_bytes()
    for length in (*range(0, len(whole), 41), len(whole) - 1):
        path.write_bytes(whole[:length])
        assert read_metadata(path) is None
    path.write_bytes(whole + b"x")
    assert read_metadata(path) is None
    mx.save_safetensors(str(path), {"latents": mx.zeros((1, 2, 3, 4))})
    assert read_metadata(path) is None


def test_as_a_module(tmp_path: Path, model: Path, picture: Path) -> None:
    command = [sys.executable, "-m", "mlx_vae.encode", str(picture), "-o", str(tmp_path / "out"), "--model", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    assert "1 encoded, 0 already done, 0 failed" in done.stderr
    done = subprocess.run([*command[:3], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--unscaled" in done.stdout


def test_patchified_latents(tmp_path: Path) -> None:
    """FLUX.2's, whose scaled latents are patches: pictures are padded to whole ones."""
    config = AutoencoderKLConfig(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, scaling_factor=1.0, patch_size=(2, 2)
    )
    AutoencoderKL(config).save_pretrained(tmp_path / "flux2")
    random_picture(9, 14).save(tmp_path / "a.png")
    for name, flags, shape in (("scaled", [], (1, 3, 4, 12)), ("unscaled", ["--unscaled"], (1, 6, 8, 3))):
        z, back = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.png"
        assert run(tmp_path / "a.png", "-o", z, "--model", tmp_path / "flux2", *flags) == 0
        assert load_latents(z).values.shape == shape
        assert decode.main([str(z), "-o", str(back)]) == 0
    with Image.open(tmp_path / "scaled.png") as scaled, Image.open(tmp_path / "unscaled.png") as unscaled:
        assert scaled.size == unscaled.size == (14, 9)
        assert np.abs(np.array(scaled).astype(int) - np.array(unscaled)).max() <= 1


def test_the_family_is_recorded_for_decode(tmp_path: Path, picture: Path) -> None:
    """A single file that fits several families: what --family has said once, decode finds in the latent file."""
    config = AutoencoderKLConfig(block_out_channels=(32, 32))
    random_model(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    file = tmp_path / "model" / "model.safetensors"
    z = tmp_path / "z.safetensors"
    assert run(picture, "-o", z, "--model", file) == 2
    assert run(picture, "-o", z, "--model", file, "--family", "ldm") == 0
    assert load_latents(z).family == "ldm"
    assert decode.main([str(z), "-o", str(tmp_path / "back.png")]) == 0


def test_names_may_be_any_bytes(tmp_path: Path, model: Path) -> None:
    try:
        path = tmp_path / os.fsdecode(b"caf\xe9.png")
        random_picture(5, 5).save(path)
    except OSError:
        pytest.skip("this file system wants names to be text")
    report = encode_files([tmp_path], tmp_path / "out", model, Settings(seed=0))
    assert (report.encoded, report.failures) == (1, [])
    (latents,) = map(load_latents, (tmp_path / "out").iterdir())
    assert latents.record["source"] == r"caf\xe9.png"
