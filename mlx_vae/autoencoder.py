"""Encoder, Decoder and AutoencoderKL: the image autoencoder of latent diffusion (Rombach et al., 2022). NHWC."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_vae import convert, layers, memory, precision, slabs
from mlx_vae.blocks import AttentionBlock, DownBlock, MidBlock, UpBlock
from mlx_vae.config import AutoencoderKLConfig
from mlx_vae.memory import Memory
from mlx_vae.posterior import DiagonalGaussianDistribution
from mlx_vae.tiling import Tiling

logger = logging.getLogger(__name__)


class AutoencoderKLOutput(NamedTuple):
    """What `AutoencoderKL.encode` returns."""

    latent_dist: DiagonalGaussianDistribution


class DecoderOutput(NamedTuple):
    """What `AutoencoderKL.decode` returns: pictures (N, H, W, out_channels), about [-1, 1]."""

    sample: mx.array


class Encoder(nn.Module):
    """(N, H, W, in_channels) -> (N, H / factor, W / factor, 2 * latent_channels)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = layers.conv3x3(config.in_channels, widths[0])
        self.down_blocks = [
            DownBlock(
                inner,
                outer,
                config.layers_per_block,
                groups,
                add_attention=block_type == "AttnDownEncoderBlock2D",
                add_downsample=level < len(widths) - 1,
            )
            for level, (inner, outer, block_type) in enumerate(
                zip(widths[:1] + widths[:-1], widths, config.down_block_types, strict=True)
            )
        ]
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = layers.norm(groups, widths[-1])
        self.conv_out = layers.conv3x3(widths[-1], 2 * config.latent_channels)

    def steps(self) -> Iterator[nn.Module]:
        """What runs between conv_in and conv_norm_out: resnets, attention blocks and samplers, in their order."""
        for block in (*self.down_blocks, self.mid_block):
            yield from block.steps()

    def __call__(self, x: mx.array) -> mx.array:
        x = layers.conv(self.conv_in, x)
        for step in self.steps():
            x = step(x)
        return layers.norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class Decoder(nn.Module):
    """(N, h, w, latent_channels) -> (N, h * factor, w * factor, out_channels)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.decoder_widths[::-1], config.norm_num_groups
        self.conv_in = layers.conv3x3(config.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = [
            UpBlock(
                inner,
                outer,
                config.layers_per_block + 1,
                groups,
                add_attention=block_type == "AttnUpDecoderBlock2D",
                add_upsample=level < len(widths) - 1,
            )
            for level, (inner, outer, block_type) in enumerate(
                zip(widths[:1] + widths[:-1], widths, config.up_block_types, strict=True)
            )
        ]
        self.conv_norm_out = layers.norm(groups, widths[-1])
        self.conv_out = layers.conv3x3(widths[-1], config.out_channels)

    def steps(self) -> Iterator[nn.Module]:
        """What runs between conv_in and conv_norm_out: resnets, attention blocks and samplers, in their order."""
        for block in (self.mid_block, *self.up_blocks):
            yield from block.steps()

    def __call__(self, z: mx.array) -> mx.array:
        x = layers.conv(self.conv_in, z)
        for step in self.steps():
            x = step(x)
        return layers.norm_silu_conv(self.conv_norm_out, self.conv_out, x)


class AutoencoderKL(nn.Module):
    """A variational autoencoder for images, equal to diffusers' class of the same name.

    `AutoencoderKL(config)` has random weights; `AutoencoderKL.from_pretrained` loads them.
    """

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, kernel_size=1)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, kernel_size=1)
        if config.patch_size:
            eps, momentum = config.batch_norm_eps, config.batch_norm_momentum
            self.bn = nn.BatchNorm(config.diffusion_channels, eps, momentum, affine=False)
        if config.activation_scales:
            precision.rescale_half(self.encoder, *config.activation_scales[:2])
            precision.rescale_half(self.decoder, *config.activation_scales[2:])
        self.use_slicing = False
        self.tiling: Tiling | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the weights, in which everything is computed and returned."""
        return self.decoder.conv_in.weight.dtype

    def named_parameters(self) -> dict[str, mx.array]:
        """Every parameter under its diffusers name, convolution weights OHWI."""
        return dict(tree_flatten(self.parameters()))

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter under its diffusers name."""
        return {name: value.shape for name, value in self.named_parameters().items()}

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        subfolder: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        family: str | None = None,
        dtype: mx.Dtype | None = None,
        rescale: bool = True,
    ) -> AutoencoderKL:
        """Loads "tiny", a folder, a single file, or a model on the hub ("stabilityai/sd-vae-ft-mse").

        A folder, here or on the hub, is a VAE's own or a whole pipeline's, with `vae/`; `variant` is as "fp16".
        `dtype` defaults to the one on disk (float32 where there are several). In float16 a model with `force_upcast`
        whose activations would overflow is rescaled, exactly (see `precision`), and a notice says so; not so with
        `rescale=False`.
        Raises `convert.CheckpointError` (a ValueError) with all that is missing, unexpected or misshapen.
        """
        checkpoint = convert.open_pretrained(source, subfolder, revision, variant, family)
        return cls.from_checkpoint(checkpoint, dtype, rescale)

    @classmethod
    def from_single_file(
        cls,
        path: str | os.PathLike[str],
        family: str | None = None,
        dtype: mx.Dtype | None = None,
        rescale: bool = True,
    ) -> AutoencoderKL:
        """Loads a `.safetensors`, `.sft`, `.ckpt`, `.pt` or `.bin`: an autoencoder's own, or a diffusion model's.

        A config.json beside it counts. Raises `convert.CheckpointError` (a ValueError), too for a file that fits
        several families: their latents differ in scale, and `family` ("sd", "sdxl" ...) is to say which it is.
        `dtype` and `rescale` are as for `from_pretrained`.
        """
        return cls.from_checkpoint(convert.open_single_file(path, family), dtype, rescale)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: convert.Checkpoint, dtype: mx.Dtype | None = None, rescale: bool = True
    ) -> AutoencoderKL:
        """Loads what `convert.open_pretrained` or `open_single_file` has found; as `from_pretrained`."""
        vae = cls(checkpoint.config)
        shapes = vae.parameter_shapes()
        dtype = dtype or checkpoint.dtype
        if not (dtype == mx.float16 and rescale and vae.config.force_upcast and not vae.config.activation_scales):
            vae.update(tree_unflatten(list(checkpoint.weights(shapes, dtype).items())))
            return vae
        vae.update(tree_unflatten(list(checkpoint.weights(shapes, mx.float32).items())))
        try:
            line = precision.fit(vae)
            precision.cast(vae, mx.float16)
        except ValueError as error:
            raise convert.CheckpointError(f"{checkpoint.parameters.path}: {error}") from None
        if line:
            logger.warning("%s: %s", checkpoint.parameters.path, line)
        return vae

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes `config.json` and `model.safetensors`, which `from_pretrained` loads back bit for bit."""
        convert.save_pretrained(folder, self.config, self.named_parameters())

    # Encoding and decoding

    def encode(
        self,
        x: mx.array,
        return_dict: bool = True,
        max_memory: str | int | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> AutoencoderKLOutput:
        """The posterior of pictures x (N, H, W, in_channels) in [-1, 1]; its latents are (N, H / f, W / f, C).

        `return_dict=False` gives a plain tuple, here and below. `max_memory` and `progress` are as for `decode`.
        Raises ValueError for anything but a floating-point array of that shape with H and W multiples of
        f = `config.factor`.
        """
        x = self._checked_image(x)
        if self.tiling and not self.tiling.covers(x.shape[1] // self.config.factor, x.shape[2] // self.config.factor):
            self._check_exact(max_memory)
            return self.tiled_encode(x, return_dict)
        moments = self._guarded(lambda x: self._quantized(self._run(self.encoder, x, max_memory, progress)), x)
        return _output(AutoencoderKLOutput, DiagonalGaussianDistribution(moments), return_dict)

    def decode(
        self,
        z: mx.array,
        return_dict: bool = True,
        max_memory: str | int | None = None,
        progress: Callable[[float], object] | None = None,
    ) -> DecoderOutput:
        """Latents z (N, h, w, C), unscaled -> pictures (N, h * f, w * f, out_channels), with f = `config.factor`.

        `max_memory` is how much decoding may take besides the weights, in bytes or as "4GB", for the same pictures, to
        rounding: they are computed one by one, by slabs of rows (see `slabs`). Without it a GPU computes whole what
        fits into half of its memory, and a CPU takes the slabs that are fastest there. `progress` is called after each
        slab with the share of the work that has been done, up to 1.

        Raises ValueError for anything but a floating-point array of that shape, and for a limit that is less than
        `decode_memory(z.shape).least`.
        """
        z = self._checked(z, "z", self.config.latent_channels)
        if self.tiling and not self.tiling.covers(z.shape[1], z.shape[2]):
            self._check_exact(max_memory)
            return self.tiled_decode(z, return_dict)
        run = lambda z: self._run(self.decoder, self._unquantized(z), max_memory, progress)  # noqa: E731
        return _output(DecoderOutput, self._guarded(run, z), return_dict)

    def decode_memory(self, shape: tuple[int, ...], dtype: mx.Dtype | None = None) -> Memory:
        """What decoding latents (N, h, w, C) takes in bytes besides the weights: `whole`, and at `least`.

        `dtype` is that of the model if not given.
        """
        return memory.needed(self.decoder, shape, (dtype or self.dtype).size)

    def encode_memory(self, shape: tuple[int, ...], dtype: mx.Dtype | None = None) -> Memory:
        """As `decode_memory`, of pictures (N, H, W, C)."""
        return memory.needed(self.encoder, shape, (dtype or self.dtype).size)

    def __call__(
        self,
        x: mx.array,
        sample_posterior: bool = False,
        key: mx.array | None = None,
        return_dict: bool = True,
    ) -> DecoderOutput:
        """Encodes and decodes pictures (N, H, W, in_channels), through the posterior's mode or a sample of it."""
        posterior = self.encode(x).latent_dist
        z = posterior.sample(key) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def scale(self, z: mx.array) -> mx.array:
        """Latents of the autoencoder -> latents of the diffusion model, (N, h, w, C): (z - shift) * scale.

        With a `patch_size` (FLUX.2's (2, 2)) patches become channels first: (N, h, w, C) -> (N, h / 2, w / 2, 4C).
        """
        z = self._patchify(z)
        shift, scale = self._latent_space(z)
        return (z - shift) * scale

    def unscale(self, z: mx.array) -> mx.array:
        """Latents of the diffusion model -> latents of the autoencoder, (N, h, w, C): z / scale + shift.

        With a `patch_size` (FLUX.2's (2, 2)) channels become patches last: (N, h, w, 4C) -> (N, 2h, 2w, C).
        """
        shift, scale = self._latent_space(z)
        return self._unpatchify(z / scale + shift)

    def _patchify(self, z: mx.array) -> mx.array:
        p, q = self.config.patch_size or (1, 1)
        N, h, w, C = z.shape
        if h % p or w % q:
            raise ValueError(f"z: shape {z.shape}, wanted a height and a width that are multiples of {(p, q)}")
        return z.reshape(N, h // p, p, w // q, q, C).transpose(0, 1, 3, 5, 2, 4).reshape(N, h // p, w // q, C * p * q)

    def _unpatchify(self, z: mx.array) -> mx.array:
        p, q = self.config.patch_size or (1, 1)
        N, h, w, C = z.shape
        return z.reshape(N, h, w, C // (p * q), p, q).transpose(0, 1, 4, 2, 5, 3).reshape(N, h * p, w * q, C // (p * q))

    def _encode(self, x: mx.array) -> mx.array:
        return self._quantized(self.encoder(x))

    def _decode(self, z: mx.array) -> mx.array:
        return self.decoder(self._unquantized(z))

    def _quantized(self, moments: mx.array) -> mx.array:
        return layers.linear(self.quant_conv, moments) if "quant_conv" in self else moments

    def _unquantized(self, z: mx.array) -> mx.array:
        return layers.linear(self.post_quant_conv, z) if "post_quant_conv" in self else z

    def _run(
        self, half: nn.Module, x: mx.array, max_memory: str | int | None, progress: Callable[[float], object] | None
    ) -> mx.array:
        """half(x), whole or by slabs."""
        limit = None if max_memory is None else memory.parse(max_memory)
        plan = memory.plan(half, x.shape, self.dtype.size, limit)
        if plan is None:
            return half(x)
        try:
            mx.async_eval(x, half.parameters())
        except ValueError:
            if limit is None:
                return half(x)
            raise ValueError(
                f"max_memory is {memory.describe(limit)}: mx.grad, mx.compile and mx.vmap can't keep to it"
            ) from None
        return slabs.run(half, x, plan, progress)

    def _check_exact(self, max_memory: str | int | None) -> None:
        if max_memory is not None:
            raise ValueError("max_memory is for exact decoding and encoding: disable_tiling() first")

    def _latent_space(self, z: mx.array) -> tuple[mx.array, mx.array]:
        """shift and scale, each (1,) or (C,), in the dtype of z."""
        config = self.config
        if "bn" in self:
            variance = self.bn.running_var.astype(mx.float32)
            return self.bn.running_mean.astype(z.dtype), mx.rsqrt(variance + self.bn.eps).astype(z.dtype)
        if config.latents_mean is None or config.latents_std is None:
            shift, scale = [config.shift_factor or 0.0], [config.scaling_factor]
        else:
            shift, scale = list(config.latents_mean), [config.scaling_factor / std for std in config.latents_std]
        return mx.array(shift, dtype=z.dtype), mx.array(scale, dtype=z.dtype)

    def _checked(self, x: mx.array, name: str, channels: int) -> mx.array:
        """x in the dtype of the weights. Raises ValueError unless it is floating-point and (N, H, W, channels)."""
        if x.ndim != 4 or x.shape[-1] != channels or 0 in x.shape:
            raise ValueError(f"{name}: shape {x.shape}, wanted (N, H, W, {channels}), no side of them 0")
        if not mx.issubdtype(x.dtype, mx.floating):
            raise ValueError(f"{name}: dtype {x.dtype}, wanted a floating-point one")
        return x.astype(self.dtype)

    def _checked_image(self, x: mx.array) -> mx.array:
        x = self._checked(x, "x", self.config.in_channels)
        factor = self.config.factor
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(f"x: shape {x.shape}, wanted a height and a width that are multiples of {factor}")
        return x

    # Memory

    def enable_slicing(self) -> None:
        """Encodes and decodes one picture of the batch at a time."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float = 0.25) -> None:
        """Encodes and decodes what is larger than a tile by blended tiles, as diffusers does (approximate).

        `tile_sample_min_size`, the side of a tile in picture pixels, defaults to the configuration's sample_size.
        """
        self.tiling = self._tiling(tile_sample_min_size, tile_overlap_factor)

    def disable_tiling(self) -> None:
        self.tiling = None

    def tiled_encode(self, x: mx.array, return_dict: bool = True) -> AutoencoderKLOutput:
        """As `encode`, by blended tiles whatever the size."""
        tiling = self.tiling or self._tiling()
        moments = self._guarded(lambda x: tiling.encode(self._encode, x), self._checked_image(x))
        return _output(AutoencoderKLOutput, DiagonalGaussianDistribution(moments), return_dict)

    def tiled_decode(self, z: mx.array, return_dict: bool = True) -> DecoderOutput:
        """As `decode`, by blended tiles whatever the size."""
        tiling = self.tiling or self._tiling()
        z = self._checked(z, "z", self.config.latent_channels)
        return _output(DecoderOutput, self._guarded(lambda z: tiling.decode(self._decode, z), z), return_dict)

    def _tiling(self, tile_sample_min_size: int | None = None, tile_overlap_factor: float = 0.25) -> Tiling:
        default = self.config.sample_size
        size = tile_sample_min_size or (default[0] if isinstance(default, tuple) else default)
        return Tiling(size // self.config.factor, self.config.factor, tile_overlap_factor)

    def _guarded(self, run: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """run(x), by slices if they are enabled; again in bfloat16 where float16 overflows."""
        result = self._by_slices(run, x)
        if self.dtype == mx.float16 and precision.overflows(result):
            return precision.in_bfloat16(self, lambda x: self._by_slices(run, x), x)
        return result

    def _by_slices(self, run: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        if not self.use_slicing:
            return run(x)
        return mx.concatenate(layers.in_turn(run, [x[i : i + 1] for i in range(x.shape[0])]))

    # Attention

    def set_attn_processor(self, processor: layers.AttentionProcessor) -> None:
        """Has every attention block compute `processor(q, k, v, scale)`: arrays (N, 1, H * W, C) in, one out."""
        for module in self.modules():
            if isinstance(module, AttentionBlock):
                module.processor = processor

    def set_default_attn_processor(self) -> None:
        self.set_attn_processor(layers.attention)


def _output(kind: Callable[[Any], Any], value: object, return_dict: bool) -> Any:
    output = kind(value)
    return output if return_dict else tuple(output)
