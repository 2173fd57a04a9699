"""python -m mlx_vae.decode: latents in, pictures out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_vae import cli
from mlx_vae.autoencoder import AutoencoderKL
from mlx_vae.images import check_image_path, save_image
from mlx_vae.latents import Latents, load_latents


def decode_files(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | None = None,
    scaled: bool | None = None,
    layout: str | None = None,
    dtype: mx.Dtype = mx.float32,
    tile: bool = False,
) -> list[Path]:
    """Decodes latent files and returns the paths of the pictures, one for each latent of each file.

    `output` is a picture file, numbered where there are several pictures, or a folder (it exists, or ends in a slash),
    where each picture is called after its latent file. What a file says of its model and scaling holds unless `model`
    and `scaled` say otherwise; a file that says nothing of its scaling is taken as scaled, with a notice. `layout` is
    that of files that don't say ("nchw" or "nhwc").

    Raises ValueError for a user's mistake, before anything is written.
    """
    into_folder = Path(output).is_dir() or os.fspath(output).endswith("/")
    if not into_folder:
        check_image_path(output)
    models: dict[str, AutoencoderKL] = {}
    pictures: list[tuple[AutoencoderKL, Latents, mx.array]] = []
    counts = []
    for source in sources:
        latents = load_latents(source)
        name = model or latents.model
        if name is None:
            raise ValueError(f"{source}: does not say which model made it; name one with --model")
        if name not in models:
            models[name] = AutoencoderKL.from_pretrained(name, dtype=dtype)
            if tile:
                models[name].enable_tiling()
        vae = models[name]
        try:
            z = latents.nhwc(vae.config.latent_channels, layout)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if scaled is None and latents.scaled is None:
            cli.notice(f"{source}: does not say whether it is scaled; taken as scaled (if it is not: --unscaled)")
        if latents.scaled is not False if scaled is None else scaled:
            z = vae.unscale(z.astype(mx.float32))
        pictures += [(vae, latents, z[i : i + 1]) for i in range(z.shape[0])]
        counts.append(z.shape[0])

    output = Path(output)
    targets = _in_folder(output, sources, counts) if into_folder else _numbered(output, sum(counts))
    for (vae, latents, z), target in zip(tqdm(pictures, unit="picture", disable=None), targets, strict=True):
        x = vae.decode(z).sample[0]
        save_image(target, x[: latents.height, : latents.width])
    return targets


def _in_folder(folder: Path, sources: Sequence[str | os.PathLike[str]], counts: Sequence[int]) -> list[Path]:
    """A .png for each picture, called after its latent file; makes the folder. Raises ValueError for doubled names."""
    stems = [Path(source).stem for source in sources]
    for stem in stems:
        if stems.count(stem) > 1:
            raise ValueError(f"{folder / stem}.png: several latent files of that name would be written to it")
    folder.mkdir(parents=True, exist_ok=True)
    return [
        target for stem, count in zip(stems, counts, strict=True) for target in _numbered(folder / f"{stem}.png", count)
    ]


def _numbered(path: Path, count: int) -> list[Path]:
    """out.png for one picture; out-01.png to out-12.png for twelve."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:0{len(str(count))}}{path.suffix}") for i in range(1, count + 1)]


def configure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_vae.decode", description="Decode latents into pictures.")
    parser.add_argument("latents", nargs="+", help="latent files: .safetensors, .npy or .npz")
    parser.add_argument(
        "-o", "--output", required=True, help="a picture file, numbered if there are several, or a folder"
    )
    parser.add_argument("--model", help='"tiny", or a model folder; the default is what the latent file says')
    scaling = parser.add_mutually_exclusive_group()
    scaling.add_argument("--scaled", action="store_true", default=None, help="latents of a diffusion model")
    scaling.add_argument("--unscaled", dest="scaled", action="store_false", help="latents as the encoder gives them")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), help="axis order of files that do not say theirs")
    parser.add_argument("--dtype", choices=tuple(cli.DTYPES), default="float32")
    parser.add_argument("--tile", action="store_true", help="decode by blended tiles: less memory, approximate")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_decode, configure_parser().parse_args(argv))


def _decode(arguments: argparse.Namespace) -> None:
    pictures = decode_files(
        arguments.latents,
        arguments.output,
        arguments.model,
        arguments.scaled,
        arguments.layout,
        cli.DTYPES[arguments.dtype],
        arguments.tile,
    )
    for picture in pictures:
        print(picture)


if __name__ == "__main__":
    raise SystemExit(main())
