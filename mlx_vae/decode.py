"""python -m mlx_vae.decode: latents in, pictures out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_vae import cli, memory
from mlx_vae.autoencoder import AutoencoderKL
from mlx_vae.config import FAMILIES
from mlx_vae.convert.families import ANY
from mlx_vae.images import check_image_path, save_image
from mlx_vae.inputs import Input, find_inputs
from mlx_vae.latents import ENDINGS, Latents, load_latents

PROGRESS = "{percentage:3.0f}%|{bar}| {n:.1f} of {total} pictures [{elapsed}<{remaining}]"
FORMATS = ("png", "jpg", "webp", "tiff")


def decode_files(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | None = None,
    scaled: bool | None = None,
    layout: str | None = None,
    dtype: mx.Dtype = mx.float32,
    tile: bool = False,
    format: str = "png",
    bits: int = 8,
    quality: int = 95,
    lossless: bool = False,
    family: str | None = None,
    max_memory: str | int | None = None,
) -> list[Path]:
    """Decodes latent files, and those in folders, and returns the paths of the pictures, one for each latent of a file.

    `output` is a picture file, numbered where there are several pictures, or a folder (it exists, or ends in a slash),
    where each picture is called after its latent file, lies as deep as it did, and is of kind `format` ("png"). `bits`
    (8, or 16 for PNG), `quality` (1 to 100) and `lossless` are those of `images.save_image`.

    What a file says of its model and scaling holds unless `model` (with `family`, as `from_pretrained` takes them) and
    `scaled` say otherwise; a file that says nothing of its scaling is taken as scaled, with a notice. `layout` is that
    of files that don't say ("nchw" or "nhwc"). `tile` and `max_memory` ("4GB") are for large pictures: blended tiles,
    and exact slabs, as `AutoencoderKL.enable_tiling` and `AutoencoderKL.decode` have them.

    Raises ValueError for a user's mistake, before anything is written.
    """
    into_folder = Path(output).is_dir() or os.fspath(output).endswith("/")
    check_image_path(f"a.{format}" if into_folder else output, bits)
    if not 1 <= quality <= 100:
        raise ValueError(f"a quality of {quality}; wanted 1 to 100")
    if tile and max_memory is not None:
        raise ValueError("tile and max_memory exclude each other: tiles are approximate, max_memory is exact")
    limit = None if max_memory is None else memory.parse(max_memory)
    inputs = find_inputs(sources, ENDINGS)
    models: dict[tuple[str, str | None], AutoencoderKL] = {}
    pictures: list[tuple[AutoencoderKL, dict[str, str], Latents, mx.array]] = []
    counts = []
    for source, _ in inputs:
        latents = load_latents(source)
        name = model or latents.model
        if name is None:
            raise ValueError(f"{source}: does not say which model made it; name one with --model")
        place = name, family or (latents.family if model is None else None)
        if place not in models:
            models[place] = AutoencoderKL.from_pretrained(name, family=place[1], dtype=dtype)
            if tile:
                models[place].enable_tiling()
        vae = models[place]
        is_scaled = latents.scaled is not False if scaled is None else scaled
        channels = vae.config.diffusion_channels if is_scaled else vae.config.latent_channels
        try:
            z = latents.nhwc(channels, layout)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        if scaled is None and latents.scaled is None:
            cli.notice(f"{source}: does not say whether it is scaled; taken as scaled (if it is not: --unscaled)")
        if is_scaled:
            z = vae.unscale(z.astype(mx.float32))
        try:
            memory.plan(vae.decoder, (1, *z.shape[1:]), vae.dtype.size, limit)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        record = {"model": name, "source": latents.record.get("source", source.name)}
        pictures += [(vae, record, latents, z[i : i + 1]) for i in range(z.shape[0])]
        counts.append(z.shape[0])

    output = Path(output)
    targets = _in_folder(output, inputs, counts, format) if into_folder else _numbered(output, sum(counts))
    with tqdm(total=len(pictures), bar_format=PROGRESS, disable=None) as bar:
        for done, ((vae, record, latents, z), target) in enumerate(zip(pictures, targets, strict=True), start=1):
            show = partial(_show, bar, done - 1)
            x = vae.decode(z, max_memory=limit, progress=show).sample[0][: latents.height, : latents.width]
            target.parent.mkdir(parents=True, exist_ok=True)
            save_image(target, x, bits, quality, lossless, record)
            show(1.0)
    return targets


def _show(bar: tqdm, done: int, share: float) -> None:
    """So many pictures, and a share of the next."""
    bar.update(done + share - bar.n)


def _in_folder(folder: Path, inputs: Sequence[Input], counts: Sequence[int], format: str) -> list[Path]:
    """A picture file for each picture, called after its latent file. Raises ValueError for doubled names."""
    taken: set[str] = set()
    targets = []
    for (_, name), count in zip(inputs, counts, strict=True):
        name = name.with_suffix(f".{format}")
        if str(name).casefold() in taken:
            raise ValueError(f"{folder / name}: several latent files of that name would be written to it")
        taken.add(str(name).casefold())
        targets += _numbered(folder / name, count)
    return targets


def _numbered(path: Path, count: int) -> list[Path]:
    """out.png for one picture; out-01.png to out-12.png for twelve."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i:0{len(str(count))}}{path.suffix}") for i in range(1, count + 1)]


def configure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_vae.decode", description="Decode latents into pictures.")
    parser.add_argument(
        "latents", nargs="+", metavar="LATENTS", help=f"latent files ({', '.join(ENDINGS)}) or folders of them"
    )
    parser.add_argument(
        "-o", "--output", required=True, help="a picture file, numbered if there are several, or a folder"
    )
    parser.add_argument(
        "--model", help='"tiny", a model folder or file, or one on the hub; the latent file\'s own if not given'
    )
    parser.add_argument(
        "--family", choices=(*FAMILIES, ANY), help="which model's autoencoder it is, if it fits several"
    )
    scaling = parser.add_mutually_exclusive_group()
    scaling.add_argument("--scaled", action="store_true", default=None, help="latents of a diffusion model")
    scaling.add_argument("--unscaled", dest="scaled", action="store_false", help="latents as the encoder gives them")
    parser.add_argument("--layout", choices=("nchw", "nhwc"), help="axis order of files that do not say theirs")
    parser.add_argument("--dtype", choices=tuple(cli.DTYPES), default="float32")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--max-memory", metavar="SIZE", help="such as 4GB, besides the weights: slower at worst, exact")
    memory.add_argument("--tile", action="store_true", help="decode by blended tiles: less memory, approximate")
    parser.add_argument("--format", choices=FORMATS, default="png", help="kind of the pictures in a folder (png)")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=8, help="bits a channel; 16 for .png (8)")
    parser.add_argument("--quality", type=int, default=95, metavar="1-100", help="of .jpg and .webp (95)")
    parser.add_argument("--lossless", action="store_true", help="write .webp without loss")
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
        arguments.format,
        arguments.bits,
        arguments.quality,
        arguments.lossless,
        arguments.family,
        arguments.max_memory,
    )
    for picture in pictures:
        print(picture)


if __name__ == "__main__":
    raise SystemExit(main())
