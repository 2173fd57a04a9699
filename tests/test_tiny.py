"""The embedded model, the drawn pictures that it was trained on, and its training."""

from __future__ import annotations

from pathlib import Path

import mlx_vae  # isort: skip  (before mlx: see blas.py)

import mlx.core as mx
import numpy as np
import pytest
from drawn_pictures import draw
from evaluate_tiny import fit_pca, from_blocks, psnr, through, to_blocks
from mlx.utils import tree_flatten
from train_tiny import Training, crops

from mlx_vae import AutoencoderKL, AutoencoderKLConfig

SIZE = 128
CONFIG = AutoencoderKLConfig(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, latent_channels=2)


@pytest.fixture(scope="module")
def tiny() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained("tiny", dtype=mx.float32)


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """(6, 128, 128, 3) uint8, none of them trained on."""
    return np.stack([draw(number, SIZE) for number in range(6)])


def test_tiny_is_small_and_half_precision() -> None:
    weights = AutoencoderKL.from_pretrained("tiny").named_parameters()
    assert {value.dtype for value in weights.values()} == {mx.float16}
    assert (Path(mlx_vae.__file__).parent / "tiny" / "model.safetensors").stat().st_size <= 2_000_000


def test_tiny_has_the_topology_of_stable_diffusion(tiny: AutoencoderKL) -> None:
    config = tiny.config
    assert config.factor == 8
    assert config.latent_channels <= 16
    assert config.mid_block_add_attention
    assert config.use_quant_conv
    assert config.use_post_quant_conv


def test_tiny_keeps_drawn_pictures(tiny: AutoencoderKL, drawn: np.ndarray) -> None:
    assert np.mean([psnr(picture, through(tiny, picture)) for picture in drawn]) >= 28


def test_scaled_latents_have_deviation_one(tiny: AutoencoderKL, drawn: np.ndarray) -> None:
    z = tiny.encode(mx.array(drawn, dtype=mx.float32) / 127.5 - 1).latent_dist.mode()
    assert mx.std(tiny.scale(z)).item() == pytest.approx(1, abs=0.1)


def test_a_drawing_is_its_number() -> None:
    assert draw(5, 32).shape == (32, 32, 3)
    assert draw(5, 32).dtype == np.uint8
    assert np.array_equal(draw(5, 32), draw(5, 32))
    assert not np.array_equal(draw(5, 32), draw(6, 32))


def test_blocks_and_back(drawn: np.ndarray) -> None:
    picture = drawn[0, :64]
    assert np.array_equal(from_blocks(to_blocks(picture), picture.shape), picture)
    assert np.array_equal(fit_pca(drawn[:1], coefficients=192)(picture), picture)


def batch(step: int) -> mx.array:
    pictures = np.random.RandomState(0).randint(0, 256, (3, 256, 256, 3)).astype(np.uint8)
    return crops(pictures, count=2, size=16, seed=(step, 0))


def run(training: Training, until: int) -> None:
    while training.step < until:
        assert np.isfinite(training.advance(batch(training.step), mx.distributed.init()))


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    whole = Training(CONFIG, steps=4)
    run(whole, until=4)

    first, second = Training(CONFIG, steps=4), Training(CONFIG, steps=4, seed=1)
    run(first, until=2)
    first.save(tmp_path / "checkpoint.safetensors")
    second.load(tmp_path / "checkpoint.safetensors")
    run(second, until=4)

    for ours, theirs in ((whole.vae.parameters(), second.vae.parameters()), (whole.average, second.average)):
        expected, found = dict(tree_flatten(ours)), dict(tree_flatten(theirs))
        assert expected.keys() == found.keys()
        assert all(mx.array_equal(expected[name], found[name]) for name in expected)


def test_training_learns_and_its_result_loads(tmp_path: Path) -> None:
    training = Training(CONFIG, steps=12)
    x = batch(0)
    errors = [training.advance(x, mx.distributed.init()) for _ in range(12)]
    assert errors[-1] < errors[0]
    pictures = np.random.RandomState(1).randint(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    training.result(pictures).save_pretrained(tmp_path)
    loaded = AutoencoderKL.from_pretrained(tmp_path, dtype=mx.float32)
    z = loaded.encode(mx.array(pictures, dtype=mx.float32) / 127.5 - 1).latent_dist.mode()
    assert mx.std(loaded.scale(z)).item() == pytest.approx(1, abs=0.02)
