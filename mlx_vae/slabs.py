"""Encoder and Decoder by slabs of rows: the whole picture's result, to rounding, in a fraction of the memory.

Between two GroupNorms every operation is local. So a picture is a list of slabs of its rows, and each
normalise-activate-convolve goes over it slab by slab, with the neighbouring rows, while it gathers the moments that the
next GroupNorm needs. A slab is given up as soon as nothing is left to read it: what remains is one tensor for the
residual stream and one for the branch, the least that an exact GroupNorm allows without computing anything twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vae import blas, layers, malloc
from mlx_vae.blocks import AttentionBlock, Downsample, ResnetBlock, Upsample
from mlx_vae.layers import Edges, Moments
from mlx_vae.memory import Plan

NEARLY = 0.95
"""The share of a limit from which on what is freed goes back to the system at once, which takes time."""

Compute = Callable[[int, int], tuple[mx.array, ...]]
"""f(top, bottom) -> what a slab of these rows is."""


def run(half: nn.Module, x: mx.array, plan: Plan, progress: Callable[[float], object] | None = None) -> mx.array:
    """half(x), for an Encoder or a Decoder, picture by picture in the sweeps of a plan for x (N, H, W, C).

    `progress` is called after each slab with the share of the work that has been done, up to 1.
    """
    pictures: list[mx.array] = []

    def share(done: float) -> None:
        if progress:
            progress((len(pictures) + done) / len(x))

    with blas.single_threaded(), malloc.keeping():
        for i in range(len(x)):
            pictures.append(_Run(half, plan, share)(x[i : i + 1]))
    return mx.concatenate(pictures)


@dataclass
class Picture:
    """Rows (N, H, W, C) as slabs, from the top down, and the moments of each slab if a GroupNorm is to read them."""

    height: int
    slabs: list[mx.array]
    moments: list[Moments] = field(default_factory=list)
    top: int = 0
    """The first row that is still there."""

    @property
    def pixels(self) -> int:
        return self.height * self.slabs[0].shape[2]

    @classmethod
    def of(cls, parts: list[tuple[mx.array, ...]]) -> Picture:
        """Of (slab, mean, deviation) each, or just (slab,)."""
        slabs = [part[0] for part in parts]
        moments = [Moments(slab.shape[1] * slab.shape[2], *rest) for slab, *rest in parts if rest]
        return cls(sum(slab.shape[1] for slab in slabs), slabs, moments)

    def window(self, top: int, bottom: int) -> tuple[mx.array, Edges]:
        """Rows top to bottom, and how many of these lie outside of the picture, above and below it."""
        edges = max(0, -top), max(0, bottom - self.height)
        parts, start = [], self.top
        for slab in self.slabs:
            end = start + slab.shape[1]
            if start < bottom and top < end:
                parts.append(slab[:, max(0, top - start) : bottom - start])
            start = end
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1), edges

    def give_up(self, row: int) -> None:
        """Lets go of the slabs that lie above a row."""
        while self.slabs and self.top + self.slabs[0].shape[1] <= row:
            self.top += self.slabs.pop(0).shape[1]


class Activated:
    """The rows of a picture after a GroupNorm and SiLU, each computed once, when a window first needs it."""

    def __init__(self, norm: nn.GroupNorm, source: Picture) -> None:
        _read(norm, source)
        self.activate = layers.activation(norm, source.moments)
        self.source = source
        self.rows = Picture(source.height, [])
        self.reached = 0

    def around(self, top: int, bottom: int) -> tuple[mx.array, Edges]:
        """Rows top to bottom with one more on either side, and how many of these lie outside; windows only go down."""
        while self.reached < min(bottom + 1, self.source.height):
            end = min(self.reached + bottom - top, self.source.height)
            self.rows.slabs.append(self.activate(self.source.window(self.reached, end)[0]))
            self.reached = end
        self.rows.give_up(top - 1)
        return self.rows.window(top - 1, bottom + 1)


class _Run:
    """Each step takes a picture, which it gives up, and makes another in one or two sweeps, the plan's next."""

    def __init__(self, half: nn.Module, plan: Plan, progress: Callable[[float], object]) -> None:
        self.half = half
        self.dtype = half.conv_in.weight.dtype
        self.slab = plan.slab
        self.sweeps = iter(plan.sweeps)
        self.products = sum(sweep.products // sweep.height * sweep.height for sweep in plan.sweeps)
        self.done = 0
        self.most = None if plan.limit is None else layers.held_memory() + int(NEARLY * plan.limit)
        self.progress = progress

    def __call__(self, x: mx.array) -> mx.array:
        steps: dict[type[nn.Module], Callable[[Any, Picture], Picture]] = {
            AttentionBlock: self._attention,
            Downsample: self._downsample,
            ResnetBlock: self._resnet,
            Upsample: self._upsample,
        }
        half = self.half
        picture = self._conv_in(half.conv_in, Picture.of([(x,)]))
        for step in half.steps():
            picture = steps[type(step)](step, picture)
        return mx.concatenate(self._conv_out(half.conv_norm_out, half.conv_out, picture), axis=1)

    def _sweep(self, compute: Compute, at_once: bool = False) -> list[tuple[mx.array, ...]]:
        """The results for every slab, on streams side by side, of which only the newest are still at work."""
        sweep = next(self.sweeps)
        rows = sweep.height if at_once else sweep.rows(self.slab)
        streams = layers.streams()
        results: list[tuple[mx.array, ...]] = []
        slabs = [(top, min(top + rows, sweep.height)) for top in range(0, sweep.height, rows)]
        for first in range(0, len(slabs), len(streams)):
            group = []
            for stream, (top, bottom) in zip(streams, slabs[first:], strict=False):
                with mx.stream(stream):
                    group.append(compute(top, bottom))
            mx.async_eval(group)
            mx.eval(results[-len(streams) :])
            if self.most is not None and layers.held_memory() > self.most:
                layers.return_memory()
            results += group
            self.done += sweep.products // sweep.height * (bottom - slabs[first][0])
            self.progress(self.done / self.products)
        mx.eval(results)
        return results

    def _kept(self, slab: mx.array) -> tuple[mx.array, ...]:
        """As it is stored, and its moments."""
        _, mean, deviation = layers.moments(slab)
        return slab.astype(self.dtype), mean, deviation

    def _conv_in(self, conv: nn.Conv2d, x: Picture) -> Picture:
        convolve = layers.convolution(conv, x.pixels)
        return Picture.of(self._sweep(lambda top, bottom: self._kept(convolve(*x.window(top - 1, bottom + 1)))))

    def _conv_out(self, norm: nn.GroupNorm, conv: nn.Conv2d, x: Picture) -> list[mx.array]:
        activated, convolve = Activated(norm, x), layers.convolution(conv, x.pixels)

        def compute(top: int, bottom: int) -> tuple[mx.array, ...]:
            window = activated.around(top, bottom)
            x.give_up(activated.reached)
            return (convolve(*window).astype(self.dtype),)

        return Picture.of(self._sweep(compute)).slabs

    def _resnet(self, block: ResnetBlock, x: Picture) -> Picture:
        shortcut = block.get("conv_shortcut")
        activated, convolve = Activated(block.norm1, x), layers.convolution(block.conv1, x.pixels)

        def first(top: int, bottom: int) -> tuple[mx.array, ...]:
            h = self._kept(convolve(*activated.around(top, bottom)))
            if shortcut is None:
                return h
            residual, _ = x.window(top, bottom)
            x.give_up(bottom)
            return *h, layers.linear(shortcut, residual)

        parts = self._sweep(first)
        h = Picture.of([part[:3] for part in parts])
        if shortcut is not None:
            x = Picture.of([part[3:] for part in parts])
        del parts
        activated, convolve = Activated(block.norm2, h), layers.convolution(block.conv2, h.pixels)

        def second(top: int, bottom: int) -> tuple[mx.array, ...]:
            window = activated.around(top, bottom)
            h.give_up(activated.reached)
            residual, _ = x.window(top, bottom)
            x.give_up(bottom)
            return self._kept(residual + convolve(*window))

        return Picture.of(self._sweep(second))

    def _attention(self, block: AttentionBlock, x: Picture) -> Picture:
        _read(block.group_norm, x)
        normalize = layers.normalization(block.group_norm, x.moments)

        def tokens(rows: mx.array) -> mx.array:
            N, H, W, C = rows.shape
            return normalize(rows).reshape(N, 1, H * W, C)

        def project(top: int, bottom: int) -> tuple[mx.array, ...]:
            h = tokens(x.window(top, bottom)[0])
            return layers.linear(block.to_k, h), layers.linear(block.to_v, h)

        k, v = (mx.concatenate(list(parts), axis=2) for parts in zip(*self._sweep(project), strict=True))
        mx.eval(k, v)

        def attend(top: int, bottom: int) -> tuple[mx.array, ...]:
            residual, _ = x.window(top, bottom)
            x.give_up(bottom)
            q = layers.linear(block.to_q, tokens(residual))
            h = layers.linear(block.to_out[0], block.processor(q, k, v, k.shape[-1] ** -0.5))
            return self._kept(residual + h.reshape(residual.shape))

        return Picture.of(self._sweep(attend, at_once=block.processor is not layers.attention))

    def _upsample(self, step: Upsample, x: Picture) -> Picture:
        convolve = layers.upsampling(step.conv, x.pixels)

        def compute(top: int, bottom: int) -> tuple[mx.array, ...]:
            window, edges = x.window(top - 1, bottom + 1)
            x.give_up(bottom - 1)
            return self._kept(convolve(window, edges))

        return Picture.of(self._sweep(compute))

    def _downsample(self, step: Downsample, x: Picture) -> Picture:
        convolve = layers.downsampling(step.conv, x.pixels)

        def compute(top: int, bottom: int) -> tuple[mx.array, ...]:
            window, edges = x.window(2 * top, 2 * bottom + 1)
            x.give_up(2 * bottom)
            return self._kept(convolve(window, edges))

        return Picture.of(self._sweep(compute))


def _read(norm: nn.GroupNorm, x: Picture) -> None:
    for slab in x.slabs:
        layers.read(norm, slab)
