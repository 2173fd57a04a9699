"""PNG files of 16 bits a channel, which Pillow reads and can't write. The format: https://www.w3.org/TR/png-3/."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOUR_TYPES = {1: 0, 3: 2, 4: 6}
FILTER_UP = 2


def write_png16(file: BinaryIO, pixels: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes uint16 pixels (H, W, C), C of 1, 3 or 4, and `text` as international text chunks."""
    H, W, C = pixels.shape
    rows = pixels.astype(">u2").reshape(H, W * C).view(np.uint8)
    filtered = np.full((H, 1 + rows.shape[1]), FILTER_UP, dtype=np.uint8)
    filtered[:, 1:] = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # each row less the one above, modulo 256
    file.write(SIGNATURE)
    _write_chunk(file, b"IHDR", struct.pack(">IIBBBBB", W, H, 16, COLOUR_TYPES[C], 0, 0, 0))
    for keyword, value in text.items():
        _write_chunk(
            file, b"iTXt", keyword.encode("latin-1") + bytes(5) + value.encode()
        )  # no compression, no language
    _write_chunk(file, b"IDAT", zlib.compress(filtered.tobytes()))
    _write_chunk(file, b"IEND", b"")


def _write_chunk(file: BinaryIO, kind: bytes, data: bytes) -> None:
    file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))
