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


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The fields of diffusers' `AutoencoderKL`, with diffusers' defaults.

    `down_block_types` and `up_block_types` may be left out: then every level is a plain one.
    Diffusion latents are `(z - shift_factor) * scaling_factor`, or `(z - latents_mean) * scaling_factor / latents_std`.

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

    def __post_init__(self) -> None:
        for field in ("down_block_types", "up_block_types", "block_out_channels", "latents_mean", "latents_std"):
            value = getattr(self, field)
            if isinstance(value, list):
                object.__setattr__(self, field, tuple(value))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
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

    def _check_widths(self) -> None:
        widths = self.block_out_channels
        if not isinstance(widths, tuple) or not widths or not all(_is_count(width) for width in widths):
            raise ValueError(f"block_out_channels is {widths!r}; it must be a list of at least one positive integer")
        for field in ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups"):
            if not _is_count(getattr(self, field)):
                raise ValueError(f"{field} is {getattr(self, field)!r}; it must be a positive integer")
        for width in widths:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {width} is not a multiple of norm_num_groups {self.norm_num_groups}"
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

    @property
    def factor(self) -> int:
        """Picture pixels for each latent pixel, along one side: 2 ** (levels - 1)."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AutoencoderKLConfig:
        """From the contents of a config.json. Raises ValueError for another `_class_name` and for unknown fields."""
        if not isinstance(fields, Mapping):
            raise ValueError(f"a configuration is an object of fields, not {type(fields).__name__}")
        class_name = fields.get("_class_name", "AutoencoderKL")
        if class_name != "AutoencoderKL":
            raise ValueError(f"_class_name {class_name!r} is not supported; only 'AutoencoderKL'")
        known = {field.name for field in dataclasses.fields(cls)}
        given = {key: value for key, value in fields.items() if not key.startswith("_")}
        unknown = sorted(key for key, value in given.items() if key not in known and value is not None)
        if unknown:
            raise ValueError(f"unknown fields in the configuration: {', '.join(unknown)}")
        return cls(**{key: value for key, value in given.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """What diffusers would write to config.json, without its version."""
        return {"_class_name": "AutoencoderKL", **json.loads(json.dumps(dataclasses.asdict(self)))}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
