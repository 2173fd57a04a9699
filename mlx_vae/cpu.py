"""Convolutions for MLX's CPU backend, as sums of shifted matrix products. Arrays are NHWC, weights OHWI.

`mx.conv2d` copies its input once for every tap of the kernel before it multiplies. Here a picture is a matrix of
pixels by channels, and to shift it by a tap is to begin further down that matrix: nothing is copied. All arithmetic is
float32, the dtype in which the CPU's matrix products are fast.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import mlx.core as mx


def conv3x3(x: mx.array, weight: mx.array) -> mx.array:
    """(N, H, W, C) * (O, 3, 3, C) -> (N, H, W, O), zeros around the picture."""
    return _conv(_pad(x, 1, 1), weight, x.dtype)


def downsample_conv3x3(x: mx.array, weight: mx.array) -> mx.array:
    """(N, H, W, C) * (O, 3, 3, C) -> (N, H / 2, W / 2, O): stride 2, zeros on the right and at the bottom.

    Each square of 2x2 pixels becomes one pixel of 4C channels, and the kernel 2x2 such squares.
    """
    N, H, W, C = x.shape
    O = weight.shape[0]
    squares = x.reshape(N, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(N, H // 2, W // 2, 4 * C)
    kernel = _pad(weight, 0, 1).reshape(O, 2, 2, 2, 2, C).transpose(0, 1, 3, 2, 4, 5).reshape(O, 2, 2, 4 * C)
    return _conv(_pad(squares, 0, 1), kernel, x.dtype)


def upsample_conv3x3(x: mx.array, weight: mx.array) -> mx.array:
    """(N, H, W, C) * (O, 3, 3, C) -> (N, 2H, 2W, O): every pixel doubled, then a convolution.

    Of the three rows that a window sees in the doubled picture, two are one row of the small one. So each of the 2x2
    phases of the output is a 2x2 convolution of the small picture with summed taps: 16 products in place of 36.
    """
    N, H, W, _ = x.shape
    O = weight.shape[0]
    rows = _summed_taps(weight, axis=1)
    kernels = [taps for row in rows for taps in _summed_taps(row, axis=2)]  # 4 of (O, 2, 2, C)
    phases = _conv(_pad(x, 1, 1), mx.concatenate(kernels), x.dtype)  # (N, H + 1, W + 1, 4 O)
    phases = phases.reshape(N, H + 1, W + 1, 2, 2, O)
    rows = [mx.stack([phases[:, a : a + H, b : b + W, a, b] for b in range(2)], axis=3) for a in range(2)]
    return mx.stack(rows, axis=2).reshape(N, 2 * H, 2 * W, O)


def _summed_taps(weight: mx.array, axis: int) -> list[mx.array]:
    """The three taps along an axis as two, for the even pixels (0, 1 + 2) and for the odd ones (0 + 1, 2)."""
    first, middle, last = mx.split(weight, 3, axis=axis)
    return [mx.concatenate([first, middle + last], axis=axis), mx.concatenate([first + middle, last], axis=axis)]


def _pad(x: mx.array, before: int, after: int) -> mx.array:
    return mx.pad(x, [(0, 0), (before, after), (before, after), (0, 0)])


def _conv(x: mx.array, weight: mx.array, dtype: mx.Dtype) -> mx.array:
    return _valid_conv(x.astype(mx.float32), weight.astype(mx.float32)).astype(dtype)


def _shifted_products(x: mx.array, weight: mx.array) -> mx.array:
    """(N, H, W, C) * (O, h, w, C) -> (N, H - h + 1, W - w + 1, O): a convolution without padding."""
    N, H, W, C = x.shape
    O, h, w, _ = weight.shape
    pixels = x.reshape(-1, C)
    count = _window_count(x, weight)
    total = pixels[:count] @ weight[:, 0, 0].T
    for i, j in list(product(range(h), range(w)))[1:]:
        total = mx.addmm(total, pixels[i * W + j :][:count], weight[:, i, j].T)
    total = mx.pad(total, [(0, N * H * W - count), (0, 0)])
    return total.reshape(N, H, W, O)[:, : H - h + 1, : W - w + 1]


def _shifted_products_vjp(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    x, weight = primals
    W, C = x.shape[2:]
    O, h, w = weight.shape[:3]
    edges = [(0, 0), (h - 1, h - 1), (w - 1, w - 1), (0, 0)]
    turned = weight[:, ::-1, ::-1].transpose(3, 1, 2, 0)
    x_gradient = _valid_conv(mx.pad(cotangent, edges), turned)
    pixels = x.reshape(-1, C)
    count = _window_count(x, weight)
    outputs = mx.pad(cotangent, [(0, 0), (0, h - 1), (0, w - 1), (0, 0)]).reshape(-1, O)[:count].T
    taps = [outputs @ pixels[i * W + j :][:count] for i, j in product(range(h), range(w))]
    return x_gradient, mx.stack(taps, axis=1).reshape(O, h, w, C)


_valid_conv: Any = mx.custom_function(_shifted_products)
_valid_conv.vjp(_shifted_products_vjp)


def _window_count(x: mx.array, weight: mx.array) -> int:
    """How many pixels of the flat picture a window can begin at, those that run over the right edge included."""
    N, H, W, _ = x.shape
    _, h, w, _ = weight.shape
    return N * H * W - (h - 1) * W - (w - 1)
