"""Reading `.mlpackage` folders: a protobuf of operations, and a file of weights beside it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vae.coreml.tools import coremltools

BLOB = struct.Struct("<IIQQQ")  # sentinel, dtype, bytes, offset of the data, bits of padding
SENTINEL = 0xDEADBEEF
DTYPES = {
    "BOOL": "?",
    "FLOAT16": "<f2",
    "FLOAT32": "<f4",
    "FLOAT64": "<f8",
    "INT8": "<i1",
    "INT16": "<i2",
    "INT32": "<i4",
    "INT64": "<i8",
    "UINT8": "<u1",
    "UINT16": "<u2",
    "UINT32": "<u4",
    "UINT64": "<u8",
}
PACKED_BITS = {"UINT1": 1, "UINT2": 2, "UINT3": 3, "UINT4": 4, "UINT6": 6, "INT4": 4}


class PackageError(ValueError):
    """A folder that is no ML program package, or holds one that can't be read: where and why."""


@dataclass(frozen=True)
class Type:
    """A tensor's dtype, by its name in the protobuf, and shape; None for a dimension that is not fixed."""

    dtype: str
    shape: tuple[int | None, ...]

    @property
    def is_dynamic(self) -> bool:
        return None in self.shape

    @property
    def bytes(self) -> int:
        """Of a tensor of this type; unknown dimensions count as 1."""
        bits = PACKED_BITS.get(self.dtype) or 8 * np.dtype(DTYPES.get(self.dtype, "u1")).itemsize
        return -(-math.prod(1 if size is None else size for size in self.shape) * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype.lower()}{list(self.shape)}"


@dataclass(frozen=True)
class Operation:
    """One line of a program: outputs = kind(inputs)."""

    message: Any
    package: Package

    @property
    def kind(self) -> str:
        return self.message.type

    @cached_property
    def name(self) -> str:
        if "name" in self.message.attributes:
            return str(self.package.value(self.message.attributes["name"]))
        return self.message.outputs[0].name if self.message.outputs else self.kind

    @property
    def is_constant(self) -> bool:
        return self.kind == "const" or self.kind.startswith("constexpr_")

    @cached_property
    def outputs(self) -> dict[str, Type]:
        return {output.name: _type(output.type) for output in self.message.outputs}

    @cached_property
    def inputs(self) -> dict[str, list[str | Any]]:
        """For each parameter its bindings: names of other outputs, or values (of protobuf) written in place."""
        inputs = {
            parameter: [binding.name or binding.value for binding in argument.arguments]
            for parameter, argument in self.message.inputs.items()
        }
        return inputs | {key: [value] for key, value in self.message.attributes.items() if key != "name"}

    @property
    def names(self) -> list[str]:
        """Of the outputs of other operations that this one takes."""
        return [binding for bindings in self.inputs.values() for binding in bindings if isinstance(binding, str)]


@dataclass(frozen=True)
class Function:
    name: str
    opset: str
    inputs: dict[str, Type]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    @cached_property
    def types(self) -> dict[str, Type]:
        """Of every tensor by its name."""
        return self.inputs | {name: type_ for op in self.operations for name, type_ in op.outputs.items()}


