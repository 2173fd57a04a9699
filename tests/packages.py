"""Core ML packages for the tests: ours of small models, and those of others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vae import AutoencoderKL
from mlx_vae.coreml.evaluate import evaluate
from mlx_vae.coreml.export import Options, write_package
from mlx_vae.coreml.faces import Face
from mlx_vae.coreml.package import Package
from mlx_vae.coreml.tools import coremltools, quiet


def written(
    path: Path, vae: AutoencoderKL, part: str = "decoder", size: tuple[int, int] = (28, 20), **options: Any
) -> tuple[Face, Package]:
    face = Face(vae, part, options.get("io", "tensor"))
    write_package(face, path, Options((size,), **options))
    return face, Package.open(path)


def answer(package: Package, face: Face, x: np.ndarray, round_float16: bool = False, name: str = "main") -> np.ndarray:
    return evaluate(package.functions[name], {face.input: x}, round_float16).outputs[face.output]


def error(ours: np.ndarray, reference: np.ndarray) -> float:
    """Relative, in float64."""
    assert ours.shape == reference.shape
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def foreign(path: Path, body: Callable[..., Any], *shapes: Any, target: str = "iOS16", dtype: str = "fp32") -> Package:
    """A package of `body(mb, x, ...)`, as others would write it: coremltools' own passes, no metadata."""
    ct = coremltools()
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program, types

    dtypes = {"fp32": types.fp32, "fp16": types.fp16}
    inputs = {f"x{i}": mb.placeholder(shape, dtype=dtypes[dtype]) for i, shape in enumerate(shapes)}
    with quiet():
        with Function(inputs, opset_version=getattr(ct.target, target)) as function:
            outputs = body(mb, *function.inputs.values())
            function.set_outputs(list(outputs) if isinstance(outputs, (list, tuple)) else [outputs])
        program = Program()
        program.add_function("main", function)
        ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=getattr(ct.target, target),
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        ).save(str(path))
    return Package.open(path)
