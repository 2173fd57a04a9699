"""Slabs of rows against the whole."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from models import (
    SMALL,
    WIDE,
    inflated,
    random_config,
    random_images,
    random_latent_shape,
    random_latents,
    random_model,
    relative_error,
)

from mlx_vae import AutoencoderKL, AutoencoderKLConfig, layers, memory, precision, slabs
from mlx_vae.memory import Plan


def by_rows(half: nn.Module, x: mx.array, rows: int) -> mx.array:
    sweeps = memory.plan(half, x.shape, 4, memory.needed(half, x.shape, 4).least)
    sweeps = sweeps.sweeps if sweeps else list(memory._sweeps(half, *x.shape[1:3]))
    return slabs.run(half, x, Plan([replace(sweep, least_rows=rows) for sweep in sweeps], slab=1))


def inputs(config: AutoencoderKLConfig, seed: int) -> tuple[mx.array, mx.array]:
    z = random_latents(random_latent_shape(config, seed), seed)
    N, h, w, _ = z.shape
    return random_images((N, h * config.factor, w * config.factor, config.in_channels), seed), z


@pytest.mark.parametrize("seed", range(12))
def test_slabs_of_any_height_are_the_whole(seed: int) -> None:
    config = random_config(seed)
    vae = random_model(config, seed)
    x, z = inputs(config, seed)
    moments, pictures = vae.encoder(x), vae.decoder(z)
    for rows in (1, 3, 4):
        assert relative_error(by_rows(vae.encoder, x, rows), moments) < 5e-6
        assert relative_error(by_rows(vae.decoder, z, rows), pictures) < 5e-6


def test_every_height_of_a_slab() -> None:
    vae = random_model(WIDE)
    z = random_latents((1, 9, 5, WIDE.latent_channels))
    x = random_images((1, 18, 10, 3))
    moments, pictures = vae.encoder(x), vae.decoder(z)
    for rows in range(1, 20):
        assert relative_error(by_rows(vae.decoder, z, rows), pictures) < 5e-6
        assert relative_error(by_rows(vae.encoder, x, rows), moments) < 5e-6


def test_the_strategies_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run on the CPU too, without `mx.compile`, which needs a compiler there."""
    vae = random_model(WIDE)
    z = random_latents((1, 9, 5, WIDE.latent_channels))
    x = random_images((1, 18, 10, 3))
    pictures, moments = vae.decoder(z), vae.encoder(x)
    monkeypatch.setattr(layers, "_on_cpu", lambda: False)
    mx.disable_compile()
    try:
        assert relative_error(vae.decoder(z), pictures) < 5e-6
        assert relative_error(vae.encoder(x), moments) < 5e-6
        for rows in (1, 4, 7):
            assert relative_error(by_rows(vae.decoder, z, rows), pictures) < 5e-6
            assert relative_error(by_rows(vae.encoder, x, rows), moments) < 5e-6
    finally:
        mx.enable_compile()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_slabs_in_half_precision(dtype: mx.Dtype) -> None:
    vae = random_model(SMALL)
    z = random_latents((1, 9, 7, SMALL.latent_channels))
    expected = vae.decoder(z)
    vae.set_dtype(dtype)
    whole, bounded = vae.decoder(z.astype(dtype)), by_rows(vae.decoder, z.astype(dtype), 4)
    assert bounded.dtype == dtype
    assert relative_error(bounded, expected) < 1.2 * relative_error(whole, expected)


def test_a_processor_of_ones_own_gets_all_queries_at_once() -> None:
    vae = random_model(SMALL)
    z = random_latents((1, 9, 7, SMALL.latent_channels))
    shapes = []

    def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        shapes.append(q.shape)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

    expected = vae.decoder(z)
    vae.set_attn_processor(attend)
    assert relative_error(by_rows(vae.decoder, z, 2), expected) < 5e-6
    assert shapes == [(1, 1, 63, 16)]


