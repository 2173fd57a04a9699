"""Model folders: where the files are, what is in them, and writing them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_vae.config import AutoencoderKLConfig
from mlx_vae.convert.weights import differences, from_torch
from mlx_vae.files import replacing

TINY = Path(__file__).resolve().parent.parent / "mlx_vae" / "tiny"
CONFIG_NAME = "config.json"
MLX_WEIGHTS_NAME = "model.safetensors"
WEIGHTS_NAMES = (MLX_WEIGHTS_NAME, "diffusion_pytorch_model.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded: where, what was found and what was wanted."""


@dataclass(frozen=True)
class Checkpoint:
    """A configuration and the file that holds its weights."""

    config: AutoencoderKLConfig
    path: Path

    def weights(self, shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype | None) -> dict[str, mx.array]:
        """The parameters named in `shapes`, all and no others. Raises CheckpointError that names every difference."""
        try:
            loaded: Any = mx.load(str(self.path), return_metadata=True)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path}: not a readable safetensors file ({error})") from None
        tensors: dict[str, mx.array] = loaded[0]
        metadata: dict[str, str] = loaded[1]
        weights = tensors if metadata.get("format") == "mlx" else from_torch(tensors)
        lines = differences(weights, shapes)
        if lines:
            raise CheckpointError(f"{self.path}: {len(lines)} tensors do not fit\n  " + "\n  ".join(lines))
        return weights if dtype is None else {name: weight.astype(dtype) for name, weight in weights.items()}


def open_pretrained(source: str | os.PathLike[str], subfolder: str | None = None) -> Checkpoint:
    """Finds the configuration and weights of "tiny" or of a folder: a VAE's own, or a pipeline's with `vae/`."""
    folder = TINY if source == "tiny" else Path(source)
    if subfolder:
        folder = folder / subfolder
    elif not (folder / CONFIG_NAME).is_file() and (folder / "vae" / CONFIG_NAME).is_file():
        folder = folder / "vae"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_NAME} in this folder or in its vae/")
    weights = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
    if not weights:
        raise CheckpointError(f"{folder}: none of {', '.join(WEIGHTS_NAMES)}")
    try:
        config = AutoencoderKLConfig.from_dict(json.loads((folder / CONFIG_NAME).read_text()))
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from None
    return Checkpoint(config, weights[0])


def save_pretrained(folder: str | os.PathLike[str], config: AutoencoderKLConfig, weights: dict[str, mx.array]) -> None:
    """Writes a model folder: `config.json` and `model.safetensors`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / MLX_WEIGHTS_NAME) as path:
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    with replacing(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
