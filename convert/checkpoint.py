"""Checkpoints: where the files are, which configuration they have, and writing them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx

from mlx_vae.config import AutoencoderKLConfig
from mlx_vae.convert import families, hub
from mlx_vae.convert.layouts import DIFFUSERS, FLUX2, LDM
from mlx_vae.convert.pickles import read_pickle
from mlx_vae.convert.safetensors import read_safetensors
from mlx_vae.convert.tensors import CheckpointError, TensorView
from mlx_vae.convert.weights import Parameters, parameters, to_torch
from mlx_vae.files import replacing

CONFIG_NAME = "config.json"
WRITTEN_AS = {"mlx": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors", "ldm": "vae.safetensors"}
"""The layouts that we write, and the name of the weights' file in each."""

WEIGHTS_NAMES = (
    "model.safetensors",
    "diffusion_pytorch_model{variant}.safetensors",
    "diffusion_pytorch_model.safetensors.index{variant}.json",
    "diffusion_pytorch_model{variant}.bin",
    "diffusion_pytorch_model.bin.index{variant}.json",
    "vae.safetensors",
)
"""The weights in a folder, the first of these that is there. A variant is as ".fp16"."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Checkpoint:
    """A configuration, how it is known, and the parameters on disk.

    family: the known one that it belongs to, or None. why: what decided on the configuration.
    """

    config: AutoencoderKLConfig
    family: str | None
    why: str
    parameters: Parameters

    def weights(self, shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """The parameters named in `shapes`, all and no others. Raises CheckpointError that names every difference."""
        return self.parameters.read(shapes, dtype)


def open_pretrained(
    source: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    family: str | None = None,
) -> Checkpoint:
    """Finds the configuration and the weights of "tiny", a folder, a single file or a model on the hub.

    A folder, here or on the hub, is a VAE's own or a whole pipeline's, with `vae/`. `variant` is as "fp16".
    Raises CheckpointError.
    """
    path = Path(str(resources.files("mlx_vae") / "tiny")) if source == "tiny" else Path(source)
    if path.exists() and revision is not None:
        raise CheckpointError(f"{path}: a revision is for models on the hub, and this is here")
    if path.is_file():
        if subfolder or variant:
            raise CheckpointError(f"{path}: a subfolder or a variant is for folders, and this is a file")
        return open_single_file(path, family)
    if path.is_dir():
        places = [path / place for place in _places(subfolder) if (path / place).is_dir()]
        names = [file.relative_to(path).as_posix() for place in places for file in place.iterdir() if file.is_file()]
        return _open_files(path, *_find(str(path), names, subfolder, variant), family)
    if not HUB_ID.fullmatch(str(source)):
        raise CheckpointError(f"{source}: no such folder or file, nor the name of a model on the hub")
    return _open_from_hub(str(source), subfolder, revision, variant, family)


def open_single_file(path: str | os.PathLike[str], family: str | None = None) -> Checkpoint:
    """A file of weights: an autoencoder's own, or a whole diffusion model's. A config.json beside it counts.

    Raises CheckpointError, for a file that fits several families with their names.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    beside = path.with_name(CONFIG_NAME)
    return _open(path, _read(path), beside if beside.is_file() else None, family)


def save_pretrained(
    folder: str | os.PathLike[str],
    config: AutoencoderKLConfig,
    weights: Mapping[str, mx.array],
    layout: str = "mlx",
) -> None:
    """Writes `config.json` and the weights: layout "mlx", "diffusers" or "ldm", the latter two for torch."""
    if layout == "mlx":
        tensors = dict(weights)
    elif layout == "diffusers":
        tensors = to_torch(weights, DIFFUSERS, attention_axes=2)
    else:
        tensors = to_torch(weights, FLUX2 if config.patch_size else LDM, attention_axes=4)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WRITTEN_AS[layout]) as path:
        mx.save_safetensors(str(path), tensors, metadata={"format": "mlx" if layout == "mlx" else "pt"})
    with replacing(folder / CONFIG_NAME) as path:
        path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def _places(subfolder: str | None) -> list[str]:
    """Where in a folder an autoencoder may be, the first first."""
    return [subfolder] if subfolder else ["", "vae"]