def test_norms_are_watched_slab_by_slab() -> None:
    vae = random_model(SMALL)
    z = random_latents((1, 9, 7, SMALL.latent_channels))
    whole: dict[str, float] = {}
    bounded: dict[str, float] = {}
    for largest, rows in ((whole, None), (bounded, 4)):

        def watch(name: str, x: mx.array, largest: dict[str, float] = largest) -> None:
            value: float = mx.max(mx.abs(x)).item()  # type: ignore[assignment]
            largest[name] = max(largest.get(name, 0.0), value)

        with precision.watching_norms(vae, watch):
            mx.eval(vae.decoder(z) if rows is None else by_rows(vae.decoder, z, rows))
    assert whole == pytest.approx(bounded, rel=1e-5)
    assert len(whole) == sum(name.startswith("decoder") and "norm" in name for name in vae.named_parameters()) / 2


@pytest.mark.parametrize("part", ["decode", "encode"])
def test_max_memory(part: str) -> None:
    """A batch, a progress that ends at 1, and the same result."""
    vae = random_model(WIDE)
    x = random_latents((2, 40, 33, 4)) if part == "decode" else random_images((2, 80, 66, 3))
    run, needed = (vae.decode, vae.decode_memory) if part == "decode" else (vae.encode, vae.encode_memory)
    shares: list[float] = []
    limit = needed(x.shape).least
    bounded = run(x, max_memory=limit, progress=shares.append, return_dict=False)[0]
    whole = vae._decode(x) if part == "decode" else vae._encode(x)
    assert relative_error(bounded if part == "decode" else bounded.moments, whole) < 5e-6
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1
    assert len(shares) > 20
    with pytest.raises(ValueError, match=r"max_memory is .* needs at least .* besides the weights, and .* whole"):
        run(x, max_memory=limit - 1)


def test_the_least_is_less_than_the_whole() -> None:
    vae = random_model(WIDE)
    z = random_latents((1, 128, 128, WIDE.latent_channels))

    def peak(decode: object) -> int:
        mx.eval(z)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(decode())  # type: ignore[operator]
        return mx.get_peak_memory() - before

    least, whole = vae.decode_memory(z.shape).least, vae.decode_memory(z.shape).whole
    bounded = peak(lambda: vae.decode(z, max_memory=least).sample)
    assert bounded < least < whole
    assert bounded < 0.5 * peak(lambda: vae._decode(z)) < whole


def test_transforms_compute_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs have to be evaluated one by one, which no transformation allows."""
    monkeypatch.setattr("mlx_vae.layers.largest_slab", lambda: 1 << 18)
    vae = random_model(WIDE)
    z = random_latents((1, 30, 50, WIDE.latent_channels))
    expected = vae._decode(z)
    assert mx.any(vae.decode(z).sample != expected).item()
    assert mx.array_equal(mx.vmap(lambda z: vae.decode(z).sample)(z[None])[0], expected)

    def loss(vae: AutoencoderKL, exact: bool) -> mx.array:
        return mx.mean(mx.sin(vae._decode(z) if exact else vae.decode(z).sample))

    gradients = [dict(tree_flatten(nn.value_and_grad(vae, loss)(vae, exact)[1])) for exact in (True, False)]
    for name, gradient in gradients[0].items():
        assert mx.array_equal(gradients[1][name], gradient), name
    z = random_latents((1, 128, 128, WIDE.latent_channels))
    limit = vae.decode_memory(z.shape).least
    with pytest.raises(ValueError, match=r"max_memory is .*: mx\.grad, mx\.compile and mx\.vmap can't keep to it"):
        mx.grad(lambda z: vae.decode(z, max_memory=limit).sample.sum())(z)


def test_max_memory_is_not_for_tiles() -> None:
    vae = random_model(SMALL)
    vae.enable_tiling()
    with pytest.raises(ValueError, match="disable_tiling"):
        vae.decode(random_latents((1, 9, 7, 4)), max_memory="1GB")
    with pytest.raises(ValueError, match="disable_tiling"):
        vae.encode(random_images((1, 36, 28, 3)), max_memory="1GB")


def test_float16_that_overflows_in_slabs() -> None:
    vae = inflated(WIDE, stream=2.0**15)
    z = random_latents((1, 24, 24, WIDE.latent_channels))
    expected = vae._decode(z)
    vae.set_dtype(mx.float16)
    with pytest.warns(RuntimeWarning, match=r"float16 overflows before decoder\."):
        ours = vae.decode(z, max_memory=vae.decode_memory(z.shape).least).sample
    assert relative_error(ours, expected) < 4e-2
