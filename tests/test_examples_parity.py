"""The examples' measures against scikit-image's, and the benchmark's torch."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from models import SMALL, random_model, relative_error
from reconstruct import psnr, ssim
from reference import reference_model
from skimage import metrics
from test_examples import benchmark, noisy_pair

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("size", [(11, 11), (33, 48), (64, 21)])
def test_measures_agree(size: tuple[int, int]) -> None:
    a, b = noisy_pair(*size)
    levels_a, levels_b = (a.astype(np.float64) + 1) / 2, (b.astype(np.float64) + 1) / 2
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    reference = metrics.structural_similarity(levels_a, levels_b, data_range=1, **options)
    assert ssim(a, b) == pytest.approx(reference, abs=1e-9)
    reference = metrics.peak_signal_noise_ratio(levels_a, levels_b, data_range=1)
    assert psnr(a, b) == pytest.approx(reference, abs=1e-4)


def test_torch_computes_the_same() -> None:
    contender, vae = benchmark.Torch(SMALL.to_dict(), "float32"), random_model(SMALL)
    contender.model.load_state_dict(reference_model(SMALL).state_dict())
    z, x = (benchmark.random_input(SMALL, part, 32) for part in ("decode", "encode"))
    assert relative_error(contender.decode(z), vae.decode(mx.array(z)).sample) < 1e-5
    assert relative_error(contender.encode(x), vae.encode(mx.array(x)).latent_dist.mean) < 1e-5


def test_torch_is_measured() -> None:
    job = {"contender": "torch", "adapter": None, "part": "decode", "size": 32, "dtype": "bfloat16"}
    assert benchmark.measure(job | {"config": SMALL.to_dict()}, timeout=60)["seconds"] > 0
