"""What can be proved about a package before it leaves: lint, and its own answer against the MLX model's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vae import AutoencoderKL
from mlx_vae.coreml.evaluate import UnsupportedOperation, evaluate
from mlx_vae.coreml.faces import Face
from mlx_vae.coreml.lint import lint
from mlx_vae.coreml.package import Function, Package, PackageError, Type
from mlx_vae.coreml.program import FLOAT16_MAX
from mlx_vae.coreml.tools import coremltools, quiet

PSNR_FLOOR = {"none": 50.0, "int8": 32.0, "pal8": 34.0, "pal6": 22.0, "pal4": 10.0}
"""In dB, by compression, for float16; far enough below what is usual that only a defect falls under it."""
FLOAT32_FLOOR = 90.0
PICTURE_FLOOR = 45.0
"""Whole levels of a picture can't be closer than about this, however good the package."""
OURS = {"mlx_vae.part", "mlx_vae.io", "mlx_vae.precision", "mlx_vae.compress"}
"""The metadata that a comparison needs."""
SHOWN, SHOWN_PEAKS = 8, 3
"""Findings of one severity, and operations with the largest values, that are printed."""


@dataclass
class Report:
    """What was found, line by line, and the lines that fail the package."""

    lines: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    peaks: dict[str, dict[str, float]] = field(default_factory=dict)
    """For each evaluation, the largest |value| of every operation by its name."""

    @property
    def passed(self) -> bool:
        return not self.failures

    def fail(self, line: str) -> None:
        self.lines.append(f"FAILED {line}")
        self.failures.append(line)


def check(path: Path, vae: AutoencoderKL | None = None, say: Callable[[str], None] = lambda line: None) -> Report:
    """Lints and evaluates a package, and compares it with the model that it was made from.

    Packages of others, which carry no metadata of ours, are linted and evaluated only. Raises PackageError for what
    can't be read at all, and ValueError for a package that is not of this model.
    """
    package, report = Package.open(path), Report()
    mib = package.bytes_on_disk / 2**20
    version = package.spec.specificationVersion
    report.lines.append(f"{path.name}: {mib:.1f} MiB, specification version {version}")
    say("linting")
    _report_lint(package, report)
    for name, function in package.functions.items():
        _check_function(package, name, function, vae, report, say)
    return report


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """In dB; the peak is the range of the reference, which for a picture is about 2 (or 255)."""
    error = float(np.mean(np.square(image.astype(np.float64) - reference)))
    peak = float(reference.max() - reference.min()) or 1.0
    return float("inf") if error == 0 else 10 * float(np.log10(peak**2 / error))


def _report_lint(package: Package, report: Report) -> None:
    findings = lint(package)
    for severity, count in Counter(finding.severity for finding in findings).items():
        add = report.fail if severity == "error" else report.lines.append
        chosen = [finding for finding in findings if finding.severity == severity]
        for finding in chosen[:SHOWN]:
            add(f"lint {finding}")
        if count > SHOWN:
            add(f"lint {severity}: {count - SHOWN} more")
    if not findings:
        report.lines.append("lint: nothing to complain about")


def _check_function(
    package: Package,
    name: str,
    function: Function,
    vae: AutoencoderKL | None,
    report: Report,
    say: Callable[[str], None],
) -> None:
    largest_name, largest = max(
        ((n, t) for op in function.operations if not op.is_constant for n, t in op.outputs.items()),
        key=lambda item: item[1].bytes,
        default=("nothing", Type("OTHER", ())),
    )
    report.lines.append(f"{name}: largest activation {largest.bytes / 2**20:.1f} MiB ({largest_name}, {largest})")
    reference = None
    if vae is not None and package.metadata.keys() >= OURS:
        face = Face(vae, package.metadata["mlx_vae.part"], package.metadata["mlx_vae.io"])
        inputs = {face.input: face.example(_shape(function, face))}
        say(f"{name}: running the MLX model")
        reference = face.reference(inputs[face.input])
    else:
        report.lines.append(f"{name}: compared with no model")
        random = np.random.default_rng(0)
        inputs = {
            each: random.standard_normal([size or 1 for size in type_.shape]).astype(np.float32)
            for each, type_ in function.inputs.items()
        }
    for kind, rounded in (("float32 arithmetic", False), ("float16 rounding", True)):
        say(f"{name}: evaluating with {kind}")
        try:
            result = evaluate(function, inputs, round_float16=rounded)
        except (UnsupportedOperation, PackageError) as error:
            report.fail(f"{name}: {error}")
            return
        output = result.outputs[function.outputs[0]]
        _report_peaks(f"{name}, {kind}", result.peaks, report)
        if reference is not None:
            _compare(f"{name}, {kind}", output, reference, package.metadata, report)
    if sys.platform == "darwin":
        _run_core_ml(package, name, function, inputs, reference, report)


