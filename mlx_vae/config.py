"""The configuration of an AutoencoderKL, field for field as in diffusers' config.json, and the families in the wild."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DOWN_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCK_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
ACTIVATIONS = ("silu", "swish")  # two names of one function

NORM_EPS = 1e-6
"""The eps of every GroupNorm of the autoencoder: diffusers' `resnet_eps`; MLX's own default of 1e-5 is wrong here."""

MAX_COUNT = 1 << 16
"""No autoencoder has as many channels, layers or pixels to a side; a configuration with more is a damaged one."""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_COUNT


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of diffusers' `AutoencoderKL`, with diffusers' defaults.

    `down_block_types` and `up_block_types` may be left out: then every level is a plain one.
    Diffusion latents are `(z - shift_factor) * scaling_factor`, or `(z - latents_mean) * scaling_factor / latents_std`.
    With a `patch_size` this is an `AutoencoderKLFlux2`: its diffusion latents are patches of that size, normalised by
    the statistics of a batch norm, and its decoder may have widths of its own, `decoder_block_out_channels`.

    Raises ValueError, naming the field, for anything that this library does not implement.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ()
    up_block_types: tuple[str, ...] = ()
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, int] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    decoder_block_out_channels: tuple[int, ...] | None = None
    patch_size: tuple[int, int] | None = None
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._check_widths()
        for field, plain in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
            if getattr(self, field) == ():
                object.__setattr__(self, field, (plain[0],) * len(self.block_out_channels))
            self._check_block_types(field, plain)
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn {self.act_fn!r} is not supported; only {' and '.join(map(repr, ACTIVATIONS))}")
        for field in ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be true or false")
        self._check_scaling()
        self._check_patches()

    def _check_widths(self) -> None:
        for field in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if not _is_count(getattr(self, field)):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be a positive integer")
        for field, widths in (
            ("block_out_channels", self.block_out_channels),
            ("decoder_block_out_channels", self.decoder_widths),
        ):
            if not isinstance(widths, tuple) or not widths or not all(_is_count(width) for width in widths):
                raise ValueError(f"{field} is {widths!r}; it must be a list of at least one positive integer")
            for width in widths:
                if width % self.norm_num_groups:
                    raise ValueError(f"{field}: {width} is not a multiple of norm_num_groups {self.norm_num_groups}")
        if len(self.decoder_widths) != len(self.block_out_channels):
            raise ValueError(
                f"decoder_block_out_channels has {len(self.decoder_widths)} levels, "
                f"block_out_channels {len(self.block_out_channels)}; they must agree"
            )
        size = self.sample_size
        if not (_is_count(size) or (isinstance(size, tuple) and len(size) == 2 and all(map(_is_count, size)))):
            raise ValueError(f"sample_size is {size!r}; it must be a positive integer or a pair of them")

    def _check_block_types(self, field: str, supported: tuple[str, ...]) -> None:
        types = getattr(self, field)
        if not isinstance(types, tuple) or len(types) != len(self.block_out_channels):
            raise ValueError(f"{field} is {types!r}; block_out_channels has {len(self.block_out_channels)} levels")
        for block_type in types:
            if block_type not in supported:
                raise ValueError(f"{field}: {block_type!r} is not supported; only {' and '.join(supported)}")

    def _check_scaling(self) -> None:
        if not _is_finite(self.scaling_factor) or self.scaling_factor == 0:
            raise ValueError(f"scaling_factor is {self.scaling_factor!r}; it must be a finite number other than 0")
        if self.shift_factor is not None and not _is_finite(self.shift_factor):
            raise ValueError(f"shift_factor is {self.shift_factor!r}; it must be a finite number or null")
        mean, std = self.latents_mean, self.latents_std
        if (mean is None) != (std is None):
            raise ValueError("latents_mean and latents_std belong together: give both or neither")
        if mean is None or std is None:
            return
        for field, values in (("latents_mean", mean), ("latents_std", std)):
            if (
                not isinstance(values, tuple)
                or len(values) != self.latent_channels
                or not all(map(_is_finite, values))
                or (field == "latents_std" and 0 in values)
            ):
                raise ValueError(
                    f"{field} is {values!r}; it must hold one number for each of {self.latent_channels} latent channels"
                )
        if self.shift_factor:
            raise ValueError("shift_factor and latents_mean are both given; a latent space has one or the other")

    def _check_patches(self) -> None:
        if self.patch_size is None:
            if self.decoder_block_out_channels is not None:
                raise ValueError(
                    "decoder_block_out_channels is for AutoencoderKLFlux2, which has a patch_size; give both"
                )
            return
        if (
            not isinstance(self.patch_size, tuple)
            or len(self.patch_size) != 2
            or not all(map(_is_count, self.patch_size))
        ):
            raise ValueError(f"patch_size is {self.patch_size!r}; it must be a pair of positive integers")
        for field in ("batch_norm_eps", "batch_norm_momentum"):
            if not _is_finite(getattr(self, field)) or getattr(self, field) <= 0:
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be a positive number")
        if (self.scaling_factor, self.shift_factor, self.latents_mean) != (1.0, None, None):
            raise ValueError(
                "patch_size: the batch norm scales the latents; scaling_factor must be 1 and the rest null"
            )

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """The channels of the decoder's levels, from the picture's resolution down as `block_out_channels` are."""
        return self.block_out_channels if self.decoder_block_out_channels is None else self.decoder_block_out_channels

    @property
    def diffusion_channels(self) -> int:
        """The channels of the diffusion model's latents: those of a whole patch, where there is a patch_size."""
        return self.latent_channels * math.prod(self.patch_size or (1,))

    @property
    def class_name(self) -> str:
        """diffusers' class for this configuration."""
        return "AutoencoderKL" if self.patch_size is None else "AutoencoderKLFlux2"

    @property
    def factor(self) -> int:
        """Picture pixels for each latent pixel, along one side: 2 ** (levels - 1)."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AutoencoderKLConfig:
        """From the contents of a config.json, with the defaults of its class.

        Raises ValueError for another `_class_name` than AutoencoderKL and AutoencoderKLFlux2, and for unknown fields.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"a configuration is an object of fields, not {type(fields).__name__}")
        class_name = fields.get("_class_name", "AutoencoderKL")
        if class_name not in tuple(LACKS):
            raise ValueError(f"_class_name {class_name!r} is not supported; only {' and '.join(map(repr, LACKS))}")
        known = {field.name for field in dataclasses.fields(cls)} - LACKS[class_name]
        given = {key: value for key, value in fields.items() if not key.startswith("_")}
        unknown = sorted(key for key, value in given.items() if key not in known and value is not None)
        if unknown:
            raise ValueError(f"unknown fields in the configuration: {', '.join(unknown)}")
        defaults = FLUX2 if class_name == "AutoencoderKLFlux2" else {}
        return cls(**{**defaults, **{key: value for key, value in given.items() if key in known}})

    def to_dict(self) -> dict[str, Any]:
        """What diffusers would write to config.json, without its version."""
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in LACKS[self.class_name]}
        return {"_class_name": self.class_name, **json.loads(json.dumps(fields))}


