"""Makes what shows the embedded model at work: the latent that `make demo` decodes, and the picture in the README.

    python examples/make_demo.py          # needs scikit-image, for its photograph

The photograph is NASA's portrait of Eileen Collins, in the public domain.
"""

from __future__ import annotations

import mlx_vae  # noqa: F401  isort: skip  (before mlx: see mlx_vae/blas.py)

from pathlib import Path

import mlx.core as mx
import numpy as np
from evaluate_tiny import load_photograph, through
from PIL import Image, ImageDraw, ImageFont

from mlx_vae import AutoencoderKL
from mlx_vae.files import replacing
from mlx_vae.latents import Latents, save_latents

ROOT = Path(__file__).resolve().parents[1]
LATENT = ROOT / "examples" / "data" / "astronaut.safetensors"
COMPARISON = ROOT / "docs" / "reconstruction.png"
SIZE = (512, 384)  # width and height; not square, so that no one confuses them
SHOWN = (64, 0, 416, 288)  # the part in the comparison, pixel for pixel: left, top, right, bottom
MARGIN, CAPTION = 8, 28


def main() -> int:
    vae = AutoencoderKL.from_pretrained("tiny", dtype=mx.float32)
    width, height = SIZE
    photograph = np.asarray(load_photograph("astronaut.png").crop((0, 0, width, height)))

    z = vae.encode(mx.array(photograph[None], dtype=mx.float32) / 127.5 - 1).latent_dist.mode()
    LATENT.parent.mkdir(exist_ok=True)
    values = vae.scale(z).astype(mx.float16)
    save_latents(LATENT, Latents(values, model="tiny", family="", scaled=True, height=height, width=width))

    left, top, right, bottom = SHOWN
    captions = ("original", f"decoded from {z.shape[-1]} numbers for every 8x8 pixels")
    sheet = Image.new("RGB", (2 * (right - left) + 3 * MARGIN, bottom - top + CAPTION + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip((photograph, through(vae, photograph)), captions, strict=True)):
        x = MARGIN + i * (right - left + MARGIN)
        sheet.paste(Image.fromarray(picture).crop(SHOWN), (x, CAPTION))
        pen.text((x, 6), caption, fill="black", font=ImageFont.load_default(size=15))
    COMPARISON.parent.mkdir(exist_ok=True)
    with replacing(COMPARISON) as path:
        sheet.save(path, optimize=True)
    print(LATENT, COMPARISON, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