def _shape(function: Function, face: Face) -> tuple[int, ...]:
    """Of the input. Raises ValueError where the model has another number of channels."""
    found = function.inputs.get(face.input)
    shape = tuple(size or 1 for size in found.shape) if found else ()
    wanted = face.input_shape(face.vae.config.factor, face.vae.config.factor)
    if len(shape) != 4 or shape[1] != wanted[1]:
        raise ValueError(f"the package is of another model: its input {face.input} is {found}")
    return shape


def _report_peaks(title: str, peaks: dict[str, float], report: Report) -> None:
    lost = [name for name, peak in peaks.items() if not np.isfinite(peak)]
    if lost:
        report.fail(f"{title}: values that are not finite, first in {lost[0]}")
        return
    report.peaks[title] = peaks
    names = sorted(peaks, key=lambda each: -peaks[each])[:SHOWN_PEAKS]
    values = ", ".join(f"{peaks[name]:.4g} ({peaks[name] / FLOAT16_MAX:.2%} of float16's) in {name}" for name in names)
    report.lines.append(f"{title}: largest |value| {values}")


def _compare(title: str, output: np.ndarray, reference: np.ndarray, metadata: dict[str, str], report: Report) -> None:
    if output.shape != reference.shape:
        raise ValueError(f"the package is of another model: it gives {output.shape}, the model {reference.shape}")
    found = psnr(output, reference)
    floor = PSNR_FLOOR[metadata["mlx_vae.compress"]]
    if metadata["mlx_vae.precision"] == "float32" and metadata["mlx_vae.compress"] == "none":
        floor = FLOAT32_FLOOR
    if (metadata["mlx_vae.part"], metadata["mlx_vae.io"]) == ("decoder", "image"):
        floor = min(floor, PICTURE_FLOOR)
        most = float(np.max(np.abs(output - reference)))
        report.lines.append(f"{title}: at most {most:.0f} levels from the MLX model's picture")
    add = report.lines.append if found >= floor else report.fail
    add(f"{title}: PSNR {found:.1f} dB against the MLX model (at least {floor:.0f})")


def _run_core_ml(
    package: Package,
    name: str,
    function: Function,
    inputs: dict[str, np.ndarray],
    reference: np.ndarray | None,
    report: Report,
) -> None:
    """Core ML's own answer, and where it means to run each operation. Only macOS has it."""
    ct = coremltools()
    choice = {} if name == "main" else {"function_name": name}
    with quiet():
        model = ct.models.MLModel(str(package.path), **choice)
        try:
            prediction = model.predict({key: _for_core_ml(model, key, value) for key, value in inputs.items()})
        except RuntimeError as error:
            report.fail(f"{name}: Core ML: {error}")
            return
        plan = ct.models.compute_plan.MLComputePlan.load_from_path(model.get_compiled_model_path())
    output = np.asarray(prediction[function.outputs[0]], dtype=np.float32)
    if output.ndim == 2:
        output = output[None, None]  # a grey picture: HW -> NCHW
    elif output.ndim == 3:
        output = output[..., :3].transpose(2, 0, 1)[None]  # a picture: HWC -> NCHW
    if reference is not None:
        _compare(f"{name}, Core ML", output, reference, package.metadata, report)
    operations = plan.model_structure.program.functions[name].block.operations
    usages = [plan.get_compute_device_usage_for_mlprogram_operation(op) for op in operations]
    devices = Counter(type(usage.preferred_compute_device).__name__ for usage in usages if usage)
    report.lines.append(f"{name}: Core ML places " + ", ".join(f"{n} on {device}" for device, n in devices.items()))


def _for_core_ml(model: Any, name: str, value: np.ndarray) -> Any:
    """An array, or the PIL picture that an image input wants."""
    feature = next(each for each in model.get_spec().description.input if each.name == name)
    if feature.type.WhichOneof("Type") != "imageType":
        return value
    from PIL import Image

    pixels = value[0].transpose(1, 2, 0).astype(np.uint8)  # NCHW -> HWC
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
