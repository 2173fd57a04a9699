"""A rescaled model, written for torch, is the original function to diffusers."""

from __future__ import annotations

from pathlib import Path

import diffusers
import mlx.core as mx
import pytest
import torch
from models import SMALL, inflated, random_images, random_latents, random_model, relative_error
from reference import from_torch, reference_model, to_torch

from mlx_vae import AutoencoderKL, precision
from mlx_vae.convert import convert

pytestmark = pytest.mark.parity


@torch.no_grad()
def test_rescaled_to_diffusers_is_the_original(tmp_path: Path) -> None:
    vae = random_model(SMALL)
    precision.rescale(vae, (2.0**-7, 2.0**3, 2.0**-9, 2.0**5))
    vae.save_pretrained(tmp_path / "rescaled")
    convert(tmp_path / "rescaled", tmp_path / "torch", to="diffusers")
    written = diffusers.AutoencoderKL.from_pretrained(tmp_path / "torch")
    original = reference_model(SMALL)
    z, x = random_latents((1, 5, 7, 4)), random_images((1, 20, 28, 3))
    decoded, expected = (from_torch(model.decode(to_torch(z)).sample) for model in (written, original))
    assert relative_error(decoded, expected) < 1e-6
    encoded, expected = (from_torch(model.encode(to_torch(x)).latent_dist.mean) for model in (written, original))
    assert relative_error(encoded, expected) < 1e-6
    assert relative_error(vae.decode(z).sample, from_torch(original.decode(to_torch(z)).sample)) < 1e-5


@pytest.mark.parametrize("exponent", [8, 12, 16, 18])
@torch.no_grad()
def test_float16_is_near_diffusers_in_float32(exponent: int, tmp_path: Path) -> None:
    inflated(SMALL, 2.0**exponent).save_pretrained(tmp_path / "inflated")
    convert(tmp_path / "inflated", tmp_path / "torch", to="diffusers")
    convert(tmp_path / "inflated", tmp_path / "half", dtype=mx.float16)
    half = AutoencoderKL.from_pretrained(tmp_path / "half")
    reference = diffusers.AutoencoderKL.from_pretrained(tmp_path / "torch")
    z = random_latents((1, 5, 7, 4))
    assert half.dtype == mx.float16
    assert relative_error(half.decode(z).sample, from_torch(reference.decode(to_torch(z)).sample)) < 5e-3
