"""From a model to `.mlpackage` folders."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vae.convert.families import family_of
from mlx_vae.coreml.calibrate import norm_prescales
from mlx_vae.coreml.check import Report, check
from mlx_vae.coreml.compress import MODES, expansion
from mlx_vae.coreml.faces import Face
from mlx_vae.coreml.package import Package
from mlx_vae.coreml.program import Recipe, builder, emit
from mlx_vae.coreml.tools import coremltools, quiet
from mlx_vae.version import __version__

TARGETS = {"iOS16": "macOS13", "iOS17": "macOS14", "iOS18": "macOS15"}
PRECISIONS = ("float16", "float32")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What to write. Raises ValueError, naming the option, for what can't be."""

    sizes: tuple[tuple[int, int], ...]
    """(width, height) of the pictures: one function each."""
    io: str = "tensor"
    precision: str = "float16"
    compress: str = "none"
    target: str = ""
    """A key of TARGETS; by default the oldest that will do."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sizes or len(set(self.sizes)) != len(self.sizes):
            raise ValueError("--size: give at least one, and each only once")
        oldest = "iOS16" if len(self.sizes) == 1 else "iOS18"
        if not self.target:
            object.__setattr__(self, "target", oldest)
        if self.target < oldest:
            raise ValueError(f"--target {self.target}: several sizes in one package need iOS18 (macOS15)")
        for name, choices in (("precision", PRECISIONS), ("compress", MODES), ("target", tuple(TARGETS))):
            if getattr(self, name) not in choices:
                raise ValueError(f"--{name} {getattr(self, name)!r}: one of {', '.join(choices)}")

    @property
    def dtype(self) -> type[np.floating]:
        return np.float16 if self.precision == "float16" else np.float32

    def function(self, size: tuple[int, int]) -> str:
        """The name of the function for pictures of a size: "main" where there is only one."""
        return "main" if len(self.sizes) == 1 else "size_{}x{}".format(*size)


def refuse(face: Face, path: Path, options: Options) -> None:
    """Raises FileExistsError rather than replace anything, and ValueError for sizes that the model doesn't do."""
    if path.exists():
        raise FileExistsError(f"{path} exists already")
    for size in options.sizes:
        face.input_shape(*size)


