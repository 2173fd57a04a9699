"""Runs a function of an `.mlpackage` in NumPy, on any machine.

Tensors are float32 arrays throughout. Values that a package stores as float16 are float16 numbers from the start; with
`round_float16` so is the result of every operation whose type is float16, as if it had gone through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from mlx_vae.coreml.package import Function, Operation, Type, unpacked

COLUMNS_BYTES = 8 << 20
"""Of the unfolded input of a convolution at a time."""

Array = np.ndarray


class UnsupportedOperation(ValueError):
    """An operation that the evaluator doesn't know: its kind and name."""


@dataclass(frozen=True)
class Evaluation:
    outputs: dict[str, Array]
    peaks: dict[str, float]
    """The largest |value| of each operation's result by its name; NaN where one is not a number."""


def evaluate(function: Function, inputs: Mapping[str, Array], round_float16: bool = False) -> Evaluation:
    """Raises UnsupportedOperation, ValueError for missing or misshapen inputs, and PackageError for broken values."""
    constants = {name: op for op in function.operations if op.is_constant for name in op.outputs}
    values: dict[str, Array] = {}
    for name, type_ in function.inputs.items():
        if name not in inputs or not _fits(inputs[name].shape, type_):
            found = inputs[name].shape if name in inputs else "nothing"
            raise ValueError(f"input {name}: {found}, wanted {type_}")
        values[name] = np.asarray(inputs[name], dtype=np.float32)
    last_use = {name: i for i, op in enumerate(function.operations) for name in op.names}
    peaks: dict[str, float] = {}
    with np.errstate(all="ignore"):
        for i, op in enumerate(function.operations):
            if op.is_constant:
                continue
            results = _run(op, constants, values)
            if round_float16:
                results = [
                    _rounded(result) if type_.dtype == "FLOAT16" else result
                    for result, type_ in zip(results, op.outputs.values(), strict=True)
                ]
            values.update(zip(op.outputs, results, strict=True))
            peaks[op.name] = max(map(_peak, results))
            for name in {*op.names, *op.outputs}:
                if last_use.get(name, -1) <= i and name not in function.outputs:
                    values.pop(name, None)
    return Evaluation({name: values[name] for name in function.outputs}, peaks)


def constant(op: Operation, constants: Mapping[str, Operation]) -> Any:
    """The value of a `const` or `constexpr_...` operation, float16 as float32."""
    value = _run(op, constants, {})[0]
    if isinstance(value, Array) and value.dtype.kind == "f":
        value = value.astype(np.float32)
        if next(iter(op.outputs.values())).dtype == "FLOAT16":
            value = _rounded(value)
    return value


def _run(op: Operation, constants: Mapping[str, Operation], values: Mapping[str, Array]) -> list[Any]:
    if op.kind not in OPERATIONS:
        raise UnsupportedOperation(f"{op.name}: the evaluator has no operation {op.kind!r}")

    def resolve(binding: Any) -> Any:
        if not isinstance(binding, str):
            return op.package.value(binding)
        if binding not in values and binding not in constants:
            raise UnsupportedOperation(f"{op.name}: {op.kind}: nothing gives its input {binding}")
        return values[binding] if binding in values else constant(constants[binding], constants)

    arguments = {
        parameter: [resolve(binding) for binding in bindings] if parameter == "values" else resolve(bindings[0])
        for parameter, bindings in op.inputs.items()
    }
    try:
        result = OPERATIONS[op.kind](**arguments)
    except (TypeError, ValueError, LookupError) as error:
        raise UnsupportedOperation(f"{op.name}: {op.kind}: {error}") from None
    return result if isinstance(result, list) else [result]


def _fits(shape: tuple[int, ...], type_: Type) -> bool:
    return len(shape) == len(type_.shape) and all(
        wanted in (None, size) for size, wanted in zip(shape, type_.shape, strict=True)
    )


