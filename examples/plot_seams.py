"""Draws the seams of blended tiles, beside a decode in as little memory that has none.

    python examples/plot_seams.py docs/seams.png                   # needs matplotlib
    python examples/plot_seams.py seams.png --model models/sdxl --latents latents.safetensors

One latent is decoded three times: by diffusers' blended tiles, of the model's sample_size; with the least max_memory
that is accepted; and whole. Below the pictures of the first two is how they differ from the third, amplified, on grey.
Without --latents it is the latent of a drawn picture, three tiles to a side.
"""

from __future__ import annotations

import mlx_vae  # noqa: F401  isort: skip  (before mlx: see mlx_vae/blas.py)

import argparse
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import mlx.core as mx
import numpy as np
from drawn_pictures import draw
from PIL import Image

from mlx_vae import AutoencoderKL, cli, memory
from mlx_vae.files import replacing
from mlx_vae.images import to_bytes
from mlx_vae.latents import load_latents

DRAWN = 6  # of the drawn pictures 0 to 14 the one in the middle, by the largest error of its tiles
AMPLIFIED = 5
LEVELS = 127.5  # of 8 bits, for a difference of 1 between values in [-1, 1]


def drawn_latent(vae: AutoencoderKL) -> mx.array:
    side = 3 * int(np.max(vae.config.sample_size))
    picture = mx.array(draw(DRAWN, side)[None], dtype=mx.float32)
    return vae.encode(picture / 127.5 - 1).latent_dist.mode()


def read_latent(vae: AutoencoderKL, path: str) -> mx.array:
    """The first of a latent file, (1, h, w, C), as the autoencoder takes it; scaled if the file doesn't say."""
    latents = load_latents(path)
    if latents.scaled is False:
        return latents.nhwc(vae.config.latent_channels)[:1]
    return vae.unscale(latents.nhwc(vae.config.diffusion_channels)[:1])


def plot(vae: AutoencoderKL, z: mx.array, path: Path) -> None:
    vae.enable_tiling()
    side = vae.tiling.latent_size * vae.config.factor
    if vae.tiling.covers(*z.shape[1:3]):
        raise ValueError(f"the latent is of a picture that fits into a tile of {side} px: there will be no seam")
    tiled = to_numpy(vae.decode(z).sample)
    vae.disable_tiling()
    least = vae.decode_memory(z.shape).least
    bounded = to_numpy(vae.decode(z, max_memory=least).sample)
    whole = to_numpy(vae._decode(z.astype(vae.dtype)))

    titles = f"enable_tiling(), tiles of {side} px", f'max_memory="{memory.describe(least)}"'
    height, width, _ = whole.shape
    figure, grid = plt.subplots(2, 2, figsize=(9, 0.5 + 9 * height / width), layout="constrained")
    for title, picture, axes in zip(titles, (tiled, bounded), grid.T, strict=True):
        difference = picture - whole
        most = LEVELS * float(np.abs(difference).max())
        error = f"{most:.0f} of 255 levels" if most > 1 else f"{most:.2g} of a level"
        print(f"{title}: the largest difference from the whole decode is {error}")
        axes[0].imshow(to_bytes(mx.array(picture)))
        axes[0].set_title(title)
        axes[1].imshow(to_bytes(mx.array(AMPLIFIED * difference)))
        axes[1].set_title(f"its error x{AMPLIFIED}; the largest is {error}")
        for each in axes:
            each.set_axis_off()
    save(figure, path)
    plt.close(figure)


def to_numpy(pictures: mx.array) -> np.ndarray:
    return np.array(pictures[0].astype(mx.float32))


def save(figure: plt.Figure, path: Path) -> None:
    """As a PNG of 256 colours, a third of the size."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with Image.open(buffer) as picture, replacing(path) as temporary:
        picture.convert("RGB").quantize(256).save(temporary, optimize=True)


def run(arguments: argparse.Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(arguments.model, dtype=mx.float32)
    plot(vae, read_latent(vae, arguments.latents) if arguments.latents else drawn_latent(vae), arguments.output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plot the seams of blended tiles, beside an exact decode.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="tiny", help="what AutoencoderKL.from_pretrained takes (tiny)")
    parser.add_argument("--latents", metavar="FILE", help="a latent file, of a picture that is larger than a tile")
    return cli.run(run, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
