"""What an autoencoder keeps of your pictures: a folder of them encoded, decoded and compared.

    python examples/reconstruct.py photos -o reconstructed --model tiny --max-side 512

prints PSNR and SSIM of every picture, and leaves the decoded pictures in the output folder, with `side-by-side.png`:
the first few of them, originals on the left.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import mlx_vae  # isort: skip  (before mlx: see blas.py)

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_vae import cli
from mlx_vae.images import load_image, pad_to_multiple, picture_endings, save_image, to_bytes
from mlx_vae.inputs import find_inputs

SHOWN = 8
SHOWN_SIDE = 384
GAP = 8


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of pictures (H, W, 3) in [-1, 1]."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if error == 0 else 10 * float(np.log10(4 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity (Wang et al., 2004) of pictures (H, W, 3) in [-1, 1]: Gaussian windows of 11x11 pixels and
    sigma 1.5 that lie whole in the picture, the mean over them and over the channels. NaN for smaller pictures."""
    if min(a.shape[:2]) < 11:
        return float("nan")
    a, b = (a.astype(np.float64) + 1) / 2, (b.astype(np.float64) + 1) / 2
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a = _windowed(a * a) - mean_a**2
    var_b = _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float(np.mean(luminance * (2 * covariance + c2) / (var_a + var_b + c2)))


def _windowed(x: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (H - 10, W - 10, C): means under a Gaussian window, along one axis and then the other."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for axis in (0, 1):
        length = x.shape[axis] - 10
        x = sum(w * np.take(x, range(i, i + length), axis) for i, w in enumerate(window))
    return x


def side_by_side(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Pairs of pictures (H, W, 3) in [-1, 1] -> one picture, a pair to a row, shrunk to SHOWN_SIDE, white between."""
    rows = [[_shrunk(picture) for picture in pair] for pair in pairs]
    width = max(left.shape[1] for left, _ in rows)
    height = sum(left.shape[0] + GAP for left, _ in rows) - GAP
    sheet = np.ones((height, 2 * width + GAP, 3), dtype=np.float32)
    top = 0
    for left, right in rows:
        h, w, _ = left.shape
        sheet[top : top + h, :w] = left
        sheet[top : top + h, width + GAP : width + GAP + w] = right
        top += h + GAP
    return sheet


def _shrunk(picture: np.ndarray) -> np.ndarray:
    H, W, _ = picture.shape
    scale = min(1, SHOWN_SIDE / max(H, W))
    size = max(1, round(W * scale)), max(1, round(H * scale))
    channels = [Image.fromarray(channel).resize(size, Image.Resampling.BOX) for channel in np.moveaxis(picture, 2, 0)]
    return np.stack([np.asarray(channel) for channel in channels], axis=2)


def reconstruct(vae: mlx_vae.AutoencoderKL, x: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) in [-1, 1] -> what is left of it, in the 256 levels of a picture file."""
    height, width, _ = x.shape
    padded = mx.array(pad_to_multiple(x, vae.config.factor)[None])
    y = vae.decode(vae.encode(padded).latent_dist.mode()).sample[0, :height, :width]
    return to_bytes(y).astype(np.float32) / 127.5 - 1


def compare(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    inputs = find_inputs(arguments.pictures, picture_endings())
    vae = mlx_vae.AutoencoderKL.from_pretrained(arguments.model, dtype=mx.float32)
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    scores: list[tuple[float, float]] = []
    failures = 0
    print(f"{'PSNR':>8} {'SSIM':>7}  picture")
    for path, name in inputs:
        try:
            picture = load_image(path, max_side=arguments.max_side)
        except ValueError as error:
            cli.notice(f"error: {error}")
            failures += 1
            continue
        decoded = reconstruct(vae, picture.values)
        scores.append((psnr(picture.values, decoded), ssim(picture.values, decoded)))
        print(_row(scores[-1], str(name)), flush=True)
        target = output / name.with_name(f"{name.name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        save_image(target, mx.array(decoded), record={"model": arguments.model, "source": str(name)})
        if len(shown) < SHOWN:
            shown.append((picture.values, decoded))
    if scores:
        print(_row(np.nanmean(scores, axis=0), f"mean of {len(scores)}"))
        save_image(output / "side-by-side.png", mx.array(side_by_side(shown)))
        print(output / "side-by-side.png")
    return 1 if failures else 0


def _row(score: Sequence[float] | np.ndarray, name: str) -> str:
    return f"{score[0]:5.2f} dB {score[1]:7.4f}  {name}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Encode and decode pictures, and say how well they survive it.")
    parser.add_argument("pictures", nargs="+", metavar="INPUT", help="picture files, folders, or globs in quotes")
    parser.add_argument("-o", "--output", default="reconstructed", help="folder for what is made (reconstructed)")
    parser.add_argument("--model", default="tiny", help='"tiny" (the default), or a model folder')
    parser.add_argument("--max-side", type=int, default=512, help="shrink larger pictures first (512)")
    return cli.run(compare, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
