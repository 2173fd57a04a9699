"""float16 without overflow, exactly.

From one GroupNorm to the next, encoder and decoder are linear in their residual stream, and a GroupNorm forgets the
scale of what it reads once its eps has the same scale, squared. So the stream may carry any power of two: multiply
what writes to it, and the biases of what acts on it linearly, and the result is the same to the last bit but for
exponents. What lies between the two norms of a resnet is such a stream of its own, called its branch here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vae import layers
from mlx_vae.blocks import AttentionBlock, Downsample, ResnetBlock, Upsample

if TYPE_CHECKING:
    from mlx_vae.autoencoder import AutoencoderKL

FLOAT16_MAX = 65504.0
TARGET = 2.0**9
"""What the largest value of a stream is brought down to: 128 times below the largest float16, 2^23 above the smallest
normal one."""
TOLERATED = 2.0**12
"""A stream that stays below this is left as it is, with 16 times to spare: measured on the embedded model, photographs
reach 5.5 times the values of the calibration at most."""
SIDE = 12
"""Of the calibration latents."""


@dataclass(frozen=True)
class Headroom:
    """What a GroupNorm reads: its largest absolute value, and the bits up to float16's largest, before and after."""

    norm: str
    largest: float
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """The headroom of every norm, and the scales that give it: of the encoder's stream and branches, and the decoder's.

    `str` of it is a table.
    """

    rows: tuple[Headroom, ...]
    scales: tuple[float, float, float, float]

    def __str__(self) -> str:
        width = max(len(row.norm) for row in self.rows)
        lines = [f"{'norm':{width}}  largest value  headroom  rescaled"]
        lines += [f"{r.norm:{width}}  {r.largest:13.4g}  {r.before:+6.1f} b  {r.after:+6.1f} b" for r in self.rows]
        return "\n".join([*lines, f"scales: {describe(self.scales)}"])


def report(vae: AutoencoderKL, latents: mx.array | None = None) -> Report:
    """How near to overflow each norm comes, and what `fit` would do about it. The model stays as it is.

    latents: your own (N, h, w, C), unscaled, to decode and encode in place of the project's.
    """
    largest = _largest_values(vae, latents)
    scales = _choose(largest)
    rows = tuple(
        Headroom(name, value, _headroom(value), _headroom(value * scales[_stream_of(name)]))
        for name, value in largest.items()
    )
    return Report(rows, scales)


def fit(vae: AutoencoderKL, latents: mx.array | None = None) -> str | None:
    """Rescales a float32 model, in place, where float16 would overflow. Returns a line that says so, or None.

    latents: as for `report`.
    """
    scales = _choose(_largest_values(vae, latents))
    if scales == (1, 1, 1, 1):
        return None
    rescale(vae, scales)
    return f"rescaled for float16, exactly: {describe(scales)}"


def cast(vae: AutoencoderKL, dtype: mx.Dtype) -> None:
    """`vae.set_dtype(dtype)`. Raises ValueError, naming the first, for parameters that dtype can't hold."""
    vae.set_dtype(dtype)
    for name, value in vae.named_parameters().items():
        if overflows(value):
            raise ValueError(f"{name}: some values are too large for {dtype}; take float32 or bfloat16")


def rescale(vae: AutoencoderKL, scales: tuple[float, float, float, float]) -> None:
    """Multiplies the encoder's stream and branches and the decoder's by powers of two, in place; same function.

    The model's configuration keeps the product of all such scales.
    """
    rescale_half(vae.encoder, *scales[:2])
    rescale_half(vae.decoder, *scales[2:])
    a, b, c, d = vae.config.activation_scales or (1.0, 1.0, 1.0, 1.0)
    product = (a * scales[0], b * scales[1], c * scales[2], d * scales[3])
    vae.config = replace(vae.config, activation_scales=None if product == (1, 1, 1, 1) else product)


def restore(vae: AutoencoderKL) -> None:
    """Undoes every `rescale`, in place: for frameworks whose eps can't be set."""
    if vae.config.activation_scales:
        encoder_stream, encoder_branch, decoder_stream, decoder_branch = vae.config.activation_scales
        rescale(vae, (1 / encoder_stream, 1 / encoder_branch, 1 / decoder_stream, 1 / decoder_branch))


def rescale_half(half: nn.Module, stream: float, branch: float) -> None:
    """An Encoder or a Decoder, in place."""
    _scale(half.conv_in, stream)
    _scale_eps(half.conv_norm_out, stream)
    for module in half.modules():
        if isinstance(module, ResnetBlock):
            _scale_eps(module.norm1, stream)
            _scale(module.conv1, branch)
            _scale_eps(module.norm2, branch)
            _scale(module.conv2, stream)
            if "conv_shortcut" in module:
                _scale_bias(module.conv_shortcut, stream)
        elif isinstance(module, AttentionBlock):
            _scale_eps(module.group_norm, stream)
            _scale(module.to_out[0], stream)
        elif isinstance(module, (Downsample, Upsample)):
            _scale_bias(module.conv, stream)


def _scale(layer: nn.Module, factor: float) -> None:
    layer.weight = layer.weight * factor
    _scale_bias(layer, factor)


def _scale_bias(layer: nn.Module, factor: float) -> None:
    layer.bias = layer.bias * factor


