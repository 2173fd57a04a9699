"""SiLU, softmax and convolutions for MLX's CPU backend. Arrays are NHWC, weights OHWI.

What is fast there is a matrix product and a simple operation on every element; what is slow is `mx.conv2d`, which
copies its input once for every tap of the kernel, and `mx.exp`, which takes its elements one by one. So here exp is a
polynomial, a large convolution is Winograd's, and a small one is a sum of shifted products: a picture is a matrix of
pixels by channels, and to shift it by a tap is to begin further down that matrix.

All arithmetic is float32, the dtype in which the CPU's matrix products are fast.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np

Edges = tuple[int, int]
"""How many rows of zeros belong above and below the rows that are given."""

Convolution = Callable[[mx.array, Edges], mx.array]
"""f(x, edges): (N, H, W, C) in any dtype -> (N, rows, W', O) in float32."""


# Exponentials

LOG2_E = math.log2(math.e)
ROUND = 1.5 * 2.0**23
"""A float32 of this size has no fraction: to add it is to round, and the sum's lowest bits are the whole number."""
EXP2 = np.polynomial.Chebyshev.interpolate(np.exp2, 5, domain=[-0.5, 0.5]).convert(kind=np.polynomial.Polynomial).coef
"""2^x on [-1/2, 1/2], lowest power first, to 2e-7."""


def _exp(x: mx.array) -> mx.array:
    power = mx.clip(x * LOG2_E, -126, 126)
    rounded = power + ROUND
    rest = power - (rounded - ROUND)
    result = rest * float(EXP2[-1]) + float(EXP2[-2])
    for coefficient in EXP2[-3::-1]:
        result = result * rest + float(coefficient)
    exponent = mx.left_shift(mx.view(rounded, mx.int32), 23)
    return mx.view(mx.view(result, mx.int32) + exponent, mx.float32)


exp: Any = mx.custom_function(_exp)
"""e^x of a float32 array, between 2^-126 and 2^126: 2^n 2^r with n whole and |r| at most 1/2, a polynomial."""
exp.vjp(lambda x, cotangent, result: cotangent * result)


def silu(x: mx.array) -> mx.array:
    """x / (1 + e^-x) of a float32 array. (A product takes a third of the time of a change of sign.)"""
    return x / (exp(x * -1) + 1)


QUERIES = 256
KEYS = 2048
"""Of attention, computed together: their scores stay in the caches."""


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """softmax(q k^T scale) v: (N, heads, L, C), k and v maybe of another L, in the dtype of q.

    The keys come in blocks; whatever was summed up before a larger score came shrinks (Rabe & Staats, 2021).
    """
    dtype = q.dtype
    q, k, v = q.astype(mx.float32) * scale, k.astype(mx.float32), v.astype(mx.float32)
    largest, total, result = mx.array(-mx.inf), mx.array(0.0), mx.array(0.0)
    for start in range(0, k.shape[2], KEYS):
        scores = q @ k[:, :, start : start + KEYS].swapaxes(-1, -2)
        larger = mx.stop_gradient(mx.maximum(largest, mx.max(scores, axis=-1, keepdims=True)))
        weights, shrink = exp(scores - larger), exp(largest - larger)
        total = total * shrink + mx.sum(weights, axis=-1, keepdims=True)
        result = result * shrink + weights @ v[:, :, start : start + KEYS]
        largest = larger
    return (result / total).astype(dtype)


# Convolutions, each prepared for a picture that has so many pixels


def conv3x3(weight: mx.array, pixels: int) -> Convolution:
    """Of weights (O, 3, 3, C), the size is kept: (N, H, W, C) -> (N, H + edges - 2, W, O)."""
    convolve = _convolution(weight, pixels)
    return lambda x, edges: convolve(_padded(x, edges, (1, 1)))


def downsample_conv3x3(weight: mx.array, pixels: int) -> Convolution:
    """Of weights (O, 3, 3, C), stride 2, zeros on the right: (N, H, W, C) -> (N, (H + edges - 1) / 2, W / 2, O).

    Each square of 2x2 pixels becomes one pixel of 4C channels, and the kernel 2x2 such squares.
    """
    O, _, _, C = weight.shape
    kernel = _padded(weight, (0, 1), (0, 1)).reshape(O, 2, 2, 2, 2, C).transpose(0, 1, 3, 2, 4, 5)
    convolve = _convolution(kernel.reshape(O, 2, 2, 4 * C), pixels // 4)

    def downsample(x: mx.array, edges: Edges) -> mx.array:
        x = _padded(x, (edges[0], edges[1] + 1), (0, 2))
        N, H, W, _ = x.shape
        squares = x.reshape(N, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5)
        return convolve(squares.reshape(N, H // 2, W // 2, 4 * C))

    return downsample


def upsample_conv3x3(weight: mx.array, pixels: int) -> Convolution:
    """Of weights (O, 3, 3, C), every pixel doubled, then a convolution: (N, H, W, C) -> (N, 2 (H + edges - 2), 2W, O).

    Of the three rows that a window sees in the doubled picture, two are one row of the small one. So each of the 2x2
    phases of the output is a 2x2 convolution of the small picture with summed taps: 16 products in place of 36.
    """
    phases = [
        [_convolution(taps, pixels) for taps in _summed_taps(rows, axis=2)] for rows in _summed_taps(weight, axis=1)
    ]

    def upsample(x: mx.array, edges: Edges) -> mx.array:
        x = _padded(x, edges, (1, 1))
        N, H, W, _ = x.shape
        rows = [
            mx.stack([phases[a][b](x[:, a : H - 1 + a, b : W - 1 + b]) for b in range(2)], axis=3) for a in range(2)
        ]
        return mx.stack(rows, axis=2).reshape(N, 2 * (H - 2), 2 * (W - 2), -1)

    return upsample


def _summed_taps(weight: mx.array, axis: int) -> list[mx.array]:
    """The three taps along an axis as two, for the even pixels (0, 1 + 2) and for the odd ones (0 + 1, 2)."""
    first, middle, last = mx.split(weight.astype(mx.float32), 3, axis=axis)
    return [mx.concatenate([first, middle + last], axis=axis), mx.concatenate([first + middle, last], axis=axis)]


def _padded(x: mx.array, rows: tuple[int, int], columns: tuple[int, int]) -> mx.array:
    """With zeros around, in float32. (`mx.pad` copies even where there is nothing to add.)"""
    x = x.astype(mx.float32)
    return mx.pad(x, [(0, 0), rows, columns, (0, 0)]) if any(rows + columns) else x


def _convolution(weight: mx.array, pixels: int) -> Callable[[mx.array], mx.array]:
    """Of weights (O, r, r, C), without padding: (N, H, W, C) in float32 -> (N, H - r + 1, W - r + 1, O)."""
    O, _, _, C = weight.shape
    weight = weight.astype(mx.float32)
    fixed = mx.stop_gradient(weight)
    taps = mx.contiguous(fixed.transpose(1, 2, 0, 3))
    transformed = _winograd_weights(fixed)
    pays = min(C, O) >= WINOGRAD_CHANNELS and pixels >= WINOGRAD_PIXELS

    def convolve(x: mx.array) -> mx.array:
        if pays and x.shape[1] >= WINOGRAD_ROWS:
            return _winograd(x, weight, transformed)
        return _shifted_products(x, weight, taps)

    return convolve


def _sum_of_shifted_products(x: mx.array, weight: mx.array, taps: mx.array) -> mx.array:
    N, H, W, C = x.shape
    r, _, O, _ = taps.shape
    pixels = x.reshape(-1, C)
    count = (N * H - (r - 1)) * W - (r - 1)  # the windows, and those that run over the right edge or into the next N
    shifts = [(taps[i, j].T, i * W + j) for i, j in product(range(r), range(r))]
    total = pixels[:count] @ taps[0, 0].T
    for tap, shift in shifts[1:]:
        total = mx.addmm(total, pixels[shift : shift + count], tap)
    total = mx.pad(total, [(0, N * H * W - count), (0, 0)])
    return total.reshape(N, H, W, O)[:, : H - r + 1, : W - r + 1]


WINOGRAD_CHANNELS = 64
"""From here up, Winograd's products are so many fewer that its transforms pay."""
WINOGRAD_PIXELS = 1024
"""Of the picture: with fewer, the transform of the weights takes longer than it saves."""
WINOGRAD_ROWS = 5
"""Of the input: with fewer, most of a tile would be empty."""
TILE = 4
POINTS = {2: (0.5, -0.5, 1.25, -1.25), 3: (0.0, 0.625, -0.625, 1.5, -1.5)}
"""Where the polynomials are evaluated, besides infinity: of those tried, the ones with the least error, half of that of
the usual 0, 1, -1, 2, -2."""


def _winograd_products(x: mx.array, weight: mx.array, transformed: mx.array) -> mx.array:
    """Winograd's minimal filtering (Lavin & Gray, 2016): tiles of 4x4 outputs, (r + 3)^2 products for 16 r^2."""
    N, H, W, C = x.shape
    O, r = weight.shape[:2]
    n = TILE + r - 1
    rows, columns = -(-(H - r + 1) // TILE), -(-(W - r + 1) // TILE)
    x = _padded(x, (0, rows * TILE + r - 1 - H), (0, columns * TILE + r - 1 - W))
    inputs, _, outputs = _winograd_transforms(r)
    bands = mx.stack([x[:, i : i + rows * TILE : TILE] for i in range(n)])
    tiles = mx.stack([bands[:, :, :, j : j + columns * TILE : TILE] for j in range(n)], axis=1)
    tiles = (inputs @ tiles.reshape(n * n, -1)).reshape(n * n, -1, C) @ transformed.swapaxes(1, 2)
    tiles = (outputs @ tiles.reshape(n * n, -1)).reshape(TILE, TILE, N, rows, columns, O)
    result = tiles.transpose(2, 3, 0, 4, 1, 5).reshape(N, rows * TILE, columns * TILE, O)
    return result[:, : H - r + 1, : W - r + 1]


def _winograd_weights(weight: mx.array) -> mx.array:
    """(O, r, r, C) -> ((r + 3)^2, O, C)."""
    O, r, _, C = weight.shape
    _, weights, _ = _winograd_transforms(r)
    return (weights @ weight.transpose(1, 2, 0, 3).reshape(r * r, -1)).reshape(-1, O, C)


@functools.cache
def _winograd_transforms(r: int) -> tuple[mx.array, mx.array, mx.array]:
    """Of tiles of (r + 3)^2 inputs, of r^2 weights, and to 4^2 outputs, each a matrix.

    To multiply polynomials is to multiply their values at enough points; a convolution is the transpose of that.
    """
    n = TILE + r - 1

    def values(length: int) -> np.ndarray:
        at_infinity = np.eye(length)[-1:]
        return np.concatenate([np.vander(POINTS[r], length, increasing=True), at_infinity])

    transforms = np.linalg.inv(values(n)).T, values(r), values(TILE).T
    inputs, weights, outputs = (mx.array(np.kron(matrix, matrix).astype(np.float32)) for matrix in transforms)
    return inputs, weights, outputs


def _vjp(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    x, weight, prepared = primals
    N, H, W, C = x.shape
    O, r = weight.shape[:2]
    turned = weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)
    x_gradient = _convolution(turned, N * H * W)(_padded(cotangent, (r - 1, r - 1), (r - 1, r - 1)))
    pixels = x.reshape(-1, C)
    count = (N * H - (r - 1)) * W - (r - 1)
    outputs = _padded(cotangent, (0, r - 1), (0, r - 1)).reshape(-1, O)[:count].T
    taps = [outputs @ pixels[i * W + j :][:count] for i, j in product(range(r), range(r))]
    return x_gradient, mx.stack(taps, axis=1).reshape(O, r, r, C), mx.zeros_like(prepared)


_shifted_products: Any = mx.custom_function(_sum_of_shifted_products)
_winograd: Any = mx.custom_function(_winograd_products)
for _function in (_shifted_products, _winograd):
    _function.vjp(_vjp)