LACKS = {
    "AutoencoderKL": {"decoder_block_out_channels", "patch_size", "batch_norm_eps", "batch_norm_momentum"},
    "AutoencoderKLFlux2": {"scaling_factor", "shift_factor", "latents_mean", "latents_std"},
}
"""The diffusers classes that an AutoencoderKLConfig stands for, and the fields that each of them does not have."""

SD: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
SDXL: dict[str, Any] = {**SD, "sample_size": 1024, "scaling_factor": 0.13025}
SD3: dict[str, Any] = {
    **SD,
    "sample_size": 1024,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX2: dict[str, Any] = {**SD, "sample_size": 1024, "latent_channels": 32, "scaling_factor": 1.0, "patch_size": (2, 2)}

FAMILIES: dict[str, AutoencoderKLConfig] = {
    "sd": AutoencoderKLConfig(**SD),
    "sd-x4-upscaler": AutoencoderKLConfig(
        block_out_channels=(128, 256, 512), layers_per_block=2, sample_size=256, scaling_factor=0.08333
    ),
    "sdxl": AutoencoderKLConfig(**SDXL),
    "sdxl-fp16-fix": AutoencoderKLConfig(**SDXL, force_upcast=False),
    "playground-2.5": AutoencoderKLConfig(
        **{**SDXL, "scaling_factor": 0.5},
        latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
        latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
    ),
    "sd3": AutoencoderKLConfig(**SD3, scaling_factor=1.5305, shift_factor=0.0609),
    "flux": AutoencoderKLConfig(**SD3, scaling_factor=0.3611, shift_factor=0.1159),
    "cogview4": AutoencoderKLConfig(
        **{**SD3, "block_out_channels": (128, 512, 1024, 1024), "layers_per_block": 3},
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    ),
    "flux2": AutoencoderKLConfig(**FLUX2),
    "flux2-small-decoder": AutoencoderKLConfig(**FLUX2, decoder_block_out_channels=(96, 192, 384, 384)),
}
"""The autoencoders in the wild, by the first model that used each:
"sd" is Stable Diffusion 1's and 2's, sd-vae-ft-mse too; "sdxl" also AuraFlow's and Kolors'; "sdxl-fp16-fix" also
PixArt-Sigma's; "sd3" also SD 3.5's; "flux" FLUX.1's, Z-Image's, Lumina 2's, Chroma's and HiDream's."""
