"""The answers of diffusers, kept as numbers, so that parity is tested where torch is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from models import random_images, random_latents, random_model, relative_error

from mlx_vae import AutoencoderKLConfig

GOLDEN: Any = mx.load(str(Path(__file__).parent / "data" / "golden.safetensors"), return_metadata=True)
CONFIGS = json.loads(GOLDEN[1]["configs"])


@pytest.mark.parametrize("seed", CONFIGS)
def test_agrees_with_diffusers(seed: str) -> None:
    config = AutoencoderKLConfig.from_dict(CONFIGS[seed])
    expected = {name.partition(".")[2]: value for name, value in GOLDEN[0].items() if name.startswith(f"{seed}.")}
    _, height, width, _ = expected["mean"].shape
    vae = random_model(config, int(seed))
    z = random_latents((1, height, width, config.latent_channels), int(seed))
    x = random_images((1, height * config.factor, width * config.factor, config.in_channels), int(seed))
    posterior = vae.encode(x).latent_dist
    ours = {"decode": vae.decode(z).sample, "mean": posterior.mean, "logvar": posterior.logvar}
    vae.enable_tiling()
    posterior = vae.encode(x).latent_dist
    ours |= {"tiled_decode": vae.decode(z).sample, "tiled_mean": posterior.mean, "tiled_logvar": posterior.logvar}
    errors = {name: relative_error(ours[name], expected[name]) for name in expected}
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5, errors
