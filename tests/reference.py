"""diffusers' AutoencoderKL with the weights of ours, its answers in our axis order. Needs torch and diffusers."""

from __future__ import annotations

import diffusers
import mlx.core as mx
import numpy as np
import torch
from models import random_weights

from mlx_vae import AutoencoderKL, AutoencoderKLConfig

torch.set_num_threads(
    1
)  # small tensors gain nothing from threads, and threads that spin on a busy machine lose minutes


def reference_model(config: AutoencoderKLConfig, seed: int = 0) -> diffusers.AutoencoderKL:
    """The same function as `models.random_model(config, seed)`."""
    fields = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    reference = diffusers.AutoencoderKL(**fields).eval()
    weights = {
        name: torch.from_numpy(value.transpose(0, 3, 1, 2).copy() if value.ndim == 4 else value)  # OHWI -> OIHW
        for name, value in random_weights(AutoencoderKL(config), seed).items()
    }
    reference.load_state_dict(weights, strict=True)
    return reference


def to_torch(x: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(x).transpose(0, 3, 1, 2).copy())  # NHWC -> NCHW


def from_torch(x: torch.Tensor) -> np.ndarray:
    return x.detach().permute(0, 2, 3, 1).contiguous().numpy()  # NCHW -> NHWC


@torch.no_grad()
def answers(reference: diffusers.AutoencoderKL, z: mx.array, x: mx.array) -> dict[str, np.ndarray]:
    posterior = reference.encode(to_torch(x)).latent_dist
    reference.enable_tiling()
    tiled = reference.encode(to_torch(x)).latent_dist
    results = {
        "mean": from_torch(posterior.mean),
        "logvar": from_torch(posterior.logvar),
        "tiled_mean": from_torch(tiled.mean),
        "tiled_logvar": from_torch(tiled.logvar),
        "tiled_decode": from_torch(reference.decode(to_torch(z)).sample),
    }
    reference.disable_tiling()
    return results | {"decode": from_torch(reference.decode(to_torch(z)).sample)}
