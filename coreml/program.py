"""The Core ML program of an encoder or a decoder: MLX modules in, MIL operations out.

Tensors are (1, C, H, W), as the Neural Engine wants them; convolution weights OIHW. There is one function for each
module class, which says what that class's `__call__` says: the modules stay the only description of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vae.autoencoder import Decoder, Encoder
from mlx_vae.blocks import AttentionBlock, DownBlock, Downsample, MidBlock, ResnetBlock, UpBlock, Upsample
from mlx_vae.coreml.tools import coremltools

FLOAT16_MAX = 65504.0
QUERIES, KEYS = 1024, 8192
"""Pixels of one attention band: the engine takes no axis over 16384, and runs best well below."""

Var = Any
"""coremltools' symbolic tensor."""


@dataclass(frozen=True)
class Recipe:
    """How modules are written down.

    `weight(array, name)` gives the Var of a convolution's weight: a constant, or the decompression of one.
    `prescales` holds, for each GroupNorm by its name, powers of two (C,); without one, a norm is not scaled.
    """

    dtype: type[np.floating]
    weight: Callable[[np.ndarray, str], Var]
    prescales: Mapping[str, np.ndarray]

    def constant(self, values: np.ndarray, name: str) -> np.ndarray:
        """In the program's dtype. Raises ValueError where float16 can't hold a value."""
        largest = float(np.max(np.abs(values)))
        if self.dtype is np.float16 and not largest <= FLOAT16_MAX:
            raise ValueError(f"{name}: holds {largest:g}, float16 only {FLOAT16_MAX:g}; use --precision float32")
        return np.asarray(values, dtype=self.dtype)

    def per_channel(self, values: np.ndarray, name: str) -> np.ndarray:
        """(C,) -> (1, C, 1, 1)."""
        return self.constant(values, name).reshape(1, -1, 1, 1)


def builder() -> Any:
    coremltools()
    from coremltools.converters.mil import Builder

    return Builder


@singledispatch
def emit(module: nn.Module, x: Var, name: str, recipe: Recipe) -> Var:
    """Writes `module(x)`; operations are called after `name`, the module's path in the model."""
    raise TypeError(f"{name}: no Core ML form of {type(module).__name__}")


@emit.register
def _encoder(encoder: Encoder, x: Var, name: str, recipe: Recipe) -> Var:
    x = emit(encoder.conv_in, x, f"{name}.conv_in", recipe)
    for i, block in enumerate(encoder.down_blocks):
        x = emit(block, x, f"{name}.down_blocks.{i}", recipe)
    x = emit(encoder.mid_block, x, f"{name}.mid_block", recipe)
    return _norm_silu_conv(encoder, "conv_norm_out", "conv_out", x, name, recipe)


@emit.register
def _decoder(decoder: Decoder, x: Var, name: str, recipe: Recipe) -> Var:
    x = emit(decoder.conv_in, x, f"{name}.conv_in", recipe)
    x = emit(decoder.mid_block, x, f"{name}.mid_block", recipe)
    for i, block in enumerate(decoder.up_blocks):
        x = emit(block, x, f"{name}.up_blocks.{i}", recipe)
    return _norm_silu_conv(decoder, "conv_norm_out", "conv_out", x, name, recipe)


@emit.register
def _mid_block(block: MidBlock, x: Var, name: str, recipe: Recipe) -> Var:
    x = emit(block.resnets[0], x, f"{name}.resnets.0", recipe)
    if "attentions" in block:
        x = emit(block.attentions[0], x, f"{name}.attentions.0", recipe)
    return emit(block.resnets[1], x, f"{name}.resnets.1", recipe)


@emit.register(DownBlock)
@emit.register(UpBlock)
def _level(block: DownBlock | UpBlock, x: Var, name: str, recipe: Recipe) -> Var:
    for i, resnet in enumerate(block.resnets):
        x = emit(resnet, x, f"{name}.resnets.{i}", recipe)
        if "attentions" in block:
            x = emit(block.attentions[i], x, f"{name}.attentions.{i}", recipe)
    for sampler in ("downsamplers", "upsamplers"):
        if sampler in block:
            x = emit(block[sampler][0], x, f"{name}.{sampler}.0", recipe)
    return x


