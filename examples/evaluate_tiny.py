"""What "tiny" keeps of a picture, against a PCA of 8x8 blocks that keeps as many numbers.

    python examples/evaluate_tiny.py          # needs scikit-image, for its photographs

PSNR in dB of 8-bit pictures of 256x256 px, through the posterior's mode. The drawn pictures are not those of the
training; the PCA is fitted on some that are.
"""

from __future__ import annotations

import mlx_vae  # noqa: F401  isort: skip  (before mlx: see mlx_vae/blas.py)

import argparse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import numpy as np
from drawn_pictures import draw
from PIL import Image
from train_tiny import FIRST_PICTURE

from mlx_vae import AutoencoderKL
from mlx_vae.images import to_bytes

SIZE = 256
BLOCK = 8
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Every photograph in scikit-image's wheel: what is left without its drawings, scanned pages and microscope slides, and
without the second view of the motorcycle."""


def load_photograph(name: str) -> Image.Image:
    """One of scikit-image's photographs, from its wheel: nothing is downloaded."""
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / name) as picture:
        return picture.convert("RGB")


def square(picture: Image.Image) -> np.ndarray:
    """The middle square, (256, 256, 3) uint8."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    picture = picture.crop((left, top, left + side, top + side))
    return np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))


def psnr(x: np.ndarray, y: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of uint8."""
    return 10 * float(np.log10(255**2 / np.mean((x.astype(np.float64) - y) ** 2)))


def through(vae: AutoencoderKL, picture: np.ndarray) -> np.ndarray:
    """Encoded and decoded: (H, W, 3) uint8 -> the same."""
    x = mx.array(picture[None], dtype=mx.float32) / 127.5 - 1
    return to_bytes(vae(x).sample[0])


def fit_pca(pictures: Iterable[np.ndarray], coefficients: int) -> Callable[[np.ndarray], np.ndarray]:
    """The best linear code of single blocks of `pictures`, each (H, W, 3), with so many coefficients for each block.

    Returns what `through` is for an autoencoder: (H, W, 3) uint8 -> the same.
    """
    count, total, products = 0, np.zeros(3 * BLOCK**2), np.zeros((3 * BLOCK**2, 3 * BLOCK**2))
    for picture in pictures:  # one at a time: the blocks of all of them are large
        blocks = to_blocks(picture) - 128  # near 0, where the covariance below loses no digits
        count, total, products = count + len(blocks), total + blocks.sum(axis=0), products + blocks.T @ blocks
    covariance = products / count - np.outer(total, total) / count**2
    mean = total / count + 128
    basis = np.linalg.eigh(covariance)[1][:, -coefficients:]

    def through_pca(picture: np.ndarray) -> np.ndarray:
        restored = (to_blocks(picture) - mean) @ basis @ basis.T + mean
        return np.clip(np.round(from_blocks(restored, picture.shape)), 0, 255).astype(np.uint8)

    return through_pca


def to_blocks(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (H / 8 * W / 8, 192)."""
    H, W, C = picture.shape
    blocks = picture.reshape(H // BLOCK, BLOCK, W // BLOCK, BLOCK, C).swapaxes(1, 2)
    return blocks.reshape(-1, BLOCK * BLOCK * C).astype(np.float64)


def from_blocks(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(H / 8 * W / 8, 192) -> (H, W, 3)."""
    H, W, C = shape
    return blocks.reshape(H // BLOCK, W // BLOCK, BLOCK, BLOCK, C).swapaxes(1, 2).reshape(shape)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare the embedded model with a PCA.")
    parser.add_argument("--model", default="tiny", help="another model folder (tiny)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="(float32)")
    parser.add_argument("--drawn", type=int, default=64, help="how many drawn pictures (64)")
    parser.add_argument("--fit", type=int, default=400, help="on how many drawn pictures the PCA is fitted (400)")
    arguments = parser.parse_args(argv)

    vae = AutoencoderKL.from_pretrained(arguments.model, dtype=getattr(mx, arguments.dtype))
    numbers = range(FIRST_PICTURE, FIRST_PICTURE + arguments.fit)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        through_pca = fit_pca(processes.map(draw, numbers, chunksize=8), vae.config.latent_channels)
    sets = {
        "drawn pictures": {str(number): draw(number) for number in range(arguments.drawn)},
        "photographs": {Path(name).stem: square(load_photograph(name)) for name in PHOTOGRAPHS},
    }
    print(f"| {arguments.dtype} | {arguments.model} | PCA |\n|---|---|---|")
    for title, pictures in sets.items():
        scores = np.array([(psnr(x, through(vae, x)), psnr(x, through_pca(x))) for x in pictures.values()])
        if title == "photographs":
            for name, (ours, linear) in zip(pictures, scores, strict=True):
                print(f"| {name} | {ours:.2f} | {linear:.2f} |")
        ours, linear = scores.mean(axis=0)
        print(f"| **mean of {len(pictures)} {title}** | **{ours:.2f}** | {linear:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
