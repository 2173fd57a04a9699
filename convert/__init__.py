"""Checkpoints in and out: from the files and names that others use to the model's own parameters, and back."""

from mlx_vae.convert.checkpoint import Checkpoint, open_pretrained, open_single_file, save_pretrained
from mlx_vae.convert.tensors import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "open_pretrained", "open_single_file", "save_pretrained"]
