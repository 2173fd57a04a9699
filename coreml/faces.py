"""What goes into a package and what comes out: names, shapes, and the arithmetic between them and the model.

Scales are folded into the first and the last convolution and offsets are single additions, so they cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vae import AutoencoderKL

PARTS = ("decoder", "encoder")
IOS = ("tensor", "image")
PACKAGES = {"decoder": "VAEDecoder.mlpackage", "encoder": "VAEEncoder.mlpackage"}
PICTURE_LEVELS = 127.5
"""[-1, 1] -> [0, 255] is x * 127.5 + 127.5."""


@dataclass(frozen=True)
class Face:
    """One part of a model behind one kind of input and output.

    | io     | decoder                                | encoder                              |
    |--------|----------------------------------------|--------------------------------------|
    | tensor | z (unscaled) -> image in [-1, 1]       | x in [-1, 1] -> moments              |
    | image  | latents of the diffusion model -> RGB  | RGB -> latents of the diffusion model |
    """

    vae: AutoencoderKL
    part: str
    io: str

    def __post_init__(self) -> None:
        channels = self.vae.config.out_channels if self.part == "decoder" else self.vae.config.in_channels
        if self.io == "image" and channels not in (1, 3):
            raise ValueError(f"--io image: the {self.part} has {channels} picture channels; a picture has 1 or 3")
        if self.io == "image" and self.vae.config.patch_size:
            raise ValueError("--io image: this model's latents are patches, which only --io tensor leaves to the app")

    @property
    def input(self) -> str:
        return {"decoder": {"tensor": "z", "image": "latents"}, "encoder": {"tensor": "x", "image": "image"}}[
            self.part
        ][self.io]

    @property
    def output(self) -> str:
        return {"decoder": {"tensor": "image", "image": "image"}, "encoder": {"tensor": "moments", "image": "latents"}}[
            self.part
        ][self.io]

    @property
    def takes_picture(self) -> bool:
        return (self.part, self.io) == ("encoder", "image")

    @property
    def gives_picture(self) -> bool:
        return (self.part, self.io) == ("decoder", "image")

    def input_shape(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(1, C, H, W) for pictures of that size. Raises ValueError unless the sides are multiples of the factor."""
        config = self.vae.config
        if width % config.factor or height % config.factor or min(width, height) < 1:
            raise ValueError(f"--size {width}x{height}: both sides must be positive multiples of {config.factor}")
        if self.part == "encoder":
            return 1, config.in_channels, height, width
        return 1, config.latent_channels, height // config.factor, width // config.factor

    def offset(self) -> np.ndarray | None:
        """What is added to the input before the first convolution, (C,); None for nothing."""
        if self.io == "tensor":
            return None
        if self.takes_picture:
            return np.full(self.vae.config.in_channels, -PICTURE_LEVELS)
        shift, scale = _latent_space(self.vae)
        return shift * scale if np.any(shift) else None

    def modules(self) -> list[tuple[str, nn.Module]]:
        """The model's modules in the order of computation, scales folded in."""
        vae = AutoencoderKL(self.vae.config)
        vae.update(self.vae.parameters())
        vae.set_dtype(mx.float32)
        if self.part == "decoder":
            names = ["post_quant_conv", "decoder"] if "post_quant_conv" in vae else ["decoder"]
            first, last = vae.get("post_quant_conv", vae.decoder.conv_in), vae.decoder.conv_out
        else:
            names = ["encoder", "quant_conv"] if "quant_conv" in vae else ["encoder"]
            first, last = vae.encoder.conv_in, vae.get("quant_conv", vae.encoder.conv_out)
        if self.io == "image":
            shift, scale = map(mx.array, _latent_space(vae))
            if self.part == "decoder":
                first.weight = first.weight / scale
                _after(last, PICTURE_LEVELS, PICTURE_LEVELS)
            else:
                first.weight = first.weight / PICTURE_LEVELS
                last.weight, last.bias = (values[: vae.config.latent_channels] for values in (last.weight, last.bias))
                _after(last, scale, -shift * scale)
        return [(name, vae[name]) for name in names]

    def reference(self, inputs: np.ndarray) -> np.ndarray:
        """What the MLX model gives for the package's input, NCHW both."""
        vae = self.vae
        x = mx.array(inputs.transpose(0, 2, 3, 1))  # NCHW -> NHWC
        if self.part == "decoder":
            y = vae.decode(vae.unscale(x) if self.io == "image" else x).sample
            y = mx.clip(mx.round((y + 1) * PICTURE_LEVELS), 0, 255) if self.gives_picture else y
        else:
            posterior = vae.encode(x / PICTURE_LEVELS - 1 if self.takes_picture else x).latent_dist
            y = vae.scale(posterior.mean) if self.io == "image" else posterior.moments
        return np.array(y.astype(mx.float32)).transpose(0, 3, 1, 2)  # NHWC -> NCHW

    def example(self, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
        """An input to try the package on: normal latents of the diffusion model, or a picture of soft noise."""
        random = np.random.default_rng(seed)
        if self.part == "encoder":
            picture = np.clip(np.rint(127.5 + 60 * random.standard_normal(shape)), 0, 255).astype(np.float32)
            return picture if self.takes_picture else picture / np.float32(PICTURE_LEVELS) - 1
        latents = random.standard_normal(shape).astype(np.float32)
        if self.io == "image" or self.vae.config.patch_size:
            return latents
        return np.array(self.vae.unscale(mx.array(latents.transpose(0, 2, 3, 1)))).transpose(0, 3, 1, 2)


def _after(conv: nn.Conv2d, scale: mx.array | float, shift: mx.array | float) -> None:
    """Makes `conv(x)` what `conv(x) * scale + shift` was, channel by channel."""
    scale = mx.broadcast_to(scale, conv.bias.shape)
    conv.weight = conv.weight * scale[:, None, None, None]
    conv.bias = conv.bias * scale + shift


def _latent_space(vae: AutoencoderKL) -> tuple[np.ndarray, np.ndarray]:
    """shift and scale, each (C,): diffusion latents are (z - shift) * scale."""
    C = vae.config.latent_channels
    shift = vae.unscale(mx.zeros((1, 1, 1, C)))
    scale = vae.scale(shift + 1)
    return np.array(shift).reshape(C), np.array(scale).reshape(C)
