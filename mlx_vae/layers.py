"""What the blocks are made of: normalise-activate-convolve, upsample-convolve, downsample-convolve, linear, attention.

The only place that chooses by backend: for the CPU by measurement, for a GPU what MLX's own kernels favour, which has
not been measured. Arrays are NHWC, convolution weights OHWI. Each convolution comes in two forms: of a whole picture,
and prepared (`convolution`, `upsampling`, `downsampling`), for many slabs of its rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_vae import cpu, malloc
from mlx_vae.config import NORM_EPS
from mlx_vae.cpu import Convolution, Edges

SCORES = 1 << 22
"""Attention scores in a chunk on a GPU: 16 MiB in float32. The backend runs a few chunks ahead."""

ARRAYS_AT_WORK = 11
"""How many arrays of the largest size are in memory when a layer is computed whole. Measured on the CPU."""

AttentionProcessor = Callable[[mx.array, mx.array, mx.array, float], mx.array]
"""f(q, k, v, scale) -> out, each array (N, heads, L, C); on the CPU in float32, whatever the dtype of the model."""


def norm(groups: int, channels: int) -> nn.GroupNorm:
    """The parameters of a GroupNorm (Wu & He, 2018) over H, W and the channels of a group."""
    return nn.GroupNorm(groups, channels, eps=NORM_EPS, pytorch_compatible=True)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


# Convolutions


def conv(conv: nn.Conv2d, x: mx.array) -> mx.array:
    """A 3x3 convolution that keeps the size: (N, H, W, C) -> (N, H, W, O)."""
    return convolution(conv, _pixels(x))(x, (1, 1)).astype(conv.weight.dtype)


def upsample_conv(conv: nn.Conv2d, x: mx.array) -> mx.array:
    """Nearest-neighbour doubling, then a 3x3 convolution: (N, H, W, C) -> (N, 2H, 2W, O)."""
    return upsampling(conv, _pixels(x))(x, (1, 1)).astype(conv.weight.dtype)


def downsample_conv(conv: nn.Conv2d, x: mx.array) -> mx.array:
    """3x3 convolution of stride 2 that pads right and bottom only: (N, H, W, C) -> (N, H / 2, W / 2, O)."""
    return downsampling(conv, _pixels(x))(x, (0, 1)).astype(conv.weight.dtype)


def convolution(conv: nn.Conv2d, pixels: int) -> Convolution:
    """A 3x3 convolution of rows (N, H, W, C) -> (N, H + edges - 2, W, O), the outermost rows only as neighbours.

    `edges` is how many rows of zeros to add above and below: 1 where the picture ends, 0 where it goes on. `pixels` is
    how many the whole picture has: what pays for a large one takes longer for a small one. On the CPU the result is
    float32 whatever the dtype of the weights: conversions are slow there.
    """
    if _on_cpu():
        return _with_bias(cpu.conv3x3(conv.weight, pixels), conv)
    return lambda x, edges: _conv2d(conv, x, edges, (1, 1))


def upsampling(conv: nn.Conv2d, pixels: int) -> Convolution:
    """As `convolution`, of rows that are doubled first: (N, H, W, C) -> (N, 2 (H + edges - 2), 2W, O)."""
    if _on_cpu():
        return _with_bias(cpu.upsample_conv3x3(conv.weight, pixels), conv)

    def upsample(x: mx.array, edges: Edges) -> mx.array:
        x = mx.pad(x, [(0, 0), edges, (0, 0), (0, 0)])
        N, H, W, C = x.shape
        doubled = mx.broadcast_to(x[:, :, None, :, None], (N, H, 2, W, 2, C)).reshape(N, 2 * H, 2 * W, C)
        return _conv2d(conv, doubled[:, 1:-1], (0, 0), (1, 1))

    return upsample


def downsampling(conv: nn.Conv2d, pixels: int) -> Convolution:
    """As `convolution`, of stride 2: (N, H, W, C) -> (N, (H + edges - 1) / 2, W / 2, O), `edges` (0, 0) or (0, 1)."""
    if _on_cpu():
        return _with_bias(cpu.downsample_conv3x3(conv.weight, pixels), conv)
    return lambda x, edges: _conv2d(conv, x, edges, (0, 1))


def _pixels(x: mx.array) -> int:
    N, H, W, _ = x.shape
    return N * H * W


def _with_bias(convolve: Convolution, conv: nn.Conv2d) -> Convolution:
    return lambda x, edges: convolve(x, edges) + conv.bias


def _conv2d(conv: nn.Conv2d, x: mx.array, rows: Edges, columns: Edges) -> mx.array:
    x = x.astype(conv.weight.dtype)
    if rows == columns == (1, 1):
        return mx.conv2d(x, conv.weight, conv.stride, padding=1) + conv.bias
    return mx.conv2d(mx.pad(x, [(0, 0), rows, columns, (0, 0)]), conv.weight, conv.stride) + conv.bias


def linear(layer: nn.Module, x: mx.array) -> mx.array:
    """A Linear or a 1x1 Conv2d, in the dtype of x: (N, H, W, C) -> (N, H, W, O).

    On the CPU products in other dtypes than float32 are slow. Whatever else stands in the layer's place (a quantised
    one, one with an adapter, one without a bias) is called as it is.
    """
    if not _on_cpu() or type(layer) not in (nn.Linear, nn.Conv2d) or "bias" not in layer:
        return layer(x)
    weight = layer.weight.astype(mx.float32)
    return mx.addmm(layer.bias, x.astype(mx.float32), weight.reshape(len(weight), -1).T).astype(x.dtype)


# Normalisation


class Moments(NamedTuple):
    """Of so many pixels: each channel's mean and sum of squared deviations from it, (N, 1, 1, C) in float32."""

    pixels: int
    mean: mx.array
    deviation: mx.array


