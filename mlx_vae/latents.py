"""Latent files: our own, which say what they are, and those of others, which don't."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vae.files import replacing

FORMAT_VERSION = "1"
TENSOR_NAME = "latents"


@dataclass(frozen=True)
class Latents:
    """Latents of one or more pictures, and what is known about them; None where the file doesn't say.

    `values` is (N, h, w, C); from a file of others, where `own` is False, also (N, C, h, w), and either without the N:
    `nhwc` tells which. `height` and `width` are those of the pictures in pixels, before padding.
    """

    values: mx.array
    model: str | None = None
    family: str | None = None
    scaled: bool | None = None
    height: int | None = None
    width: int | None = None
    own: bool = True

    def nhwc(self, channels: int, layout: str | None = None) -> mx.array:
        """The values as (N, h, w, channels). `layout` ("nchw" or "nhwc") says which axis holds the channels.

        Raises ValueError where no axis has that many channels, or where both could be it and no layout says which.
        """
        x = self.values[None] if self.values.ndim == 3 else self.values
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"latents of shape {self.values.shape}; wanted (N, h, w, {channels})")
        fits = {"nchw": x.shape[1] == channels, "nhwc": x.shape[3] == channels}
        if self.own:
            layout = "nhwc"
        elif layout is None:
            if all(fits.values()):
                raise ValueError(f"latents of shape {self.values.shape} may be NCHW or NHWC; --layout must say which")
            layout = "nchw" if fits["nchw"] else "nhwc"
        if not fits[layout]:
            raise ValueError(f"latents of shape {self.values.shape}; the model wants {channels} channels")
        return x.transpose(0, 2, 3, 1) if layout == "nchw" else x  # NCHW -> NHWC


def save_latents(path: str | os.PathLike[str], latents: Latents) -> None:
    """Writes a latent file of our own: one tensor `latents` (N, h, w, C) and what is known about it as metadata."""
    metadata = {
        "model": latents.model or "",
        "family": latents.family or "",
        "scaled": "true" if latents.scaled else "false",
        "height": str(latents.height),
        "width": str(latents.width),
        "format_version": FORMAT_VERSION,
    }
    with replacing(path) as temporary:
        mx.save_safetensors(str(temporary), {TENSOR_NAME: latents.values}, metadata)


def load_latents(path: str | os.PathLike[str]) -> Latents:
    """Reads a latent file of our own, or the one array of an .npy, .npz or .safetensors file of others.

    Of several arrays the one called `latents` is read. Raises ValueError for anything else, and for values that are not
    finite numbers.
    """
    path = Path(path)
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: {path.suffix or 'no'} ending; latents are read from {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    arrays, metadata = readers[path.suffix.lower()](path)
    if TENSOR_NAME not in arrays and len(arrays) != 1:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"{path}: holds {found}; wanted one array, or one called {TENSOR_NAME!r}")
    values = arrays.get(TENSOR_NAME, next(iter(arrays.values())))
    if not mx.issubdtype(values.dtype, mx.floating):
        raise ValueError(f"{path}: latents of dtype {values.dtype}; wanted a floating-point one")
    if not mx.all(mx.isfinite(values)).item():
        raise ValueError(f"{path}: latents with values that are not finite")
    if "format_version" not in metadata:
        return Latents(values, own=False)
    return _described(path, values, metadata)


def _described(path: Path, values: mx.array, metadata: dict[str, str]) -> Latents:
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {metadata['format_version']}; this version reads {FORMAT_VERSION}")
    try:
        return Latents(
            values,
            model=metadata["model"] or None,
            family=metadata["family"] or None,
            scaled={"true": True, "false": False}[metadata["scaled"]],
            height=int(metadata["height"]),
            width=int(metadata["width"]),
        )
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: incomplete metadata of a latent file ({error})") from None


def _read_npy(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        with path.open("rb") as file:
            return {TENSOR_NAME: _to_mlx(np.lib.format.read_array(file, allow_pickle=False))}, {}
    except (ValueError, EOFError, MemoryError) as error:
        raise ValueError(f"{path}: not a readable .npy file ({error})") from None


def _read_npz(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: _to_mlx(archive[name]) for name in archive.files}, {}
    except (ValueError, EOFError, MemoryError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable .npz file ({error})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    try:
        loaded: Any = mx.load(str(path), return_metadata=True)
        mx.eval(loaded[0])
    except (RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file ({error})") from None
    return loaded[0], loaded[1]


def _to_mlx(array: np.ndarray) -> mx.array:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"an array of dtype {array.dtype}")
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    return mx.array(array)
