"""Smaller weights: 8-bit integers, or palettes of 16, 64 or 256 values, that Core ML expands as it loads or runs."""

from __future__ import annotations

from typing import Any

import numpy as np

MODES = ("none", "int8", "pal8", "pal6", "pal4")
SMALLEST = 2048
"""Tensors with fewer values stay as they are: their palette would weigh as much."""


def expansion(weight: np.ndarray, mode: str, modern: bool) -> tuple[str, dict[str, Any]] | None:
    """The operation that gives back a weight (O, I, h, w), and its parameters; None for "none" and for small weights.

    `modern` selects the operations of iOS 18, whose programs don't know those of iOS 16.
    """
    if mode == "none" or weight.size < SMALLEST:
        return None
    if mode == "int8":
        data, scale = integers(weight)
        if modern:
            return "constexpr_blockwise_shift_scale", {"data": data, "scale": scale.reshape(-1, 1, 1, 1)}
        zero = {"zero_point": np.int8(0), "axis": np.int32(0)}
        return "constexpr_affine_dequantize", {"quantized_data": data, "scale": scale, **zero}
    bits = int(mode.removeprefix("pal"))
    table, indices = palette(weight, bits)
    if modern:
        from coremltools.converters.mil.mil import types

        indices = indices.astype(types.type_mapping.string_to_nptype(f"uint{bits}"))
        return "constexpr_lut_to_dense", {"indices": indices, "lut": table.reshape(1, 1, 1, 1, -1, 1)}
    shape = np.array(weight.shape, dtype=np.uint32)
    return "constexpr_lut_to_dense", {"indices": packed(indices, bits), "lut": table, "shape": shape}


def integers(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weight ~ data * scale: int8 of the same shape, and one scale for each output channel."""
    scale = (np.abs(weight.astype(np.float32)).max(axis=(1, 2, 3)) / 127).astype(weight.dtype)
    scale[scale == 0] = 1
    data = np.rint(weight.astype(np.float32) / scale.astype(np.float32)[:, None, None, None])
    return np.clip(data, -127, 127).astype(np.int8), scale


def palette(weight: np.ndarray, bits: int, rounds: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """weight ~ table[indices], with the least squared error that Lloyd's algorithm (1982) finds.

    Rounded to float16, any number of weights is at most 65536 different values with counts: each round costs the same.
    """
    codes = weight.astype(np.float16).view(np.uint16)
    counts = np.bincount(codes.ravel(), minlength=1 << 16)
    present = np.flatnonzero(counts)
    values = present.astype(np.uint16).view(np.float16).astype(np.float64)
    order = np.argsort(values)
    present, values, counts = present[order], values[order], counts[present][order]
    count = np.concatenate([[0], np.cumsum(counts)])
    total = np.concatenate([[0], np.cumsum(counts * values)])
    centres = _first_centres(values, counts, 1 << bits)
    for _ in range(rounds):
        edges = np.concatenate([[0], np.searchsorted(values, (centres[1:] + centres[:-1]) / 2), [len(values)]])
        members, sums = np.diff(count[edges]), np.diff(total[edges])
        centres = np.where(members > 0, sums / np.maximum(members, 1), centres)
    lookup = np.zeros(1 << 16, dtype=np.uint8)
    lookup[present] = np.searchsorted((centres[1:] + centres[:-1]) / 2, values)
    return centres.astype(weight.dtype), lookup[codes]


def _first_centres(values: np.ndarray, counts: np.ndarray, number: int) -> np.ndarray:
    """Spread as the cube root of the density, which is best for many centres (Panter & Dite, 1951)."""
    density, edges = np.histogram(values, bins=64, weights=counts)
    mass = np.concatenate([[0], np.cumsum(np.cbrt(density))])
    return np.interp((np.arange(number) + 0.5) / number * mass[-1], mass, edges)


def packed(indices: np.ndarray, bits: int) -> np.ndarray:
    """One after the other without gaps, the lowest bit first: uint8 (ceil(size * bits / 8),)."""
    planes = (indices.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.ravel(), bitorder="little")
