"""`python -m mlx_vae.coreml`: a model as Core ML packages for the Neural Engine, checked before they leave."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_vae import AutoencoderKL, cli, precision
from mlx_vae.coreml.check import Report, check
from mlx_vae.coreml.compress import MODES
from mlx_vae.coreml.export import PRECISIONS, TARGETS, Options, export, refuse
from mlx_vae.coreml.faces import IOS, PACKAGES, PARTS, Face
from mlx_vae.coreml.tools import coremltools

FAILED = 1


def configure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_vae.coreml", description=__doc__)
    parser.add_argument("--model", default="tiny", help="what AutoencoderKL.from_pretrained takes (default: tiny)")
    parser.add_argument("--part", choices=(*PARTS, "both"), default="both")
    parser.add_argument(
        "--io",
        choices=IOS,
        default="tensor",
        help="tensor: for Apple's Swift package StableDiffusion. image: pictures, latents of the diffusion model",
    )
    parser.add_argument(
        "--size",
        action="append",
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="of the picture; several make one package with shared weights (iOS 18, macOS 15). Default: 512x512",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float16")
    parser.add_argument("--no-rescale", action="store_true", help="float16 as it is, even if activations overflow")
    parser.add_argument("--compress", choices=MODES, default="none", help="how weights are stored")
    parser.add_argument("--target", choices=tuple(TARGETS), default="", help="the oldest system to run on")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(),
        help="a folder for VAEDecoder.mlpackage and VAEEncoder.mlpackage, or the name of one .mlpackage",
    )
    parser.add_argument("--license", default="", help="of the model, for the package's metadata")
    parser.add_argument("--no-check", action="store_true", help="write without checking")
    parser.add_argument("--check", type=Path, metavar="PACKAGE", help="check a package against --model; write nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 for a package that failed its check, 2 for bad input."""
    return cli.run(_run, configure_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    coremltools()
    vae = AutoencoderKL.from_pretrained(arguments.model, dtype=mx.float32)
    with tqdm(disable=not sys.stderr.isatty(), bar_format="{desc} ({elapsed})", leave=False) as bar:
        say = bar.set_description
        if arguments.check:
            return _told(check(arguments.check, vae, say))
        parts = PARTS if arguments.part == "both" else (arguments.part,)
        paths = [_path(arguments.output, part) for part in parts]
        if len(set(paths)) < len(paths):
            raise ValueError(f"-o {arguments.output}: one package can't hold both parts; name a folder")
        options = Options(
            tuple(arguments.size or [(512, 512)]),
            arguments.io,
            arguments.precision,
            arguments.compress,
            arguments.target,
            {"source": arguments.model, "license": arguments.license},
        )
        jobs = [(Face(vae, part, options.io), path) for part, path in zip(parts, paths, strict=True)]
        for face, path in jobs:
            refuse(face, path, options)
        if options.precision == "float16" and not arguments.no_rescale and (line := precision.fit(vae)):
            cli.notice(line)
        return max(_told(export(face, path, options, not arguments.no_check, say)) for face, path in jobs)


def _path(output: Path, part: str) -> Path:
    return output if output.suffix == ".mlpackage" else output / PACKAGES[part]


def _told(report: Report) -> int:
    with tqdm.external_write_mode():
        print("\n".join(report.lines))
    return 0 if report.passed else FAILED


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, as in 512x768")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
