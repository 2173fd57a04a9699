"""How large the input of each GroupNorm is, measured by running the MLX model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vae import AutoencoderKL, layers

SIDE = 16
"""Of the calibration latents; deviations hardly depend on it."""
EXPONENTS = (-14, 10)
"""Powers of two that float16 holds as normal numbers; above the last, eps outweighs the variance anyway."""


def norm_prescales(vae: AutoencoderKL) -> dict[str, np.ndarray]:
    """For each GroupNorm by its name, the powers of two (C,) that bring every group's largest deviation near 1.

    Raises ValueError where the model itself gives values that are not finite.
    """
    config = vae.config
    deviations: dict[int, np.ndarray] = {}
    keys = mx.random.split(mx.random.key(0), 2)
    with _watching_norms(deviations):
        pictures = mx.stack([_smooth(keys[0], config.factor * SIDE, config.in_channels)])
        z = vae.encode(pictures).latent_dist.mean
        noise = mx.random.normal(z.shape, key=keys[1])
        mx.eval(vae.decode(z).sample, vae.decode(noise if config.patch_size else vae.unscale(noise)).sample)
    prescales = {}
    for name, module in vae.named_modules():
        if isinstance(module, nn.GroupNorm):
            deviation = deviations[id(module)]
            if not np.all(np.isfinite(deviation)):
                raise ValueError(f"{name}: the model's own activations are not finite")
            exponents = -np.rint(np.log2(np.maximum(deviation, 2.0 ** -EXPONENTS[1])))
            scale = np.exp2(np.clip(exponents, *EXPONENTS))
            prescales[name] = np.repeat(scale, module.dims // module.num_groups)
    return prescales


@contextmanager
def _watching_norms(deviations: dict[int, np.ndarray]) -> Iterator[None]:
    """Keeps the largest deviation that each group of each norm has seen, by the norm's id."""
    normalize = layers.normalize

    def watched(norm: nn.GroupNorm, x: mx.array) -> mx.array:
        N, H, W, C = x.shape
        groups = x.astype(mx.float32).reshape(N, H * W, norm.num_groups, C // norm.num_groups)
        deviation = np.array(mx.max(mx.std(groups, axis=(1, 3)), axis=0))
        deviations[id(norm)] = np.maximum(deviations.get(id(norm), 0), deviation)
        return normalize(norm, x)

    layers.normalize = watched
    try:
        yield
    finally:
        layers.normalize = normalize


def _smooth(key: mx.array, side: int, channels: int) -> mx.array:
    """A picture (side, side, channels) in [-1, 1] with what photographs have: broad areas, edges and fine grain."""
    coarse = mx.random.normal((8, 8, channels), key=key)
    y = mx.linspace(0, 7.999, side).astype(mx.int32)
    fine = 0.1 * mx.random.normal((side, side, channels), key=key)
    return mx.clip(0.5 * coarse[y][:, y] + fine, -1, 1)
