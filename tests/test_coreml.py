"""Core ML packages: written, read back, evaluated; the check and the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from models import SMALL, inflated, random_model

import mlx_vae.coreml.check
import mlx_vae.coreml.program
import mlx_vae.precision
from mlx_vae import AutoencoderKL, AutoencoderKLConfig
from mlx_vae.coreml.compress import MODES, integers, packed, palette
from mlx_vae.coreml.package import Package, PackageError, unpacked
from mlx_vae.coreml.tools import coremltools, quiet

pytestmark = pytest.mark.coreml

from packages import answer, error, written  # noqa: E402

from mlx_vae.coreml.__main__ import main  # noqa: E402
from mlx_vae.coreml.evaluate import evaluate  # noqa: E402
from mlx_vae.coreml.export import Options  # noqa: E402
from mlx_vae.coreml.faces import IOS, PARTS, Face  # noqa: E402

FLUX_LIKE = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    norm_num_groups=4,
    latent_channels=6,
    scaling_factor=0.36,
    shift_factor=0.12,
    use_quant_conv=False,
    use_post_quant_conv=False,
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
)
NORMALISED = AutoencoderKLConfig(
    block_out_channels=(12, 24),
    norm_num_groups=3,
    latent_channels=2,
    scaling_factor=1.5,
    latents_mean=(0.3, -0.2),
    latents_std=(2.0, 0.7),
    mid_block_add_attention=False,
)


@pytest.mark.parametrize("config", [SMALL, FLUX_LIKE, NORMALISED], ids=["small", "flux-like", "normalised"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("io", IOS)
def test_package_is_the_model(config: AutoencoderKLConfig, part: str, io: str, tmp_path: Path) -> None:
    vae = random_model(config)
    for precision, exact, rounded in (("float32", 1e-5, 1e-5), ("float16", 2e-3, 6e-3)):
        face, package = written(tmp_path / f"{precision}.mlpackage", vae, part, io=io, precision=precision)
        x = face.example(face.input_shape(28, 20))
        reference = face.reference(x)
        if face.gives_picture:
            for round_float16 in (False, True):
                assert np.abs(answer(package, face, x, round_float16) - reference).max() <= 1
        else:
            assert error(answer(package, face, x), reference) < exact
            assert error(answer(package, face, x, round_float16=True), reference) < rounded


def test_faces_of_a_picture(vae: AutoencoderKL, tmp_path: Path) -> None:
    """Core ML's own description says image, of the right size and colours."""
    _, decoder = written(tmp_path / "decoder.mlpackage", vae, "decoder", io="image")
    _, encoder = written(tmp_path / "encoder.mlpackage", vae, "encoder", io="image")
    picture, latents = decoder.spec.description.output[0], decoder.spec.description.input[0]
    assert (picture.name, latents.name) == ("image", "latents")
    assert picture.type.imageType.colorSpace == encoder.spec.description.input[0].type.imageType.colorSpace
    assert (picture.type.imageType.width, picture.type.imageType.height) == (28, 20)
    assert list(latents.type.multiArrayType.shape) == [1, 4, 5, 7]
    assert encoder.spec.description.output[0].name == "latents"


def test_tensor_face_has_float32_borders(vae: AutoencoderKL, tmp_path: Path) -> None:
    _, package = written(tmp_path / "a.mlpackage", vae)
    function = package.functions["main"]
    assert {name: type_.dtype for name, type_ in function.inputs.items()} == {"z": "FLOAT32"}
    assert function.types["image"].dtype == "FLOAT32"
    inside = [op for op in function.operations if not op.is_constant][1:-1]
    assert {type_.dtype for op in inside for type_ in op.outputs.values()} == {"FLOAT16"}


def test_metadata(tmp_path: Path) -> None:
    _, package = written(tmp_path / "a.mlpackage", random_model(NORMALISED), metadata={"license": "MIT"})
    metadata = package.metadata
    assert metadata["mlx_vae.sizes"] == "28x20"
    assert metadata["mlx_vae.functions"] == "main"
    assert [float(x) for x in metadata["mlx_vae.scale"].split(",")] == [1.5 / 2.0, 1.5 / 0.7]
    assert [float(x) for x in metadata["mlx_vae.shift"].split(",")] == [0.3, -0.2]
    assert metadata["mlx_vae.license"] == "MIT"


