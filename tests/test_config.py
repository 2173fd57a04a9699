"""AutoencoderKLConfig: what it takes, and what it refuses by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_vae import AutoencoderKLConfig

SD_VAE_FT_MSE = {  # as on the hub, with what old files lack
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def test_reads_a_file_of_the_hub() -> None:
    config = AutoencoderKLConfig.from_dict(SD_VAE_FT_MSE)
    assert config.factor == 8
    assert config.scaling_factor == 0.18215
    assert config.use_quant_conv


def test_round_trip_through_json() -> None:
    config = AutoencoderKLConfig(block_out_channels=(32, 64), latents_mean=(0.0, 1, 2, 3), latents_std=(1, 2, 3, 4.0))
    assert AutoencoderKLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_fields_without_a_value_are_no_matter() -> None:
    assert AutoencoderKLConfig.from_dict({"some_future_field": None}) == AutoencoderKLConfig()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name 'AutoencoderTiny' is not supported"),
        ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types: 'DownBlock2D' is not supported"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types: 'UpBlock2D' is not supported"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types .* block_out_channels has 1 levels"),
        ({"block_out_channels": [48]}, "48 is not a multiple of norm_num_groups 32"),
        ({"block_out_channels": []}, "block_out_channels is"),
        ({"block_out_channels": 64}, "block_out_channels is 64"),
        ({"block_out_channels": [64, True]}, "block_out_channels is"),
        ({"layers_per_block": 0}, "layers_per_block is 0; it must be a positive integer"),
        ({"latent_channels": 4.0}, "latent_channels is 4.0"),
        ({"norm_num_groups": "32"}, "norm_num_groups is '32'"),
        ({"sample_size": [512]}, "sample_size is"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"shift_factor": "0.1"}, "shift_factor is '0.1'"),
        ({"latents_mean": [0, 0, 0, 0]}, "latents_mean and latents_std belong together"),
        ({"latents_mean": [0, 0], "latents_std": [1, 1]}, "latents_mean is .* each of 4 latent channels"),
        ({"latents_mean": [0] * 4, "latents_std": [1, 1, 0, 1]}, "latents_std is"),
        ({"latents_mean": [0] * 4, "latents_std": [1] * 4, "shift_factor": 0.1}, "one or the other"),
        ({"use_quant_conv": "yes"}, "use_quant_conv is 'yes'"),
        ({"temporal_layers": 2}, "unknown fields in the configuration: temporal_layers"),
    ],
)
def test_refuses_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig.from_dict(fields)


def test_refuses_what_is_no_object() -> None:
    with pytest.raises(ValueError, match="an object of fields, not list"):
        AutoencoderKLConfig.from_dict([])  # type: ignore[arg-type]
