"""From a checkpoint's tensors to the model's parameters: rename, bring into MLX's axis order, and check every one."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from mlx_vae.convert.layouts import canonical


def from_torch(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Canonical names; convolutions OIHW -> OHWI; attention's 1x1 convolutions (O, I, 1, 1) -> linear (O, I)."""
    weights = {}
    for name, tensor in tensors.items():
        name = canonical(name)
        if tensor.ndim == 4:
            if ".attentions." in name and tensor.shape[2:] == (1, 1):
                tensor = tensor.reshape(tensor.shape[:2])
            else:
                tensor = tensor.transpose(0, 2, 3, 1)  # OIHW -> OHWI
        weights[name] = tensor
    return weights


def differences(weights: Mapping[str, mx.array], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """A line for each parameter that is missing, unexpected or misshapen."""
    lines = [f"{name}: missing" for name in shapes if name not in weights]
    lines += [f"{name}: unexpected" for name in weights if name not in shapes]
    lines += [
        f"{name}: shape {tuple(weights[name].shape)}, the configuration wants {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and tuple(weights[name].shape) != tuple(shape)
    ]
    return lines
