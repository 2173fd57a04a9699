"""Freed memory: kept for the next arrays while slabs come and go, and given back afterwards."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from mlx_vae import malloc

pytestmark = pytest.mark.skipif(malloc._glibc is None, reason="only glibc's malloc is told what to keep")

SIZE = 64 << 20


@pytest.fixture(autouse=True)
def trimmed() -> None:
    malloc.trim()


def resident() -> int:
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("VmRSS:") + 1]) << 10


def left_by_an_array() -> int:
    """How much memory this process still holds of an array's that has been freed, besides what it held before."""
    before = resident()
    mx.eval(mx.zeros(SIZE // 4))
    return resident() - before


def test_an_array_takes_the_memory_of_the_one_before() -> None:
    assert left_by_an_array() < 0.1 * SIZE
    with malloc.keeping():
        assert left_by_an_array() > 0.9 * SIZE
        assert left_by_an_array() < 0.1 * SIZE


def test_afterwards_memory_goes_back() -> None:
    with malloc.keeping():
        left_by_an_array()
    kept = resident()
    malloc.trim()
    assert resident() < kept - 0.9 * SIZE
    assert left_by_an_array() < 0.1 * SIZE