def export(face: Face, path: Path, options: Options, checked: bool = True, say: Say = lambda line: None) -> Report:
    """Writes one part of a model to `path`, a new .mlpackage; only one that passes the check gets there.

    Raises FileExistsError, and ValueError for what can't be exported.
    """
    refuse(face, path, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch(path) as folder:
        written = folder / path.name
        write_package(face, written, options, say)
        report = check(written, face.vae, say) if checked else Report([f"{path.name}: not checked"])
        if report.passed:
            written.rename(path)
            report.lines.append(f"{path}: written")
        else:
            report.lines.append(f"{path}: not written")
    return report


def write_package(face: Face, path: Path, options: Options, say: Say = lambda line: None) -> None:
    """Writes one part of a model to a new folder. `say` hears what is going on."""
    ct = coremltools()
    say("calibrating the norms")
    prescales = norm_prescales(face.vae) if options.precision == "float16" else {}
    recipe = Recipe(options.dtype, _weights(options), prescales)
    modules = face.modules()
    with scratch(path) as folder:
        single = {}
        for size in options.sizes:
            function = options.function(size)
            say(f"building {face.part} {size[0]}x{size[1]}")
            single[function] = path if function == "main" else folder / f"{function}.mlpackage"
            with quiet():
                _convert(face, modules, size, options, recipe).save(str(single[function]))
        if len(single) > 1:
            say(f"joining {len(single)} sizes")
            functions = ct.utils.MultiFunctionDescriptor()
            for function, source in single.items():
                functions.add_function(str(source), "main", function)
            functions.default_function_name = options.function(options.sizes[0])
            with quiet():
                ct.utils.save_multifunction(functions, str(path))
    package = Package.open(path)
    about = package.spec.description.metadata
    about.shortDescription = f"The {face.part} of an AutoencoderKL of factor {face.vae.config.factor}"
    about.license = options.metadata.get("license", "")
    about.userDefined.update(_metadata(face, options))
    package.write_spec()


def _weights(options: Options) -> Callable[[np.ndarray, str], Any]:
    """The Var of a weight, compressed as the options say; once, however many sizes use it."""
    done: dict[str, tuple[str, dict[str, Any]] | None] = {}

    def weight(values: np.ndarray, name: str) -> Any:
        if name not in done:
            done[name] = expansion(values, options.compress, modern=options.target == "iOS18")
        chosen = done[name]
        if chosen is None:
            return values
        operation, parameters = chosen
        return getattr(builder(), operation)(**parameters, name=f"{name}.weight")

    return weight


def _convert(
    face: Face, modules: Sequence[tuple[str, Any]], size: tuple[int, int], options: Options, recipe: Recipe
) -> Any:
    ct, mb = coremltools(), builder()
    from coremltools.converters.mil.mil import Function, Program, types

    shape = face.input_shape(*size)
    target = getattr(ct.target, options.target)
    placeholder = mb.placeholder(shape, dtype=types.fp32)
    with Function({face.input: placeholder}, opset_version=target) as function:
        x = function.inputs[face.input]
        if options.precision == "float16":
            x = mb.cast(x=x, dtype="fp16", name="input.float16")
        offset = face.offset()
        if offset is not None:
            x = mb.add(x=x, y=recipe.per_channel(offset, "input.offset"), name="input.offset")
        for name, module in modules:
            x = emit(module, x, name, recipe)
        if face.gives_picture:
            x = mb.clip(x=x, alpha=recipe.dtype(0), beta=recipe.dtype(255), name="output.clipped")
            x = mb.round(x=x, name="output.levels")
        x = mb.cast(x=x, dtype="fp32", name=face.output) if options.precision == "float16" else _named(x, face.output)
        function.set_outputs([x])
    program = Program()
    program.add_function("main", function)
    if face.gives_picture:
        function.set_output_types([ct.ImageType(color_layout=_layout(x.shape[1]))])
    return ct.convert(
        program,
        convert_to="mlprogram",
        inputs=[ct.ImageType(face.input, shape, color_layout=_layout(shape[1]))] if face.takes_picture else None,
        minimum_deployment_target=target,
        compute_precision=ct.precision.FLOAT32,  # that is, as written
        pass_pipeline=ct.PassPipeline(["common::const_deduplication", "common::dead_code_elimination"], "as_written"),
        skip_model_load=True,
    )


def _named(x: Any, name: str) -> Any:
    x.name = name
    return x


def _layout(channels: int) -> Any:
    layouts = coremltools().colorlayout
    return layouts.RGB if channels == 3 else layouts.GRAYSCALE


def _metadata(face: Face, options: Options) -> dict[str, str]:
    """What an app needs to know, as strings; lists are separated by commas."""
    config = face.vae.config
    shift = config.latents_mean or (config.shift_factor or 0.0,)
    scale = tuple(config.scaling_factor / std for std in config.latents_std or (1.0,))
    return {
        "mlx_vae.version": __version__,
        "mlx_vae.coremltools": coremltools().__version__,
        "mlx_vae.family": family_of(config) or "",
        "mlx_vae.part": face.part,
        "mlx_vae.io": face.io,
        "mlx_vae.input": face.input,
        "mlx_vae.output": face.output,
        "mlx_vae.sizes": ",".join(f"{width}x{height}" for width, height in options.sizes),
        "mlx_vae.functions": ",".join(map(options.function, options.sizes)),
        "mlx_vae.factor": str(config.factor),
        "mlx_vae.latent_channels": str(config.latent_channels),
        "mlx_vae.latent_shapes": ",".join(
            f"1x{config.latent_channels}x{height // config.factor}x{width // config.factor}"
            for width, height in options.sizes
        ),
        "mlx_vae.scale": ",".join(map(repr, scale)),
        "mlx_vae.shift": ",".join(map(repr, map(float, shift))),
        "mlx_vae.precision": options.precision,
        "mlx_vae.compress": options.compress,
        "mlx_vae.target": f"{options.target}, {TARGETS[options.target]}",
        **{f"mlx_vae.{key}": value for key, value in options.metadata.items()},
    }


@contextlib.contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """A new empty folder beside `path`, gone when the block ends."""
    folder = path.with_name(f".{path.stem}.{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
