"""Sizes as people write them, and limits that are kept."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from memory import peak_bytes
from models import SD1, WIDE, random_images, random_latents, random_model

from mlx_vae import AutoencoderKL, layers, malloc, memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        (" 1.5 GiB ", 3 << 29),
        ("512MiB", 512 << 20),
        ("512M", 512 * 10**6),
        ("1K", 1000),
        ("1000000", 10**6),
        ("10B", 10),
        (123456789, 123456789),
        (2.5e9, 2500000000),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert memory.parse(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "four", "4 I", "0", "1e9GB", "nan", -5])
def test_no_sizes(text: str | int) -> None:
    with pytest.raises(ValueError, match=r'max_memory is .*; wanted bytes, such as "4GB"'):
        memory.parse(text)


@pytest.mark.parametrize("size", [999_999, 1_234_567, 88_900_001, 999_999_999, 1_000_000_001, 12_345_678_901])
def test_what_is_described_is_enough(size: int) -> None:
    assert size <= memory.parse(memory.describe(size)) <= 1.02 * size + 10**4


def test_what_stable_diffusion_needs() -> None:
    """Two tensors of 128 channels for each pixel at least, and ten more whole."""
    vae = AutoencoderKL(SD1)
    for side in (128, 256):
        needed = vae.decode_memory((1, side, side, 4))
        tensors = 2 * 128 * (8 * side) ** 2 * 4
        assert tensors < needed.least < 1.35 * tensors
        assert needed.whole > 5 * tensors
        half = vae.decode_memory((1, side, side, 4), mx.float16)
        assert tensors / 2 < half.least < 0.6 * needed.least
        encoding = vae.encode_memory((1, 8 * side, 8 * side, 3))
        assert tensors < encoding.least < 1.35 * tensors


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget the peak of a process")
def test_limits_are_kept() -> None:
    """20 random sizes and limits: what the process takes on top, as the system sees it."""
    vae = random_model(WIDE)
    choose = random.Random(0)
    for i in range(20):
        height, width = choose.randrange(40, 100, 2), choose.randrange(40, 100, 2)
        if i % 2:
            x, needed = random_images((1, 2 * height, 2 * width, 3)), vae.encode_memory((1, 2 * height, 2 * width, 3))
        else:
            x, needed = random_latents((1, height, width, 4)), vae.decode_memory((1, height, width, 4))
        limit = choose.randint(needed.least, needed.least + needed.whole // 4)
        mx.eval(x)
        layers.return_memory()
        before = malloc.resident()
        Path("/proc/self/clear_refs").write_text("5")
        result = (
            vae.encode(x, max_memory=limit).latent_dist.moments if i % 2 else vae.decode(x, max_memory=limit).sample
        )
        mx.eval(result)
        assert peak_bytes() - before < limit, (height, width, limit)
