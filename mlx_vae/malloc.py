"""glibc's malloc, which is where MLX's arrays are on Linux without a GPU; on other systems nothing here does anything.

By itself it gives an array of more than 32 MiB back to the system as soon as it is freed, and so the end of its heap.
But new memory is slow: the system clears each page when it is first touched.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of mallopt(3)
KEEPING = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_MAX: 0}
RETURNING = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536}
"""As glibc sets itself once it has seen large arrays."""
MUCH = 512 << 20
"""Bytes that are worth the time to give them back."""


@contextmanager
def keeping() -> Iterator[None]:
    """What is freed meanwhile stays for the next arrays; if it was much, it is given back in the end."""
    if _glibc is None:
        yield
        return
    before = resident()
    _set(KEEPING)
    try:
        yield
    finally:
        _set(RETURNING)
        if resident() > before + MUCH:
            trim()


def trim() -> None:
    """Gives the system back whatever is free, in the middle of the heap too."""
    if _glibc is not None:
        _glibc.malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _set(parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        _glibc.mallopt(parameter, value)


def _find() -> Any:
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    return found if hasattr(found, "gnu_get_libc_version") else None


_glibc = _find()
