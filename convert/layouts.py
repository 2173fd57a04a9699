"""How checkpoints spell the names of the tensors. The canonical spelling is diffusers', which is the model's own.

A layout is a table of (theirs, ours), read from left to right to load and from right to left to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

Table = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """A spelling.

    modules: how names begin. {i} and {j} are indices; {up} is one that counts the decoder's levels from the other end.
    leaves: how the names of modules end.
    sign: what is in some name of such a checkpoint, and of none in the layouts after it.
    """

    name: str
    sign: str
    modules: Table = ()
    leaves: Table = ()

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """Each name of a checkpoint, and the model's. A name that is in no table stays as it is."""
        names = list(names)
        last = _last_level(names, r"decoder\.up\.(\d{1,4})\.")
        return {name: _leaf(_module(name, self.modules, last), self.leaves) for name in names}

    def theirs(self, names: Iterable[str]) -> dict[str, str]:
        """Each name of the model, and this layout's: the inverse of `canonical`."""
        names = list(names)
        last = _last_level(names, r"decoder\.up_blocks\.(\d{1,4})\.")
        modules, leaves = _reverse(self.modules), _reverse(self.leaves)
        return {name: _module(_leaf(name, leaves), modules, last) for name in names}


def _reverse(table: Table) -> Table:
    return tuple((ours, theirs) for theirs, ours in table)


def _last_level(names: Iterable[str], pattern: str) -> int:
    return max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=0)


def _module(name: str, modules: Table, last: int) -> str:
    """`decoder.up.3.block.0.conv1.weight` -> `decoder.up_blocks.0.resnets.0.conv1.weight`."""
    for source, target in modules:
        pattern = re.escape(source).replace(r"\{", "(?P<").replace(r"\}", r">0|[1-9]\d{0,3})") + r"(?=\.)"
        if found := re.match(pattern, name):
            indices = {key: int(index) for key, index in found.groupdict().items()}
            if "up" in indices:
                indices["up"] = last - indices["up"]
            return target.format(**indices) + name[found.end() :]
    return name


def _leaf(name: str, leaves: Table) -> str:
    """`decoder.mid_block.attentions.0.query.weight` -> `decoder.mid_block.attentions.0.to_q.weight`."""
    module, _, parameter = name.rpartition(".")
    for source, target in leaves:
        if module.endswith("." + source):
            return f"{module.removesuffix(source)}{target}.{parameter}"
    return name


DIFFUSERS = Layout("diffusers", sign="")

DIFFUSERS_OLD_ATTENTION = Layout(
    "diffusers, before 0.15",  # sd-vae-ft-mse on the hub
    sign=".query.",
    leaves=(("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")),
)

LDM = Layout(
    "ldm",  # CompVis' latent diffusion: Stable Diffusion's and FLUX.1's own files
    sign=".mid.block_1.",
    modules=(
        ("encoder.down.{i}.block.{j}", "encoder.down_blocks.{i}.resnets.{j}"),
        ("encoder.down.{i}.attn.{j}", "encoder.down_blocks.{i}.attentions.{j}"),
        ("encoder.down.{i}.downsample", "encoder.down_blocks.{i}.downsamplers.0"),
        ("encoder.mid.block_1", "encoder.mid_block.resnets.0"),
        ("encoder.mid.attn_1", "encoder.mid_block.attentions.0"),
        ("encoder.mid.block_2", "encoder.mid_block.resnets.1"),
        ("encoder.norm_out", "encoder.conv_norm_out"),
        ("decoder.up.{up}.block.{j}", "decoder.up_blocks.{up}.resnets.{j}"),
        ("decoder.up.{up}.attn.{j}", "decoder.up_blocks.{up}.attentions.{j}"),
        ("decoder.up.{up}.upsample", "decoder.up_blocks.{up}.upsamplers.0"),
        ("decoder.mid.block_1", "decoder.mid_block.resnets.0"),
        ("decoder.mid.attn_1", "decoder.mid_block.attentions.0"),
        ("decoder.mid.block_2", "decoder.mid_block.resnets.1"),
        ("decoder.norm_out", "decoder.conv_norm_out"),
    ),
    leaves=(
        ("nin_shortcut", "conv_shortcut"),
        ("norm", "group_norm"),
        ("q", "to_q"),
        ("k", "to_k"),
        ("v", "to_v"),
        ("proj_out", "to_out.0"),
    ),
)

FLUX2 = Layout(
    "ldm, FLUX.2",
    sign="encoder.quant_conv.",
    modules=(*LDM.modules, ("encoder.quant_conv", "quant_conv"), ("decoder.post_quant_conv", "post_quant_conv")),
    leaves=LDM.leaves,
)

LAYOUTS = (FLUX2, LDM, DIFFUSERS_OLD_ATTENTION, DIFFUSERS)

PREFIXES = ("first_stage_model.", "vae.")
"""Where the autoencoder is among the keys of a whole diffusion model."""

LEFT_OUT = ("loss.", "model_ema.", "bn.num_batches_tracked")
"""How the names begin of what training leaves in an autoencoder's checkpoint, and no picture depends on."""

OTHER_CLASSES = {
    "quantize.embedding.weight": "VQModel",
    "encoder.layers.0.weight": "AutoencoderTiny",
    "decoder.layers.1.weight": "AutoencoderTiny",
    "decoder.condition_encoder.layers.0.weight": "AsymmetricAutoencoderKL",
    "decoder_unet.conv_in.weight": "ConsistencyDecoderVAE",
    "decoder.mid_block.resnets.0.spatial_res_block.conv1.weight": "AutoencoderKLTemporalDecoder",
    "decoder.mid.block_1.time_stack.in_layers.0.weight": "AutoencoderKLTemporalDecoder",
    "decoder.stages.1.op_list.0.main.conv.conv.bias": "AutoencoderDC",
    "encoder.project_in.conv.weight": "AutoencoderDC",
    "decoder.middle.0.residual.0.gamma": "AutoencoderKLWan or AutoencoderKLQwenImage",
    "decoder.mid_block.resnets.0.norm1.gamma": "AutoencoderKLWan or AutoencoderKLQwenImage",
    "encoder.conv_in.conv.weight": "an autoencoder of videos",
}
"""Names that only other autoencoders have."""


def layout_of(names: Iterable[str]) -> Layout:
    names = list(names)
    return next(layout for layout in LAYOUTS if any(layout.sign in name for name in names))
