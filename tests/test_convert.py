"""Every layout in every kind of file: the right parameters, bit for bit, or a sentence that says why not."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FLUX1, FLUX2, LAYOUTS, LEVEL_ATTENTION, PLAIN, assert_loaded, checkpoint_of, weights_of
from writers import (
    Tensors,
    bfloat16_bits,
    dict_op,
    int_op,
    pickled,
    tensor_op,
    text_op,
    write_config,
    write_legacy,
    write_safetensors,
    write_sparse,
    write_sparse_zip,
    write_zip,
)

from mlx_vae import AutoencoderKL, AutoencoderKLConfig
from mlx_vae.config import FAMILIES
from mlx_vae.convert import CheckpointError, convert, inspect, save_pretrained

KEYS = Path(__file__).parent / "data" / "keys"
FILES: dict[str, Callable[[Path, Tensors], Path]] = {
    "vae.safetensors": write_safetensors,
    "vae.sft": write_safetensors,
    "vae.bin": write_zip,
    "vae.ckpt": lambda path, tensors: write_zip(path, tensors, nested=True),
    "vae.pt": write_legacy,
    "old.ckpt": lambda path, tensors: write_legacy(path, tensors, nested=True),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the configuration PLAIN."""
    write_config(tmp_path / "config.json", PLAIN)
    return tmp_path


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_every_file(layout: str, file: str, tmp_path: Path) -> None:
    config, *spelling = LAYOUTS[layout]
    write_config(tmp_path / "config.json", config)
    path = FILES[file](tmp_path / file, checkpoint_of(config, *spelling))
    assert_loaded(AutoencoderKL.from_single_file(path), weights_of(config))


def test_dtypes(folder: Path) -> None:
    tensors = checkpoint_of(PLAIN, "diffusers")
    weights = weights_of(PLAIN)
    for name, dtype, cast in (
        ("half", mx.float16, lambda x: x.astype(np.float16)),
        ("brain", mx.bfloat16, bfloat16_bits),
    ):
        for file, write in FILES.items():
            path = write(folder / f"{name}-{file}", {key: cast(value) for key, value in tensors.items()})
            assert_loaded(AutoencoderKL.from_single_file(path), weights, dtype)
    wide = AutoencoderKL.from_single_file(path, dtype=mx.float32)
    assert wide.dtype == mx.float32
    with pytest.raises(CheckpointError, match=r"dtype .*int8, wanted a floating-point one"):
        AutoencoderKL.from_single_file(path, dtype=mx.int8)


def test_mixed_dtypes_become_the_widest(folder: Path) -> None:
    tensors = checkpoint_of(PLAIN, "diffusers")
    mixed = {name: value.astype(np.float16) if "bias" in name else value for name, value in tensors.items()}
    assert AutoencoderKL.from_single_file(write_safetensors(folder / "a.safetensors", mixed)).dtype == mx.float32
    halves = {
        name: value.astype(np.float16) if "bias" in name else bfloat16_bits(value) for name, value in tensors.items()
    }
    assert AutoencoderKL.from_single_file(write_safetensors(folder / "b.safetensors", halves)).dtype == mx.float32


