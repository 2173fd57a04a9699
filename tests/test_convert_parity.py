"""Checkpoints written by torch and diffusers, and ours read by them: the same function on both sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import FLUX1, FLUX2, LAYOUTS, LEVEL_ATTENTION, PLAIN, checkpoint_of, weights_of
from models import random_images, random_latents, relative_error
from reference import from_torch, to_torch
from safetensors.torch import save_file
from writers import Tensors, as_torch, write_config

from mlx_vae import AutoencoderKL, AutoencoderKLConfig
from mlx_vae.config import FAMILIES
from mlx_vae.convert import CheckpointError, convert

pytestmark = pytest.mark.parity


def reference_of(config: AutoencoderKLConfig) -> torch.nn.Module:
    """diffusers' model with the parameters of `weights_of(config)`."""
    lacks = ("_class_name", "force_upcast") if config.patch_size else ("_class_name",)
    fields = {name: value for name, value in config.to_dict().items() if name not in lacks}
    reference = getattr(diffusers, config.class_name)(**fields).eval()
    weights = {name: torch.from_numpy(value) for name, value in as_torch(weights_of(config)).items()}
    missing, unexpected = reference.load_state_dict(weights, strict=False)
    assert set(missing) <= {"bn.num_batches_tracked"}
    assert not unexpected
    return reference


@torch.no_grad()
def assert_same_function(vae: AutoencoderKL, reference: torch.nn.Module, limit: float = 1e-5) -> None:
    config = vae.config
    z = random_latents((2, 5, 3, config.latent_channels))
    x = random_images((1, 3 * config.factor, 4 * config.factor, 3))
    assert relative_error(vae.decode(z).sample, from_torch(reference.decode(to_torch(z)).sample)) < limit
    ours, theirs = vae.encode(x).latent_dist, reference.encode(to_torch(x)).latent_dist
    assert relative_error(ours.mean, from_torch(theirs.mean)) < limit
    assert relative_error(ours.logvar, from_torch(theirs.logvar)) < limit


