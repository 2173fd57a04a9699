"""The examples' measures against scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
from reconstruct import psnr, ssim
from skimage import metrics
from test_examples import noisy_pair

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