def _rounded(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def _peak(x: Array) -> float:
    return max(float(x.max()), -float(x.min())) if x.size else 0.0


# The operations. Parameters are called as in MIL, arrays are whatever MIL says.


def _const(val: Any) -> Any:
    return val


def _affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """scale * (quantized_data - zero_point), scale and zero_point along an axis or scalar."""
    along = [1] * quantized_data.ndim
    along[int(axis)] = -1
    scale, zero_point = (x.reshape(along) if x.ndim else x for x in (scale.astype(np.float32), zero_point))
    return scale * (quantized_data.astype(np.float32) - zero_point.astype(np.float32))


def _blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), each scale and offset for a block of data."""

    def spread(x: Array) -> Array:
        for axis, (size, blocks) in enumerate(zip(data.shape, x.shape, strict=True)):
            x = np.repeat(x, size // blocks, axis=axis)
        return x.astype(np.float32)

    shifted = data.astype(np.float32) if offset is None else data.astype(np.float32) - spread(offset)
    return spread(scale) * shifted


def _lut_to_dense(indices: Array, lut: Array, shape: Array | None = None, vector_axis: Array | None = None) -> Array:
    """iOS 16: packed indices into lut (n,), to a shape. iOS 18: indices of any rank, lut (*blocks, n, vector)."""
    if shape is not None:
        bits = max(1, int(lut.size - 1).bit_length())
        return lut[unpacked(indices, bits, int(np.prod(shape)))].reshape(shape)
    if vector_axis is not None and lut.shape[-1] != 1:
        raise TypeError("palettes of vectors are not supported")
    block = tuple(size // blocks for size, blocks in zip(indices.shape, lut.shape, strict=False))
    table = lut[..., 0]
    where = [np.arange(size) // each for size, each in zip(indices.shape, block, strict=True)]
    return table[(*np.ix_(*where), indices)]


def _sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """iOS 16: a packed mask, to a shape. iOS 18: a mask of the result's shape."""
    if shape is not None:
        mask = unpacked(mask, 1, int(np.prod(shape))).reshape(shape)
    dense = np.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.astype(bool)] = nonzero_data
    return dense