@dataclass(frozen=True)
class Package:
    """An ML program on disk. `spec` is coremltools' protobuf of the model."""

    path: Path
    model: Path
    spec: Any

    @classmethod
    def open(cls, path: Path) -> Package:
        """Raises PackageError for anything but an ML program."""
        coremltools()
        from coremltools.proto import Model_pb2
        from google.protobuf.message import DecodeError

        try:
            manifest = json.loads((path / "Manifest.json").read_text())
            model = path / "Data" / manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
            spec = Model_pb2.Model()
            spec.ParseFromString(model.read_bytes())
        except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
            raise PackageError(f"{path}: not an .mlpackage ({type(error).__name__}: {error})") from None
        if spec.WhichOneof("Type") != "mlProgram":
            raise PackageError(f"{path}: holds a {spec.WhichOneof('Type')}, not an ML program")
        return cls(path, model, spec)

    def write_spec(self) -> None:
        self.model.write_bytes(self.spec.SerializeToString())

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.spec.description.metadata.userDefined)

    @property
    def bytes_on_disk(self) -> int:
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    @cached_property
    def functions(self) -> dict[str, Function]:
        return {name: self._function(name, message) for name, message in self.spec.mlProgram.functions.items()}

    def _function(self, name: str, message: Any) -> Function:
        block = message.block_specializations[message.opset]
        return Function(
            name,
            message.opset,
            {each.name: _type(each.type) for each in message.inputs},
            tuple(block.outputs),
            tuple(self._operations(block)),
        )

    def _operations(self, block: Any) -> Iterator[Operation]:
        for message in block.operations:
            yield Operation(message, self)
            for inner in message.blocks:
                yield from self._operations(inner)

    @cached_property
    def _weights(self) -> dict[str, np.ndarray]:
        """The mapped files of weights by the name that the program gives them."""
        return {}

    def value(self, message: Any) -> Any:
        """A protobuf Value as an array, or as a str. Raises PackageError for what it can't read."""
        type_ = _type(message.type)
        if message.WhichOneof("value") == "blobFileValue":
            return _array(self._blob(message.blobFileValue), type_)
        tensor = message.immediateValue.tensor
        kind = tensor.WhichOneof("value")
        if kind is None:
            raise PackageError(f"{self.path}: a value of type {type_} that is not a tensor")
        values = getattr(tensor, kind).values
        if kind == "strings":
            return str(values[0]) if len(values) == 1 else np.array(list(values))
        if kind == "bytes":
            return _array(np.frombuffer(values, dtype=np.uint8), type_)
        if type_.dtype not in DTYPES:
            raise PackageError(f"{self.path}: a value of type {type_} written as {kind}")
        array = np.array(values, dtype=DTYPES[type_.dtype])
        return _array(array.view(np.uint8), type_)

    def _blob(self, message: Any) -> np.ndarray:
        name = message.fileName
        if name not in self._weights:
            file = self.model.parent / name.removeprefix("@model_path/")
            try:
                self._weights[name] = np.memmap(file, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise PackageError(f"{file}: {error}") from None
        data = self._weights[name]
        if message.offset + BLOB.size > data.size:
            raise PackageError(f"{name}: no record at {message.offset}, the file has {data.size} bytes")
        sentinel, _, size, start, _ = BLOB.unpack(data[message.offset :][: BLOB.size].tobytes())
        if sentinel != SENTINEL or start + size > data.size:
            raise PackageError(f"{name}: no record at {message.offset}")
        return data[start : start + size]


def _type(message: Any) -> Type:
    """Of a protobuf ValueType; what is not a tensor has the dtype "OTHER" and no dimensions."""
    from coremltools.proto import MIL_pb2

    if message.WhichOneof("type") != "tensorType":
        return Type("OTHER", ())
    tensor = message.tensorType
    shape = [d.constant.size if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions]
    return Type(MIL_pb2.DataType.Name(tensor.dataType), tuple(shape))


def _array(data: np.ndarray, type_: Type) -> np.ndarray:
    """Bytes as an array of a type. Raises PackageError where they are too few or the dtype is unknown."""
    bits = PACKED_BITS.get(type_.dtype)
    if (type_.dtype not in DTYPES and bits is None) or type_.is_dynamic:
        raise PackageError(f"values of type {type_} are not supported")
    if data.size < type_.bytes:
        raise PackageError(f"{data.size} bytes for {type_}")
    shape = tuple(size or 0 for size in type_.shape)
    if bits is None:
        return data[: type_.bytes].view(DTYPES[type_.dtype]).reshape(shape)
    values = unpacked(data, bits, int(np.prod(shape)))
    return ((values.astype(np.int8) ^ 8) - 8 if type_.dtype == "INT4" else values).reshape(shape)


def unpacked(data: np.ndarray, bits: int, size: int) -> np.ndarray:
    """`size` numbers of so many bits from bytes that hold them without gaps, the lowest bit first: uint8 (size,)."""
    planes = np.unpackbits(data, bitorder="little", count=size * bits).reshape(-1, bits)
    return planes @ (1 << np.arange(bits, dtype=np.uint8))
