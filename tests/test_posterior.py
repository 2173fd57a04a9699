"""DiagonalGaussianDistribution."""

from __future__ import annotations

import math

import mlx.core as mx
import pytest
from models import random_latents

from mlx_vae import DiagonalGaussianDistribution


def standard_normal() -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(mx.zeros((2, 3, 5, 8)))


def test_samples_have_the_mean_and_the_deviation() -> None:
    moments = mx.concatenate([mx.full((1, 64, 64, 2), 3.0), mx.full((1, 64, 64, 2), 2 * math.log(0.5))], axis=-1)
    sample = DiagonalGaussianDistribution(moments).sample(mx.random.key(0))
    assert sample.shape == (1, 64, 64, 2)
    assert mx.mean(sample).item() == pytest.approx(3, abs=0.03)
    assert mx.std(sample).item() == pytest.approx(0.5, abs=0.03)


def test_the_key_decides() -> None:
    posterior = standard_normal()
    first, again, other = (posterior.sample(mx.random.key(seed)) for seed in (1, 1, 2))
    assert mx.array_equal(first, again)
    assert not mx.array_equal(first, other)
    assert not mx.array_equal(posterior.sample(), posterior.sample())


def test_mode_is_the_mean() -> None:
    posterior = DiagonalGaussianDistribution(random_latents((1, 2, 3, 8)))
    assert mx.array_equal(posterior.mode(), posterior.mean)


def test_logvar_is_clamped() -> None:
    moments = mx.array([0.0, 0.0, -1e4, 1e4]).reshape(1, 1, 1, 4)
    posterior = DiagonalGaussianDistribution(moments)
    assert posterior.logvar.tolist() == [[[[-30.0, 20.0]]]]
    assert mx.all(mx.isfinite(posterior.var)).item()


def test_kl_and_nll_of_the_standard_normal() -> None:
    posterior = standard_normal()
    assert posterior.kl().tolist() == [0.0, 0.0]
    assert posterior.kl(posterior).tolist() == [0.0, 0.0]
    assert mx.allclose(posterior.nll(mx.zeros((2, 3, 5, 4))), mx.full((2,), 60 * 0.5 * math.log(2 * math.pi)))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_sums_do_not_overflow(dtype: mx.Dtype) -> None:
    posterior = DiagonalGaussianDistribution(mx.full((1, 64, 64, 8), 10.0, dtype=dtype))
    kl = posterior.kl()
    assert kl.dtype == mx.float32
    assert kl.item() == pytest.approx(64 * 64 * 4 * 0.5 * (100 + math.exp(10) - 1 - 10), rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (2, 3, 4)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"wanted \(N, h, w, 2C\)"):
        DiagonalGaussianDistribution(mx.zeros(shape))
