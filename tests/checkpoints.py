"""Small checkpoints of every layout, with the parameters that they must load as."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from models import random_weights
from writers import Tensors, as_torch, respelled

from mlx_vae import AutoencoderKL, AutoencoderKLConfig

PLAIN = AutoencoderKLConfig(block_out_channels=(4, 8, 8), norm_num_groups=2, latent_channels=3)
FLUX1 = AutoencoderKLConfig(
    block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False
)
FLUX2 = AutoencoderKLConfig(
    block_out_channels=(4, 8),
    decoder_block_out_channels=(2, 6),
    norm_num_groups=2,
    patch_size=(2, 2),
    scaling_factor=1.0,
)
LEVEL_ATTENTION = AutoencoderKLConfig(
    block_out_channels=(4, 8, 8),
    norm_num_groups=2,
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
)
FOREIGN = {
    "model.diffusion_model.input_blocks.0.0.weight": np.zeros((4, 4, 3, 3), np.float32),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": np.zeros((1, 77), np.int64),
    "model_ema.decay": np.zeros((), np.float32),
}

# name: configuration, layout, prefix of the names, tensors of other models
LAYOUTS = {
    "diffusers": (PLAIN, "diffusers", "", {}),
    "old attention": (PLAIN, "old", "", {}),
    "ldm": (PLAIN, "ldm", "", {}),
    "first_stage_model": (PLAIN, "ldm", "first_stage_model.", FOREIGN),
    "vae": (PLAIN, "ldm", "vae.", FOREIGN),
    "diffusers names in a bundle": (PLAIN, "diffusers", "vae.", FOREIGN),
    "flux": (FLUX1, "ldm", "", {}),
    "flux2": (FLUX2, "flux2", "", {"bn.num_batches_tracked": np.zeros((), np.int64)}),
    "level attention": (LEVEL_ATTENTION, "ldm", "", {}),
    "first-stage training": (PLAIN, "ldm", "", {"loss.logvar": np.zeros((), np.float32)}),
}


def weights_of(config: AutoencoderKLConfig, seed: int = 0) -> Tensors:
    """Parameters in MLX's axis order."""
    weights = random_weights(AutoencoderKL(config), seed)
    return {name: np.abs(value) + 0.1 if "running_var" in name else value for name, value in weights.items()}


def checkpoint_of(config: AutoencoderKLConfig, layout: str, prefix: str = "", others: Tensors | None = None) -> Tensors:
    tensors = respelled(as_torch(weights_of(config)), config, layout)
    return (others or {}) | {prefix + name: value for name, value in tensors.items()}


def assert_loaded(vae: AutoencoderKL, weights: Tensors, dtype: mx.Dtype = mx.float32) -> None:
    found = vae.named_parameters()
    assert found.keys() == weights.keys()
    for name, value in found.items():
        assert value.dtype == dtype, name
        assert mx.array_equal(value, mx.array(weights[name]).astype(dtype)), name
