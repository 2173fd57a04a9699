"""Checkpoints in and out: from the files and names that others use to the model's own parameters."""

from mlx_vae.convert.checkpoint import Checkpoint, CheckpointError, open_pretrained, save_pretrained

__all__ = ["Checkpoint", "CheckpointError", "open_pretrained", "save_pretrained"]
