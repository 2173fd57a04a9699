"""Tensors at rest: where in a file each of them lies, without reading it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ITEMSIZE = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
}
"""Bytes of an element. A tensor of any other dtype is known by that dtype's name alone."""

STORED_AS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
"""The dtypes of weights, and NumPy's for their bytes (it has no bfloat16)."""


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded or written: where, what was found and what was wanted."""


@dataclass(frozen=True, slots=True)
class TensorView:
    """A strided view of a file: element (i, j) is at byte offset + itemsize * (i * strides[0] + j * strides[1])."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def transpose(self, axes: Sequence[int]) -> TensorView:
        return replace(self, shape=tuple(self.shape[i] for i in axes), strides=tuple(self.strides[i] for i in axes))

    def drop_trailing(self, axes: int) -> TensorView:
        """Without its last axes, of size 1 each."""
        return replace(self, shape=self.shape[:-axes], strides=self.strides[:-axes])

    def read(self) -> np.ndarray:
        """The elements, one at least, in the NumPy dtype of STORED_AS; no other part of the file is read."""
        dtype = np.dtype(STORED_AS[self.dtype])
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        flat = np.empty(span, dtype)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(flat.data.cast("B")) != flat.nbytes:
                raise CheckpointError(f"{self.path}: ends in the middle of a tensor")
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, strides))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous array: (2, 3, 4) -> (12, 4, 1)."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
