"""How large the input of each GroupNorm is, measured by running the MLX model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vae import AutoencoderKL, precision

EXPONENTS = (-14, 10)
"""Powers of two that float16 holds as normal numbers; above the last, eps outweighs the variance anyway."""


def norm_prescales(vae: AutoencoderKL) -> dict[str, np.ndarray]:
    """For each GroupNorm by its name, the powers of two (C,) that bring every group's largest deviation near 1.

    Raises ValueError where the model itself gives values that are not finite.
    """
    norms = {name: module for name, module in vae.named_modules() if isinstance(module, nn.GroupNorm)}
    deviations: dict[str, np.ndarray] = {}

    def watch(name: str, x: mx.array) -> None:
        N, H, W, C = x.shape
        groups = norms[name].num_groups
        grouped = x.astype(mx.float32).reshape(N, H * W, groups, C // groups)
        deviation = np.array(mx.max(mx.std(grouped, axis=(1, 3)), axis=0))
        deviations[name] = np.maximum(deviations.get(name, 0), deviation)

    with precision.watching_norms(vae, watch):
        precision.run_calibration(vae)
    prescales = {}
    for name, norm in norms.items():
        if not np.all(np.isfinite(deviations[name])):
            raise ValueError(f"{name}: the model's own activations are not finite")
        exponents = -np.rint(np.log2(np.maximum(deviations[name], 2.0 ** -EXPONENTS[1])))
        scale = np.exp2(np.clip(exponents, *EXPONENTS))
        prescales[name] = np.repeat(scale, norm.dims // norm.num_groups)
    return prescales