def as_tensors(tensors: Tensors, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    made = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


def save_parameters(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save({name: torch.nn.Parameter(value, value.is_floating_point()) for name, value in tensors.items()}, path)


def save_channels_last(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Strided tensors, some of them views of one storage."""
    kinds = {4: lambda x: x.to(memory_format=torch.channels_last), 1: lambda x: torch.cat([x, x])[x.numel() :]}
    torch.save({name: kinds.get(value.ndim, lambda x: x)(value) for name, value in tensors.items()}, path)


WRITERS: dict[str, Callable[[Path, dict[str, torch.Tensor]], None]] = {
    "vae.safetensors": lambda path, tensors: save_file(tensors, path),
    "vae.sft": lambda path, tensors: save_file(tensors, path, metadata={"format": "pt"}),
    "vae.bin": lambda path, tensors: torch.save(tensors, path),
    "vae.ckpt": lambda path, tensors: torch.save({"state_dict": tensors, "epoch": 3, "lr": 1e-4}, path),
    "parameters.pt": save_parameters,
    "strided.pt": save_channels_last,
    "protocol 4.pt": lambda path, tensors: torch.save(tensors, path, pickle_protocol=4),
    "legacy.pt": lambda path, tensors: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "legacy.ckpt": lambda path, tensors: torch.save(
        {"state_dict": tensors}, path, _use_new_zipfile_serialization=False
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_file(layout: str, tmp_path: Path) -> None:
    config, *spelling = LAYOUTS[layout]
    write_config(tmp_path / "config.json", config)
    tensors = as_tensors(checkpoint_of(config, *spelling))
    reference = reference_of(config)
    for file, write in WRITERS.items():
        write(tmp_path / file, tensors)
        assert_same_function(AutoencoderKL.from_single_file(tmp_path / file), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype: torch.dtype, tmp_path: Path) -> None:
    write_config(tmp_path / "config.json", PLAIN)
    tensors = as_tensors(checkpoint_of(PLAIN, "ldm"), dtype)
    reference = reference_of(PLAIN).to(dtype).float()
    for file, write in WRITERS.items():
        write(tmp_path / file, tensors)
        vae = AutoencoderKL.from_single_file(tmp_path / file, dtype=mx.float32)
        assert_same_function(vae, reference)
        assert AutoencoderKL.from_single_file(tmp_path / file).dtype == getattr(mx, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("config", [PLAIN, FLUX1, FLUX2, LEVEL_ATTENTION], ids=["plain", "flux", "flux2", "attention"])
def test_folders_that_diffusers_writes(config: AutoencoderKLConfig, tmp_path: Path) -> None:
    reference = reference_of(config)
    reference.save_pretrained(tmp_path / "whole")
    reference.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    reference.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    reference.save_pretrained(tmp_path / "variant", variant="fp16", max_shard_size="5KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for folder, variant in (("whole", None), ("shards", None), ("pickle", None), ("variant", "fp16")):
        assert_same_function(AutoencoderKL.from_pretrained(tmp_path / folder, variant=variant), reference)


@pytest.mark.parametrize("config", [PLAIN, FLUX1, FLUX2, LEVEL_ATTENTION], ids=["plain", "flux", "flux2", "attention"])
def test_diffusers_loads_what_we_write(config: AutoencoderKLConfig, tmp_path: Path) -> None:
    reference = reference_of(config)
    reference.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "mlx")
    convert(tmp_path / "mlx", tmp_path / "diffusers", to="diffusers")
    convert(tmp_path / "mlx", tmp_path / "ldm", to="ldm")
    model_class = getattr(diffusers, config.class_name)
    loaded = [model_class.from_pretrained(tmp_path / "diffusers", low_cpu_mem_usage=False)]
    if config in (PLAIN, FLUX1):  # diffusers reads neither FLUX.2's layout nor attention within a level
        path = str(tmp_path / "ldm" / "vae.safetensors")
        loaded.append(model_class.from_single_file(path, config=str(tmp_path / "ldm"), local_files_only=True))
    for model in loaded:
        state = model.state_dict()
        for name, value in reference.state_dict().items():
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("name", FAMILIES)
def test_families_have_the_tensors_of_diffusers(name: str) -> None:
    config = FAMILIES[name]
    fields = {
        key: value for key, value in config.to_dict().items() if config.patch_size is None or key != "force_upcast"
    }
    with torch.device("meta"):
        reference = getattr(diffusers, config.class_name).from_config(fields)
    theirs = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    theirs.pop("bn.num_batches_tracked", None)
    ours = {
        key: tuple(value.shape[axis] for axis in (0, 3, 1, 2)) if value.ndim == 4 else tuple(value.shape)
        for key, value in AutoencoderKL(config).named_parameters().items()
    }
    assert ours == theirs
    for key, value in fields.items():
        if key != "_class_name":
            theirs_value = reference.config[key]
            assert value == (list(theirs_value) if isinstance(theirs_value, tuple) else theirs_value), key


@torch.no_grad()
def test_flux2_latents(tmp_path: Path) -> None:
    """As the FLUX.2 pipeline scales them: patches into channels, then the batch norm's statistics; and back."""
    reference = reference_of(FLUX2)
    write_config(tmp_path / "config.json", FLUX2)
    save_file(as_tensors(checkpoint_of(FLUX2, "flux2")), tmp_path / "ae.safetensors")
    vae = AutoencoderKL.from_single_file(tmp_path / "ae.safetensors")
    z = random_latents((2, 6, 10, FLUX2.latent_channels))
    mean = reference.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(reference.bn.running_var.view(1, -1, 1, 1) + reference.config.batch_norm_eps)
    scaled = (torch.nn.functional.pixel_unshuffle(to_torch(z), 2) - mean) / std
    assert vae.scale(z).shape == (2, 3, 5, 4 * FLUX2.latent_channels)
    assert relative_error(vae.scale(z), from_torch(scaled)) < 1e-5
    patches = random_latents((2, 3, 5, 4 * FLUX2.latent_channels))
    unscaled = torch.nn.functional.pixel_shuffle(to_torch(patches) * std + mean, 2)
    assert relative_error(vae.unscale(patches), from_torch(unscaled)) < 1e-5
    assert relative_error(vae.unscale(vae.scale(z)), np.array(z)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_pickled_models_and_code_are_refused(tmp_path: Path) -> None:
    """Whole models and code, pickled by torch itself."""
    write_config(tmp_path / "config.json", PLAIN)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"it asks for torch\.nn\.modules\.linear\.Linear"):
        AutoencoderKL.from_single_file(tmp_path / "model.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="it asks for __torch__"):
        AutoencoderKL.from_single_file(tmp_path / "script.pt")
