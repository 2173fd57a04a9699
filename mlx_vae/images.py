"""Picture files. Arrays are (H, W, C) with values in [-1, 1], as the autoencoder wants them."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_vae.files import replacing

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def check_image_path(path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless Pillow can write a file of that ending and its folder exists."""
    path = Path(path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path}: {path.suffix or 'no'} ending; wanted one of a picture file, such as .png")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such folder as {path.parent}")


def to_bytes(x: mx.array) -> np.ndarray:
    """(..., C) in [-1, 1] -> uint8: clipped, and rounded to the nearest of 256 levels, not truncated.

    Raises ValueError for values that are not finite.
    """
    x = x.astype(mx.float32)
    if not mx.all(mx.isfinite(x)).item():
        raise ValueError(
            "the picture has values that are not finite: its activations overflow. Use float32 or bfloat16"
        )
    return np.array(mx.round((mx.clip(x, -1, 1) + 1) * 127.5).astype(mx.uint8))


def save_image(path: str | os.PathLike[str], x: mx.array) -> None:
    """Writes (H, W, C), C of 1, 3 or 4, as the kind of file that the ending of the path says."""
    if x.ndim != 3 or x.shape[-1] not in MODES:
        raise ValueError(f"a picture of shape {x.shape} can't be written; wanted (H, W, C) with C of 1, 3 or 4")
    with replacing(path) as temporary:
        Image.fromarray(to_bytes(x).squeeze(-1) if x.shape[-1] == 1 else to_bytes(x)).save(temporary)
