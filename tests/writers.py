"""Checkpoints as others write them, made by hand: from the description of the layouts and of the file formats alone.

Nothing here uses the library's own tables, nor torch.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vae import AutoencoderKLConfig

Tensors = dict[str, np.ndarray]

RESNET = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"))
SHORTCUT = (("conv_shortcut", "nin_shortcut"),)
ATTENTION = (
    ("group_norm", "group_norm", "norm"),
    ("to_q", "query", "q"),
    ("to_k", "key", "k"),
    ("to_v", "value", "v"),
    ("to_out.0", "proj_attn", "proj_out"),
)


def modules(config: AutoencoderKLConfig, flux2: bool = False) -> Iterator[tuple[str, str, str]]:
    """(diffusers, diffusers before 0.15, LDM) names of every module that a model of any configuration may have."""
    levels = len(config.block_out_channels)

    def same(*names: str) -> Iterator[tuple[str, str, str]]:
        for name in names:
            yield name, name, name

    def resnet(ours: str, ldm: str) -> Iterator[tuple[str, str, str]]:
        for a, b in RESNET + SHORTCUT:
            yield f"{ours}.{a}", f"{ours}.{a}", f"{ldm}.{b}"

    def attention(ours: str, ldm: str) -> Iterator[tuple[str, str, str]]:
        for new, old, b in ATTENTION:
            yield f"{ours}.{new}", f"{ours}.{old}", f"{ldm}.{b}"

    for half in ("encoder", "decoder"):
        yield from same(f"{half}.conv_in", f"{half}.conv_out")
        yield f"{half}.conv_norm_out", f"{half}.conv_norm_out", f"{half}.norm_out"
        yield from resnet(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1")
        yield from attention(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1")
        yield from resnet(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2")
    for i in range(levels):
        up = levels - 1 - i
        for j in range(config.layers_per_block + 1):
            yield from resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}")
            yield from attention(f"encoder.down_blocks.{i}.attentions.{j}", f"encoder.down.{i}.attn.{j}")
            yield from resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}")
            yield from attention(f"decoder.up_blocks.{i}.attentions.{j}", f"decoder.up.{up}.attn.{j}")
        down = f"encoder.down_blocks.{i}.downsamplers.0.conv"
        yield down, down, f"encoder.down.{i}.downsample.conv"
        upsample = f"decoder.up_blocks.{i}.upsamplers.0.conv"
        yield upsample, upsample, f"decoder.up.{up}.upsample.conv"
    yield "quant_conv", "quant_conv", "encoder.quant_conv" if flux2 else "quant_conv"
    yield "post_quant_conv", "post_quant_conv", "decoder.post_quant_conv" if flux2 else "post_quant_conv"
    yield from same("bn")


def as_torch(weights: Mapping[str, np.ndarray]) -> Tensors:
    """The model's parameters in torch's axis order, under diffusers' names."""
    return {
        name: np.ascontiguousarray(value.transpose(0, 3, 1, 2)) if value.ndim == 4 else value
        for name, value in weights.items()
    }


def respelled(tensors: Mapping[str, np.ndarray], config: AutoencoderKLConfig, layout: str) -> Tensors:
    """Tensors in torch's axis order in the layout "diffusers", "old", "ldm" or "flux2"."""
    column = {"diffusers": 0, "old": 1, "ldm": 2, "flux2": 2}[layout]
    names = {row[0]: row[column] for row in modules(config, flux2=layout == "flux2")}
    made = {}
    for name, value in tensors.items():
        module, _, parameter = name.rpartition(".")
        if column == 2 and ".attentions." in name and value.ndim == 2:
            value = value[:, :, None, None]
        made[f"{names[module]}.{parameter}"] = value
    return made


def bfloat16_bits(value: np.ndarray) -> np.ndarray:
    """float32 -> the upper halves of its bits, rounded to nearest even, as uint16."""
    bits = value.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


