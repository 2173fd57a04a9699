"""Freed memory: kept for the next arrays while slabs come and go, and given back afterwards."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_vae import malloc

pytestmark = pytest.mark.skipif(malloc._glibc is None, reason="only glibc's malloc is told what to keep")

SIZE = 64 << 20


@pytest.fixture(autouse=True)
def trimmed() -> None:
    malloc.trim()


def left_by_an_array() -> int:
    """How much memory this process still holds of an array's that has been freed, besides what it held before."""
    before = malloc.resident()
    mx.eval(mx.zeros(SIZE // 4))
    return malloc.resident() - before


def test_an_array_takes_the_memory_of_the_one_before() -> None:
    assert left_by_an_array() < 0.1 * SIZE
    with malloc.keeping():
        assert left_by_an_array() > 0.9 * SIZE
        assert left_by_an_array() < 0.1 * SIZE


def test_afterwards_memory_goes_back() -> None:
    with malloc.keeping():
        left_by_an_array()
    kept = malloc.resident()
    malloc.trim()
    assert malloc.resident() < kept - 0.9 * SIZE
    assert left_by_an_array() < 0.1 * SIZE


def test_much_goes_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc, "MUCH", SIZE // 2)
    before = malloc.resident()
    with malloc.keeping():
        assert left_by_an_array() > 0.9 * SIZE
    assert malloc.resident() < before + 0.1 * SIZE
