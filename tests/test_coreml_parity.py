"""Core ML packages, evaluated, against diffusers on torch; and each operation of the evaluator against torch's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import random_config, random_model
from packages import answer, error, foreign, written
from reference import reference_model

from mlx_vae.coreml.evaluate import OPERATIONS, evaluate
from mlx_vae.coreml.faces import PARTS

pytestmark = pytest.mark.parity

DRAW = np.random.default_rng(0)


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.parametrize("part", PARTS)
def test_random_configurations(part: str, seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    size = (6 * config.factor, 5 * config.factor) if seed % 2 else (3 * config.factor, 4 * config.factor)
    face, package = written(tmp_path / "a.mlpackage", random_model(config, seed), part, size, precision="float32")
    x = face.example(face.input_shape(*size), seed)
    reference = reference_model(config, seed)
    with torch.no_grad():
        if part == "decoder":
            expected = reference.decode(torch.from_numpy(x)).sample
        else:
            expected = reference.encode(torch.from_numpy(x)).latent_dist.parameters
    assert error(answer(package, face, x), expected.numpy()) < 1e-5


@pytest.mark.parametrize("seed", [1, 2])
def test_pictures_are_within_a_level(seed: int, tmp_path: Path) -> None:
    config = replace(random_config(seed), in_channels=3, out_channels=3)
    size = (6 * config.factor, 5 * config.factor)
    face, package = written(tmp_path / "d.mlpackage", random_model(config, seed), "decoder", size, io="image")
    latents = face.example(face.input_shape(*size), seed)
    reference = reference_model(config, seed)
    with torch.no_grad():
        z = torch.from_numpy(latents) / config.scaling_factor + (config.shift_factor or 0)
        expected = torch.clip(torch.round(reference.decode(z).sample * 127.5 + 127.5), 0, 255).numpy()
    assert np.abs(answer(package, face, latents, round_float16=True) - expected).max() <= 1
    face, package = written(
        tmp_path / "e.mlpackage", random_model(config, seed), "encoder", size, io="image", precision="float32"
    )
    picture = face.example(face.input_shape(*size), seed)
    with torch.no_grad():
        mean = reference.encode(torch.from_numpy(picture) / 127.5 - 1).latent_dist.mean
    assert error(answer(package, face, picture), (mean.numpy()) * config.scaling_factor) < 1e-5


def normal(*shape: int) -> np.ndarray:
    return DRAW.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return np.abs(normal(*shape)) + 0.1


WEIGHT, BIAS = normal(6, 4, 3, 2), normal(6)
GROUPED = normal(6, 2, 3, 3)
PADDED = {"pad_type": "custom", "pad": [1, 2, 3, 0]}

CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], list[np.ndarray]]] = {
    "add": (lambda mb, x, y: mb.add(x=x, y=y), torch.add, [normal(1, 4, 5, 7), normal(1, 4, 1, 1)]),
    "sub": (lambda mb, x, y: mb.sub(x=x, y=y), torch.sub, [normal(1, 4, 5, 7), normal(1, 4, 1, 7)]),
    "mul": (lambda mb, x, y: mb.mul(x=x, y=y), torch.mul, [normal(1, 4, 5, 7), normal(1, 1, 5, 1)]),
    "real_div": (lambda mb, x, y: mb.real_div(x=x, y=y), torch.div, [normal(1, 4, 5, 7), positive(1, 4, 5, 7)]),
    "square": (lambda mb, x: mb.square(x=x), torch.square, [normal(1, 4, 5, 7)]),
    "sqrt": (lambda mb, x: mb.sqrt(x=x), torch.sqrt, [positive(1, 4, 5, 7)]),
    "rsqrt": (lambda mb, x: mb.rsqrt(x=x, epsilon=0.5), lambda x: torch.rsqrt(x + 0.5), [positive(1, 4, 5, 7)]),
    "round": (lambda mb, x: mb.round(x=x), torch.round, [np.arange(-4, 4, 0.25, dtype=np.float32)]),
    "clip": (lambda mb, x: mb.clip(x=x, alpha=-0.5, beta=1.0), lambda x: x.clip(-0.5, 1), [normal(1, 4, 5, 7)]),
    "identity": (lambda mb, x: mb.identity(x=x), lambda x: x, [normal(1, 4, 5, 7)]),
    "sigmoid": (lambda mb, x: mb.sigmoid(x=x), torch.sigmoid, [100 * normal(1, 4, 5, 7)]),
    "silu": (lambda mb, x: mb.silu(x=x), F.silu, [100 * normal(1, 4, 5, 7)]),
    "softmax": (lambda mb, x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1), [100 * normal(1, 9, 1, 7)]),
    "reduce_mean": (
        lambda mb, x: mb.reduce_mean(x=x, axes=[2], keep_dims=True),
        lambda x: x.mean(2, keepdim=True),
        [normal(1, 4, 5, 7)],
    ),
    "reduce_sum": (lambda mb, x: mb.reduce_sum(x=x, axes=[-1]), lambda x: x.sum(-1), [normal(1, 4, 5, 7)]),
    "reduce_max": (lambda mb, x: mb.reduce_max(x=x, axes=[1, 3]), lambda x: x.amax((1, 3)), [normal(1, 4, 5, 7)]),
    "reduce_log_sum_exp": (
        lambda mb, x: mb.reduce_log_sum_exp(x=x, axes=[1], keep_dims=True),
        lambda x: x.logsumexp(1, keepdim=True),
        [100 * normal(1, 9, 1, 7)],
    ),
    "conv": (
        lambda mb, x: mb.conv(x=x, weight=WEIGHT, bias=BIAS, strides=[2, 1], dilations=[1, 2], **PADDED),
        lambda x: F.conv2d(
            F.pad(x, (3, 0, 1, 2)), torch.from_numpy(WEIGHT), torch.from_numpy(BIAS), stride=(2, 1), dilation=(1, 2)
        ),
        [normal(2, 4, 9, 8)],
    ),
    "conv in groups": (
        lambda mb, x: mb.conv(x=x, weight=GROUPED, groups=2, pad_type="same"),
        lambda x: F.conv2d(x, torch.from_numpy(GROUPED), padding="same", groups=2),
        [normal(1, 4, 9, 8)],
    ),
    "einsum": (
        lambda mb, x, y: mb.einsum(values=(x, y), equation="nchw,nwhu->nchu"),
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y),
        [normal(2, 4, 3, 5), normal(2, 5, 3, 6)],
    ),
    "matmul": (
        lambda mb, x, y: mb.matmul(x=x, y=y, transpose_y=True),
        lambda x, y: x @ y.mT,
        [normal(2, 3, 4, 5), normal(2, 3, 6, 5)],
    ),
    "transpose": (
        lambda mb, x: mb.transpose(x=x, perm=[0, 3, 2, 1]),
        lambda x: x.permute(0, 3, 2, 1),
        [normal(1, 4, 5, 7)],
    ),
    "reshape": (
        lambda mb, x: mb.reshape(x=x, shape=[1, 4, 1, -1]),
        lambda x: x.flatten(2)[:, :, None],
        [normal(1, 4, 5, 7)],
    ),
    "split": (
        lambda mb, x: mb.split(x=x, split_sizes=[2, 1, 4], axis=3),
        lambda x: x.split([2, 1, 4], 3),
        [normal(1, 4, 5, 7)],
    ),
    "split evenly": (lambda mb, x: mb.split(x=x, num_splits=2, axis=1), lambda x: x.chunk(2, 1), [normal(1, 4, 5, 7)]),
    "concat": (
        lambda mb, x, y: mb.concat(values=(x, y), axis=2),
        lambda x, y: torch.cat((x, y), 2),
        [normal(1, 4, 5, 7), normal(1, 4, 2, 7)],
    ),
    "upsample_nearest_neighbor": (
        lambda mb, x: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
        lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest"),
        [normal(1, 4, 5, 7)],
    ),
    "cast": (lambda mb, x: mb.cast(x=x, dtype="fp16"), lambda x: x.half().float(), [1e-4 * normal(1, 4, 5, 7)]),
}


@pytest.mark.parametrize("name", CASES)
def test_operation(name: str, tmp_path: Path) -> None:
    body, expected, inputs = CASES[name]
    package = foreign(tmp_path / "a.mlpackage", body, *[x.shape for x in inputs])
    function = package.functions["main"]
    assert name.split()[0] in {op.kind for op in function.operations}
    results = evaluate(function, {f"x{i}": x for i, x in enumerate(inputs)}).outputs
    wanted = expected(*map(torch.from_numpy, inputs))
    wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    for result, reference in zip(results.values(), wanted, strict=True):
        np.testing.assert_allclose(result, reference.numpy(), rtol=1e-5, atol=1e-5)


def unpack_bits(data: np.ndarray, bits: int, size: int) -> torch.Tensor:
    """Bit by bit, as the format is described."""
    flags = [(int(byte) >> bit) & 1 for byte in data for bit in range(8)]
    return torch.tensor([sum(flags[i * bits + bit] << bit for bit in range(bits)) for i in range(size)])


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_palettes_of_ios16(bits: int) -> None:
    lut, shape = normal(1 << bits), (3, 5, 1, 2)
    indices = DRAW.integers(0, 256, size=-(-30 * bits // 8), dtype=np.uint8)
    ours = OPERATIONS["constexpr_lut_to_dense"](indices=indices, lut=lut, shape=np.array(shape))
    reference = torch.from_numpy(lut)[unpack_bits(indices, bits, 30)].reshape(shape)
    np.testing.assert_array_equal(ours, reference.numpy())


def test_palettes_of_ios18_by_blocks() -> None:
    lut, indices = normal(2, 1, 4, 1), DRAW.integers(0, 4, size=(6, 2), dtype=np.uint8)
    ours = OPERATIONS["constexpr_lut_to_dense"](indices=indices, lut=lut)
    tables = torch.from_numpy(lut[:, 0, :, 0]).repeat_interleave(3, 0)
    np.testing.assert_array_equal(ours, tables.gather(1, torch.from_numpy(indices.astype(np.int64))).numpy())


def test_integers() -> None:
    data = DRAW.integers(-128, 128, size=(6, 4, 1, 2), dtype=np.int8)
    scale, zero = positive(6), DRAW.integers(-5, 5, size=6, dtype=np.int8)
    along = [torch.from_numpy(x).float().reshape(-1, 1, 1, 1) for x in (scale, zero)]
    expected = along[0] * (torch.from_numpy(data).float() - along[1])
    ours = OPERATIONS["constexpr_affine_dequantize"](
        quantized_data=data, scale=scale, zero_point=zero, axis=np.int32(0)
    )
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-6)
    blocks, offset = positive(3, 2, 1, 1), normal(3, 2, 1, 1)
    ours = OPERATIONS["constexpr_blockwise_shift_scale"](data=data, scale=blocks, offset=offset)
    spread = [torch.from_numpy(x).repeat_interleave(2, 0).repeat_interleave(2, 1) for x in (blocks, offset)]
    np.testing.assert_allclose(ours, (spread[0] * (torch.from_numpy(data).float() - spread[1])).numpy(), rtol=1e-6)


def test_sparse_weights() -> None:
    dense = torch.from_numpy(normal(3, 5, 1, 2)).relu()
    mask = dense != 0
    packed = np.packbits(mask.numpy().ravel(), bitorder="little")
    values = dense[mask].numpy()
    operation = OPERATIONS["constexpr_sparse_to_dense"]
    for result in (
        operation(nonzero_data=values, mask=packed, shape=np.array([3, 5, 1, 2])),
        operation(nonzero_data=values, mask=mask.numpy().astype(np.uint8)),
    ):
        np.testing.assert_array_equal(result, dense.numpy())


def test_every_operation_is_tested() -> None:
    here = {name.split()[0] for name in CASES} | {"const"}
    assert set(OPERATIONS) - here == {name for name in OPERATIONS if name.startswith("constexpr_")}
