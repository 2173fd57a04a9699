"""Draws how near to float16's largest number each norm of a model comes, before and after `precision.fit`.

    python examples/plot_headroom.py docs/headroom.png --model models/sdxl     # needs matplotlib

Without --model: Stable Diffusion's architecture with random weights, the streams of which are multiplied by 2^14, as
they grow in checkpoints that overflow. It has the function of the model before, and turns black in float16.
"""

from __future__ import annotations

import mlx_vae  # noqa: F401  isort: skip  (before mlx: see mlx_vae/blas.py)

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import mlx.core as mx

from mlx_vae import AutoencoderKL, precision
from mlx_vae.config import FAMILIES
from mlx_vae.files import replacing


def overflowing_model() -> AutoencoderKL:
    mx.random.seed(0)
    vae = AutoencoderKL(FAMILIES["sd"])
    precision.rescale(vae, (2.0**14,) * 4)
    return vae


def plot(report: precision.Report, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    numbers = range(len(report.rows))
    axes.bar(numbers, [row.before for row in report.rows], color="#c44e52", label="as it is")
    axes.plot(numbers, [row.after for row in report.rows], "o", color="#4c72b0", markersize=4, label="rescaled")
    axes.axhline(0, color="black", linewidth=0.8)
    decoder = next(i for i, row in enumerate(report.rows) if row.norm.startswith("decoder."))
    axes.axvline(decoder - 0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xticks([decoder / 2, (decoder + len(report.rows)) / 2], ["the encoder's norms", "the decoder's norms"])
    axes.set_ylabel("bits to float16's largest number")
    axes.legend(loc="center right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Plot the headroom of a model in float16.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="what AutoencoderKL.from_pretrained takes")
    arguments = parser.parse_args(argv)
    vae = AutoencoderKL.from_pretrained(arguments.model, dtype=mx.float32) if arguments.model else overflowing_model()
    plot(precision.report(vae), arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