@pytest.mark.parametrize("rescale", [True, False])
def test_a_cast_that_overflows_is_refused(rescale: bool, folder: Path) -> None:
    tensors = checkpoint_of(PLAIN, "diffusers")
    tensors["decoder.conv_out.bias"][0] = 1e5
    path = write_safetensors(folder / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out\.bias: some values are too large for .*float16"):
        AutoencoderKL.from_single_file(path, dtype=mx.float16, rescale=rescale)


def test_views_of_storages(folder: Path) -> None:
    """Tensors that share a storage, begin inside one, or are not contiguous."""
    tensors = checkpoint_of(PLAIN, "diffusers")
    shape = tensors["encoder.conv_in.weight"].shape
    swapped = np.ascontiguousarray(tensors["encoder.conv_in.weight"].transpose(0, 2, 3, 1))  # channels last
    joined = np.concatenate([tensors["quant_conv.bias"], tensors["post_quant_conv.bias"]])
    stored = tensors | {"encoder.conv_in.weight": swapped, "quant_conv.bias": joined}
    numbers = {name: str(i) for i, name in enumerate(stored)}
    items = {name: tensor_op(numbers[name], "float32", value.shape) for name, value in tensors.items()}
    _, I, H, W = shape
    items["encoder.conv_in.weight"] = tensor_op(
        numbers["encoder.conv_in.weight"], "float32", shape, (H * W * I, 1, W * I, I)
    )
    items["quant_conv.bias"] = tensor_op(numbers["quant_conv.bias"], "float32", (6,), numel=9)
    items["post_quant_conv.bias"] = tensor_op(numbers["quant_conv.bias"], "float32", (3,), offset=6, numel=9)
    path = write_zip(folder / "vae.pt", stored, body=dict_op(items))
    assert_loaded(AutoencoderKL.from_single_file(path), weights_of(PLAIN))


# Folders


def write_shards(folder: Path, tensors: Tensors, variant: str = "") -> Path:
    names = list(tensors)
    weight_map = {}
    for k in range(3):
        shard = f"diffusion_pytorch_model{variant}-{k + 1:05}-of-00003.safetensors"
        part = {name: tensors[name] for name in names[k::3]}
        write_safetensors(folder / shard, part)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(folder: Path) -> None:
    index = write_shards(folder, checkpoint_of(PLAIN, "diffusers"))
    assert_loaded(AutoencoderKL.from_pretrained(folder), weights_of(PLAIN))
    fields = json.loads(index.read_text())
    for change, message in (
        (
            {"extra": "diffusion_pytorch_model-00001-of-00003.safetensors"},
            "extra is not in diffusion_pytorch_model-00001",
        ),
        ({"quant_conv.bias": "no.safetensors"}, "no.safetensors is not beside it"),
        ({"quant_conv.bias": "../a.safetensors"}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": fields["weight_map"] | change}))
        with pytest.raises(CheckpointError, match=re.escape(message)):
            AutoencoderKL.from_pretrained(folder)
    del fields["weight_map"]["quant_conv.bias"]
    index.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"quant_conv\.bias is not there according to"):
        AutoencoderKL.from_pretrained(folder)


def test_variants(folder: Path) -> None:
    tensors = {name: value.astype(np.float16) for name, value in checkpoint_of(PLAIN, "old").items()}
    write_safetensors(folder / "diffusion_pytorch_model.fp16.safetensors", tensors)
    assert_loaded(AutoencoderKL.from_pretrained(folder, variant="fp16"), weights_of(PLAIN), mx.float16)
    with pytest.raises(CheckpointError, match=r"no weights in .*; there are the variants fp16"):
        AutoencoderKL.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no weights of the variant bf16"):
        AutoencoderKL.from_pretrained(folder, variant="bf16")
    write_shards(folder, checkpoint_of(PLAIN, "diffusers"), ".non_ema")
    assert_loaded(AutoencoderKL.from_pretrained(folder, variant="non_ema"), weights_of(PLAIN))


def test_pipelines_and_subfolders(tmp_path: Path) -> None:
    for name in ("vae", "elsewhere"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name / "config.json", PLAIN)
        write_zip(tmp_path / name / "diffusion_pytorch_model.bin", checkpoint_of(PLAIN, "diffusers"))
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert_loaded(AutoencoderKL.from_pretrained(tmp_path), weights_of(PLAIN))
    assert_loaded(AutoencoderKL.from_pretrained(tmp_path, subfolder="elsewhere"), weights_of(PLAIN))
    with pytest.raises(CheckpointError, match=r"no config\.json in nowhere"):
        AutoencoderKL.from_pretrained(tmp_path, subfolder="nowhere")


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json in it or in its vae/"):
        AutoencoderKL.from_pretrained(tmp_path)
    (tmp_path / "sd.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"from_single_file, .* is for sd\.ckpt"):
        AutoencoderKL.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder or file"):
        AutoencoderKL.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="no such file"):
        AutoencoderKL.from_single_file(tmp_path / "nothing.safetensors")


# Families


def rows(name: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(LDM name, diffusers name, shape in an LDM file) of every tensor of a checkpoint in the wild."""
    return [(ldm, ours, tuple(shape)) for ldm, ours, shape in json.loads((KEYS / f"{name}.json").read_text())]


def write_keys(path: Path, name: str, prefix: str = "", others: dict[str, tuple[int, ...]] | None = None) -> Path:
    return write_sparse(path, (others or {}) | {prefix + ldm: shape for ldm, _, shape in rows(name)})


PARAMETERS = {
    "sd1": 83653863,
    "sdxl": 83653863,
    "sd3": 83819683,
    "flux1": 83819683,
    "flux2": 84046115 + 2 * 128,
}  # and the statistics


@pytest.mark.parametrize(
    ("name", "family"), [("sd1", "sd"), ("sdxl", "sdxl"), ("sd3", "sd3"), ("flux1", "flux"), ("flux2", "flux2")]
)
def test_checkpoints_in_the_wild_are_accounted_for(name: str, family: str, tmp_path: Path) -> None:
    model = {k: tuple(v.shape) for k, v in AutoencoderKL(FAMILIES[family]).named_parameters().items()}
    for ldm, ours, shape in rows(name):
        if ours == "bn.num_batches_tracked":
            continue
        if ".attentions." in ours:
            shape = shape[:2]
        elif len(shape) == 4:
            shape = tuple(shape[axis] for axis in (0, 2, 3, 1))
        assert model.pop(ours) == shape, ldm
    assert not model

    from_ldm = inspect(write_keys(tmp_path / "ae.safetensors", name), family=family)
    assert from_ldm.config == FAMILIES[family]
    assert from_ldm.family == family
    assert from_ldm.layout == ("ldm, FLUX.2" if name == "flux2" else "ldm")
    assert from_ldm.left_out == (("bn.num_batches_tracked",) if name == "flux2" else ())
    from_diffusers = inspect(write_sparse(tmp_path / "d.safetensors", {o: s for _, o, s in rows(name)}), family=family)
    assert (from_diffusers.config, from_diffusers.parameters) == (from_ldm.config, from_ldm.parameters)
    assert from_ldm.parameters == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("sd1", "sd, sdxl, sdxl-fp16-fix, playground-2.5"),
        ("sdxl", "sd, sdxl, sdxl-fp16-fix, playground-2.5"),
        ("sd3", "sd3, flux"),
        ("flux1", "sd3, flux"),
    ],
)
def test_a_file_that_fits_several_families(name: str, candidates: str, tmp_path: Path) -> None:
    path = write_keys(tmp_path / "ae.safetensors", name)
    first = candidates.split(",")[0]
    with pytest.raises(CheckpointError, match=rf"any of {candidates}: .* --family {first} \(in Python family="):
        AutoencoderKL.from_single_file(path)
    with pytest.raises(CheckpointError, match=r"not of the family flux2\n  latent_channels is .* in the tensors, 32"):
        AutoencoderKL.from_single_file(path, family="flux2")
    with pytest.raises(CheckpointError, match="sd4: not a family; there are sd, "):
        AutoencoderKL.from_single_file(path, family="sd4")


def test_a_file_that_fits_one_family_only(tmp_path: Path) -> None:
    inspection = inspect(write_keys(tmp_path / "ae.safetensors", "flux2"))
    assert inspection.family == "flux2"
    assert inspection.why == "no other family has this architecture"


UNET = "model.diffusion_model."
CROSS_ATTENTION = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("name", "mark", "shape", "family"),
    [
        ("sd1", CROSS_ATTENTION, (640, 768), "sd"),
        ("sd1", CROSS_ATTENTION, (640, 1024), "sd"),
        ("sdxl", CROSS_ATTENTION, (640, 2048), "sdxl"),
        ("sdxl", CROSS_ATTENTION, (768, 1280), "sdxl"),
        ("sdxl", "edm_mean", (1, 4, 1, 1), "playground-2.5"),
        ("sd3", UNET + "joint_blocks.0.context_block.adaLN_modulation.1.bias", (9216,), "sd3"),
        ("flux1", UNET + "double_blocks.0.img_attn.norm.key_norm.scale", (128,), "flux"),
        ("flux1", "double_blocks.0.img_attn.norm.key_norm.scale", (128,), "flux"),
        ("flux1", UNET + "distilled_guidance_layer.in_proj.bias", (5120,), "flux"),
        ("flux1", UNET + "cap_embedder.0.weight", (2304,), "flux"),
        ("flux2", UNET + "single_stream_modulation.lin.weight", (8, 8), "flux2"),
    ],
)
def test_a_bundle_tells_its_family(name: str, mark: str, shape: tuple[int, ...], family: str, tmp_path: Path) -> None:
    others = {mark: shape, "text_encoders.t5xxl.encoder.block.0.weight": (8, 8)}
    for prefix in ("first_stage_model.", "vae."):
        inspection = inspect(write_keys(tmp_path / "bundle.safetensors", name, prefix, others))
        assert (inspection.family, inspection.why) == (family, f"{mark} is in the same file")
        assert inspection.foreign == tuple(others)


def test_a_bundle_whose_autoencoder_is_another(tmp_path: Path) -> None:
    path = write_keys(
        tmp_path / "bundle.safetensors", "sd1", "vae.", {UNET + "single_stream_modulation.lin.weight": (8,)}
    )
    with pytest.raises(CheckpointError, match="shows flux2, but the autoencoder differs\n  latent_channels is 4"):
        AutoencoderKL.from_single_file(path)


def test_any_architecture(tmp_path: Path) -> None:
    """LDM's own first stages; their groups can't be seen, and are 32."""
    config = AutoencoderKLConfig(block_out_channels=(32, 64), latent_channels=3, scaling_factor=1.0)
    path = write_safetensors(tmp_path / "kl-f2.ckpt", checkpoint_of(config, "ldm"))
    with pytest.raises(CheckpointError, match=r"no known family has this architecture .*--family ldm"):
        AutoencoderKL.from_single_file(path)
    vae = AutoencoderKL.from_single_file(path, family="ldm")
    assert vae.config == config
    assert_loaded(vae, weights_of(config))
    bundle = checkpoint_of(config, "ldm", "first_stage_model.", {"scale_factor": np.array(0.25, np.float32)})
    vae = AutoencoderKL.from_single_file(write_zip(tmp_path / "model.ckpt", bundle, nested=True), family="ldm")
    assert vae.config.scaling_factor == 0.25
    path = write_safetensors(tmp_path / "odd.ckpt", checkpoint_of(PLAIN, "ldm"))
    with pytest.raises(CheckpointError, match=r"not a multiple of norm_num_groups 32\. Put its config\.json beside it"):
        AutoencoderKL.from_single_file(path, family="ldm")


def test_a_family_adds_to_a_configuration_and_never_contradicts_it(tmp_path: Path) -> None:
    path = write_keys(tmp_path / "ae.safetensors", "sdxl")
    fields = FAMILIES["sdxl"].to_dict()
    scaling_factor = fields.pop("scaling_factor")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert inspect(path).config.scaling_factor == 0.18215  # as diffusers reads an old configuration
    assert inspect(path, family="sdxl").config.scaling_factor == scaling_factor
    (tmp_path / "config.json").write_text(json.dumps(fields | {"scaling_factor": 0.5}))
    with pytest.raises(CheckpointError, match=r"scaling_factor is 0\.5, of the family sdxl it is 0\.13025"):
        inspect(path, family="sdxl")


@pytest.mark.parametrize(
    "class_name",
    [
        *("AsymmetricAutoencoderKL", "AutoencoderTiny", "ConsistencyDecoderVAE", "AutoencoderKLTemporalDecoder"),
        *("AutoencoderDC", "AutoencoderKLWan", "AutoencoderKLQwenImage", "VQModel"),
    ],
)
def test_other_classes_are_refused_by_name(class_name: str, folder: Path) -> None:
    path = write_safetensors(folder / "model.safetensors", checkpoint_of(PLAIN, "diffusers"))
    (folder / "config.json").write_text(json.dumps({"_class_name": class_name}))
    for source in (folder, path):
        with pytest.raises(CheckpointError, match=f"config.json: _class_name '{class_name}' is not supported"):
            AutoencoderKL.from_pretrained(source)


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("quantize.embedding.weight", "VQModel"),
        ("encoder.layers.0.weight", "AutoencoderTiny"),
        ("decoder.mid_block.resnets.0.spatial_res_block.conv1.weight", "AutoencoderKLTemporalDecoder"),
        ("decoder.middle.0.residual.0.gamma", "AutoencoderKLWan"),
    ],
)
def test_other_classes_are_known_by_their_tensors(name: str, class_name: str, tmp_path: Path) -> None:
    tensors = checkpoint_of(PLAIN, "ldm") | {name: np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} shows {class_name}"):
        AutoencoderKL.from_single_file(write_safetensors(tmp_path / "a.safetensors", tensors), family="ldm")


# Writing back


@pytest.mark.parametrize("layout", ["mlx", "diffusers", "ldm"])
@pytest.mark.parametrize("config", [PLAIN, FLUX1, FLUX2, LEVEL_ATTENTION], ids=["plain", "flux", "flux2", "attention"])
def test_written_back_bit_for_bit(config: AutoencoderKLConfig, layout: str, tmp_path: Path) -> None:
    weights = weights_of(config)
    save_pretrained(tmp_path / "a", config, {name: mx.array(value) for name, value in weights.items()})
    convert(tmp_path / "a", tmp_path / "b", to=layout)
    convert(tmp_path / "b", tmp_path / "c")
    assert_loaded(AutoencoderKL.from_pretrained(tmp_path / "b"), weights)
    assert_loaded(AutoencoderKL.from_pretrained(tmp_path / "c"), weights)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "c/config.json").read_text()


@pytest.mark.parametrize("layout", ["diffusers", "ldm"])
def test_written_names_and_values_are_the_layouts(layout: str, tmp_path: Path) -> None:
    for config in (PLAIN, FLUX2):
        weights = {name: mx.array(value) for name, value in weights_of(config).items()}
        save_pretrained(tmp_path, config, weights, layout)
        wanted = checkpoint_of(config, "flux2" if layout == "ldm" and config is FLUX2 else layout)
        written = mx.load(str(next(tmp_path.glob("*.safetensors"))))
        assert written.keys() == wanted.keys()
        for name, value in written.items():
            assert np.array_equal(np.array(value), wanted[name]), name


# Bad input


def no_code(folder: Path) -> Path:
    """A pickle that would make a file if it were run."""
    body = b"cos\nsystem\n(" + text_op(f"touch {folder / 'owned'}") + b"tR"
    return write_zip(folder / "bad.ckpt", checkpoint_of(PLAIN, "ldm"), body=dict_op({"state_dict": body}))


def bomb(folder: Path) -> Path:
    """64 MB of zeros in a compressed archive of a few kB."""
    tensors = {"encoder.conv_in.weight": np.zeros((4, 4, 1024, 1024), np.float32)}
    return write_zip(folder / "bad.ckpt", tensors, compression=zipfile.ZIP_DEFLATED)


def declared(folder: Path) -> Path:
    """A storage that is said to be larger than the file."""
    body = dict_op({"encoder.conv_in.weight": tensor_op("0", "float32", (1 << 20, 1 << 10))})
    return write_zip(folder / "bad.ckpt", {"x": np.zeros(4, np.float32)}, body=body)


def expanded(folder: Path) -> Path:
    """One number seen as a gigabyte through strides of 0."""
    body = dict_op({"encoder.conv_in.weight": tensor_op("0", "float32", (1 << 15, 1 << 15), (0, 0), numel=1)})
    return write_zip(folder / "bad.ckpt", {"x": np.zeros(1, np.float32)}, body=body)


def deep_key(folder: Path) -> Path:
    """A dict key whose hash takes for ever: a pair of pairs of pairs ..., each the same twice."""
    pair = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(100))
    return write_zip(folder / "bad.ckpt", {}, body=b"}" + pair + b"Ns")


def far_memo(folder: Path) -> Path:
    """A place in the memo that makes the standard unpickler fill 16 GB with nulls."""
    return write_zip(folder / "bad.ckpt", {}, body=b"}r" + struct.pack("<I", 1 << 30))


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "malicious": (no_code, r"it asks for os\.system, which is neither a tensor nor a container; nothing of it was run"),
    "zip bomb": (bomb, "is compressed or encrypted, which torch.save never does"),
    "declared size": (declared, "storage 0 has 16 bytes, wanted 1073741824 of float32"),
    "expanded": (expanded, r"a tensor without a storage, a shape and strides"),
    "deep key": (deep_key, "a dict with a tuple for a key"),
    "far memo": (far_memo, "no autoencoder in it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_malicious_files(name: str, folder: Path) -> None:
    make, message = BAD_FILES[name]
    path = make(folder)
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError, match=message):
        AutoencoderKL.from_single_file(path)
    assert sorted(folder.iterdir()) == before


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html>", "not a whole safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (b"\0" * 257 + b"ustar\0" + b"\0" * 300, "a tar file as PyTorch 0.1 wrote"),
        (pickled(int_op(3)), "not a readable PyTorch file"),
        (b"PK\3\4", "not a readable PyTorch file"),
        (struct.pack("<Q", 2) + b"{}", "no autoencoder in it; its 0 tensors"),
        (struct.pack("<Q", 1 << 60) + b"{}", "a header of 1152921504606846976 bytes in a file of 10"),
        (struct.pack("<Q", 2) + b"[]", "not a whole safetensors file"),
        (struct.pack("<Q", 200000) + b"[" * 200000, "not a whole safetensors file"),
    ],
)
def test_files_of_something_else(data: bytes, message: str, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        AutoencoderKL.from_single_file(write_bytes(folder / "bad.ckpt", data))


@pytest.mark.parametrize("file", FILES)
def test_truncated_files(file: str, folder: Path) -> None:
    path = FILES[file](folder / file, checkpoint_of(PLAIN, "ldm"))
    data = path.read_bytes()
    for size in (1, 7, 8, 9, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            AutoencoderKL.from_single_file(path)


@pytest.mark.parametrize("file", ["vae.safetensors", "vae.ckpt", "vae.pt"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.conv_in.bias"), r"tensors that do not fit: 1\n  decoder\.conv_in\.bias: missing"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), r"extra: unexpected"),
        (
            lambda t: t.update({"quant_conv.bias": np.zeros(5, np.float32)}),
            r"quant_conv\.bias: shape \(5,\), the configuration wants \(6,\)",
        ),
        (
            lambda t: t.update({"quant_conv.bias": np.zeros(6, np.int64)}),
            r"quant_conv\.bias: dtype int64, wanted float32, float16, bfloat16",
        ),
        (
            lambda t: t.update({"quant_conv.bias": np.full(6, np.nan, np.float32)}),
            r"quant_conv\.bias: some values are not finite",
        ),
        (
            lambda t: t.update({"quant_conv.bias": np.full(6, 0xFF80, np.uint16)}),
            r"quant_conv\.bias: some values are not finite",
        ),
        (
            lambda t: t.update({"encoder.mid_block.attentions.0.query.bias": np.zeros(8, np.float32)}),
            r"encoder\.mid_block\.attentions\.0\.to_q\.bias is there twice, as .*to_q\.bias and as .*query\.bias",
        ),
        (
            lambda t: t.update(
                {f"{p}.encoder.conv_in.bias": np.zeros(4, np.float32) for p in ("vae", "first_stage_model")}
            ),
            r"two autoencoders, under first_stage_model\. and under vae\.",
        ),
    ],
)
def test_wrong_tensors_are_named(file: str, change: Callable[[Tensors], object], message: str, folder: Path) -> None:
    tensors = checkpoint_of(PLAIN, "diffusers")
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        AutoencoderKL.from_single_file(FILES[file](folder / file, tensors))


def test_all_differences_are_in_one_error(folder: Path) -> None:
    tensors = checkpoint_of(PLAIN, "ldm")
    del tensors["decoder.up.2.block.0.norm1.bias"], tensors["quant_conv.bias"]
    tensors["spare"] = tensors["post_quant_conv.bias"] = np.zeros(2, np.float32)
    with pytest.raises(CheckpointError) as caught:
        AutoencoderKL.from_single_file(write_safetensors(folder / "vae.safetensors", tensors))
    assert str(caught.value).splitlines() == [
        f"{folder / 'vae.safetensors'}: tensors that do not fit: 4",
        "  decoder.up_blocks.0.resnets.0.norm1.bias: missing",
        "  quant_conv.bias: missing",
        "  spare: unexpected",
        "  post_quant_conv.bias: shape (2,), the configuration wants (3,)",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[]", "a JSON object was wanted"),
        ("[" * 100000, "not JSON"),
        ('{"layers_per_block": 60000}', "it takes more than 60000 tensors"),
        ('{"block_out_channels": [4, 8, 8], "norm_num_groups": 3}', "not a multiple"),
        ('{"_class_name": ["AutoencoderKL"]}', "is not supported"),
        ('{"block_out_channels": [65536, 65536, 65536]}', "the configuration wants"),
    ],
)
def test_bad_configurations(text: str, message: str, folder: Path) -> None:
    write_safetensors(folder / "model.safetensors", checkpoint_of(PLAIN, "diffusers"))
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        AutoencoderKL.from_pretrained(folder)


# Memory

MEASURE = """
import sys
sys.path.append(sys.argv[2])
from memory import peak_bytes
from mlx_vae import AutoencoderKL
vae = AutoencoderKL.from_single_file(sys.argv[1])
print(sum(value.nbytes for value in vae.named_parameters().values()), peak_bytes())
"""


@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_only_the_autoencoder_is_read_from_a_bundle(kind: str, tmp_path: Path) -> None:
    """The whole process, interpreter and libraries included, stays within the weights' bytes and 300 MiB."""
    shapes = {"first_stage_model." + ldm: shape for ldm, _, shape in rows("sd1")}
    mark = {CROSS_ATTENTION: (640, 768)}
    path = tmp_path / f"bundle.{kind}"
    if kind == "safetensors":
        write_sparse(path, mark | shapes, size=2 << 30)
    else:
        write_sparse_zip(path, mark | shapes | {"model.diffusion_model.rest": ((2 << 30) // 4,)})
    assert path.stat().st_size >= 2 << 30
    command = [sys.executable, "-c", MEASURE, path, Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    assert weights == 4 * 83_653_863
    assert peak <= weights + (300 << 20)