@pytest.mark.parametrize(("scale", "low", "high"), [(350.0, 4000, 10000), (1e-3, 0.005, 0.05)])
def test_norms_survive_float16(scale: float, low: float, high: float, tmp_path: Path) -> None:
    """Activations thousands of times larger, or a hundred times smaller, than they should be."""
    vae = random_model(SMALL)
    for name, module in vae.named_modules():
        last = name.rpartition(".")[2]
        writes_the_stream = last in ("conv_in", "conv1", "conv2") or name.endswith("to_out.0")
        if writes_the_stream:
            module.weight = module.weight * scale
        if writes_the_stream or name.endswith(("conv_shortcut", "samplers.0.conv")):
            module.bias = module.bias * scale
    face, package = written(tmp_path / "a.mlpackage", vae)
    x = face.example(face.input_shape(28, 20))
    result = evaluate(package.functions["main"], {face.input: x}, round_float16=True)
    largest = max(result.peaks[name] for name in result.peaks if name.endswith(("_conv1", "_conv2", "_conv_in")))
    assert low < largest < high
    assert error(result.outputs[face.output], face.reference(x)) < 5e-3


@pytest.mark.parametrize("part", PARTS)
def test_streams_that_overflow_are_rescaled(part: str, tmp_path: Path) -> None:
    vae = inflated(SMALL, 2.0**16)
    face, _ = written(tmp_path / "float32.mlpackage", vae, part, precision="float32")
    x = face.example(face.input_shape(28, 20))
    expected = face.reference(x)
    assert mlx_vae.precision.fit(vae)
    face, package = written(tmp_path / "float16.mlpackage", vae, part)
    assert error(answer(package, face, x, round_float16=True), expected) < 5e-3


@pytest.mark.parametrize("part", PARTS)
def test_no_variance_is_no_division_by_zero(part: str, tmp_path: Path) -> None:
    vae = random_model(SMALL)
    mlx_vae.precision.rescale(vae, (2.0**-12,) * 4)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = mx.zeros_like(module.weight)
    face, package = written(tmp_path / "a.mlpackage", vae, part)
    x = np.zeros(face.input_shape(28, 20), np.float32)
    assert np.isfinite(answer(package, face, x, round_float16=True)).all()


@pytest.mark.parametrize("shape", [(20, 28), (64, 4)])
def test_attention_in_bands(shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys in many bands, of unequal numbers of rows, give what one band gives."""
    monkeypatch.setattr(mlx_vae.coreml.program, "QUERIES", 15)
    monkeypatch.setattr(mlx_vae.coreml.program, "KEYS", 22)
    face, package = written(tmp_path / "a.mlpackage", random_model(FLUX_LIKE), size=shape, precision="float32")
    x = face.example(face.input_shape(*shape))
    assert error(answer(package, face, x), face.reference(x)) < 1e-5


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_compression(mode: str, target: str, tmp_path: Path) -> None:
    """Our reading of compressed weights is coremltools' own, to the bit."""
    from coremltools.optimize.coreml import decompress_weights

    config = AutoencoderKLConfig(block_out_channels=(24,), norm_num_groups=4)
    face, package = written(tmp_path / "a.mlpackage", random_model(config), compress=mode, target=target)
    kinds = {op.kind for op in package.functions["main"].operations if op.kind.startswith("constexpr")}
    assert len(kinds) == 1
    model = coremltools().models.MLModel(str(package.path), skip_model_load=True)
    with quiet():
        decompress_weights(model).save(str(tmp_path / "b.mlpackage"))
    plain = Package.open(tmp_path / "b.mlpackage")
    assert not any(op.kind.startswith("constexpr") for op in plain.functions["main"].operations)
    x = face.example(face.input_shape(28, 20))
    np.testing.assert_array_equal(answer(package, face, x), answer(plain, face, x))
    assert package.bytes_on_disk < plain.bytes_on_disk


def test_quantized_weights_are_near() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 32, 3, 3)).astype(np.float16)

    def decibels(guess: np.ndarray) -> float:
        return -20 * float(np.log10(error(guess, weight)))

    data, scale = integers(weight)
    assert decibels(data * scale.astype(np.float32)[:, None, None, None]) > 40
    for bits, floor in ((8, 43), (6, 31), (4, 20)):
        table, indices = palette(weight, bits)
        assert len(table) == 1 << bits
        assert decibels(table[indices]) > floor
        np.testing.assert_array_equal(unpacked(packed(indices, bits), bits, indices.size), indices.ravel())


def test_palette_of_few_values_is_exact() -> None:
    weight = np.random.default_rng(0).choice([-1.5, 0.0, 0.25, 3.0], size=(8, 8, 3, 3)).astype(np.float32)
    table, indices = palette(weight, 4)
    np.testing.assert_array_equal(table[indices], weight)


