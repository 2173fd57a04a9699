"""AutoencoderKL's interface: shapes, options, transforms, dtypes, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten
from models import SMALL, SMALL_LATENT, random_images, random_latents, random_model, random_weights, relative_error

from mlx_vae import AutoencoderKL, AutoencoderKLConfig, AutoencoderKLOutput, DecoderOutput

HEIGHT, WIDTH = 4 * SMALL_LATENT[0], 4 * SMALL_LATENT[1]


@pytest.fixture
def x() -> mx.array:
    return random_images((2, HEIGHT, WIDTH, 3))


@pytest.fixture
def z() -> mx.array:
    return random_latents((2, *SMALL_LATENT, 4))


def test_shapes(vae: AutoencoderKL, x: mx.array, z: mx.array) -> None:
    assert vae.encode(x).latent_dist.mean.shape == z.shape
    assert vae.decode(z).sample.shape == x.shape
    assert vae(x).sample.shape == x.shape


def test_return_dict(vae: AutoencoderKL, x: mx.array, z: mx.array) -> None:
    assert isinstance(vae.encode(x), AutoencoderKLOutput)
    assert isinstance(vae.decode(z), DecoderOutput)
    (posterior,) = vae.encode(x, return_dict=False)
    (sample,) = vae.decode(z, return_dict=False)
    (again,) = vae(x, return_dict=False)
    assert type(vae.decode(z, return_dict=False)) is tuple
    assert mx.array_equal(posterior.mean, vae.encode(x).latent_dist.mean)
    assert mx.array_equal(sample, vae.decode(z).sample)
    assert again.shape == x.shape


def test_call_takes_the_mode_or_a_sample(vae: AutoencoderKL, x: mx.array) -> None:
    posterior = vae.encode(x).latent_dist
    assert mx.array_equal(vae(x).sample, vae.decode(posterior.mode()).sample)
    key = mx.random.key(3)
    expected = vae.decode(posterior.sample(key)).sample
    assert mx.array_equal(vae(x, sample_posterior=True, key=key).sample, expected)


def test_parameter_names_are_those_of_diffusers(vae: AutoencoderKL) -> None:
    names = vae.named_parameters()
    assert names["encoder.down_blocks.0.downsamplers.0.conv.weight"].shape == (8, 3, 3, 8)
    assert names["decoder.up_blocks.1.resnets.0.conv_shortcut.weight"].shape == (12, 1, 1, 16)
    assert names["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (16, 16)
    assert names["quant_conv.weight"].shape == (8, 1, 1, 8)


def test_optional_parts_leave_no_parameters() -> None:
    config = AutoencoderKLConfig(
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False, block_out_channels=(32, 32)
    )
    names = AutoencoderKL(config).named_parameters()
    assert not [name for name in names if "quant" in name or "attentions" in name]


# The latent space


def test_scale_and_unscale_undo_each_other(z: mx.array) -> None:
    for fields in (
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        {"scaling_factor": 0.5, "latents_mean": (0.1, 0.2, 0.3, 0.4), "latents_std": (1.0, 2.0, 3.0, 4.0)},
    ):
        vae = AutoencoderKL(AutoencoderKLConfig(**fields))
        assert relative_error(vae.unscale(vae.scale(z)), z) < 1e-6


def test_scale_is_the_formula(z: mx.array) -> None:
    flux = AutoencoderKL(AutoencoderKLConfig(scaling_factor=0.3611, shift_factor=0.1159))
    assert relative_error(flux.scale(z), (z - 0.1159) * 0.3611) < 1e-6
    mean, std = mx.array([0.1, 0.2, 0.3, 0.4]), mx.array([1.0, 2.0, 3.0, 4.0])
    playground = AutoencoderKL(
        AutoencoderKLConfig(scaling_factor=0.5, latents_mean=tuple(mean.tolist()), latents_std=tuple(std.tolist()))
    )
    assert relative_error(playground.scale(z), (z - mean) * 0.5 / std) < 1e-6


# Memory


def test_slicing_changes_nothing(vae: AutoencoderKL, x: mx.array, z: mx.array) -> None:
    whole, posterior = vae.decode(z).sample, vae.encode(x).latent_dist
    vae.enable_slicing()
    assert relative_error(vae.decode(z).sample, whole) < 1e-6
    assert relative_error(vae.encode(x).latent_dist.mean, posterior.mean) < 1e-6
    vae.disable_slicing()
    assert not vae.use_slicing


def test_slices_and_tiles_take_less_memory(vae: AutoencoderKL) -> None:
    z = random_latents((4, 16, 16, 4))
    mx.eval(z)

    def peak(decode: Callable[[mx.array], DecoderOutput]) -> int:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(decode(z).sample)
        return mx.get_peak_memory() - before

    whole = peak(vae.decode)
    vae.enable_slicing()
    sliced = peak(vae.decode)
    assert sliced < 0.35 * whole
    assert peak(vae.tiled_decode) < 0.5 * sliced


def test_tiling_is_for_what_is_larger_than_a_tile(vae: AutoencoderKL) -> None:
    small, large = random_latents((1, 4, 4, 4)), random_latents((1, 4, 5, 4))
    whole = vae.decode(small).sample, vae.decode(large).sample
    vae.enable_tiling()
    assert mx.array_equal(vae.decode(small).sample, whole[0])
    assert relative_error(vae.decode(large).sample, whole[1]) > 1e-3
    vae.disable_tiling()
    assert mx.array_equal(vae.decode(large).sample, whole[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 3), (4, 4), (7, 13)])
def test_tiles_of_any_picture_size(vae: AutoencoderKL, size: tuple[int, int]) -> None:
    decoded = vae.tiled_decode(random_latents((1, *size, 4))).sample
    assert decoded.shape == (1, 4 * size[0], 4 * size[1], 3)
    encoded = vae.tiled_encode(random_images((1, 4 * size[0], 4 * size[1], 3))).latent_dist
    assert encoded.mean.shape == (1, *size, 4)


@pytest.mark.parametrize(("tile", "overlap"), [(20, 0.25), (24, 0.5), (16, 0.0), (18, 0.1)])
def test_tiles_of_any_size(vae: AutoencoderKL, tile: int, overlap: float) -> None:
    vae.enable_tiling(tile, overlap)
    z = random_latents((1, 9, 11, 4))
    assert vae.decode(z).sample.shape == (1, 36, 44, 3)
    assert vae.encode(vae.decode(z).sample).latent_dist.mean.shape == z.shape


def test_slices_of_tiles(vae: AutoencoderKL) -> None:
    z = random_latents((2, 7, 6, 4))
    expected = vae.tiled_decode(z, return_dict=False)[0]
    vae.enable_slicing()
    assert relative_error(vae.tiled_decode(z).sample, expected) < 1e-6


@pytest.mark.parametrize(("tile", "overlap"), [(3, 0.25), (16, 1.0), (16, -0.1), (4, 0.5)])
def test_refuses_tiles_without_a_step(vae: AutoencoderKL, tile: int, overlap: float) -> None:
    with pytest.raises(ValueError, match=r"tile"):
        vae.enable_tiling(tile, overlap)


# Attention


def test_attention_processor(vae: AutoencoderKL, z: mx.array) -> None:
    expected = vae.decode(z).sample
    seen = []

    def processor(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
        seen.append((q.shape, scale))
        return mx.softmax(q @ k.transpose(0, 1, 3, 2) * scale, axis=-1) @ v

    vae.set_attn_processor(processor)
    assert relative_error(vae.decode(z).sample, expected) < 1e-6
    assert seen == [((2, 1, 35, 16), 0.25)]
    vae.set_default_attn_processor()
    assert mx.array_equal(vae.decode(z).sample, expected)
    assert len(seen) == 1


def test_what_replaces_a_linear_layer_is_called(vae: AutoencoderKL, z: mx.array) -> None:
    """Such as a layer that is quantised or that has an adapter, in slabs and, under a transformation, whole."""

    class Adapted(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def __call__(self, x: mx.array) -> mx.array:
            return self.linear(x) + 0.1 * x

    attention = vae.decoder.mid_block.attentions[0]
    adapted = Adapted(attention.to_v)
    attention.to_v.weight = attention.to_v.weight + 0.1 * mx.eye(16)
    expected = vae.decode(z).sample
    attention.to_v.weight = attention.to_v.weight - 0.1 * mx.eye(16)
    attention.to_v = adapted
    assert relative_error(vae.decode(z).sample, expected) < 1e-6
    assert relative_error(mx.vmap(lambda z: vae.decode(z).sample)(z[None])[0], expected) < 1e-6
    attention.to_v = nn.Linear(16, 16, bias=False)
    mx.eval(vae.decode(z).sample)


# Transforms and training


@pytest.mark.skipif(shutil.which("c++") is None, reason="mx.compile needs a C++ compiler on the CPU")
def test_compile(vae: AutoencoderKL, x: mx.array, z: mx.array) -> None:
    decode = mx.compile(lambda z: vae.decode(z).sample)
    encode = mx.compile(lambda x: vae.encode(x).latent_dist.mean)
    assert relative_error(decode(z), vae.decode(z).sample) < 1e-5
    assert relative_error(encode(x), vae.encode(x).latent_dist.mean) < 1e-5


@pytest.mark.parametrize("tiled", [False, True])
def test_vmap(vae: AutoencoderKL, tiled: bool) -> None:
    if tiled:
        vae.enable_tiling()
        vae.enable_slicing()
    z = random_latents((3, 2, *SMALL_LATENT, 4))
    x = random_images((3, 2, HEIGHT, WIDTH, 3))
    decoded = mx.vmap(lambda z: vae.decode(z).sample)(z)
    encoded = mx.vmap(lambda x: vae.encode(x).latent_dist.mean)(x)
    assert relative_error(decoded, mx.stack([vae.decode(one).sample for one in z])) < 1e-6
    assert relative_error(encoded, mx.stack([vae.encode(one).latent_dist.mean for one in x])) < 1e-6


def loss_of(x: mx.array, vae: AutoencoderKL) -> mx.array:
    posterior = vae.encode(x).latent_dist
    sample = vae.decode(posterior.sample(mx.random.key(0))).sample
    return mx.mean(mx.square(sample - x)) + 1e-3 * mx.mean(posterior.kl())


def test_gradients_of_each_sample(vae: AutoencoderKL) -> None:
    """As differentially private training takes them."""
    x = random_images((3, HEIGHT, WIDTH, 3))

    def gradients(parameters: dict[str, Any], x: mx.array) -> dict[str, Any]:
        return mx.grad(lambda parameters, x: loss_of(x[None], vae.update(parameters)))(parameters, x)

    parameters = vae.trainable_parameters()
    mapped = mx.vmap(gradients, in_axes=(None, 0))(parameters, x)
    for i in range(3):
        expected = dict(tree_flatten(gradients(parameters, x[i])))
        largest = max(mx.max(mx.abs(value)).item() for value in expected.values())
        for name, value in tree_flatten(mapped):
            assert mx.max(mx.abs(value[i] - expected[name])).item() < 1e-5 * largest, name
    vae.update(parameters)


def test_gradients_are_finite_differences(vae: AutoencoderKL, x: mx.array) -> None:
    _, gradients = nn.value_and_grad(vae, partial(loss_of, x))(vae)
    direction = random_weights(vae, seed=7)
    slope = sum(mx.sum(mx.array(direction[name]) * gradient).item() for name, gradient in flat(gradients).items())
    step = 1e-3
    values = []
    for sign in (1, -1):
        moved = random_model(SMALL)
        weights = {name: w + sign * step * mx.array(direction[name]) for name, w in vae.named_parameters().items()}
        moved.load_weights(list(weights.items()))
        values.append(loss_of(x, moved).item())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)


def test_trains(vae: AutoencoderKL, x: mx.array) -> None:
    optimizer = optim.Adam(1e-3)
    step = nn.value_and_grad(vae, partial(loss_of, x))
    losses = []
    for _ in range(10):
        loss, gradients = step(vae)
        optimizer.update(vae, gradients)
        mx.eval(vae.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_frozen_part_has_no_gradient(vae: AutoencoderKL, x: mx.array) -> None:
    vae.encoder.freeze()
    _, gradients = nn.value_and_grad(vae, partial(loss_of, x))(vae)
    assert not [name for name in flat(gradients) if name.startswith("encoder.")]
    assert "decoder.conv_in.weight" in flat(gradients)


def flat(gradients: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(gradients))


# dtypes


@pytest.mark.parametrize(("dtype", "bound"), [(mx.float16, 5e-3), (mx.bfloat16, 4e-2)])
def test_half_precision(x: mx.array, z: mx.array, dtype: mx.Dtype, bound: float) -> None:
    exact, rounded = random_model(SMALL), random_model(SMALL)
    rounded.set_dtype(dtype)
    assert rounded.dtype == dtype
    decoded, mean = rounded.decode(z).sample, rounded.encode(x).latent_dist.mean
    assert decoded.dtype == mean.dtype == dtype
    assert relative_error(decoded, exact.decode(z).sample) < bound
    assert relative_error(mean, exact.encode(x).latent_dist.mean) < bound


def test_inputs_take_the_dtype_of_the_weights(vae: AutoencoderKL, z: mx.array) -> None:
    assert vae.decode(z.astype(mx.float16)).sample.dtype == mx.float32


# Refusals


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((HEIGHT, WIDTH, 3), r"x: shape \(20, 28, 3\), wanted \(N, H, W, 3\)"),
        ((1, 3, HEIGHT, WIDTH), r"wanted \(N, H, W, 3\)"),
        ((1, 20, 27, 3), "multiples of 4"),
        ((0, 20, 28, 3), r"wanted \(N, H, W, 3\)"),
        ((1, 0, 28, 3), r"wanted \(N, H, W, 3\)"),
    ],
)
def test_encode_refuses_other_shapes(vae: AutoencoderKL, shape: tuple[int, ...], message: str) -> None:
    for encode in (vae.encode, vae.tiled_encode):
        with pytest.raises(ValueError, match=message):
            encode(mx.zeros(shape))


def test_decode_refuses_other_shapes(vae: AutoencoderKL) -> None:
    for decode in (vae.decode, vae.tiled_decode):
        with pytest.raises(ValueError, match=r"z: shape \(1, 4, 5, 7\), wanted \(N, H, W, 4\)"):
            decode(mx.zeros((1, 4, 5, 7)))


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int32, mx.bool_, mx.complex64])
def test_refuses_other_dtypes(vae: AutoencoderKL, dtype: mx.Dtype) -> None:
    with pytest.raises(ValueError, match=r"x: dtype .*, wanted a floating-point one"):
        vae.encode(mx.zeros((1, 8, 8, 3), dtype=dtype))


# Saving


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_saving_and_loading_is_the_identity(vae: AutoencoderKL, tmp_path: Path, dtype: mx.Dtype) -> None:
    vae.set_dtype(dtype)
    vae.save_pretrained(tmp_path / "a model")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "a model")
    assert loaded.config == vae.config
    before, after = vae.named_parameters(), loaded.named_parameters()
    assert before.keys() == after.keys()
    assert all(after[name].dtype == dtype and mx.array_equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in (tmp_path / "a model").iterdir()) == ["config.json", "model.safetensors"]


def test_dtype_on_loading(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path, dtype=mx.bfloat16).dtype == mx.bfloat16
