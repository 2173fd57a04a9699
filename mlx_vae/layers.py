"""What the blocks are made of: normalise-activate-convolve, upsample-convolve, downsample-convolve, attention.

The only place that knows about backends and memory. Arrays are NHWC, convolution weights OHWI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_vae import cpu
from mlx_vae.config import NORM_EPS

SCORES = 1 << 24
"""Attention scores in a chunk: 64 MiB in float32. The backend runs a few chunks ahead."""

AttentionProcessor = Callable[[mx.array, mx.array, mx.array, float], mx.array]
"""f(q, k, v, scale) -> out, each array (N, heads, L, C)."""


def norm(groups: int, channels: int) -> nn.GroupNorm:
    """The parameters of a GroupNorm (Wu & He, 2018) over H, W and the channels of a group."""
    return nn.GroupNorm(groups, channels, eps=NORM_EPS, pytorch_compatible=True)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def conv(conv: nn.Conv2d, x: mx.array) -> mx.array:
    """A 3x3 convolution that keeps the size: (N, H, W, C) -> (N, H, W, O)."""
    return cpu.conv3x3(x, conv.weight) + conv.bias if _on_cpu() else conv(x)


def norm_silu_conv(norm: nn.GroupNorm, conv_: nn.Conv2d, x: mx.array) -> mx.array:
    """conv(silu(norm(x))): (N, H, W, C) -> (N, H, W, O)."""
    return conv(conv_, nn.silu(normalize(norm, x)))


def upsample_conv(conv: nn.Conv2d, x: mx.array) -> mx.array:
    """Nearest-neighbour doubling, then a 3x3 convolution: (N, H, W, C) -> (N, 2H, 2W, O)."""
    if _on_cpu():
        return cpu.upsample_conv3x3(x, conv.weight) + conv.bias
    N, H, W, C = x.shape
    return conv(mx.broadcast_to(x[:, :, None, :, None], (N, H, 2, W, 2, C)).reshape(N, 2 * H, 2 * W, C))


def downsample_conv(conv: nn.Conv2d, x: mx.array) -> mx.array:
    """3x3 convolution of stride 2 that pads right and bottom only: (N, H, W, C) -> (N, H / 2, W / 2, O)."""
    if _on_cpu():
        return cpu.downsample_conv3x3(x, conv.weight) + conv.bias
    return conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


def normalize(norm: nn.GroupNorm, x: mx.array) -> mx.array:
    """GroupNorm: (N, H, W, C) -> (N, H, W, C). Statistics and arithmetic are float32 whatever the dtype of x.

    The mean and the variance of each channel come first and combine into those of the groups (Chan et al., 1979):
    var = mean_c(var_c + (mean_c - mean)^2), a sum of squares of small numbers, never E[x^2] - E[x]^2.
    """
    N, _, _, C = x.shape
    grouped = (N, 1, 1, norm.num_groups, C // norm.num_groups)
    h = x.astype(mx.float32)
    channel_mean = _spatial_mean(h)  # (N, 1, 1, C)
    channel_var = _spatial_mean(mx.square(h - channel_mean)).reshape(grouped)
    channel_mean = channel_mean.reshape(grouped)
    mean = mx.mean(channel_mean, axis=-1, keepdims=True)  # (N, 1, 1, groups, 1)
    var = mx.mean(channel_var + mx.square(channel_mean - mean), axis=-1, keepdims=True)
    mean = mx.broadcast_to(mean, grouped).reshape(N, 1, 1, C)
    scale = mx.broadcast_to(mx.rsqrt(var + norm.eps), grouped).reshape(N, 1, 1, C) * norm.weight
    return ((h - mean) * scale + norm.bias).astype(x.dtype)


def _spatial_mean(x: mx.array) -> mx.array:
    """(N, H, W, C) -> (N, 1, 1, C), rows first: a single running sum over H * W would lose digits in float32."""
    return mx.mean(mx.mean(x, axis=2, keepdims=True), axis=1, keepdims=True)


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q k^T scale) v, each (N, heads, L, C); the softmax in float32.

    MLX has no fused kernel for the autoencoder's one wide head, and all its scores at once would be L^2 numbers: so the
    queries come in chunks, in turn, of SCORES scores each.
    """
    N, heads, L, _ = q.shape
    rows = max(1, SCORES // (N * heads * L))

    def attend(q: mx.array) -> mx.array:
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


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)
