"""An autoencoder inside a diffusion pipeline, in one page: image to image, in MLX.

    python examples/pipeline.py photo.jpg --style style.jpg -o out.png --strength 0.6

Everything that a pipeline does with its autoencoder is here: a picture becomes latents (`encode`), those become the
diffusion model's (`scale`), noise is added and taken away again step by step, and the result goes back (`unscale`,
`decode`). `encode` and `decode` never scale by themselves, so a pipeline does it exactly once each way.

The diffusion model is the part to replace. To need no download it is the exact one for a world that is made of the
patches of a single picture: of all denoisers, the mean of those patches, each weighted by how likely the noisy one is
to come from it, has the least error (Karras et al., 2022, equation 57). The photo is painted with pieces of `--style`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import mlx_vae  # isort: skip  (before mlx: see blas.py)

import mlx.core as mx

from mlx_vae import cli
from mlx_vae.images import check_image_path, load_image, pad_to_multiple, save_image

PATCH = 3
SIGMA_MAX, SIGMA_MIN, RHO = 10.0, 0.03, 7.0

Denoiser = Callable[[mx.array, float], mx.array]
"""f(noisy latents (1, h, w, C), sigma) -> the latents that they are likely to come from."""


def patches(z: mx.array) -> mx.array:
    """(1, h, w, C) -> (h * w, PATCH * PATCH * C): the neighbourhood of every pixel, edges repeated."""
    _, h, w, C = z.shape
    r = PATCH // 2
    z = mx.pad(z, [(0, 0), (r, r), (r, r), (0, 0)], mode="edge")
    taps = [z[0, i : i + h, j : j + w] for i in range(PATCH) for j in range(PATCH)]
    return mx.stack(taps, axis=2).reshape(h * w, PATCH * PATCH * C)


def patch_denoiser(style: mx.array) -> Denoiser:
    """The denoiser of a world that is made of the patches of `style`, scaled latents (1, h, w, C)."""
    keys = patches(style)
    values = style.reshape(-1, style.shape[-1])  # the pixel in the middle of each patch
    norms = mx.sum(keys * keys, axis=1)

    def denoise(z: mx.array, sigma: float) -> mx.array:
        distances = norms - 2 * patches(z) @ keys.T  # but for a term that is the same for all keys
        return (mx.softmax(-distances / (2 * sigma**2), axis=1) @ values).reshape(z.shape)

    return denoise


def schedule(steps: int, strength: float) -> list[float]:
    """The noise levels from `strength` (0: none, 1: all) down to 0, spaced as in Karras et al., 2022, equation 5."""
    high, low = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    start = low + strength * (high - low)
    return [(start + i / max(1, steps - 1) * (low - start)) ** RHO for i in range(steps)] + [0.0]


def diffuse(z: mx.array, denoise: Denoiser, sigmas: Sequence[float], key: mx.array) -> mx.array:
    """Adds noise of level sigmas[0] to z and follows the probability flow back, by Euler's method."""
    z = z + sigmas[0] * mx.random.normal(z.shape, key=key)
    for sigma, following in itertools.pairwise(sigmas):
        slope = (z - denoise(z, sigma)) / sigma
        z = z + (following - sigma) * slope
        mx.eval(z)
    return z


def to_latents(vae: mlx_vae.AutoencoderKL, x: mx.array) -> mx.array:
    """Pictures (1, H, W, 3) in [-1, 1] -> latents of the diffusion model (1, h, w, C)."""
    return vae.scale(vae.encode(x).latent_dist.mode())


def to_pictures(vae: mlx_vae.AutoencoderKL, z: mx.array) -> mx.array:
    """Latents of the diffusion model (1, h, w, C) -> pictures (1, H, W, 3) in [-1, 1]."""
    return vae.decode(vae.unscale(z)).sample


def image_to_image(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.strength <= 1 or arguments.steps < 1:
        raise ValueError("--strength is from 0 to 1, --steps 1 or more")
    check_image_path(arguments.output)
    photo, style = (load_image(path, max_side=arguments.max_side).values for path in (arguments.photo, arguments.style))
    vae = mlx_vae.AutoencoderKL.from_pretrained(arguments.model, dtype=mx.float32)
    latents = [to_latents(vae, mx.array(pad_to_multiple(x, vae.config.factor)[None])) for x in (photo, style)]
    denoise = patch_denoiser(latents[1])
    z = diffuse(latents[0], denoise, schedule(arguments.steps, arguments.strength), mx.random.key(arguments.seed))
    height, width, _ = photo.shape
    record = {"model": arguments.model, "source": arguments.photo}
    save_image(arguments.output, to_pictures(vae, z)[0, :height, :width], record=record)
    print(arguments.output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Paint a photo with the pieces of another picture, by diffusion.")
    parser.add_argument("photo")
    parser.add_argument("--style", required=True, help="the picture whose pieces the result is made of")
    parser.add_argument("-o", "--output", default="out.png", help="the picture to write (out.png)")
    parser.add_argument("--model", default="tiny", help='"tiny" (the default), or a model folder')
    parser.add_argument("--strength", type=float, default=0.6, help="how much noise, from 0 to 1 (0.6)")
    parser.add_argument("--steps", type=int, default=30, help="of the diffusion (30)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--max-side", type=int, default=512, help="shrink larger pictures first (512)")
    return cli.run(image_to_image, parser.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
