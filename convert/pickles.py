"""What `torch.save` writes (`.ckpt`, `.pt`, `.bin`), read without torch and without running anything.

A pickle is a program for a small stack machine. `_run` is that machine with the instructions that make numbers, text
and containers, and with the few functions of ALLOWED, which make descriptions of tensors. Everything else is refused.
The tensors' data lie raw in the file, as entries of a zip archive or, before PyTorch 1.6, one after the other.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_vae.convert.tensors import ITEMSIZE, CheckpointError, TensorView

MAX_PICKLE = 8 << 20
"""Bytes of a pickle, without its tensors' data: ten times a training state's. One may take a hundred in memory."""

MAX_AXES = 8
MAX_ELEMENTS = 1 << 40

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


@dataclass(frozen=True, slots=True)
class _Storage:
    """A flat array in the file."""

    dtype: str
    key: str
    size: int  # elements


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int  # elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """Something that a pickle names, and that we neither import nor call."""

    name: str

    def __call__(self, *args: object) -> _Name:
        return self


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: str


def _rebuild_tensor(storage: object, offset: object, shape: object, strides: object, *_: object) -> _Tensor:
    if (
        not isinstance(storage, _Storage)
        or not isinstance(offset, int)
        or not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or not len(shape) == len(strides) <= MAX_AXES
        or not all(isinstance(number, int) and 0 <= number <= storage.size for number in (offset, *shape, *strides))
    ):
        raise ValueError("a tensor without a storage, a shape and strides")
    if math.prod(shape) > storage.size:
        raise ValueError(f"a tensor of shape {shape} in a storage of {storage.size} elements")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.size:
        raise ValueError(f"a tensor that ends at element {last} of a storage of {storage.size}")
    return _Tensor(storage, offset, shape, strides)


ALLOWED: dict[str, Callable[..., object] | _StorageType] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch.Size": lambda sizes: sizes,
    "collections.OrderedDict": lambda: {},
    "builtins.set": lambda items: items,
    "__builtin__.set": lambda items: items,
    "torch.DoubleStorage": _StorageType("float64"),
    "torch.FloatStorage": _StorageType("float32"),
    "torch.HalfStorage": _StorageType("float16"),
    "torch.BFloat16Storage": _StorageType("bfloat16"),
    "torch.LongStorage": _StorageType("int64"),
    "torch.IntStorage": _StorageType("int32"),
    "torch.ShortStorage": _StorageType("int16"),
    "torch.CharStorage": _StorageType("int8"),
    "torch.ByteStorage": _StorageType("uint8"),
    "torch.BoolStorage": _StorageType("bool"),
}
"""What a pickle may call, and what is done instead: nothing that copies, so that a small file stays small in memory."""

INERT = (
    "_codecs.encode",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
)
"""What Stable Diffusion's own `.ckpt` files name beside the weights: kept as a name, never called."""


def read_pickle(path: Path) -> dict[str, TensorView]:
    """The tensors of a `torch.save` file by name: of its `state_dict`, if it has one, or of its outermost dict.

    Raises CheckpointError for whatever isn't one, or names anything but tensors and containers.
    """
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickletools, about the escapes in a damaged string
            zipped = file.read(4) == b"PK\3\4"
            file.seek(0)
            root, locate = (_open_zip if zipped else _open_legacy)(file)
            if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
                root = root["state_dict"]
            if not isinstance(root, dict):
                raise ValueError("it holds no dict of tensors")
            return {
                name: _view(path, value, locate(value.storage))
                for name, value in root.items()
                if isinstance(name, str) and isinstance(value, _Tensor)
            }
    except (
        *(ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, NotImplementedError),
        *(zipfile.BadZipFile, struct.error),
    ) as error:
        raise CheckpointError(f"{path}: not a readable PyTorch file ({error})") from None


def _view(path: Path, tensor: _Tensor, start: int) -> TensorView:
    dtype = tensor.storage.dtype
    return TensorView(path, dtype, tensor.shape, tensor.strides, start + tensor.offset * ITEMSIZE[dtype])


