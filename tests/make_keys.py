"""Writes tests/data/keys: every tensor of the checkpoints in the wild, as [LDM name, diffusers name, torch shape].

Run it where diffusers is installed. The names and shapes are diffusers' own (its models, on no device); the LDM names
come from the description of that layout, and diffusers' converter must take them to the same tensors.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from writers import modules

from mlx_vae.config import FAMILIES

KEYS = Path(__file__).parent / "data" / "keys"
CHECKPOINTS = {"sd1": "sd", "sdxl": "sdxl", "sd3": "sd3", "flux1": "flux", "flux2": "flux2"}


def rows(family: str) -> list[tuple[str, str, list[int]]]:
    config = FAMILIES[family]
    model_class = getattr(diffusers, config.class_name)
    with torch.device("meta"):
        model = model_class.from_config(config.to_dict())
    names = {ours: ldm for ours, _, ldm in modules(config, flux2=family == "flux2")}
    found = []
    for name, value in model.state_dict().items():
        module, _, parameter = name.rpartition(".")
        shape = list(value.shape)
        if ".attentions." in name and len(shape) == 2:
            shape += [1, 1]
        found.append((f"{names[module]}.{parameter}", name, shape))
    if family != "flux2":  # which diffusers does not convert
        checkpoint = {ldm: torch.empty(shape, device="meta") for ldm, _, shape in found}
        converted = convert_ldm_vae_checkpoint(checkpoint, config.to_dict())
        wanted = {name: list(value.shape) for name, value in model.state_dict().items()}
        assert {name: list(value.shape) for name, value in converted.items()} == wanted
    return found


if __name__ == "__main__":
    KEYS.mkdir(parents=True, exist_ok=True)
    for name, family in CHECKPOINTS.items():
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows(family))
        (KEYS / f"{name}.json").write_text(f"[\n{lines}\n]\n")
