"""From a file's tensors to the model's parameters and back: pick, rename, bring into MLX's axis order, check each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_vae.convert.layouts import LEFT_OUT, OTHER_CLASSES, PREFIXES, Layout, layout_of
from mlx_vae.convert.tensors import STORED_AS, CheckpointError, TensorView

EXPONENT = 0x7F80
"""A bfloat16 with all of these bits is infinite or not a number."""


@dataclass(frozen=True)
class Parameters:
    """The autoencoder's tensors in a file, under the model's names and in MLX's axis order; nothing is read yet.

    names: the file's own name of each. left_out: the names of LEFT_OUT. foreign: what belongs to other models.
    """

    path: Path
    layout: str
    tensors: dict[str, TensorView]
    names: dict[str, str]
    left_out: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def dtype(self) -> str:
        """The one dtype, or float32 of several: the widest."""
        dtypes = {tensor.dtype for tensor in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else "float32"

    def read(self, shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype | None = None) -> dict[str, mx.array]:
        """The parameters named in `shapes`, all and no others, in `dtype` or the one on disk.

        Raises CheckpointError that names every tensor that is missing, unexpected, misshapen or no number.
        """
        self.check(shapes)
        target = getattr(mx, self.dtype) if dtype is None else dtype
        if not mx.issubdtype(target, mx.floating):
            raise CheckpointError(f"{self.path}: dtype {target}, wanted a floating-point one")
        weights, bad = {}, []
        for name, tensor in self.tensors.items():
            weights[name], problem = _to_mlx(tensor, target)
            if problem:
                bad.append(f"{name}: {problem}")
        self._refuse("hold no usable numbers", bad)
        return weights

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError that names every tensor that is missing, unexpected, misshapen or of another dtype."""
        self._refuse("do not fit", self._differences(shapes))

    def _refuse(self, why: str, lines: list[str]) -> None:
        if lines:
            raise CheckpointError(f"{self.path}: tensors that {why}: {len(lines)}\n  " + "\n  ".join(lines))

    def _differences(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        lines = [f"{name}: missing" for name in shapes if name not in self.tensors]
        lines += [f"{self.names[name]}: unexpected" for name in self.tensors if name not in shapes]
        for name, shape in shapes.items():
            if name in self.tensors:
                tensor = self.tensors[name]
                if tensor.shape != tuple(shape):
                    lines.append(f"{name}: shape {tensor.shape}, the configuration wants {tuple(shape)}")
                if tensor.dtype not in STORED_AS:
                    lines.append(f"{name}: dtype {tensor.dtype}, wanted {', '.join(STORED_AS)}")
        return lines


def parameters(path: Path, tensors: Mapping[str, TensorView], is_mlx: bool) -> Parameters:
    """Accounts for every tensor of a file by name.

    Raises CheckpointError for a file without an autoencoder, with two, with a tensor twice, or with another class's.
    """
    prefixes = [p for p in PREFIXES if any(name.startswith((p + "encoder.", p + "decoder.")) for name in tensors)]
    if len(prefixes) > 1:
        raise CheckpointError(f"{path}: two autoencoders, under {' and under '.join(prefixes)}; one was wanted")
    prefix = prefixes[0] if prefixes else ""
    inside = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    for name, class_name in OTHER_CLASSES.items():
        if name in inside:
            raise CheckpointError(f"{path}: {inside[name]} shows {class_name}, which is not supported")
    if not any(name.startswith(("encoder.", "decoder.")) for name in inside):
        some = ", ".join(list(tensors)[:3]) or "nothing"
        raise CheckpointError(f"{path}: no autoencoder in it; its {len(tensors)} tensors are {some} ...")
    left_out = tuple(full for name, full in inside.items() if name.startswith(LEFT_OUT))
    wanted = [name for name in inside if not name.startswith(LEFT_OUT)]
    layout = layout_of(wanted)
    views: dict[str, TensorView] = {}
    names: dict[str, str] = {}
    for name, ours in layout.canonical(wanted).items():
        if ours in names:
            raise CheckpointError(f"{path}: {ours} is there twice, as {names[ours]} and as {inside[name]}")
        names[ours] = inside[name]
        views[ours] = tensors[inside[name]] if is_mlx else _to_mlx_axes(ours, tensors[inside[name]])
    foreign = tuple(name for name in tensors if not name.startswith(prefix))
    return Parameters(path, "mlx" if is_mlx else layout.name, views, names, left_out, foreign)


def to_torch(weights: Mapping[str, mx.array], layout: Layout, attention_axes: int) -> dict[str, mx.array]:
    """The model's parameters under a layout's names and in torch's axis order; the inverse of reading them.

    attention_axes: 2 for linear layers, 4 for 1x1 convolutions.
    """
    names = layout.theirs(weights)
    tensors = {}
    for name, weight in weights.items():
        if weight.ndim == 4:
            weight = weight.transpose(0, 3, 1, 2)  # OHWI -> OIHW
        elif weight.ndim == 2:
            weight = weight.reshape(*weight.shape, *(1,) * (attention_axes - 2))
        tensors[names[name]] = weight
    return tensors


def _to_mlx_axes(name: str, tensor: TensorView) -> TensorView:
    """Convolutions OIHW -> OHWI; attention's 1x1 convolutions (O, I, 1, 1) -> linear (O, I)."""
    if ".attentions." in name and len(tensor.shape) > 2 and set(tensor.shape[2:]) == {1}:
        return tensor.drop_trailing(len(tensor.shape) - 2)
    return tensor.transpose((0, 2, 3, 1)) if len(tensor.shape) == 4 else tensor


def _to_mlx(tensor: TensorView, dtype: mx.Dtype) -> tuple[mx.array, str]:
    """The array, computed, and what is wrong with its values, if anything."""
    stored = tensor.read()
    if tensor.dtype == "bfloat16":
        finite = bool(np.all(stored & EXPONENT != EXPONENT))
        array = mx.array(stored).view(mx.bfloat16)
    else:
        finite = bool(np.isfinite(stored).all())
        array = mx.array(stored)
    if not finite:
        return array, "some values are not finite"
    narrowed = array.dtype != dtype
    array = array.astype(dtype)
    mx.eval(array)
    if narrowed and not mx.isfinite(array).all().item():
        return array, f"some values are too large for {dtype}"
    return array, ""
