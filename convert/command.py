"""python -m mlx_vae.convert: any checkpoint in, a model folder for MLX (or for torch) out."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_vae import cli, precision
from mlx_vae.autoencoder import AutoencoderKL
from mlx_vae.config import FAMILIES, AutoencoderKLConfig
from mlx_vae.convert import hub
from mlx_vae.convert.checkpoint import HUB_ID, WRITTEN_AS, Checkpoint, open_pretrained, save_pretrained
from mlx_vae.convert.families import ANY
from mlx_vae.convert.layouts import PREFIXES
from mlx_vae.convert.tensors import CheckpointError
from mlx_vae.files import making_folder
from mlx_vae.version import __version__


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. `str` of it is what `python -m mlx_vae.convert --inspect` prints.

    dtypes: how many tensors of each. parameters: how many numbers. left_out and foreign: names of other tensors in it.
    """

    path: Path
    layout: str
    family: str | None
    why: str
    config: AutoencoderKLConfig
    dtypes: dict[str, int]
    parameters: int
    left_out: tuple[str, ...]
    foreign: tuple[str, ...]

    def __str__(self) -> str:
        fields = json.dumps(self.config.to_dict(), indent=2)
        return "\n".join(
            (
                f"file            {self.path}",
                f"layout          {self.layout}",
                f"family          {self.family or 'none that is known'}: {self.why}",
                f"parameters      {self.parameters:,}",
                f"dtypes          {', '.join(f'{dtype} ({count} tensors)' for dtype, count in self.dtypes.items())}",
                f"left out        {_summary(self.left_out)}",
                f"foreign         {_summary(self.foreign)}",
                f"groups          {self.config.norm_num_groups}: no tensor shows them; 32 but for another config.json",
                f"configuration   {fields}",
            )
        )


def _summary(names: Sequence[str]) -> str:
    """`model.diffusion_model.* (686), cond_stage_model.* (197)`, or `nothing`."""
    deep = ("model.", *PREFIXES)
    starts = Counter(".".join(name.split(".")[: 1 + name.startswith(deep)]) for name in names)
    return ", ".join(f"{start}.* ({count})" for start, count in starts.items()) or "nothing"


def inspect(
    hf_path: str | os.PathLike[str],
    family: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Inspection:
    """What a checkpoint is, all its tensors accounted for by name; reads no weights.

    The arguments are those of `AutoencoderKL.from_pretrained`. Raises CheckpointError as it does.
    """
    checkpoint = open_pretrained(hf_path, subfolder, revision, variant, family)
    found = checkpoint.parameters
    found.check(AutoencoderKL(checkpoint.config).parameter_shapes())
    return Inspection(
        path=found.path,
        layout=found.layout,
        family=checkpoint.family,
        why=checkpoint.why,
        config=checkpoint.config,
        dtypes=dict(Counter(tensor.dtype for tensor in found.tensors.values())),
        parameters=sum(math.prod(shape) for shape in found.shapes.values()),
        left_out=found.left_out,
        foreign=found.foreign,
    )


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    dtype: mx.Dtype | None = None,
    upload_repo: str | None = None,
    to: str = "mlx",
    family: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    rescale: bool = True,
) -> Path:
    """Writes a checkpoint as a new folder `mlx_path`: config.json, the weights, and for MLX a model card.

    `to` is "mlx", or "diffusers" or "ldm" (vae.safetensors) for torch; `dtype` defaults to the one on disk; the other
    arguments, `rescale` among them, are those of `AutoencoderKL.from_pretrained`. With `upload_repo` the folder is
    uploaded to the hub, too.
    Raises CheckpointError, with nothing written.
    """
    mlx_path = Path(mlx_path)
    if to not in WRITTEN_AS:
        raise CheckpointError(f"{to}: not a layout to write; there are {', '.join(WRITTEN_AS)}")
    if mlx_path.exists():
        raise CheckpointError(f"{mlx_path}: it exists already; remove it, or name another with --mlx-path")
    print(f"[INFO] Loading {hf_path}")
    checkpoint = open_pretrained(hf_path, subfolder, revision, variant, family)
    print(f"[INFO] Layout {checkpoint.parameters.layout}, family {checkpoint.family}: {checkpoint.why}")
    vae = AutoencoderKL.from_checkpoint(checkpoint, dtype, rescale) if to == "mlx" else _restored(checkpoint, dtype)
    with making_folder(mlx_path) as folder:
        save_pretrained(folder, vae.config, vae.named_parameters(), to)
        if to == "mlx":
            (folder / "README.md").write_text(_card(str(hf_path), upload_repo or str(mlx_path), checkpoint))
    print(f"[INFO] Wrote {mlx_path}")
    if upload_repo:
        print(f"[INFO] Uploaded to {hub.upload(upload_repo, mlx_path)}")
    return mlx_path