def moments(x: mx.array) -> Moments:
    """Of rows (N, H, W, C)."""
    _, H, W, _ = x.shape
    x = x.astype(mx.float32)
    mean = _spatial_mean(x)
    x = x - mean
    return Moments(H * W, mean, _spatial_mean(x * x) * (H * W))


def merge(first: Moments, second: Moments) -> Moments:
    """The moments of both parts together (Chan, Golub & LeVeque, 1979)."""
    pixels = first.pixels + second.pixels
    difference = second.mean - first.mean
    between = difference * difference * (first.pixels * second.pixels / pixels)
    mean = first.mean + difference * (second.pixels / pixels)
    return Moments(pixels, mean, first.deviation + second.deviation + between)


def _spatial_mean(x: mx.array) -> mx.array:
    """(N, H, W, C) -> (N, 1, 1, C), rows first: a single running sum over H * W would lose digits in float32."""
    return mx.mean(mx.mean(x, axis=2, keepdims=True), axis=1, keepdims=True)


def norm_silu_conv(norm: nn.GroupNorm, conv_: nn.Conv2d, x: mx.array) -> mx.array:
    """conv(silu(norm(x))): (N, H, W, C) -> (N, H, W, O)."""
    read(norm, x)
    return conv(conv_, activation(norm, [moments(x)])(x))


def normalize(norm: nn.GroupNorm, x: mx.array) -> mx.array:
    """GroupNorm: (N, H, W, C) -> (N, H, W, C), as `normalization`."""
    read(norm, x)
    return normalization(norm, [moments(x)])(x)


def normalization(norm: nn.GroupNorm, parts: Sequence[Moments]) -> Callable[[mx.array], mx.array]:
    """The GroupNorm of a picture whose parts have these moments, of its rows (N, H, W, C); on the CPU in float32."""
    scale, shift = _scale_and_shift(norm, parts)
    if _on_cpu():
        return lambda x: x.astype(mx.float32) * scale + shift
    return lambda x: (x.astype(mx.float32) * scale + shift).astype(x.dtype)


def activation(norm: nn.GroupNorm, parts: Sequence[Moments]) -> Callable[[mx.array], mx.array]:
    """As `normalization`, and SiLU. What follows is a convolution, which takes any dtype."""
    scale, shift = _scale_and_shift(norm, parts)
    if _on_cpu():
        return lambda x: cpu.silu(x.astype(mx.float32) * scale + shift)
    return lambda x: _normalize_silu(x, scale, shift)


@partial(mx.compile, shapeless=True)
def _normalize_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    y = x.astype(mx.float32) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


