"""Freed memory: kept for the next arrays while slabs come and go, and given back afterwards.

Measured in new processes, whose heaps have no gaps yet that an array fits into.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import mlx.core as mx
import pytest

from mlx_vae import malloc

pytestmark = pytest.mark.skipif(malloc._glibc is None, reason="only glibc's malloc is told what to keep")

SIZE = 64 << 20


def in_a_new_process(measure: Callable[[], list[int]]) -> list[float]:
    """What `measure` returns, in arrays of SIZE bytes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return [size / SIZE for size in pool.submit(measure).result()]


def left_by_an_array() -> int:
    """How much memory this process still holds of an array's that has been freed, besides what it held before."""
    before = malloc.resident()
    mx.eval(mx.zeros(SIZE // 4))
    return malloc.resident() - before


def before_within_and_after() -> list[int]:
    left = [left_by_an_array()]
    start = malloc.resident()
    with malloc.keeping():
        left += [left_by_an_array(), left_by_an_array()]
    malloc.trim()
    return [*left, malloc.resident() - start, left_by_an_array()]


def much() -> list[int]:
    malloc.MUCH = SIZE // 2
    before = malloc.resident()
    with malloc.keeping():
        left = left_by_an_array()
    return [left, malloc.resident() - before]


def test_an_array_takes_the_memory_of_the_one_before() -> None:
    before, first, *others = in_a_new_process(before_within_and_after)
    assert first == pytest.approx(1, abs=0.1)
    assert [before, *others] == pytest.approx([0, 0, 0, 0], abs=0.1)


def test_much_goes_back_at_once() -> None:
    assert in_a_new_process(much) == pytest.approx([1, 0], abs=0.1)