@pytest.mark.parametrize("compress", ["none", "int8", "pal6"])
def test_several_sizes_share_their_weights(compress: str, tmp_path: Path) -> None:
    from mlx_vae.coreml.export import write_package

    vae = random_model(AutoencoderKLConfig(block_out_channels=(48,), norm_num_groups=4))
    sizes = ((9, 20), (16, 11), (12, 12))
    face = Face(vae, "decoder", "tensor")
    options = Options(sizes, compress=compress, precision="float32")
    write_package(face, tmp_path / "all.mlpackage", options)
    package = Package.open(tmp_path / "all.mlpackage")
    assert package.spec.description.defaultFunctionName == "size_9x20"
    weights = {}
    for size in sizes:
        _, alone = written(
            tmp_path / f"{options.function(size)}.mlpackage", vae, size=size, compress=compress, precision="float32",
            target="iOS18",
        )  # fmt: skip
        x = face.example(face.input_shape(*size))
        together = answer(package, face, x, name=options.function(size))
        assert error(together, answer(alone, face, x)) < 1e-6
        if compress == "none":
            assert error(together, face.reference(x)) < 1e-5
        weights[size] = (alone.model.parent / "weights" / "weight.bin").stat().st_size
    assert (package.model.parent / "weights" / "weight.bin").stat().st_size < 1.05 * max(weights.values())


def test_float16_can_not_hold_everything(vae: AutoencoderKL, tmp_path: Path) -> None:
    vae.decoder.conv_out.bias = mx.array([1e5, 0, 0])
    with pytest.raises(ValueError, match=r"decoder.conv_out.bias: holds 100000, float16 only 65504"):
        written(tmp_path / "a.mlpackage", vae)


# The command line


@pytest.fixture
def model(vae: AutoencoderKL, tmp_path: Path) -> str:
    vae.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_export_and_check(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["--model", model, "--size", "28x20", "-o", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["VAEDecoder.mlpackage", "VAEEncoder.mlpackage"]
    assert "PSNR" in capsys.readouterr().out
    assert main(["--model", model, "--check", str(out / "VAEDecoder.mlpackage")]) == 0
    assert main(["--model", model, "--size", "28x20", "-o", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_nothing_is_left_of_a_package_that_fails(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(mlx_vae.coreml.check.PSNR_FLOOR, "none", 200.0)
    out = tmp_path / "out"
    assert main(["--model", model, "--part", "decoder", "--size", "28x20", "-o", str(out)]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert list(out.iterdir()) == []


def test_values_that_are_not_finite_fail(vae: AutoencoderKL, tmp_path: Path) -> None:
    """Weights of another model's size: float32 arithmetic copes, float16 does not."""
    vae.decoder.conv_in.weight = vae.decoder.conv_in.weight * 3e4
    _, package = written(tmp_path / "a.mlpackage", vae)
    report = mlx_vae.coreml.check.check(package.path, vae)
    assert any("not finite, first in decoder_conv_in" in line for line in report.failures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "30x20"], "--size 30x20: both sides must be positive multiples of 4"),
        (["--size", "28x20", "--size", "20x28", "--target", "iOS17"], "several sizes in one package need iOS18"),
        (["--size", "28x20", "--size", "28x20"], "--size: give at least one, and each only once"),
        (["--size", "28x20", "-o", "both.mlpackage"], "one package can't hold both parts"),
        (["--check", "nowhere.mlpackage"], "nowhere.mlpackage: not an .mlpackage"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["--model", model, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_pictures_have_one_or_three_channels(vae: AutoencoderKL) -> None:
    with pytest.raises(ValueError, match="the encoder has 5 picture channels; a picture has 1 or 3"):
        Face(AutoencoderKL(AutoencoderKLConfig(in_channels=5)), "encoder", "image")


def test_package_of_another_model(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "a.mlpackage", random_model(NORMALISED))
    assert main(["--model", model, "--check", str(tmp_path / "a.mlpackage")]) == 2
    assert "the package is of another model" in capsys.readouterr().err


def test_without_coremltools(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    assert main(["--model", model, "-o", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert 'pip install "mlx-vae[coreml]"' in printed or "coremltools has no build" in printed
    assert not (tmp_path / "out").exists()


def test_broken_packages(vae: AutoencoderKL, tmp_path: Path) -> None:
    _, package = written(tmp_path / "a.mlpackage", vae)
    weights = package.model.parent / "weights" / "weight.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    report = mlx_vae.coreml.check.check(package.path, vae)
    assert any("no record at" in line for line in report.failures)
    package.model.write_bytes(b"not a protobuf")
    with pytest.raises(PackageError, match=r"not an \.mlpackage"):
        Package.open(package.path)


def test_calibration_leaves_no_trace(vae: AutoencoderKL) -> None:
    from mlx_vae import layers
    from mlx_vae.coreml.calibrate import norm_prescales

    before = layers.read
    prescales = norm_prescales(vae)
    assert layers.read is before
    norms = [name for name, module in vae.named_modules() if "norm" in name.rpartition(".")[2]]
    assert sorted(prescales) == sorted(norms)
    for scale in prescales.values():
        assert np.all(np.log2(scale) % 1 == 0)
    vae.decoder.conv_in.weight = vae.decoder.conv_in.weight * mx.inf
    with pytest.raises(ValueError, match=r"decoder\..*: the model's own activations are not finite"):
        norm_prescales(vae)