def _restored(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> AutoencoderKL:
    """The model without `activation_scales`, which no other library knows."""
    if checkpoint.config.activation_scales is None:
        return AutoencoderKL.from_checkpoint(checkpoint, dtype, rescale=False)
    vae = AutoencoderKL.from_checkpoint(checkpoint, mx.float32)
    precision.restore(vae)
    precision.cast(vae, dtype or checkpoint.dtype)
    return vae


def _card(source: str, name: str, checkpoint: Checkpoint) -> str:
    """README.md for the hub."""
    on_hub = HUB_ID.fullmatch(source) and not Path(source).exists()
    base = f"base_model: {source}\n" if on_hub else ""
    return f"""---
library_name: mlx
{base}tags:
- mlx
- mlx-vae
- autoencoder
---

# {name}

The image autoencoder of `{source if on_hub else Path(source).name}`, converted to MLX with mlx-vae {__version__}
(family {checkpoint.family or "unknown"}, {checkpoint.parameters.dtype} weights in the original).

```python
from mlx_vae import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{name}")
```
"""


def configure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_vae.convert", description="Convert an autoencoder's checkpoint.")
    parser.add_argument(
        *("--hf-path", "--model"),
        required=True,
        help="a folder, a file (.safetensors, .sft, .ckpt, .pt, .bin) or a model on the hub; a whole pipeline's, too",
    )
    parser.add_argument("--mlx-path", default="mlx_model", help="the folder to write (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(cli.DTYPES), help="of the weights; the default is the one on disk")
    parser.add_argument("--to", choices=tuple(WRITTEN_AS), default="mlx", help="the layout (default: %(default)s)")
    parser.add_argument(
        "--family", choices=(*FAMILIES, ANY), help="which model's autoencoder it is, if it fits several"
    )
    parser.add_argument("--subfolder", help="the folder of the autoencoder, if it is neither the first nor vae/")
    parser.add_argument("--revision", help="the branch, tag or commit of a model on the hub")
    parser.add_argument("--variant", help='the files of a variant, as "fp16"')
    parser.add_argument("--upload-repo", help="the model on the hub to upload the result to")
    parser.add_argument("--no-rescale", action="store_true", help="to float16 as it is, even if activations overflow")
    parser.add_argument("--inspect", action="store_true", help="say what the checkpoint is, and convert nothing")
    parser.add_argument("--precision", action="store_true", help="with --inspect: how near to overflow float16 comes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_convert, configure_parser().parse_args(argv))


def _convert(arguments: argparse.Namespace) -> None:
    places = {name: getattr(arguments, name) for name in ("family", "subfolder", "revision", "variant")}
    if arguments.inspect:
        print(inspect(arguments.hf_path, **places))
        if arguments.precision:
            print(precision.report(AutoencoderKL.from_pretrained(arguments.hf_path, **places, dtype=mx.float32)))
        return
    dtype = cli.DTYPES[arguments.dtype] if arguments.dtype else None
    convert(
        arguments.hf_path,
        arguments.mlx_path,
        dtype,
        arguments.upload_repo,
        arguments.to,
        **places,
        rescale=not arguments.no_rescale,
    )
