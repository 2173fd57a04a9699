"""Random models that come out the same everywhere, for the tests and for the golden vectors."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from mlx_vae import AutoencoderKL, AutoencoderKLConfig

SD1 = AutoencoderKLConfig(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
FLUX1 = AutoencoderKLConfig(
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=1024,
    latent_channels=16,
    scaling_factor=0.3611,
    shift_factor=0.1159,
    use_quant_conv=False,
    use_post_quant_conv=False,
)
SMALL = AutoencoderKLConfig(
    block_out_channels=(8, 12, 16),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=4,
    sample_size=16,
)
WIDE = AutoencoderKLConfig(block_out_channels=(64, 96), layers_per_block=1, norm_num_groups=8)
"""Wide enough for Winograd's convolutions."""
SMALL_LATENT = (5, 7)  # h, w: odd, and not the same


def random_config(seed: int) -> AutoencoderKLConfig:
    """Any number of levels, widths, layers, groups and channels; tiles of four latent pixels."""
    choose = random.Random(seed)
    levels = choose.randint(1, 4)
    groups = choose.choice([1, 2, 4])
    types = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
    return AutoencoderKLConfig(
        in_channels=choose.choice([3, 3, 1]),
        out_channels=choose.choice([3, 3, 4]),
        block_out_channels=tuple(groups * choose.randint(2, 6) for _ in range(levels)),
        down_block_types=tuple(choose.choice(types[0]) for _ in range(levels)),
        up_block_types=tuple(choose.choice(types[1]) for _ in range(levels)),
        layers_per_block=choose.randint(1, 3),
        norm_num_groups=groups,
        latent_channels=choose.choice([1, 3, 4, 16]),
        sample_size=4 << (levels - 1),
        use_quant_conv=choose.random() < 0.5,
        use_post_quant_conv=choose.random() < 0.5,
        mid_block_add_attention=choose.random() < 0.7,
    )


def random_latent_shape(config: AutoencoderKLConfig, seed: int) -> tuple[int, int, int, int]:
    """(N, h, w, C) with one to three pictures, an odd side, and h other than w."""
    choose = random.Random(seed)
    height, width = choose.sample([1, 3, 5, 7], 1)[0], choose.sample([2, 4, 6], 1)[0]
    if choose.random() < 0.5:
        height, width = width, height
    return choose.randint(1, 3), height, width, config.latent_channels


def random_weights(vae: AutoencoderKL, seed: int) -> dict[str, np.ndarray]:
    """Weights that keep activations near 1, with norms that are neither ones nor zeros; OHWI, by diffusers' names."""
    draw = np.random.RandomState(seed)  # the one generator of NumPy whose numbers never change
    weights = {}
    for name, value in sorted(vae.named_parameters().items()):
        noise = draw.standard_normal(value.shape).astype(np.float32)
        if "norm" in name:
            weights[name] = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        elif value.ndim == 1:
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise / np.sqrt(np.prod(value.shape[1:]))
    return {name: value.astype(np.float32) for name, value in weights.items()}


def random_model(config: AutoencoderKLConfig, seed: int = 0) -> AutoencoderKL:
    vae = AutoencoderKL(config)
    weights: list[tuple[str, Any]] = [(k, mx.array(v)) for k, v in random_weights(vae, seed).items()]
    vae.update(tree_unflatten(weights))
    mx.eval(vae.parameters())
    return vae


def inflated(config: AutoencoderKLConfig, stream: float, branch: float = 1.0, seed: int = 0) -> AutoencoderKL:
    """A random model with the streams multiplied in its weights, by their names: the same function, but for the eps."""
    vae = random_model(config, seed)
    weights = vae.named_parameters()
    for name, value in weights.items():
        layer = name.rpartition(".")[0]
        if name.startswith(("encoder.", "decoder.")):
            linear = layer.endswith(("conv_shortcut", "samplers.0.conv")) and name.endswith("bias")
            if linear or layer.endswith(("conv_in", "conv2", "to_out.0")):
                weights[name] = value * stream
            elif layer.endswith("conv1"):
                weights[name] = value * branch
    vae.load_weights(list(weights.items()))
    return vae


def random_latents(shape: tuple[int, ...], seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def random_images(shape: tuple[int, ...], seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32))


def relative_error(ours: Any, reference: Any) -> float:
    """The norm of the difference over that of the reference, in float64."""
    ours = np.array(ours.astype(mx.float32) if isinstance(ours, mx.array) else ours, dtype=np.float64)
    reference = np.array(
        reference.astype(mx.float32) if isinstance(reference, mx.array) else reference, dtype=np.float64
    )
    assert ours.shape == reference.shape
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