def _open_zip(file: IO[bytes]) -> tuple[object, Callable[[_Storage], int]]:
    """The pickled object, and where the data of a storage begin. Entries are stored, as torch stores them."""
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1 or len(entries) < len(archive.infolist()):
        raise ValueError("a zip archive with one data.pkl and no name twice was wanted")
    folder = pickles[0].removesuffix("data.pkl")
    size = file.seek(0, io.SEEK_END)

    def place(name: str) -> tuple[int, int]:
        """Offset and size of an entry's data."""
        if name not in entries:
            raise ValueError(f"no {name} in the archive")
        entry = entries[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"{name} is compressed or encrypted, which torch.save never does")
        if not 0 <= entry.header_offset < size:
            raise ValueError(f"{name} begins beyond the file")
        file.seek(entry.header_offset)
        *_, name_size, extra_size = struct.unpack("<4s5H3I2H", file.read(30))
        offset = entry.header_offset + 30 + name_size + extra_size
        if offset + entry.file_size > size:
            raise ValueError(f"{name} ends beyond the file")
        return offset, entry.file_size

    def read(name: str) -> bytes:
        offset, size = place(name)
        if size > MAX_PICKLE:
            raise ValueError(f"{name} has {size} bytes; {MAX_PICKLE} at most were wanted")
        file.seek(offset)
        return file.read(size)

    def locate(storage: _Storage) -> int:
        offset, size = place(f"{folder}data/{storage.key}")
        if storage.size * ITEMSIZE[storage.dtype] > size:
            raise ValueError(f"storage {storage.key} has {size} bytes, wanted {storage.size} of {storage.dtype}")
        return offset

    if folder + "byteorder" in entries and read(folder + "byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine; save it again on another")
    return _run(io.BytesIO(read(pickles[0]))), locate


def _open_legacy(file: IO[bytes]) -> tuple[object, Callable[[_Storage], int]]:
    """As `_open_zip`, for PyTorch before 1.6: five pickles, then each storage as its element count and its data."""
    pickles = io.BytesIO(file.read(MAX_PICKLE))
    size = file.seek(0, io.SEEK_END)
    if (_run(pickles), _run(pickles)) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise ValueError("a pickle, but not one of torch.save")
    system = _run(pickles)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine; save it again on another")
    storages: dict[str, _Storage] = {}
    root, keys = _run(pickles, storages), _run(pickles)
    if not isinstance(keys, list):
        raise ValueError("no list of its storages")
    places: dict[str, int] = {}
    position = pickles.tell()
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("no list of its storages")
        storage = storages[key]
        file.seek(position)
        if struct.unpack("<q", file.read(8)) != (storage.size,):
            raise ValueError(f"storage {key} has another size than the tensors in it")
        places[key] = position + 8
        position += 8 + storage.size * ITEMSIZE[storage.dtype]
        if position > size:
            raise ValueError(f"storage {key} ends beyond the file")
    return root, lambda storage: places[storage.key]


def _run(file: IO[bytes], storages: dict[str, _Storage] | None = None) -> object:
    """The object that the pickle at the file's position describes; notes the storages that it names."""
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[Any, Any] = {}
    for opcode, arg, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case name if name in LITERALS:
                stack.append(arg)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marked.append(stack)
                stack = []
            case "POP_MARK":
                stack = marked.pop()
            case "TUPLE":
                items, stack = stack, marked.pop()
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "LIST":
                items, stack = stack, marked.pop()
                stack.append(items)
            case "APPEND":
                items = [stack.pop()]
                stack[-1].extend(items)
            case "APPENDS" | "ADDITEMS":
                items, stack = stack, marked.pop()
                stack[-1].extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS" | "DICT":
                items, stack = stack, marked.pop()
                if opcode.name == "DICT":
                    stack.append({})
                _set_items(stack[-1], items)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_global(str(arg).replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_global(".".join((module, attribute))))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                stack.append(_call(function, args))
            case "BUILD":
                stack.pop()  # attributes of a container, as a state_dict's _metadata
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages is not None:
                    storages[storage.key] = storage
                stack.append(storage)
            case name:
                raise ValueError(f"the pickle has the instruction {name}, which torch.save does not write")
    raise ValueError("a pickle without an end")


LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}


def _set_items(target: dict[object, object], items: list[Any]) -> None:
    """Keys are those whose hash is as cheap as they look: a tuple of tuples of tuples may take forever."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        if key is not None and not isinstance(key, (str, bytes, int, float, _Name)):
            raise ValueError(f"a dict with a {type(key).__name__} for a key")
        target[key] = value


def _global(name: str) -> object:
    if name in ALLOWED:
        return ALLOWED[name]
    if name in INERT or (name.startswith("torch.") and name.removeprefix("torch.") in ITEMSIZE):
        return _Name(name)
    raise ValueError(
        f"it asks for {name}, which is neither a tensor nor a container; nothing of it was run. "
        "If you trust it, save its state_dict again, as safetensors"
    )


def _call(function: Any, args: Any) -> object:
    if not isinstance(function, _Name) and function not in ALLOWED.values():
        raise ValueError("it calls what is not a function")
    if not isinstance(args, tuple):
        raise ValueError("it calls a function without arguments")
    return function(*args)


def _storage(name: object) -> _Storage:
    match name:
        case ("storage", _StorageType(dtype), str(key), _, int(size)) if 0 <= size < MAX_ELEMENTS:
            return _Storage(dtype, key, size)
        case ("storage", _StorageType(dtype), str(key), _, int(size), None) if 0 <= size < MAX_ELEMENTS:
            return _Storage(dtype, key, size)
    raise ValueError("it names data in a way that torch.save does not")