def _find(where: str, names: Collection[str], subfolder: str | None, variant: str | None) -> tuple[str, str]:
    """The configuration and the weights (or their index) among the files of a folder."""
    for place in map(PurePosixPath, _places(subfolder)):
        if str(place / CONFIG_NAME) not in names:
            continue
        for name in WEIGHTS_NAMES:
            if variant is None or "{variant}" in name:
                weights = str(place / name.format(variant=f".{variant}" if variant else ""))
                if weights in names:
                    return str(place / CONFIG_NAME), weights
        here = [PurePosixPath(name).name for name in names if PurePosixPath(name).parent == place]
        found = {match[1] for name in here if (match := re.search(r"\.(\w+)\.(?:safetensors|bin|json)$", name))}
        variants = sorted(found - {"index", "safetensors"})
        hint = f"; there are the variants {', '.join(variants)}" if variants else ""
        raise CheckpointError(f"{where}: no weights{f' of the variant {variant}' if variant else ''} in {place}/{hint}")
    files = sorted(name for name in names if name.endswith((".safetensors", ".sft", ".ckpt", ".pt", ".bin")))
    hint = f"; from_single_file, or the path of the file itself, is for {', '.join(files[:3])}" if files else ""
    raise CheckpointError(f"{where}: no {CONFIG_NAME} in {subfolder or 'it or in its vae'}/{hint}")


def _open_from_hub(
    repo_id: str, subfolder: str | None, revision: str | None, variant: str | None, family: str | None
) -> Checkpoint:
    known = tuple(str(PurePosixPath(place) / CONFIG_NAME) for place in _places(subfolder))
    names = hub.list_files(repo_id, revision, known)
    config, weights = _find(repo_id, names, subfolder, variant)
    folder = hub.download(repo_id, revision, [config, weights])
    if weights.endswith(".json"):
        shards = {str(PurePosixPath(weights).parent / name) for name in _shards(folder / weights).values()}
        hub.download(repo_id, revision, [config, weights, *sorted(shards)])
    return _open_files(folder, config, weights, family)


def _open_files(folder: Path, config: str, weights: str, family: str | None) -> Checkpoint:
    path = folder / weights
    return _open(path, _read_shards(path) if path.suffix == ".json" else _read(path), folder / config, family)


def _read(path: Path) -> tuple[dict[str, TensorView], dict[str, str]]:
    """The tensors and the metadata of a file, whatever its name ends in."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a pointer of Git LFS, not the file; fetch it with `git lfs pull`")
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path}: a tar file as PyTorch 0.1 wrote; load and save it with a PyTorch of today")
    if head[8:9] != b"{" and head.startswith((b"PK\3\4", b"\x80")):  # the length of a safetensors header may begin so
        return read_pickle(path), {}
    return read_safetensors(path)


def _read_shards(index: Path) -> tuple[dict[str, TensorView], dict[str, str]]:
    tensors: dict[str, TensorView] = {}
    shards = _shards(index)
    paths = [index.with_name(shard) for shard in sorted(set(shards.values()))]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{index}: {path.name} is not beside it")
    for path in paths:
        found, _ = _read(path)
        for name in found:
            if shards.get(name) != path.name:
                raise CheckpointError(f"{path}: {name} is not there according to {index.name}")
        tensors |= found
    for name, shard in shards.items():
        if name not in tensors:
            raise CheckpointError(f"{index}: {name} is not in {shard}")
    return tensors, {}


def _shards(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(
        isinstance(shard, str) and shard == PurePosixPath(shard).name and shard.strip(".") for shard in shards.values()
    ):
        raise CheckpointError(f"{index}: no weight_map from tensors to files beside it")
    return shards


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: a JSON object was wanted")
    return fields


def _open(
    path: Path,
    contents: tuple[dict[str, TensorView], dict[str, str]],
    config_path: Path | None,
    family: str | None,
) -> Checkpoint:
    families.check(family)
    tensors, metadata = contents
    found = parameters(path, tensors, is_mlx=metadata.get("format") == "mlx")
    if config_path is not None:
        config = families.configured(config_path, _read_json(config_path), len(found.tensors), family)
        why = f"{config_path} says so"
    else:
        config, why = families.detected(path, tensors, found.shapes, family)
    return Checkpoint(config, families.family_of(config), why, found)
