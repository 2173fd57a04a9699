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


EDGES = {"conv": (1, 1), "upsample": (1, 1), "downsample": (0, 1)}
STRATEGIES = {"conv": cpu.conv3x3, "upsample": cpu.upsample_conv3x3, "downsample": cpu.downsample_conv3x3}
DEFINITIONS: dict[str, Callable[[mx.array, mx.array], mx.array]] = {
    "conv": lambda x, w: mx.conv2d(x, w, padding=1),
    "upsample": lambda x, w: mx.conv2d(doubled(x), w, padding=1),
    "downsample": lambda x, w: mx.conv2d(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]), w, stride=2),
}
CHANNELS = [(5, 7), (cpu.WINOGRAD_CHANNELS, cpu.WINOGRAD_CHANNELS + 2)]


def pixels_of(x: mx.array) -> int:
    return x.size // x.shape[-1]


def strategy(kind: str) -> Callable[[mx.array, mx.array], mx.array]:
    return lambda x, weight: STRATEGIES[kind](weight, pixels_of(x))(x, EDGES[kind])


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", DEFINITIONS)
@pytest.mark.parametrize("size", [(2, 2), (6, 10), (2, 14), (16, 8)])
def test_cpu_convolutions_are_convolutions(kind: str, size: tuple[int, int], channels: tuple[int, int]) -> None:
    x, weight = random_images((3, *size, channels[0])), random_images((channels[1], 3, 3, channels[0]), seed=1)
    assert relative_error(strategy(kind)(x, weight), DEFINITIONS[kind](x, weight)) < 2e-6


def test_winograd_is_for_large_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WINOGRAD_PIXELS", 60)
    winograd = cpu._winograd
    taken: list[tuple[int, ...]] = []

    def watched(x: mx.array, *weights: mx.array) -> mx.array:
        taken.append(x.shape)
        return winograd(x, *weights)

    monkeypatch.setattr(cpu, "_winograd", watched)
    x, weight = random_images((1, 6, 10, 64)), random_images((66, 3, 3, 64), seed=1)
    large, small = (cpu.conv3x3(weight, pixels)(x, (1, 1)) for pixels in (60, 59))
    assert taken == [(1, 8, 12, 64)]
    assert relative_error(large, small) < 2e-6


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", DEFINITIONS)
def test_gradients_of_cpu_convolutions(kind: str, channels: tuple[int, int]) -> None:
    x, weight = random_images((2, 4, 6, channels[0])), random_images((channels[1], 3, 3, channels[0]), seed=1) / 9

    def loss(conv: Callable[..., mx.array]) -> Callable[..., mx.array]:
        return lambda x, weight: mx.sum(mx.sin(conv(x, weight)))

    ours, definition = (mx.grad(loss(conv), argnums=(0, 1))(x, weight) for conv in (strategy(kind), DEFINITIONS[kind]))
    for gradient, expected in zip(ours, definition, strict=True):
        assert relative_error(gradient, expected) < 1e-5


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("axes", [(0, None), (0, 0), (None, 0)])
def test_cpu_convolutions_can_be_mapped(axes: tuple[int | None, int | None], channels: tuple[int, int]) -> None:
    x, weight = random_images((3, 2, 6, 8, channels[0])), random_images((3, channels[1], 3, 3, channels[0]), seed=1)
    arguments = [value[0] if axis is None else value for value, axis in zip((x, weight), axes, strict=True)]
    mapped = mx.vmap(strategy("conv"), in_axes=axes)(*arguments)
    for i in range(3):
        one = [value if axis is None else value[i] for value, axis in zip(arguments, axes, strict=True)]
        assert relative_error(mapped[i], strategy("conv")(*one)) < 1e-6


