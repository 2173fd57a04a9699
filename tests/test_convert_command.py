"""python -m mlx_vae.convert, and the functions under it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FLUX2, FOREIGN, PLAIN, assert_loaded, checkpoint_of, weights_of
from writers import write_config, write_safetensors, write_zip

from mlx_vae import AutoencoderKL
from mlx_vae.config import FAMILIES
from mlx_vae.convert import CheckpointError, command, convert, inspect


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_config(tmp_path / "config.json", PLAIN)
    others = FOREIGN | {"first_stage_model.loss.logvar": np.zeros((), np.float32)}
    return write_zip(tmp_path / "bundle.ckpt", checkpoint_of(PLAIN, "ldm", "first_stage_model.", others), nested=True)


def test_converts(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", str(bundle), "--mlx-path", str(tmp_path / "out" / "mlx")]) == 0
    assert_loaded(AutoencoderKL.from_pretrained(tmp_path / "out" / "mlx"), weights_of(PLAIN))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("[INFO] ") for line in lines)
    card = (tmp_path / "out" / "mlx" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mlx\ntags:\n- mlx\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mlx"]


def test_as_a_module_into_the_default_folder(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    run = [sys.executable, "-m", "mlx_vae.convert", "--hf-path", str(bundle), "--dtype", "bfloat16"]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(run, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert AutoencoderKL.from_pretrained(tmp_path / "elsewhere" / "mlx_model").dtype == mx.bfloat16
    again = subprocess.run(
        run, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 2
    assert "error: mlx_model: it exists already; remove it, or name another with --mlx-path\n" in again.stderr
    assert "Traceback" not in again.stderr


def test_inspects(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert command.main(["--model", str(bundle), "--inspect"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.split("\nconfiguration")[0].splitlines())
    said = {key: value.strip() for key, value in said.items()}
    assert said["layout"] == "ldm"
    assert said["family"] == f"none that is known: {tmp_path / 'config.json'} says so"
    assert said["parameters"] == f"{sum(value.size for value in weights_of(PLAIN).values()):,}"
    assert said["dtypes"] == f"float32 ({len(weights_of(PLAIN))} tensors)"
    assert said["left out"] == "first_stage_model.loss.* (1)"
    assert said["foreign"] == "model.diffusion_model.* (1), cond_stage_model.* (1), model_ema.* (1)"
    inspection = inspect(bundle)
    assert inspection.config == PLAIN
    assert set(inspection.foreign) == set(FOREIGN)


def test_a_failure_leaves_nothing(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = checkpoint_of(PLAIN, "ldm")
    tensors["quant_conv.bias"][0] = np.inf
    write_safetensors(bundle, tensors)
    before = sorted(tmp_path.rglob("*"))
    assert command.main(["--model", str(bundle), "--mlx-path", str(tmp_path / "out" / "mlx")]) == 2
    assert "quant_conv.bias: some values are not finite" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_run_leaves_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_card", interrupted)
    assert command.main(["--model", str(bundle), "--mlx-path", str(tmp_path / "mlx")]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle.ckpt", "config.json"]


def test_refusals(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it exists already"):
        convert(bundle, tmp_path)
    with pytest.raises(CheckpointError, match="gguf: not a layout to write; there are mlx, diffusers, ldm"):
        convert(bundle, tmp_path / "out", to="gguf")
    with pytest.raises(CheckpointError, match="a revision is for models on the hub"):
        convert(bundle, tmp_path / "out", revision="main")
    with pytest.raises(CheckpointError, match="a subfolder or a variant is for folders"):
        convert(bundle, tmp_path / "out", variant="fp16")
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", str(bundle), "--family", "sd4"])
    assert not (tmp_path / "out").exists()


def test_saved_models_load_back(tmp_path: Path) -> None:
    for config in (PLAIN, FLUX2):
        write_config(tmp_path / "config.json", config)
        layout = "flux2" if config is FLUX2 else "ldm"
        vae = AutoencoderKL.from_single_file(write_safetensors(tmp_path / "a.pt", checkpoint_of(config, layout)))
        vae.save_pretrained(tmp_path / "saved")
        assert_loaded(AutoencoderKL.from_pretrained(tmp_path / "saved"), weights_of(config))


def test_flux2_scaling_is_inverted() -> None:
    vae = AutoencoderKL(FLUX2)
    weights = weights_of(FLUX2)
    vae.bn.running_mean, vae.bn.running_var = mx.array(weights["bn.running_mean"]), mx.array(weights["bn.running_var"])
    z = mx.random.normal((1, 4, 6, FLUX2.latent_channels), key=mx.random.key(0))
    scaled = vae.scale(z)
    assert scaled.shape == (1, 2, 3, 4 * FLUX2.latent_channels)
    C, y, x = 2, 1, 0  # channel 2 of the lower left pixel of each patch
    channel = 4 * C + 2 * y + x
    std = (weights["bn.running_var"][channel] + FLUX2.batch_norm_eps) ** 0.5
    wanted = (np.array(z)[0, 1::2, 0::2, C] - weights["bn.running_mean"][channel]) / std
    assert np.allclose(np.array(scaled)[0, :, :, channel], wanted, atol=1e-6)
    assert mx.allclose(vae.unscale(scaled), z, atol=1e-6)
    assert "bn" not in vae.trainable_parameters() or not vae.trainable_parameters()["bn"]
    with pytest.raises(ValueError, match=r"z: shape \(1, 5, 6, 4\), wanted a height and a width that are multiples"):
        vae.scale(mx.zeros((1, 5, 6, 4)))


def test_full_sd1_converts_in_seconds(tmp_path: Path) -> None:
    weights = {name: value.shape for name, value in AutoencoderKL(FAMILIES["sd"]).named_parameters().items()}
    draw = np.random.default_rng(0)
    tensors = {}
    for name, shape in weights.items():
        value = draw.standard_normal(shape, np.float32)
        tensors[name] = np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if value.ndim == 4 else value
    path = write_safetensors(tmp_path / "vae.safetensors", tensors)
    start = time.process_time()  # of ours alone, whatever else the machine does
    convert(path, tmp_path / "mlx", family="sd")
    assert time.process_time() - start < 3
    assert json.loads((tmp_path / "mlx" / "config.json").read_text())["scaling_factor"] == 0.18215