def _scale_and_shift(norm: nn.GroupNorm, parts: Sequence[Moments]) -> tuple[mx.array, mx.array]:
    """What a GroupNorm multiplies each channel by, and then adds: (N, 1, 1, C) in float32.

    The moments of the channels combine into those of the groups, var = mean_c(var_c + (mean_c - mean)^2): a sum of
    squares of small numbers, never E[x^2] - E[x]^2.
    """
    pixels, mean, deviation = reduce(merge, parts)
    N, _, _, C = mean.shape
    grouped = (N, 1, 1, norm.num_groups, C // norm.num_groups)
    channel_mean, channel_var = mean.reshape(grouped), deviation.reshape(grouped) / pixels
    mean = mx.mean(channel_mean, axis=-1, keepdims=True)
    var = mx.mean(channel_var + mx.square(channel_mean - mean), axis=-1, keepdims=True)
    scale = mx.broadcast_to(mx.rsqrt(var + norm.eps), grouped).reshape(N, 1, 1, C) * norm.weight.astype(mx.float32)
    return scale, norm.bias - mx.broadcast_to(mean, grouped).reshape(N, 1, 1, C) * scale


def read(norm: nn.GroupNorm, x: mx.array) -> None:
    """Is called with all that a GroupNorm reads, rows (N, H, W, C): `precision.watching_norms` puts its own here."""


# Attention


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q k^T scale) v, each (N, heads, L, C); the softmax in float32.

    MLX has no fused kernel for the autoencoder's one wide head, and all its scores at once would be L^2 numbers: so the
    queries come in chunks, in turn.
    """
    N, heads, L, _ = q.shape
    rows = cpu.QUERIES if _on_cpu() else max(1, SCORES // (N * heads * k.shape[2]))

    def attend(q: mx.array) -> mx.array:
        if _on_cpu():
            return cpu.attention(q, k, v, scale)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

    if rows >= L:
        return attend(q)
    return mx.concatenate(in_turn(attend, [q[:, :, i : i + rows] for i in range(0, L, rows)]), axis=2)


def in_turn(run: Callable[[mx.array], mx.array], inputs: Sequence[mx.array]) -> list[mx.array]:
    """[run(x) for x in inputs], each computed only when the one before is done, so that one is in memory at a time."""
    outputs: list[mx.array] = []
    for x in inputs:
        outputs.append(run(_after(x, outputs[-1]) if outputs else x))
    return outputs


def _after(x: mx.array, before: mx.array) -> mx.array:
    """x, but computed after `before`: what `mx.depends` does, which can't be vmapped (MLX 0.32)."""
    return mx.where(before.reshape(-1)[0] > 0, x, x)


# The machine


def streams() -> list[mx.Stream]:
    """What computes slabs side by side: as many streams as this process has CPU cores, 8 at most; one on a GPU."""
    return _cpu_streams() if _on_cpu() else [mx.default_stream(mx.default_device())]


def slabs_at_work() -> int:
    """How many slabs in float32 are in memory at once, with all that is computed on the way (measured on the CPU)."""
    return 8 * len(streams()) + 9 if _on_cpu() else 2 * ARRAYS_AT_WORK


def scores_at_once() -> int:
    """How many attention scores are computed together."""
    return cpu.QUERIES * cpu.KEYS if _on_cpu() else SCORES


def largest_slab() -> int:
    """How many numbers a slab may have. Measured on the CPU: there larger ones leave the caches."""
    return 1 << 20 if _on_cpu() else 1 << 30


def memory_size() -> int:
    """Bytes that the device reports."""
    info: dict[str, Any] = {} if _on_cpu() else mx.device_info()
    sizes = [info[key] for key in ("max_recommended_working_set_size", "total_memory") if key in info]
    return sizes[0] if sizes else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def held_memory() -> int:
    """Bytes that are in use or were and could be returned: on Linux this process's, otherwise MLX's."""
    if _on_cpu() and sys.platform == "linux":
        return malloc.resident()
    return mx.get_active_memory() + mx.get_cache_memory()


def return_memory() -> None:
    """Gives the system back what has been freed."""
    mx.clear_cache()
    if _on_cpu():
        malloc.trim()


@cache
def _cpu_streams() -> list[mx.Stream]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [mx.new_stream(mx.Device(mx.cpu)) for _ in range(min(8, cores))]


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)
