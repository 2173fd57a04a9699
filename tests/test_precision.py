"""float16 without overflow: random models whose streams are inflated by powers of two."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import SMALL, inflated, random_images, random_latents, random_model, relative_error

from mlx_vae import AutoencoderKL, AutoencoderKLConfig, precision
from mlx_vae.convert import convert

LATENT = (1, 12, 16, 4)
DEEP = AutoencoderKLConfig(
    block_out_channels=(8, 12, 16),
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
    up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    layers_per_block=2,
    norm_num_groups=4,
    sample_size=16,
)


def pictures() -> mx.array:
    return random_images((1, 48, 64, 3))


def outputs(vae: AutoencoderKL) -> tuple[mx.array, mx.array]:
    """What the model makes of a latent and of a picture, in plain float16 or float32: without the guard."""
    z, x = random_latents(LATENT).astype(vae.dtype), pictures().astype(vae.dtype)
    return vae._decode(z), vae._encode(x)


def in_float16(vae: AutoencoderKL) -> AutoencoderKL:
    half = AutoencoderKL(vae.config)
    half.load_weights(list(vae.named_parameters().items()))
    half.set_dtype(mx.float16)
    return half


@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["small", "deep"])
@pytest.mark.parametrize("exponent", [8, 12, 16, 18])
def test_inflated_models(config: AutoencoderKLConfig, exponent: int) -> None:
    vae = inflated(config, 2.0**exponent, branch=2.0 ** (exponent - 2))
    exact = outputs(vae)
    plain = outputs(in_float16(vae))
    if exponent >= 16:
        assert any(precision.overflows(result) for result in plain)
    precision.fit(vae)
    for ours, expected in zip(outputs(vae), exact, strict=True):
        assert relative_error(ours, expected) < 1e-6
    for ours, expected in zip(outputs(in_float16(vae)), exact, strict=True):
        assert relative_error(ours, expected) < 5e-3


def test_powers_of_two_change_no_bit() -> None:
    vae = random_model(SMALL)
    before = outputs(vae)
    precision.rescale(vae, (2.0**-5, 2.0**3, 2.0**7, 2.0**-9))
    assert vae.config.activation_scales == (2.0**-5, 2.0**3, 2.0**7, 2.0**-9)
    for ours, expected in zip(outputs(vae), before, strict=True):
        assert relative_error(ours, expected) < 1e-6
    precision.restore(vae)
    assert vae.config.activation_scales is None
    original = random_model(SMALL).named_parameters()
    assert all(mx.array_equal(value, original[name]) for name, value in vae.named_parameters().items())
    assert {norm.eps for norm in vae.modules() if isinstance(norm, nn.GroupNorm)} == {1e-6}


def test_a_model_that_fits_is_left_as_it_is() -> None:
    vae = random_model(SMALL)
    before = vae.named_parameters()
    assert precision.fit(vae) is None
    assert vae.config.activation_scales is None
    assert all(mx.array_equal(value, before[name]) for name, value in vae.named_parameters().items())


def test_loading_in_float16_rescales_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vae = inflated(SMALL, 2.0**18)
    vae.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        half = AutoencoderKL.from_pretrained(tmp_path / "model", dtype=mx.float16)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'model' / 'model.safetensors'}: rescaled for float16, exactly: "
        + precision.describe(half.config.activation_scales or (1, 1, 1, 1))
    ]
    assert half.dtype == mx.float16
    assert relative_error(half.decode(random_latents(LATENT)).sample, vae.decode(random_latents(LATENT)).sample) < 5e-3

    half.save_pretrained(tmp_path / "half")
    again = AutoencoderKL.from_pretrained(tmp_path / "half")
    assert again.config == half.config
    assert all(mx.array_equal(a, b) for a, b in zip(outputs(again), outputs(half), strict=True))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_other_dtypes_are_left_alone(tmp_path: Path, dtype: mx.Dtype) -> None:
    inflated(SMALL, 2.0**18).save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path, dtype=dtype).config.activation_scales is None


def test_it_can_be_told_not_to(tmp_path: Path) -> None:
    inflated(SMALL, 2.0**13).save_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path, dtype=mx.float16, rescale=False).config.activation_scales is None
    assert AutoencoderKL.from_pretrained(tmp_path, dtype=mx.float16).config.activation_scales is not None


def test_convert_rescales_and_restores(tmp_path: Path) -> None:
    vae = inflated(SMALL, 2.0**12)
    vae.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "half", dtype=mx.float16)
    half = AutoencoderKL.from_pretrained(tmp_path / "half")
    assert half.config.activation_scales is not None
    convert(tmp_path / "half", tmp_path / "torch", dtype=mx.float32, to="diffusers")
    assert "activation_scales" not in (tmp_path / "torch" / "config.json").read_text()
    restored = AutoencoderKL.from_pretrained(tmp_path / "torch")
    for name, value in vae.named_parameters().items():
        assert relative_error(restored.named_parameters()[name], value) < 1e-3  # the rounding of float16

    precision.rescale(vae, (2.0**-12, 1.0, 2.0**-12, 1.0))
    vae.save_pretrained(tmp_path / "exact")
    convert(tmp_path / "exact", tmp_path / "back", to="ldm")
    restored = AutoencoderKL.from_pretrained(tmp_path / "back")
    original = inflated(SMALL, 2.0**12).named_parameters()
    assert all(mx.array_equal(value, original[name]) for name, value in restored.named_parameters().items())


def test_the_guard_names_the_place_and_computes_in_bfloat16() -> None:
    exact = random_model(SMALL).decode(random_latents(LATENT)).sample
    half = in_float16(random_model(SMALL))
    resnet = half.decoder.up_blocks[0].resnets[0]
    resnet.norm2.weight, resnet.conv2.weight = resnet.norm2.weight * 256, resnet.conv2.weight * 2**12
    with pytest.warns(RuntimeWarning, match=r"float16 overflows before decoder\.up_blocks\.0\.resnets\.1\.norm1"):
        sample = half.decode(random_latents(LATENT)).sample
    assert sample.dtype == half.dtype == mx.float16
    assert not precision.overflows(sample)
    hot = in_float16(inflated(SMALL, 2.0**15))
    with pytest.warns(RuntimeWarning, match="computed in bfloat16 instead"):
        assert relative_error(hot.decode(random_latents(LATENT)).sample, exact) < 4e-2
    with pytest.warns(RuntimeWarning, match=r"float16 overflows before encoder\."):
        assert not precision.overflows(hot.encode(pictures()).latent_dist.mean)


def test_the_guard_leaves_transforms_alone() -> None:
    half = in_float16(random_model(SMALL))
    z = random_latents((2, *LATENT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = mx.vmap(lambda z: half.decode(z).sample)(z)
        gradient = mx.grad(lambda z: half.decode(z).sample.astype(mx.float32).square().sum())(z[0])
    assert relative_error(mapped[1], half.decode(z[1]).sample) < 5e-3
    assert not precision.overflows(gradient)


def test_report() -> None:
    vae = inflated(SMALL, 2.0**16)
    report = precision.report(vae)
    assert vae.config.activation_scales is None
    assert len(report.rows) == sum(isinstance(module, nn.GroupNorm) for module in vae.modules())
    rows = {row.norm: row for row in report.rows}
    row = rows["decoder.mid_block.resnets.0.norm1"]
    assert row.before == pytest.approx(math.log2(65504 / row.largest))
    assert row.after - row.before == pytest.approx(-math.log2(report.scales[2]))
    assert min(row.after for row in report.rows) >= 7
    assert min(row.before for row in report.rows) < 0
    assert "decoder stream 2^-" in str(report)


def test_your_own_latents() -> None:
    vae = random_model(SMALL)
    mild, wild = random_latents(LATENT), 10000 * random_latents(LATENT)
    entry = "decoder.mid_block.resnets.0.norm1"
    values = [{row.norm: row.largest for row in precision.report(vae, z).rows}[entry] for z in (mild, wild)]
    assert values[1] == pytest.approx(10000 * values[0], rel=0.1)


def test_calibration_refuses_a_model_that_overflows_itself() -> None:
    with pytest.raises(ValueError, match=r"the model is in .*float16; wanted float32"):
        precision.fit(in_float16(inflated(SMALL, 2.0**16)))
    with pytest.raises(ValueError, match=r"encoder\..*: reads values that are not finite, even in float32"):
        precision.fit(inflated(SMALL, 2.0**127))


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0, 1.0), (2.0**-5, 2.0**-4, 2.0**-6, 2.0**-3)])
def test_the_picture_of_tiny_stays_the_same(scales: tuple[float, float, float, float]) -> None:
    vae = AutoencoderKL.from_pretrained("tiny", dtype=mx.float32)
    z = vae.encode(mx.array(precision.draw_calibration_pictures(128, 3)[:1])).latent_dist.mean
    expected = vae.decode(z).sample
    precision.rescale(vae, scales)
    vae.set_dtype(mx.float16)
    error = mx.mean(mx.square(vae.decode(z).sample.astype(mx.float32) - expected)).item()
    assert 10 * math.log10(4 / error) > 50


@pytest.mark.parametrize("scales", [(1.0, 2.0, 3.0, 4.0), (1.0,), (0.0, 1.0, 1.0, 1.0), "1111"])
def test_configurations_refuse_other_scales(scales: object) -> None:
    with pytest.raises(ValueError, match="must hold four powers of two"):
        AutoencoderKLConfig(activation_scales=scales)  # type: ignore[arg-type]