SAFETENSORS = {"float64": "F64", "float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64", "int32": "I32"}
"""By NumPy's dtypes; uint16 holds the bits of bfloat16."""


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, value in tensors.items():
        begin, end = end, end + value.nbytes
        header[name] = {
            "dtype": SAFETENSORS[value.dtype.name],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value).tobytes())
    return path


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], size: int = 0) -> Path:
    """A float32 safetensors file of zeros that takes no room on the disk, with foreign tensors up to `size` bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    if end < size:
        header["model.diffusion_model.rest"] = {
            "dtype": "F32",
            "shape": [(size - end) // 4],
            "data_offsets": [end, end + (size - end) // 4 * 4],
        }
        end += (size - end) // 4 * 4
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "uint16": "BFloat16Storage",
    "int64": "LongStorage",
}


def text_op(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def int_op(number: int) -> bytes:
    return b"J" + struct.pack("<i", number) if abs(number) < 1 << 31 else b"\x8a\x08" + struct.pack("<q", number)


def tuple_op(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(int_op, numbers)) + b"t"


def tensor_op(
    key: str,
    dtype: str,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    numel: int | None = None,
    legacy: bool = False,
) -> bytes:
    """The instructions that make a tensor of a storage."""
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape))) if strides is None else strides
    numel = int(np.prod(shape)) if numel is None else numel
    storage = text_op("storage") + b"ctorch\n" + STORAGES[dtype].encode() + b"\n" + text_op(key) + text_op("cpu")
    storage = b"(" + storage + int_op(numel) + (b"N" if legacy else b"") + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + int_op(offset)
        + tuple_op(shape)
        + tuple_op(strides)
        + b"\x89"
        + hooks
        + b"tR"
    )


def dict_op(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text_op(name) + value for name, value in items.items()) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def state_op(tensors: Mapping[str, np.ndarray], legacy: bool = False) -> bytes:
    return dict_op(
        {
            name: tensor_op(str(i), value.dtype.name, value.shape, legacy=legacy)
            for i, (name, value) in enumerate(tensors.items())
        }
    )


def write_zip(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    nested: bool = False,
    body: bytes | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """As torch.save since PyTorch 1.6. `nested`: under state_dict, beside what trainers keep; `body`: any pickle."""
    if body is None:
        body = state_op(tensors)
    if nested:
        callback = b"}cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n}s"
        body = dict_op({"epoch": int_op(3), "callbacks": callback, "state_dict": body})
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled(body))
        archive.writestr("archive/byteorder", "little")
        for i, value in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{i}", np.ascontiguousarray(value).tobytes())
        archive.writestr("archive/version", "3\n")
    return path


def write_legacy(path: Path, tensors: Mapping[str, np.ndarray], nested: bool = False) -> Path:
    """As torch.save before PyTorch 1.6."""
    magic = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    sizes = dict_op({"short": int_op(2), "int": int_op(4), "long": int_op(4)})
    system = dict_op({"protocol_version": int_op(1001), "little_endian": b"\x88", "type_sizes": sizes})
    body = state_op(tensors, legacy=True)
    if nested:
        body = dict_op({"state_dict": body})
    keys = b"](" + b"".join(text_op(str(i)) for i in range(len(tensors))) + b"e"
    with path.open("wb") as file:
        for part in (magic, int_op(1001), system, body, keys):
            file.write(pickled(part))
        for value in tensors.values():
            file.write(struct.pack("<q", value.size) + np.ascontiguousarray(value).tobytes())
    return path


def write_config(path: Path, config: AutoencoderKLConfig) -> None:
    path.write_text(json.dumps(config.to_dict()))


def write_sparse_zip(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """As write_zip, float32 zeros that take no room on the disk; under 4 GiB."""
    body = dict_op({name: tensor_op(str(i), "float32", shape) for i, (name, shape) in enumerate(shapes.items())})
    data = pickled(dict_op({"state_dict": body}))
    entries = [("archive/data.pkl", len(data))]
    entries += [(f"archive/data/{i}", 4 * int(np.prod(shape))) for i, shape in enumerate(shapes.values())]
    directory = b""
    with path.open("wb") as file:
        for name, size in entries:
            common = struct.pack("<5H3I2H", 20, 0, 0, 0, 0, 0, size, size, len(name), 0)
            directory += b"PK\1\2" + struct.pack("<H", 20) + common + struct.pack("<3H2I", 0, 0, 0, 0, file.tell())
            directory += name.encode()
            file.write(b"PK\3\4" + common + name.encode())
            if name.endswith(".pkl"):
                file.write(data)
            else:
                file.seek(size, 1)
        start = file.tell()
        file.write(directory)
        file.write(b"PK\5\6" + struct.pack("<4H2IH", 0, 0, len(entries), len(entries), len(directory), start, 0))
    return path
