"""What in a package keeps it off the Neural Engine, as far as that can be read from the program.

The engine computes in float16, on tensors of rank 4 whose axes are fixed and at most 16384 long, and stores the last
axis in units of 64 bytes. What breaks this runs on the CPU or the GPU, or is refused by the engine's compiler.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_vae.coreml.package import Function, Operation, Package, Type

LONGEST_AXIS = 16384
ALIGNMENT = 32
"""float16 numbers in 64 bytes."""
LARGE = 1 << 20
"""Bytes from which on a badly aligned tensor is worth a warning."""

KNOWN = {
    "add", "batch_norm", "cast", "clip", "concat", "conv", "conv_transpose", "einsum", "exp", "gelu", "identity",
    "layer_norm", "linear", "log", "matmul", "max_pool", "avg_pool", "maximum", "minimum", "mul", "pad", "pow",
    "real_div", "reduce_log_sum_exp", "reduce_max", "reduce_mean", "reduce_min", "reduce_sum", "relu", "reshape",
    "resize_bilinear", "round", "rsqrt", "sigmoid", "silu", "slice_by_index", "slice_by_size", "softmax", "split",
    "sqrt", "square", "squeeze", "expand_dims", "sub", "tanh", "transpose", "upsample_bilinear",
    "upsample_nearest_neighbor",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One complaint. Errors fail an export, warnings are worth knowing."""

    severity: str
    operation: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.operation}: {self.message}"


def lint(package: Package) -> list[Finding]:
    """Of all functions; errors first. Reads any ML program."""
    findings = [finding for function in package.functions.values() for finding in _lint(function)]
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity)


def _lint(function: Function) -> Iterable[Finding]:
    operations = [op for op in function.operations if not op.is_constant]
    computes = [op for op in operations if op.kind != "cast"]
    in_float32 = [op for op in computes if any(type_.dtype == "FLOAT32" for type_ in op.outputs.values())]
    if in_float32 and len(in_float32) == len(computes):
        yield Finding("warning", function.name, "computes in float32 throughout: it will run on the CPU or the GPU")
    else:
        for op in in_float32:
            yield Finding("error", op.name, f"{op.kind} computes in float32")
    for op in operations:
        if op.kind not in KNOWN:
            yield Finding("error", op.name, f"{op.kind} is not known to run on the Neural Engine")
        at_a_border = function.inputs.keys() & op.names or op.outputs.keys() & function.outputs
        if op.kind == "cast" and not at_a_border:
            yield Finding("warning", op.name, "a cast between operations; casts belong at the borders")
        if op.kind == "softmax":
            yield from _softmax(op, function)
        for type_ in op.outputs.values():
            yield from _tensor(op.name, type_)
    for name, type_ in function.inputs.items():
        if type_.is_dynamic:
            yield Finding("error", name, f"dynamic dimensions in an input: {type_}")


def _tensor(name: str, type_: Type) -> Iterable[Finding]:
    if type_.is_dynamic:
        yield Finding("error", name, f"dynamic dimensions: {type_}")
        return
    shape = [size or 0 for size in type_.shape]
    if type_.dtype not in ("FLOAT16", "FLOAT32"):
        yield Finding("warning", name, f"{type_.dtype.lower()} is not float16")
    if len(shape) != 4:
        yield Finding("error" if len(shape) > 4 else "warning", name, f"rank {len(shape)}, the engine wants 4: {type_}")
    if max(shape, default=0) > LONGEST_AXIS:
        yield Finding("error", name, f"an axis over {LONGEST_AXIS}: {type_}")
    if shape and shape[-1] % ALIGNMENT and type_.bytes > LARGE:
        padded = -(-shape[-1] // ALIGNMENT) * ALIGNMENT
        yield Finding("warning", name, f"the last axis is stored as {padded}, not {shape[-1]}: {type_}")


def _softmax(op: Operation, function: Function) -> Iterable[Finding]:
    """Along the channels it is a reduction over planes; along another axis the engine transposes first."""
    binding = op.inputs.get("axis", [None])[0]
    rank = len(next(iter(op.outputs.values())).shape)
    if isinstance(binding, str):
        definition = next((each for each in function.operations if binding in each.outputs), None)
        binding = definition.inputs["val"][0] if definition and definition.kind == "const" else None
    axis = -1 if binding is None else int(op.package.value(binding))
    if axis % max(rank, 1) != 1:
        yield Finding("warning", op.name, f"softmax along axis {axis}, the engine wants the channels, 1")
