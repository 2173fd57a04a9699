"""Which of the known families a checkpoint belongs to: by its tensors' shapes, and by what else is in its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_vae.config import DOWN_BLOCK_TYPES, FAMILIES, UP_BLOCK_TYPES, AutoencoderKLConfig

Shapes = Mapping[str, tuple[int, ...]]

ANY = "ldm"
"""The family of an autoencoder of any architecture, as LDM's own kl-f4 to kl-f32, with LDM's default scaling_factor."""

UNET = "model.diffusion_model."
TEXT_WIDTH = "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
MARKS = (
    (("flux2", "flux2-small-decoder"), "single_stream_modulation.lin.weight", None),
    (("flux",), "distilled_guidance_layer.in_proj.bias", None),  # Chroma
    (("flux",), "double_blocks.0.img_attn.norm.key_norm.scale", None),
    (("flux",), "cap_embedder.0.weight", None),  # Lumina 2 and Z-Image
    (("flux",), "double_stream_blocks.0.block.adaLN_modulation.1.bias", None),  # HiDream
    (("sd3",), "joint_blocks.0.context_block.adaLN_modulation.1.bias", None),
    (("playground-2.5",), "edm_mean", None),
    (("sdxl",), "double_layers.0.attn.w2q.weight", None),  # AuraFlow
    (("sdxl",), TEXT_WIDTH, 2048),
    (("sdxl",), TEXT_WIDTH, 1280),  # SDXL's refiner
    (("sd", "sd-x4-upscaler"), TEXT_WIDTH, 1024),  # Stable Diffusion 2
    (("sd",), TEXT_WIDTH, 768),
)
"""Families, the name of a tensor in their diffusion models' files, and that tensor's last axis where it decides.
The first that fits counts."""

ARCHITECTURE = (
    *("in_channels", "out_channels", "latent_channels", "block_out_channels", "decoder_block_out_channels"),
    *("down_block_types", "up_block_types", "layers_per_block", "mid_block_add_attention"),
    *("use_quant_conv", "use_post_quant_conv", "patch_size"),
)
"""The fields of a configuration that the tensors show. The number of groups in a norm is not among them."""

LATENT_SPACE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
DEFINING = (*ARCHITECTURE, *LATENT_SPACE)
"""The fields that make a family; the others are advice."""


def architecture(shapes: Shapes) -> dict[str, Any]:
    """The fields of ARCHITECTURE, from the shapes of a model's parameters. Raises KeyError for one that is missing."""
    levels = _count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    encoder = tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels))
    decoder = tuple(shapes[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"][0] for i in reversed(range(levels)))
    return {
        "in_channels": shapes["encoder.conv_in.weight"][-1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][-1],
        "block_out_channels": encoder,
        "decoder_block_out_channels": None if decoder == encoder else decoder,
        "down_block_types": _block_types(shapes, "encoder.down_blocks", levels, DOWN_BLOCK_TYPES),
        "up_block_types": _block_types(shapes, "decoder.up_blocks", levels, UP_BLOCK_TYPES),
        "layers_per_block": _count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "patch_size": (2, 2) if "bn.running_mean" in shapes else None,
    }


def _count(shapes: Shapes, name: str) -> int:
    count = 0
    while name.format(count) in shapes:
        count += 1
    return count


def _block_types(shapes: Shapes, blocks: str, levels: int, types: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(types[f"{blocks}.{i}.attentions.0.to_q.weight" in shapes] for i in range(levels))


def misfits(config: AutoencoderKLConfig, found: Mapping[str, Any]) -> list[str]:
    """A line for each field of the architecture in which the tensors are not the configuration's."""
    return [
        f"{field} is {found[field]!r} in the tensors, {getattr(config, field)!r} in the configuration"
        for field in ARCHITECTURE
        if found[field] != getattr(config, field)
    ]


def candidates(found: Mapping[str, Any]) -> list[str]:
    """The families of that architecture."""
    return [name for name, config in FAMILIES.items() if not misfits(config, found)]


def marked(shapes: Shapes) -> tuple[tuple[str, ...], str] | None:
    """The families of the diffusion model around an autoencoder, and the name of the tensor that shows it."""
    for families, name, last in MARKS:
        for full in (name, UNET + name):
            if full in shapes and (last is None or shapes[full][-1:] == (last,)):
                return families, full
    return None


def family_of(config: AutoencoderKLConfig) -> str | None:
    """The family with this architecture, latent space and need of float32, if it is a known one."""
    fields = (*DEFINING, "force_upcast")
    same = (name for name, known in FAMILIES.items() if all(getattr(config, f) == getattr(known, f) for f in fields))
    return next(same, None)
