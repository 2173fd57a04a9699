"""Latent files: our own and those of others."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from models import random_latents

from mlx_vae.latents import Latents, load_latents, save_latents

OWN = {"model": "tiny", "family": "", "scaled": "true", "height": "30", "width": "50", "format_version": "1"}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_round_trip(tmp_path: Path, dtype: mx.Dtype) -> None:
    path = tmp_path / "a picture.safetensors"
    z = random_latents((2, 4, 7, 16)).astype(dtype)
    save_latents(path, Latents(z, model="tiny", family="flux", scaled=False, height=30, width=50))
    loaded = load_latents(path)
    assert mx.array_equal(loaded.values, z)
    assert loaded.values.dtype == dtype
    assert (loaded.model, loaded.family, loaded.scaled, loaded.height, loaded.width) == ("tiny", "flux", False, 30, 50)
    assert mx.array_equal(loaded.nhwc(16), z)
    assert [path.name for path in tmp_path.iterdir()] == ["a picture.safetensors"]


def test_files_of_others(tmp_path: Path) -> None:
    z = np.random.RandomState(0).standard_normal((4, 5, 6))
    np.save(tmp_path / "z.npy", z)
    np.savez(tmp_path / "z.npz", z.astype(np.float16)[None])
    np.savez_compressed(tmp_path / "two.npz", latents=z, noise=z)
    mx.save_safetensors(str(tmp_path / "z.safetensors"), {"anything": mx.array(z.transpose(1, 2, 0).copy())})
    for name in ("z.npy", "z.npz", "two.npz", "z.safetensors"):
        loaded = load_latents(tmp_path / name)
        assert loaded.model is loaded.scaled is None
        assert loaded.nhwc(4).shape == (1, 5, 6, 4)
        assert mx.allclose(loaded.nhwc(4)[0], mx.array(z.transpose(1, 2, 0).astype(np.float32)), atol=2e-3)


def test_the_channel_count_decides_the_layout() -> None:
    nchw = Latents(mx.zeros((1, 4, 5, 6)), own=False)
    assert nchw.nhwc(4).shape == (1, 5, 6, 4)
    assert nchw.nhwc(6).shape == (1, 4, 5, 6)
    both = Latents(mx.arange(64.0).reshape(1, 4, 4, 4), own=False)
    with pytest.raises(ValueError, match="may be NCHW or NHWC; --layout must say which"):
        both.nhwc(4)
    assert mx.array_equal(both.nhwc(4, "nhwc"), both.values)
    assert mx.array_equal(both.nhwc(4, "nchw"), both.values.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("shape", [(5, 6), (1, 5, 6, 8), (1, 2, 3, 4, 5), (0, 5, 6, 4)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents of shape .*want"):
        Latents(mx.zeros(shape), own=False).nhwc(4)


def test_layout_can_not_contradict_the_channels() -> None:
    with pytest.raises(ValueError, match="the model wants 4 channels"):
        Latents(mx.zeros((1, 4, 5, 6)), own=False).nhwc(4, "nhwc")


@pytest.mark.parametrize("name", ["z.safetensors", "z.npy", "z.npz"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 64, b"not a tensor at all", b"\xff" * 4096, b"PK\x03\x04" + b"x" * 64]
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: "):
        load_latents(tmp_path / name)


@pytest.mark.parametrize("name", ["z.safetensors", "z.npy", "z.npz"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    z = np.zeros((1, 4, 5, 6), dtype=np.float32)
    if name.endswith("safetensors"):
        mx.save_safetensors(str(tmp_path / name), {"latents": mx.array(z)})
    else:
        (np.save if name.endswith("npy") else np.savez)(tmp_path / name, z)
    whole = (tmp_path / name).read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{name}: "):
            load_latents(tmp_path / name)


def test_refuses_pickles(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"not a readable \.npy file"):
        load_latents(tmp_path / "z.npy")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((1, 4, 5, 6), dtype=np.int64), "wanted a floating-point one"),
        (np.zeros((1, 4, 5, 6), dtype=bool), "dtype bool"),
        (np.full((1, 4, 5, 6), np.nan), "not finite"),
        (np.full((1, 4, 5, 6), 1e300), "not finite"),
    ],
)
def test_refuses_other_values(tmp_path: Path, values: np.ndarray, message: str) -> None:
    np.save(tmp_path / "z.npy", values)
    with pytest.raises(ValueError, match=message):
        load_latents(tmp_path / "z.npy")


def test_refuses_several_unnamed_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "z.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(ValueError, match="holds a, b; wanted one array, or one called 'latents'"):
        load_latents(tmp_path / "z.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "2"}, "format_version 2; this version reads 1"),
        ({"scaled": "maybe"}, "incomplete metadata"),
        ({"height": "tall"}, "incomplete metadata"),
    ],
)
def test_refuses_other_metadata(tmp_path: Path, change: dict[str, str], message: str) -> None:
    mx.save_safetensors(str(tmp_path / "z.safetensors"), {"latents": mx.zeros((1, 4, 5, 16))}, OWN | change)
    with pytest.raises(ValueError, match=message):
        load_latents(tmp_path / "z.safetensors")


def test_missing_and_foreign_endings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"z.npy: no such file"):
        load_latents(tmp_path / "z.npy")
    with pytest.raises(ValueError, match=r"\.png ending; latents are read from"):
        load_latents(tmp_path / "z.png")
