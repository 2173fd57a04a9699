"""How much memory an Encoder or a Decoder takes, whole and by slabs of rows, and slabs that keep to a limit.

Memory is what a run adds: neither the weights nor the interpreter count. Sizes are in bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.nn as nn

from mlx_vae import layers
from mlx_vae.blocks import AttentionBlock, ResnetBlock, Upsample

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}

SLAB_SIZES = [1 << bits for bits in range(30, 17, -1)]
"""Numbers in a slab, from the largest that is worth trying to the least."""
OVERHEAD = 64 << 20
"""What the BLAS takes for itself."""
LOST = 0.05
"""The share of memory that is lost between allocations of different sizes."""
LEAST_ROWS = 4
"""Of a slab that is convolved: the rows above and below it are computed with it, and Winograd's tiles are as high."""


class Memory(NamedTuple):
    """What decoding or encoding needs, in bytes, besides the weights: computed whole, and by the smallest slabs."""

    whole: int
    least: int


@dataclass(frozen=True)
class Sweep:
    """One pass over a picture of `height` rows (to upsample, over the small one's), slab by slab.

    The rest are counts of numbers: a row reads or writes `row`, whichever are more; all of them write `written`; `kept`
    are stored meanwhile; `prepared` are the weights, made ready, or attention's keys, values and scores; `products` is
    how many multiplications it takes. A slab has `least_rows` or more, and is computed with `halo` neighbouring rows.
    """

    height: int
    row: int
    written: int
    kept: int
    prepared: int
    products: int
    least_rows: int = LEAST_ROWS
    halo: int = 2

    def rows(self, slab: int) -> int:
        """How many rows a slab of so many numbers has, or a few less, so that all streams have as much to do."""
        most = max(self.least_rows, slab // self.row // self.least_rows * self.least_rows)
        streams = len(layers.streams())
        slabs = math.ceil(math.ceil(self.height / most) / streams) * streams
        return min(self.height, math.ceil(self.height / slabs / self.least_rows) * self.least_rows)

    def peak(self, rows: int, at_work: int, itemsize: int) -> int:
        """Bytes, with slabs of so many rows `at_work` times in memory in float32; what is kept has its `itemsize`."""
        return self.kept * itemsize + 4 * (self.prepared + at_work * (rows + self.halo) * self.row)


@dataclass(frozen=True)
class Plan:
    """The sweeps of an Encoder or a Decoder, the numbers in a slab, and the limit to keep to if there is one."""

    sweeps: list[Sweep]
    slab: int
    limit: int | None = None

    def peak(self, N: int, itemsize: int) -> int:
        """Bytes, for N pictures one after the other: at the end there are all results, and all of them together."""
        results = 2 * N * self.sweeps[-1].written * itemsize
        slabs = [sweep.peak(sweep.rows(self.slab), layers.slabs_at_work(), itemsize) for sweep in self.sweeps]
        return OVERHEAD + int((1 + LOST) * max(slabs)) + results


def needed(half: nn.Module, shape: tuple[int, ...], itemsize: int) -> Memory:
    """For N pictures (N, H, W, C) or latents, in activations of `itemsize` bytes."""
    N, height, width, _ = shape
    sweeps = list(_sweeps(half, height, width))
    whole = OVERHEAD + N * max(sweep.peak(sweep.height, layers.ARRAYS_AT_WORK, itemsize) for sweep in sweeps)
    return Memory(whole, min(whole, Plan(sweeps, SLAB_SIZES[-1]).peak(N, itemsize)))


def plan(half: nn.Module, shape: tuple[int, ...], itemsize: int, limit: int | None) -> Plan | None:
    """The fastest way to compute `half` of (N, H, W, C) within a limit: by slabs, picture by picture; None for whole.

    Without a limit it is half of the device's memory, and if nothing keeps to that, the least. Raises ValueError if
    nothing keeps to a limit that was given.
    """
    N, height, width, _ = shape
    sweeps = list(_sweeps(half, height, width))
    room = layers.memory_size() // 2 if limit is None else limit
    largest = layers.largest_slab()
    memory = needed(half, shape, itemsize)
    if memory.whole <= room and all(N * sweep.height * sweep.row <= largest for sweep in sweeps):
        return None
    plans = [Plan(sweeps, slab, limit) for slab in SLAB_SIZES if slab <= largest]
    for candidate in plans:
        if candidate.peak(N, itemsize) <= room:
            return candidate
    if limit is None:
        return plans[-1]
    if memory.whole <= limit:
        return None
    raise ValueError(
        f"max_memory is {describe(limit)}: {N} x {height} x {width} needs at least {describe(memory.least)} "
        f"besides the weights, and {describe(memory.whole)} whole"
    )


def _sweeps(half: nn.Module, height: int, width: int) -> Iterator[Sweep]:
    """Those of an Encoder for a picture of that size, or of a Decoder for latents, in the order in which they run."""
    channels = half.conv_in.weight.shape[0]
    yield _convolution(half.conv_in, height, width, kept=channels)
    for step in half.steps():
        if isinstance(step, ResnetBlock):
            inner, channels = channels, step.conv1.weight.shape[0]
            stream = inner if "conv_shortcut" not in step else max(inner - channels, channels)
            yield _convolution(step.conv1, height, width, kept=stream + channels)
            yield _convolution(step.conv2, height, width, kept=2 * channels)
        elif isinstance(step, AttentionBlock):
            pixels = height * width
            numbers, products = pixels * channels, 2 * pixels * channels**2
            yield Sweep(height, 3 * width * channels, 2 * numbers, numbers, 4 * numbers, products, halo=0)
            products += 2 * pixels * numbers
            scores = layers.slabs_at_work() * layers.scores_at_once()
            yield Sweep(height, 3 * width * channels, numbers, 2 * numbers, 2 * numbers + scores, products, halo=0)
        elif isinstance(step, Upsample):
            height, width = 2 * height, 2 * width
            sweep = _convolution(step.conv, height, width, kept=channels)
            yield replace(sweep, height=height // 2, prepared=3 * sweep.prepared)
        else:
            height, width = height // 2, width // 2
            sweep = _convolution(step.conv, height, width, kept=4 * channels)
            yield replace(sweep, row=4 * sweep.row, prepared=3 * sweep.prepared)
    yield _convolution(half.conv_out, height, width, kept=channels)


def _convolution(conv: nn.Conv2d, height: int, width: int, kept: int) -> Sweep:
    """A sweep that writes height x width pixels, while so many pixels of `kept` channels are stored."""
    outer, _, _, inner = conv.weight.shape
    pixels, weights = height * width, outer * inner
    row = width * max(outer, inner)
    return Sweep(height, row, pixels * outer, pixels * kept, 50 * weights, 9 * pixels * weights)


def parse(size: str | int) -> int:
    """Bytes, of "4GB" (10^9), "4 GiB" (2^30), "512M" or a number. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(f'max_memory is {size!r}; wanted bytes, such as "4GB", "512MiB" or 4000000000')
    return int(float(match[1]) * UNITS[match[2]])


def describe(size: int) -> str:
    """As "1.21GB" or "62.4MB", rounded up, so that what `parse` makes of it is enough."""
    unit, suffix = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    digits = max(0, 3 - len(str(size // unit)))
    return f"{math.ceil(size / unit * 10**digits) / 10**digits:.{digits}f}{suffix}"
