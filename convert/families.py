"""The configuration of a checkpoint: from its config.json, or from the family that its tensors or its user tell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_vae.config import DOWN_BLOCK_TYPES, FAMILIES, UP_BLOCK_TYPES, AutoencoderKLConfig
from mlx_vae.convert.tensors import CheckpointError, TensorView

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


def check(family: str | None) -> None:
    if family is not None and family not in FAMILIES and family != ANY:
        raise CheckpointError(f"{family}: not a family; there are {', '.join(FAMILIES)}, {ANY}")


def family_of(config: AutoencoderKLConfig) -> str | None:
    """The family with this architecture, latent space and need of float32, if it is a known one."""
    fields = (*DEFINING, "force_upcast")
    same = (name for name, known in FAMILIES.items() if all(getattr(config, f) == getattr(known, f) for f in fields))
    return next(same, None)


def configured(path: Path, fields: Mapping[str, Any], tensors: int, family: str | None) -> AutoencoderKLConfig:
    """From the fields of a config.json; a family that is asked for may add to them, but not contradict them.

    tensors: how many there are, which bounds what a damaged configuration can have us build.
    """
    known = FAMILIES[family].to_dict() if family in FAMILIES else {}
    for field in DEFINING:
        if field in fields and field in known and fields[field] != known[field]:
            raise CheckpointError(
                f"{path}: {field} is {fields[field]!r}, of the family {family} it is {known[field]!r}"
            )
    try:
        config = AutoencoderKLConfig.from_dict({**known, **fields})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    least = len(config.block_out_channels) * config.layers_per_block
    if least > tensors:
        raise CheckpointError(f"{path}: it takes more than {least} tensors; the checkpoint has {tensors}")
    return config


def detected(
    path: Path, tensors: Mapping[str, TensorView], shapes: Shapes, family: str | None
) -> tuple[AutoencoderKLConfig, str]:
    """From the shapes of the parameters, the other tensors in the file, and the family that is asked for; and why.

    Raises CheckpointError where they disagree, or tell too little.
    """
    asked = f"the family {family} was asked for"
    try:
        shown = _architecture(shapes)
    except (KeyError, IndexError) as error:
        if family in FAMILIES:
            return FAMILIES[family], asked  # whose tensors will be named one by one
        raise CheckpointError(f"{path}: not a whole autoencoder ({error} is missing or misshapen)") from None
    if family in FAMILIES:
        if lines := _misfits(FAMILIES[family], shown):
            raise CheckpointError(f"{path}: not of the family {family}\n  " + "\n  ".join(lines))
        return FAMILIES[family], asked
    if family == ANY:
        return _any_architecture(path, tensors, shown), asked
    fitting = _candidates(shown)
    if mark := _marked({name: tensor.shape for name, tensor in tensors.items()}):
        marked, name = mark
        for candidate in marked:
            if candidate in fitting:
                return FAMILIES[candidate], f"{name} is in the same file"
        lines = _misfits(FAMILIES[marked[0]], shown)
        raise CheckpointError(f"{path}: {name} shows {marked[0]}, but the autoencoder differs\n  " + "\n  ".join(lines))
    if len(fitting) == 1:
        return FAMILIES[fitting[0]], "no other family has this architecture"
    if fitting:
        raise CheckpointError(
            f"{path}: it may be any of {', '.join(fitting)}: they have the same tensors, and other latent spaces. "
            f'Say which with --family {fitting[0]} (in Python family="{fitting[0]}"), or put its config.json beside it'
        )
    raise CheckpointError(
        f"{path}: no known family has this architecture ({shown}). "
        f"Put its config.json beside it, or take it as it is with --family {ANY}"
    )


def _any_architecture(path: Path, tensors: Mapping[str, TensorView], shown: Mapping[str, Any]) -> AutoencoderKLConfig:
    scale = tensors.get("scale_factor")  # LDM keeps it in the checkpoint where it was measured
    measured = scale is not None and scale.shape == () and scale.dtype == "float32"
    try:
        return AutoencoderKLConfig(**shown, scaling_factor=scale.read().item() if scale and measured else 1.0)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}. Put its config.json beside it") from None


def _architecture(shapes: Shapes) -> dict[str, Any]:
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


def _misfits(config: AutoencoderKLConfig, found: Mapping[str, Any]) -> list[str]:
    """A line for each field of the architecture in which the tensors are not the configuration's."""
    return [
        f"{field} is {found[field]!r} in the tensors, {getattr(config, field)!r} in the configuration"
        for field in ARCHITECTURE
        if found[field] != getattr(config, field)
    ]


def _candidates(found: Mapping[str, Any]) -> list[str]:
    """The families of that architecture."""
    return [name for name, config in FAMILIES.items() if not _misfits(config, found)]


def _marked(shapes: Shapes) -> tuple[tuple[str, ...], str] | None:
    """The families of the diffusion model around an autoencoder, and the name of the tensor that shows it."""
    for families, name, last in MARKS:
        for full in (name, UNET + name):
            if full in shapes and (last is None or shapes[full][-1:] == (last,)):
                return families, full
    return None
