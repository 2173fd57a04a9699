"""Blended tiles, as diffusers cuts and blends them. Arrays are NHWC.

Approximate by nature: every tile has its own GroupNorm statistics, so tones may shift from tile to tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_vae import layers


@dataclass(frozen=True)
class Tiling:
    """Tiles of `latent_size` latent pixels, `factor` picture pixels each, that overlap by `overlap_factor`."""

    latent_size: int
    factor: int
    overlap_factor: float = 0.25

    def __post_init__(self) -> None:
        if not 0 <= self.overlap_factor < 1:
            raise ValueError(f"tile_overlap_factor is {self.overlap_factor}; it must be at least 0 and less than 1")
        if self.latent_size < 1 or self.stride < 1:
            raise ValueError(
                f"a tile of {self.latent_size * self.factor} px with an overlap of {self.overlap_factor} leaves "
                f"less than {self.factor} px from tile to tile"
            )

    @property
    def stride(self) -> int:
        """Latent pixels from one tile to the next."""
        return int(self.latent_size * (1 - self.overlap_factor))

    def covers(self, height: int, width: int) -> bool:
        """Whether latents of that size fit into one tile."""
        return height <= self.latent_size and width <= self.latent_size

    def encode(self, encode: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """(N, H, W, 3) -> moments (N, H / factor, W / factor, 2C), `encode` applied tile by tile."""
        return _by_tiles(
            encode, x, self.latent_size * self.factor, self.stride * self.factor, self.latent_size, self.stride
        )

    def decode(self, decode: Callable[[mx.array], mx.array], z: mx.array) -> mx.array:
        """(N, h, w, C) -> (N, h * factor, w * factor, 3), `decode` applied tile by tile."""
        return _by_tiles(
            decode, z, self.latent_size, self.stride, self.latent_size * self.factor, self.stride * self.factor
        )


def _by_tiles(
    run: Callable[[mx.array], mx.array], x: mx.array, size: int, stride: int, out_size: int, out_stride: int
) -> mx.array:
    """Cuts x into tiles of `size` every `stride` pixels, runs them in turn, blends each with those above and left."""
    tops, lefts = range(0, x.shape[1], stride), range(0, x.shape[2], stride)
    tiles = layers.in_turn(run, [x[:, top : top + size, left : left + size] for top in tops for left in lefts])
    for i in range(len(tiles)):
        if i >= len(lefts):
            tiles[i] = _blend(tiles[i - len(lefts)], tiles[i], out_size - out_stride, axis=1)
        if i % len(lefts):
            tiles[i] = _blend(tiles[i - 1], tiles[i], out_size - out_stride, axis=2)
    tiles = [tile[:, :out_stride, :out_stride] for tile in tiles]
    rows = [mx.concatenate(tiles[i : i + len(lefts)], axis=2) for i in range(0, len(tiles), len(lefts))]
    return mx.concatenate(rows, axis=1)


def _blend(before: mx.array, tile: mx.array, overlap: int, axis: int) -> mx.array:
    """Fades from the end of `before` into the beginning of `tile` along an axis; the weight of `tile` is i / extent."""
    extent = min(before.shape[axis], tile.shape[axis], overlap)
    if extent == 0:
        return tile
    shape = [1, 1, 1, 1]
    shape[axis] = extent
    weight = (mx.arange(extent) / extent).astype(tile.dtype).reshape(shape)
    tail = mx.split(before, [before.shape[axis] - extent], axis=axis)[1]
    head, rest = mx.split(tile, [extent], axis=axis)
    return mx.concatenate([tail * (1 - weight) + head * weight, rest], axis=axis)
