"""The blocks of encoder and decoder, each a handful of layers. Arrays are NHWC; parameter names are diffusers'."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_vae import layers


class ResnetBlock(nn.Module):
    """(N, H, W, C) -> (N, H, W, O): x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = layers.norm(groups, in_channels)
        self.conv1 = layers.conv3x3(in_channels, out_channels)
        self.norm2 = layers.norm(groups, out_channels)
        self.conv2 = layers.conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def __call__(self, x: mx.array) -> mx.array:
        h = layers.norm_silu_conv(self.norm1, self.conv1, x)
        h = layers.norm_silu_conv(self.norm2, self.conv2, h)
        if "conv_shortcut" in self:
            x = layers.linear(self.conv_shortcut, x)
        return x + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels: (N, H, W, C) -> (N, H, W, C)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = layers.norm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]
        self.processor: layers.AttentionProcessor = layers.attention

    def __call__(self, x: mx.array) -> mx.array:
        N, H, W, C = x.shape
        h = layers.normalize(self.group_norm, x).reshape(N, 1, H * W, C)
        q, k, v = (layers.linear(layer, h) for layer in (self.to_q, self.to_k, self.to_v))
        h = layers.linear(self.to_out[0], self.processor(q, k, v, C**-0.5))
        return x + h.reshape(N, H, W, C).astype(x.dtype)


class Downsample(nn.Module):
    """(N, H, W, C) -> (N, H / 2, W / 2, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def __call__(self, x: mx.array) -> mx.array:
        return layers.downsample_conv(self.conv, x)


class Upsample(nn.Module):
    """(N, H, W, C) -> (N, 2H, 2W, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = layers.conv3x3(channels, channels)

    def __call__(self, x: mx.array) -> mx.array:
        return layers.upsample_conv(self.conv, x)


class Steps(nn.Module):
    """Modules that run one after the other."""

    def steps(self) -> Iterator[nn.Module]:
        """Those modules: resnets, attention blocks and samplers."""
        raise NotImplementedError

    def __call__(self, x: mx.array) -> mx.array:
        for step in self.steps():
            x = step(x)
        return x


class MidBlock(Steps):
    """Two resnets with attention (or nothing) between them: (N, H, W, C) -> (N, H, W, C)."""

    def __init__(self, channels: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        if add_attention:
            self.attentions = [AttentionBlock(channels, groups)]

    def steps(self) -> Iterator[nn.Module]:
        yield self.resnets[0]
        yield from self.get("attentions", [])
        yield self.resnets[1]


class _Level(Steps):
    """The resnets of one resolution, each followed by attention where the block type says so."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, groups: int, add_attention: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = [ResnetBlock(inner, outer, groups) for inner, outer in pairwise(widths)]
        if add_attention:
            self.attentions = [AttentionBlock(out_channels, groups) for _ in range(num_layers)]

    def steps(self) -> Iterator[nn.Module]:
        for i, resnet in enumerate(self.resnets):
            yield resnet
            yield from self.get("attentions", [])[i : i + 1]
        yield from self.get("downsamplers", self.get("upsamplers", []))


class DownBlock(_Level):
    """One encoder level: (N, H, W, C) -> (N, H / 2, W / 2, O), or (N, H, W, O) for the last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        add_attention: bool,
        add_downsample: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, groups, add_attention)
        if add_downsample:
            self.downsamplers = [Downsample(out_channels)]


class UpBlock(_Level):
    """One decoder level: (N, H, W, C) -> (N, 2H, 2W, O), or (N, H, W, O) for the last."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        add_attention: bool,
        add_upsample: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, groups, add_attention)
        if add_upsample:
            self.upsamplers = [Upsample(out_channels)]