def _scale_eps(norm: nn.GroupNorm, factor: float) -> None:
    norm.eps = norm.eps * factor**2


def describe(scales: tuple[float, float, float, float]) -> str:
    names = ("encoder stream", "encoder branches", "decoder stream", "decoder branches")
    return ", ".join(f"{name} 2^{round(math.log2(scale))}" for name, scale in zip(names, scales, strict=True))


def _stream_of(norm: str) -> int:
    """Which of the four scales is that of what a norm reads."""
    return 2 * norm.startswith("decoder.") + norm.endswith(".norm2")


def _headroom(value: float) -> float:
    return math.log2(FLOAT16_MAX / value) if value else math.inf


def _choose(largest: Mapping[str, float]) -> tuple[float, float, float, float]:
    """One scale for each half's stream and one for its branches: powers of two keep every bit, and float16's relative
    precision is the same from 2^-14 up, so that a level that is much smaller than the largest loses nothing."""
    scales = []
    for stream in range(4):
        peak = max(value for name, value in largest.items() if _stream_of(name) == stream)
        scales.append(1.0 if peak <= TOLERATED else TARGET / 2.0 ** math.ceil(math.log2(peak)))
    return scales[0], scales[1], scales[2], scales[3]


def _largest_values(vae: AutoencoderKL, latents: mx.array | None) -> dict[str, float]:
    """The largest |value| that each GroupNorm reads, by its name. Raises ValueError where one is not finite."""
    if vae.dtype != mx.float32:
        raise ValueError(f"the model is in {vae.dtype}; wanted float32, which does not overflow")
    largest: dict[str, float] = {}

    def watch(name: str, x: mx.array) -> None:
        if overflows(x):
            raise ValueError(f"{name}: reads values that are not finite, even in float32")
        value: Any = mx.max(mx.abs(x)).item()
        largest[name] = max(largest.get(name, 0.0), value)

    with watching_norms(vae, watch):
        run_calibration(vae, latents)
    return largest


def run_calibration(vae: AutoencoderKL, latents: mx.array | None = None) -> None:
    """Encodes and decodes: given latents (N, h, w, C), or drawn pictures and Gaussian noise, the same every time."""
    if latents is not None:
        pictures = vae.decode(latents).sample
        mx.eval(pictures)
        if pictures.shape[-1] == vae.config.in_channels:
            mx.eval(vae.encode(mx.clip(pictures, -1, 1)).latent_dist.mean)
        return
    side = SIDE * vae.config.factor
    z = vae.encode(mx.array(draw_calibration_pictures(side, vae.config.in_channels))).latent_dist.mean
    noise = mx.random.normal((1, SIDE, SIDE, z.shape[-1]), key=mx.random.key(0))
    if vae.config.patch_size is None:
        noise = vae.unscale(noise)
    for latents in (z, noise):
        mx.eval(vae.decode(latents).sample)


def draw_calibration_pictures(side: int, channels: int) -> np.ndarray:
    """(3, side, side, channels) in [-1, 1]: discs over one another, with grain; black and white at their extremes."""
    draw = np.random.RandomState(0)
    y, x = np.mgrid[:side, :side] / side
    discs = np.zeros((side, side, channels))
    for _ in range(200):
        centre, radius = draw.uniform(0, 1, 2), 0.02 / draw.uniform(0.05, 1)
        discs[np.hypot(y - centre[0], x - centre[1]) < radius] = draw.uniform(-1, 1, channels)
    grain = draw.standard_normal(discs.shape)
    checks = np.sign(np.sin(40 * y) * np.sin(40 * x))[..., None]
    pictures = np.stack([discs + 0.05 * grain, np.sign(discs), 0.5 * checks + 0.3 * grain])
    return np.clip(pictures, -1, 1).astype(np.float32)


def overflows(x: mx.array) -> bool:
    """Whether a value is not finite. False inside mx.compile and mx.vmap, where values can't be looked at."""
    try:
        return not mx.all(mx.isfinite(x)).item()
    except (RuntimeError, ValueError):
        return False


def in_bfloat16(vae: AutoencoderKL, run: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """run(x) with the model in bfloat16, in the dtype of x; warns and names where float16 overflowed."""
    reached: list[str] = []

    def watch(name: str, h: mx.array) -> None:
        if not reached and overflows(h):
            reached.append(name)

    with watching_norms(vae, watch):
        mx.eval(run(x))
    where = f"before {reached[0]}" if reached else "after the last norm"
    warnings.warn(
        f"float16 overflows {where}: computed in bfloat16 instead. precision.fit rescales the model to prevent it",
        RuntimeWarning,
        stacklevel=4,
    )
    float16 = vae.parameters()
    try:
        vae.set_dtype(mx.bfloat16)
        return run(x.astype(mx.bfloat16)).astype(x.dtype)
    finally:
        vae.update(float16)


@contextmanager
def watching_norms(vae: nn.Module, watch: Callable[[str, mx.array], None]) -> Iterator[None]:
    """Calls `watch(name, x)` with what each GroupNorm reads (N, H, W, C), as long as the block runs."""
    names = {id(module): name for name, module in vae.named_modules() if isinstance(module, nn.GroupNorm)}
    read = layers.read
    layers.read = lambda norm, x: watch(names[id(norm)], x)
    try:
        yield
    finally:
        layers.read = read
