"""The layers against their definitions, and their CPU strategies against MLX's own convolution."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models import random_images, relative_error

from mlx_vae import cpu, layers


def doubled(x: mx.array) -> mx.array:
    return mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)


DEFINITIONS: dict[str, tuple[Callable[..., mx.array], Callable[..., mx.array]]] = {
    "conv": (cpu.conv3x3, lambda x, w: mx.conv2d(x, w, padding=1)),
    "upsample": (cpu.upsample_conv3x3, lambda x, w: mx.conv2d(doubled(x), w, padding=1)),
    "downsample": (
        cpu.downsample_conv3x3,
        lambda x, w: mx.conv2d(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]), w, stride=2),
    ),
}


@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("size", [(2, 2), (6, 10), (2, 14)])
def test_cpu_convolutions_are_convolutions(kind: str, size: tuple[int, int]) -> None:
    ours, definition = DEFINITIONS[kind]
    x, weight = random_images((3, *size, 5)), random_images((7, 3, 3, 5), seed=1)
    assert relative_error(ours(x, weight), definition(x, weight)) < 1e-6


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_gradients_of_cpu_convolutions(kind: str) -> None:
    x, weight = random_images((2, 4, 6, 5)), random_images((7, 3, 3, 5), seed=1)

    def loss(conv: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda x, weight: mx.sum(mx.sin(conv(x, weight)))

    ours, definition = (mx.grad(loss(conv), argnums=(0, 1))(x, weight) for conv in DEFINITIONS[kind])
    for gradient, expected in zip(ours, definition, strict=True):
        assert relative_error(gradient, expected) < 1e-5


def test_convolutions_of_odd_sizes() -> None:
    for kind in ("conv", "upsample"):
        ours, definition = DEFINITIONS[kind]
        x, weight = random_images((2, 1, 7, 3)), random_images((2, 3, 3, 3), seed=1)
        assert relative_error(ours(x, weight), definition(x, weight)) < 1e-6


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_normalize_is_group_norm(groups: int) -> None:
    x = 5 + random_images((2, 6, 7, 12))
    norm = layers.norm(groups, 12)
    norm.weight, norm.bias = random_images((12,), seed=1), random_images((12,), seed=2)
    grouped = np.array(x, dtype=np.float64).reshape(2, 42, groups, 12 // groups)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * np.array(norm.weight) + np.array(norm.bias)
    assert relative_error(layers.normalize(norm, x), expected) < 1e-6


def test_normalize_keeps_its_digits_where_the_mean_is_large() -> None:
    """E[x^2] - E[x]^2 would lose every digit here; and float16 statistics would overflow."""
    norm = layers.norm(2, 4)
    x = random_images((1, 32, 32, 4))
    expected = layers.normalize(norm, x)
    assert relative_error(layers.normalize(norm, x + 1000), expected) < 1e-4
    assert mx.all(mx.isfinite(layers.normalize(norm, (x * 60000).astype(mx.float16)))).item()


def test_one_value_a_group_has_no_variance() -> None:
    norm = layers.norm(4, 4)
    assert mx.array_equal(layers.normalize(norm, random_images((1, 1, 1, 4))), mx.zeros((1, 1, 1, 4)))


def test_attention_is_softmax_of_the_products() -> None:
    q, k, v = (random_images((2, 1, 10, 8), seed) for seed in range(3))
    expected = mx.softmax(q @ k.transpose(0, 1, 3, 2) * 0.3, axis=-1) @ v
    assert relative_error(layers.attention(q, k, v, 0.3), expected) < 1e-6


def test_attention_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (random_images((2, 1, 11, 8), seed) for seed in range(3))
    whole = layers.attention(q, k, v, 0.3)
    gradient = mx.grad(lambda q: layers.attention(q, k, v, 0.3).square().sum())
    expected = gradient(q)
    monkeypatch.setattr(layers, "SCORES", 2 * 11 * 3)
    assert relative_error(layers.attention(q, k, v, 0.3), whole) < 1e-6
    assert relative_error(gradient(q), expected) < 1e-6


def test_attention_in_chunks_takes_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_images((1, 1, 2048, 8))

    def peak() -> int:
        mx.eval(q)
        mx.reset_peak_memory()
        mx.eval(layers.attention(q, q, q, 0.5))
        return mx.get_peak_memory()

    whole = peak()
    monkeypatch.setattr(layers, "SCORES", 2048 * 128)
    assert peak() < whole / 2


def test_in_turn_is_a_list_of_results() -> None:
    inputs = [mx.array([float(i)]) for i in range(4)]
    assert [x.item() for x in layers.in_turn(lambda x: x * 2, inputs)] == [0, 2, 4, 6]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_layers_keep_the_dtype(dtype: mx.Dtype) -> None:
    x = random_images((1, 4, 4, 4)).astype(dtype)
    conv, norm = nn.Conv2d(4, 4, 3, padding=1), layers.norm(2, 4)
    conv.set_dtype(dtype)
    norm.set_dtype(dtype)
    assert layers.conv(conv, x).dtype == dtype
    assert layers.norm_silu_conv(norm, conv, x).dtype == dtype
    assert layers.upsample_conv(conv, x).dtype == dtype
    assert layers.downsample_conv(conv, x).dtype == dtype