@emit.register
def _resnet(block: ResnetBlock, x: Var, name: str, recipe: Recipe) -> Var:
    h = _norm_silu_conv(block, "norm1", "conv1", x, name, recipe)
    h = _norm_silu_conv(block, "norm2", "conv2", h, name, recipe)
    if "conv_shortcut" in block:
        x = emit(block.conv_shortcut, x, f"{name}.conv_shortcut", recipe)
    return builder().add(x=x, y=h, name=name)


@emit.register
def _attention(block: AttentionBlock, x: Var, name: str, recipe: Recipe) -> Var:
    """In bands of query rows and of key rows; the softmaxes of the key bands are weighted by their shares of the whole.

    Keys are (1, K, 1, C), queries (1, C, 1, Q), scores (1, K, 1, Q) with the softmax along the channel axis.
    """
    mb = builder()
    _, C, _, W = x.shape
    h = emit(block.group_norm, x, f"{name}.group_norm", recipe)
    q = _linear(block.to_q, h, f"{name}.to_q", recipe, scale=C**-0.5)  # before the product, which could overflow
    k = _linear(block.to_k, h, f"{name}.to_k", recipe)
    v = _linear(block.to_v, h, f"{name}.to_v", recipe)
    keys = [mb.transpose(x=band, perm=[0, 3, 2, 1], name=f"{name}.keys.{i}") for i, band in enumerate(_bands(k, KEYS))]
    values = _bands(v, KEYS)
    outputs = []
    for i, query in enumerate(_bands(q, QUERIES)):
        scores = [
            mb.einsum(values=(key, query), equation="nchw,nwhu->nchu", name=f"{name}.scores.{i}.{j}")
            for j, key in enumerate(keys)
        ]
        parts = [
            mb.einsum(
                values=(value, mb.softmax(x=score, axis=1, name=f"{name}.softmax.{i}.{j}")),
                equation="nchw,nwhu->nchu",
                name=f"{name}.out.{i}.{j}",
            )
            for j, (value, score) in enumerate(zip(values, scores, strict=True))
        ]
        out = parts[0]
        if len(parts) > 1:
            logs = [mb.reduce_log_sum_exp(x=score, axes=[1], keep_dims=True) for score in scores]
            shares = mb.softmax(x=mb.concat(values=logs, axis=1), axis=1)  # (1, bands, 1, Q)
            shares = mb.split(x=shares, num_splits=len(parts), axis=1)
            weighted = [mb.mul(x=part, y=share) for part, share in zip(parts, shares, strict=True)]
            out = weighted[0]
            for part in weighted[1:]:
                out = mb.add(x=out, y=part)
        outputs.append(mb.reshape(x=out, shape=[1, C, out.shape[3] // W, W], name=f"{name}.rows.{i}"))
    h = outputs[0] if len(outputs) == 1 else mb.concat(values=outputs, axis=2, name=f"{name}.concat")
    return mb.add(x=x, y=_linear(block.to_out[0], h, f"{name}.to_out.0", recipe), name=name)


def _bands(x: Var, limit: int) -> list[Var]:
    """(1, C, H, W) -> bands of whole rows (1, C, 1, rows * W), of at most `limit` pixels where a row is not longer."""
    mb = builder()
    _, C, H, W = x.shape
    count = -(-H // max(1, limit // W))
    rows = [len(band) for band in np.array_split(np.arange(H), count)]
    bands = [x] if count == 1 else mb.split(x=x, split_sizes=rows, axis=2)
    return [mb.reshape(x=band, shape=[1, C, 1, n * W]) for band, n in zip(bands, rows, strict=True)]


@emit.register
def _downsample(block: Downsample, x: Var, name: str, recipe: Recipe) -> Var:
    return _conv(block.conv, x, f"{name}.conv", recipe, pad=(0, 1, 0, 1))


@emit.register
def _upsample(block: Upsample, x: Var, name: str, recipe: Recipe) -> Var:
    x = builder().upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=2, name=name)
    return emit(block.conv, x, f"{name}.conv", recipe)


@emit.register
def _group_norm(norm: nn.GroupNorm, x: Var, name: str, recipe: Recipe) -> Var:
    """(x - mean) / sqrt(var + eps) * weight + bias (Wu & He, 2018), computed on x * s: the result is the same.

    s is a power of two for each group that brings its deviation near 1, so that neither the squares nor their sums
    leave the range of float16. Means go over H, then W, then the channels of a group: short sums, one axis at a time.
    """
    mb = builder()
    channels, size = x.shape[1], x.shape[1] // norm.num_groups
    average = np.kron(np.eye(norm.num_groups), np.full((size, size), 1 / size)).reshape(channels, channels, 1, 1)
    average = recipe.constant(average, name)

    def mean(x: Var, stage: str) -> Var:
        x = mb.reduce_mean(x=x, axes=[2], keep_dims=True, name=f"{name}.{stage}.height")
        x = mb.reduce_mean(x=x, axes=[3], keep_dims=True, name=f"{name}.{stage}.width")
        return mb.conv(x=x, weight=average, name=f"{name}.{stage}")

    scale = recipe.prescales.get(name, np.ones(channels))
    if np.any(scale != 1):
        x = mb.mul(x=x, y=recipe.per_channel(scale, name), name=f"{name}.prescaled")
    x = mb.sub(x=x, y=mean(x, "mean"), name=f"{name}.centred")
    variance = mean(mb.square(x=x, name=f"{name}.squared"), "variance")
    eps = np.maximum(norm.eps * scale**2, np.finfo(recipe.dtype).smallest_subnormal)  # never 0: no variance, no result
    variance = mb.add(x=variance, y=recipe.per_channel(eps, name), name=f"{name}.variance.eps")
    factor = mb.rsqrt(x=variance, epsilon=recipe.dtype(0), name=f"{name}.rsqrt")
    factor = mb.mul(x=factor, y=recipe.per_channel(_numpy(norm.weight), f"{name}.weight"), name=f"{name}.factor")
    x = mb.mul(x=x, y=factor, name=f"{name}.scaled")
    return mb.add(x=x, y=recipe.per_channel(_numpy(norm.bias), f"{name}.bias"), name=name)


@emit.register
def _conv2d(conv: nn.Conv2d, x: Var, name: str, recipe: Recipe) -> Var:
    height, width = conv.padding
    return _conv(conv, x, name, recipe, pad=(height, height, width, width))


def _norm_silu_conv(block: nn.Module, norm: str, conv: str, x: Var, name: str, recipe: Recipe) -> Var:
    h = emit(block[norm], x, f"{name}.{norm}", recipe)
    h = builder().silu(x=h, name=f"{name}.{norm}.silu")
    return emit(block[conv], h, f"{name}.{conv}", recipe)


def _conv(conv: nn.Conv2d, x: Var, name: str, recipe: Recipe, pad: tuple[int, int, int, int]) -> Var:
    weight = recipe.constant(_numpy(conv.weight).transpose(0, 3, 1, 2), f"{name}.weight")  # OHWI -> OIHW
    return builder().conv(
        x=x,
        weight=recipe.weight(weight, name),
        bias=recipe.constant(_numpy(conv.bias), f"{name}.bias"),
        strides=list(conv.stride),
        pad_type="custom" if any(pad) else "valid",
        pad=list(pad),
        name=name,
    )


def _linear(linear: nn.Linear, x: Var, name: str, recipe: Recipe, scale: float = 1.0) -> Var:
    """`linear(x) * scale`, over channels, as a 1x1 convolution."""
    weight = recipe.constant(_numpy(linear.weight)[:, :, None, None] * scale, f"{name}.weight")
    bias = recipe.constant(_numpy(linear.bias) * scale, f"{name}.bias")
    return builder().conv(x=x, weight=recipe.weight(weight, name), bias=bias, name=name)


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))