def _conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Any = (1, 1),
    pad_type: str = "valid",
    pad: Any = (0, 0, 0, 0),
    dilations: Any = (1, 1),
    groups: Any = 1,
) -> Array:
    """(N, C, H, W) * (O, C / groups, h, w) -> (N, O, H', W'): products with the unfolded input, in bands of rows."""
    if x.ndim != 4:
        raise TypeError(f"convolutions of rank {x.ndim} are not supported")
    groups, (down, right) = int(groups), (int(stride) for stride in strides)
    extent = [int(d) * (size - 1) + 1 for d, size in zip(dilations, weight.shape[2:], strict=True)]
    top, bottom, left, rest = _padding(pad_type, pad, x.shape[2:], extent, (down, right))
    if top or bottom or left or rest:
        x = np.pad(x, [(0, 0), (0, 0), (top, bottom), (left, rest)])
    windows = sliding_window_view(x, extent, axis=(2, 3))[:, :, ::down, ::right]  # (N, C, H, W, *extent)
    windows = windows[..., :: int(dilations[0]), :: int(dilations[1])]
    N, C, H, W, h, w = windows.shape
    O = weight.shape[0]
    out = np.empty((N, O, H, W), dtype=np.float32)
    kernels = weight.reshape(groups, O // groups, -1)
    rows = max(1, COLUMNS_BYTES // (4 * C // groups * h * w * W))
    for n in range(N):
        for group, kernel in enumerate(kernels):
            channels = slice(group * C // groups, (group + 1) * C // groups)
            to = out[n, group * O // groups : (group + 1) * O // groups]
            for row in range(0, H, rows):
                band = windows[n, channels, row : row + rows]
                columns = band.transpose(0, 3, 4, 1, 2).reshape(kernel.shape[1], -1)
                to[:, row : row + rows] = (kernel @ columns).reshape(len(kernel), -1, W)
    if bias is not None:
        out += bias.reshape(1, -1, 1, 1)
    return out


def _padding(
    pad_type: str, pad: Any, size: tuple[int, ...], extent: list[int], strides: tuple[int, int]
) -> tuple[int, int, int, int]:
    """top, bottom, left, right."""
    if pad_type == "valid":
        return 0, 0, 0, 0
    if pad_type == "custom":
        top, bottom, left, right = (int(p) for p in pad)
        return top, bottom, left, right
    if pad_type not in ("same", "same_lower"):
        raise TypeError(f"pad_type {pad_type!r} is not supported")
    both = []
    for n, window, stride in zip(size, extent, strides, strict=True):
        total = max(0, (-(-n // stride) - 1) * stride + window - n)
        both += [total // 2, total - total // 2] if pad_type == "same" else [total - total // 2, total // 2]
    return both[0], both[1], both[2], both[3]


def _einsum(values: list[Array], equation: str) -> Array:
    """nchw,nwhu->nchu, as batched products."""
    if equation.replace(" ", "") != "nchw,nwhu->nchu":
        raise TypeError(f"the equation {equation} is not supported")
    x, y = values
    return (x.transpose(0, 2, 1, 3) @ y.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def _matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    return (x.swapaxes(-1, -2) if transpose_x else x) @ (y.swapaxes(-1, -2) if transpose_y else y)


def _softmax(x: Array, axis: Any) -> Array:
    e = np.exp(x - x.max(axis=int(axis), keepdims=True))
    e /= e.sum(axis=int(axis), keepdims=True)
    return e


def _sigmoid(x: Array) -> Array:
    y = np.exp(-x)
    y += 1
    return np.divide(1, y, out=y)


def _silu(x: Array) -> Array:
    y = _sigmoid(x)
    y *= x
    return y


def _reduce(function: Callable[..., Array]) -> Callable[..., Array]:
    def reduce(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        return function(x, axis=None if axes is None else tuple(map(int, axes)), keepdims=bool(keep_dims))

    return reduce


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Array:
    most = x.max(axis=axis, keepdims=True)
    total = np.log(np.exp(x - most).sum(axis=axis, keepdims=True)) + most
    return total if keepdims else total.squeeze(axis)


def _split(x: Array, axis: Any, num_splits: Any = None, split_sizes: Any = None) -> list[Array]:
    where = int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return np.split(x, where, axis=int(axis))


def _concat(values: list[Array], axis: Any, interleave: Any = False) -> Array:
    if interleave:
        raise TypeError("interleaved concat is not supported")
    return np.concatenate(values, axis=int(axis))


def _upsample_nearest(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    height, width = float(scale_factor_height), float(scale_factor_width)
    if height % 1 or width % 1:
        raise TypeError("fractional scale factors are not supported")
    return x.repeat(int(height), axis=-2).repeat(int(width), axis=-1)


def _cast(x: Array, dtype: str) -> Array:
    if not dtype.startswith("fp"):
        raise TypeError(f"casts to {dtype} are not supported")
    return _rounded(x) if dtype == "fp16" else x


OPERATIONS: dict[str, Callable[..., Any]] = {
    "const": _const,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_sparse_to_dense": _sparse_to_dense,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "square": lambda x: np.square(x),
    "sqrt": lambda x: np.sqrt(x),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "round": lambda x: np.rint(x),
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "identity": lambda x: x,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softmax": _softmax,
    "reduce_mean": _reduce(np.mean),
    "reduce_sum": _reduce(np.sum),
    "reduce_max": _reduce(np.max),
    "reduce_log_sum_exp": _reduce(_log_sum_exp),
    "conv": _conv,
    "einsum": _einsum,
    "matmul": _matmul,
    "transpose": lambda x, perm: x.transpose(perm),
    "reshape": lambda x, shape: x.reshape(shape),
    "split": _split,
    "concat": _concat,
    "upsample_nearest_neighbor": _upsample_nearest,
    "cast": _cast,
}
"""Each kind of operation as a function of its parameters."""