def test_convolutions_of_odd_sizes() -> None:
    for kind in ("conv", "upsample"):
        x, weight = random_images((2, 1, 7, 3)), random_images((2, 3, 3, 3), seed=1)
        assert relative_error(strategy(kind)(x, weight), DEFINITIONS[kind](x, weight)) < 1e-6


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("kind", DEFINITIONS)
def test_slabs_of_rows_are_the_whole(
    kind: str, backend: str, channels: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both backends' strategies run anywhere, but for `mx.compile`, which the CPU's would need a compiler for."""
    monkeypatch.setattr(layers, "_on_cpu", lambda: backend == "cpu")
    x = random_images((1, 12, 6, channels[0]))
    stride = 2 if kind == "downsample" else 1
    conv = nn.Conv2d(channels[0], channels[1], 3, stride, padding=1 if stride == 1 else 0)
    prepare, whole = {
        "conv": (layers.convolution, layers.conv),
        "upsample": (layers.upsampling, layers.upsample_conv),
        "downsample": (layers.downsampling, layers.downsample_conv),
    }[kind]
    expected, convolve = whole(conv, x), prepare(conv, pixels_of(x))
    assert relative_error(expected, DEFINITIONS[kind](x, conv.weight) + conv.bias) < 2e-6
    for rows in (2, 4, 6):
        parts = []
        for top in range(0, 12, rows):
            above, below = (0, 1) if kind == "downsample" else (1, 1)
            first, last = max(0, top - above), min(12, top + rows + below)
            edges = first - (top - above), top + rows + below - last
            parts.append(convolve(x[:, first:last], edges))
        assert relative_error(mx.concatenate(parts, axis=1), expected) < 2e-6


def test_exp_and_silu_are_theirs() -> None:
    x = mx.linspace(-80, 80, 10001)
    reference = np.exp(np.array(x, dtype=np.float64))
    assert np.max(np.abs(np.array(cpu.exp(x)) / reference - 1)) < 6e-6
    assert np.max(np.abs(np.array(cpu.silu(x)) - np.array(x, dtype=np.float64) / (1 + 1 / reference))) < 1e-5
    assert cpu.silu(mx.array([0.0, 1e30, mx.inf])).tolist() == mx.array([0.0, 1e30, mx.inf]).tolist()
    assert abs(cpu.silu(mx.array(-200.0)).item()) < 1e-30
    assert mx.isnan(cpu.silu(mx.array(mx.nan))).item()
    ours, definition = (mx.grad(lambda x, f=f: mx.sum(f(x)))(x) for f in (cpu.silu, nn.silu))
    assert mx.max(mx.abs(ours - definition)).item() < 1e-6


def test_moments_of_parts_are_those_of_the_whole() -> None:
    x = 100 + random_images((2, 9, 7, 4))
    parts = [layers.moments(x[:, top:bottom]) for top, bottom in ((0, 1), (1, 4), (4, 9))]
    merged, whole = layers.merge(layers.merge(*parts[:2]), parts[2]), layers.moments(x)
    assert merged.pixels == whole.pixels == 63
    assert relative_error(merged.mean, whole.mean) < 1e-6
    assert relative_error(merged.deviation, np.array(x, dtype=np.float64).var((1, 2), keepdims=True) * 63) < 1e-5


@pytest.mark.parametrize("groups", [1, 4, 12])
def test_normalize_is_group_norm(groups: int) -> None:
    x = 5 + random_images((2, 6, 7, 12))
    norm = layers.norm(groups, 12)
    norm.weight, norm.bias = random_images((12,), seed=1), random_images((12,), seed=2)
    grouped = np.array(x, dtype=np.float64).reshape(2, 42, groups, 12 // groups)
    mean, var = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * np.array(norm.weight) + np.array(norm.bias)
    assert relative_error(layers.normalize(norm, x), expected) < 2e-6


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
    for chunks in (
        {"cpu.QUERIES": 3, "cpu.KEYS": 4},
        {"cpu.QUERIES": 4, "cpu.KEYS": 11},
        {"SCORES": 2 * 11 * 3, "_on_cpu": lambda: False},
    ):
        for name, value in chunks.items():
            monkeypatch.setattr(f"mlx_vae.layers.{name}", value)
        assert relative_error(layers.attention(q, k, v, 0.3), whole) < 1e-6
        assert relative_error(gradient(q), expected) < 1e-6


def test_attention_in_chunks_takes_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    q = random_images((1, 1, 2048, 8))

    def peak() -> int:
        mx.eval(q)
        mx.reset_peak_memory()
        mx.eval(layers.attention(q, q, q, 0.5))
        return mx.get_peak_memory()

    monkeypatch.setattr(cpu, "QUERIES", 2048)
    whole = peak()
    monkeypatch.setattr(cpu, "QUERIES", 128)
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
