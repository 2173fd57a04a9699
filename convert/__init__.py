"""Checkpoints in and out: from the files and names that others use to the model's own parameters, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_vae.convert.checkpoint import Checkpoint, open_pretrained, open_single_file, save_pretrained
from mlx_vae.convert.tensors import CheckpointError

if TYPE_CHECKING:
    from mlx_vae.convert.command import convert, inspect

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "convert",
    "inspect",
    "open_pretrained",
    "open_single_file",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    """`convert` and `inspect` on first use: they need the model, which itself needs this package to load."""
    if name in ("convert", "inspect"):
        from mlx_vae.convert import command

        return getattr(command, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
