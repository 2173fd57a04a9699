"""The table of contents of a safetensors file: 8 bytes of length, a JSON header, then the tensors end to end."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

from mlx_vae.convert.tensors import ITEMSIZE, CheckpointError, TensorView, contiguous

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
MAX_HEADER = 16 << 20
"""More than a hundred thousand tensors need."""


def read_safetensors(path: Path) -> tuple[dict[str, TensorView], dict[str, str]]:
    """The tensors by name, and the metadata. Raises CheckpointError where the header and the file disagree."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        if not isinstance(header, dict) or not isinstance(metadata := header.pop("__metadata__", {}), dict):
            raise ValueError("its header is not an object")
        tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        _check_cover(header, size - 8 - length)
    except (struct.error, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is in it twice")
    return entries


def _tensor(path: Path, name: str, entry: Any, start: int) -> TensorView:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if all(
            type(side) is int and 0 <= side <= 1 << 40 for side in shape
        ):
            dtype = DTYPES.get(dtype, dtype)
            if dtype in ITEMSIZE and end - begin != math.prod(shape) * ITEMSIZE[dtype]:
                raise ValueError(f"{name}: {end - begin} bytes for {dtype} of shape {tuple(shape)}")
            return TensorView(path, dtype, tuple(shape), contiguous(shape), start + begin)
    raise ValueError(f"{name}: an entry without dtype, shape and data_offsets")


def _check_cover(header: dict[str, Any], size: int) -> None:
    """The tensors follow one another without gap or overlap, from the header to the end of the file."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["data_offsets"][0] != end or entry["data_offsets"][1] < end:
            raise ValueError(f"{name}: its data begins at {entry['data_offsets'][0]}, wanted {end}")
        end = entry["data_offsets"][1]
    if end != size:
        raise ValueError(f"{size} bytes of tensors, the header describes {end}: the file is cut short or overlong")
