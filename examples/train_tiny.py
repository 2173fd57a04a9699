"""Trains the embedded model: a small AutoencoderKL, on pictures that it draws itself.

    python examples/train_tiny.py work                     # one process
    mlx.launch -n 2 python examples/train_tiny.py work     # the batch shared by two, as for the embedded weights

`work` keeps the drawn pictures and a checkpoint; a run that was interrupted goes on from there, exactly as if it had
not been. At the end it holds `model`, a folder for `AutoencoderKL.from_pretrained`.
"""

from __future__ import annotations

import mlx_vae  # noqa: F401  isort: skip  (before mlx: see mlx_vae/blas.py)

import argparse
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from drawn_pictures import draw
from mlx.utils import tree_flatten, tree_unflatten
from tqdm import tqdm

from mlx_vae import AutoencoderKL, AutoencoderKLConfig
from mlx_vae.files import replacing

CONFIG = AutoencoderKLConfig(
    block_out_channels=(16, 32, 48, 64),
    layers_per_block=1,
    norm_num_groups=8,
    latent_channels=16,
    sample_size=256,
    force_upcast=False,
)
FIRST_PICTURE = 1000  # the number of the first picture to train on; those before it are for evaluation
PICTURE_SIZE = 256
SIDES = ((0.28, (64,)), (0.8, (128, 192)), (1.0, (192, 256)))
"""Until which part of the run the pieces have which sides in pixels, in turn. GroupNorm sees all of a picture: a model
that only ever saw small pieces loses 2 dB on a whole one."""
KL_WEIGHT = 1e-5  # of the mean over latent values, against the mean over pixels
L1_WEIGHT = 0.5  # fades to nothing by the end: what is measured is the squared error
MUON_LEARNING_RATE = 2e-2
ADAM_LEARNING_RATE = 2e-3
EMA_DECAY = 0.998


def drawn_pictures(path: Path, count: int) -> np.ndarray:
    """(count, 256, 256, 3) uint8, drawn once and kept in a file."""
    if not path.exists():
        numbers = range(FIRST_PICTURE, FIRST_PICTURE + count)
        with ProcessPoolExecutor() as processes:
            drawn = processes.map(draw, numbers, chunksize=8)
            pictures = np.stack(list(tqdm(drawn, "drawing", total=count, disable=None)))
        with replacing(path) as temporary:
            np.save(temporary, pictures)
    pictures = np.load(path, mmap_mode="r")
    if pictures.shape != (count, PICTURE_SIZE, PICTURE_SIZE, 3):
        raise SystemExit(f"{path}: pictures of shape {pictures.shape}; draw anew by deleting it")
    return pictures


def crops(pictures: np.ndarray, count: int, size: int, seed: Sequence[int]) -> mx.array:
    """(count, size, size, 3) in [-1, 1]: random pieces, half of them mirrored, half of them on their side."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(count):
        top, left = rng.integers(0, PICTURE_SIZE - size + 1, size=2)
        piece = pictures[rng.integers(len(pictures)), top : top + size, left : left + size]
        if rng.random() < 0.5:
            piece = piece[:, ::-1]
        if rng.random() < 0.5:
            piece = piece.transpose(1, 0, 2)
        pieces.append(piece)
    return mx.array(np.stack(pieces).astype(np.float32) / 127.5 - 1)


def side_of(step: int, steps: int) -> int:
    """The side in pixels of the pieces of a step."""
    sides = next(sides for end, sides in SIDES if step < end * steps)
    return sides[step % len(sides)]


def initialize(vae: AutoencoderKL) -> None:
    """Every residual branch begins at zero and every other weight keeps the variance, so that the whole begins nearly
    linear; the posterior begins narrow, so that its noise does not drown the first signal.
    """
    weights = vae.named_parameters()
    for name, value in weights.items():
        if name.endswith(("conv2.weight", "to_out.0.weight", ".bias")) and "norm" not in name:
            weights[name] = mx.zeros_like(value)
        elif value.ndim > 1:
            weights[name] = value * math.sqrt(3)  # MLX draws from +-1 / sqrt(fan_in)
    channels = vae.config.latent_channels
    weights["quant_conv.bias"] = mx.concatenate([mx.zeros(channels), mx.full((channels,), -6.0)])
    vae.load_weights(list(weights.items()))


def loss_of(vae: AutoencoderKL, x: mx.array, l1_weight: float, key: mx.array) -> tuple[mx.array, mx.array]:
    """The loss of pictures x (N, H, W, 3), and their mean squared error.

    The root of each picture's error gives smooth pictures their share, as the logarithm of the PSNR does.
    """
    posterior = vae.encode(x).latent_dist
    z = posterior.sample(key)
    difference = vae.decode(z).sample - x
    squared_error = mx.mean(mx.square(difference), axis=(1, 2, 3))  # (N,)
    kl = mx.mean(posterior.kl()) / (z.size / z.shape[0])
    loss = mx.mean(mx.sqrt(squared_error + 1e-4)) + l1_weight * mx.mean(mx.abs(difference)) + KL_WEIGHT * kl
    return loss, mx.mean(squared_error)


def is_for_muon(name: str, weight: mx.array) -> bool:
    """Muon (Jordan et al., 2024) takes kernels and matrices inside the model; Adam the vectors and what is outside."""
    return weight.ndim > 1 and not name.startswith(("encoder.conv_in", "decoder.conv_out", "quant", "post_quant"))


def averaged(gradients: Any, group: mx.distributed.Group) -> Any:
    """The mean of the processes' gradients, scaled down to a norm of 1 where it is larger."""
    flat = tree_flatten(gradients)
    joined = mx.concatenate([gradient.reshape(-1) for _, gradient in flat])
    joined = mx.distributed.all_sum(joined, group=group) / group.size()
    joined = joined * mx.minimum(1, 1 / mx.linalg.norm(joined))
    ends = np.cumsum([gradient.size for _, gradient in flat]).tolist()
    pieces = mx.split(joined, ends[:-1])
    return tree_unflatten(
        [(name, piece.reshape(value.shape)) for (name, value), piece in zip(flat, pieces, strict=True)]
    )


class Training:
    """The state of a run: a model, its moving average, and an optimizer, after so many steps."""

    def __init__(self, config: AutoencoderKLConfig, steps: int, seed: int = 0) -> None:
        mx.random.seed(seed)
        self.vae = AutoencoderKL(config)
        initialize(self.vae)
        self.average = self.vae.named_parameters()
        self.steps = steps
        self.step = 0
        muon = optim.Muon(MUON_LEARNING_RATE, weight_decay=0.0)
        adam = optim.Adam(ADAM_LEARNING_RATE, betas=[0.9, 0.99])
        self.optimizer = optim.MultiOptimizer([muon, adam], [is_for_muon])
        self.optimizer.init(self.vae.trainable_parameters())
        self.value_and_grad = nn.value_and_grad(self.vae, loss_of)

    def advance(self, x: mx.array, group: mx.distributed.Group) -> float:
        """One step on this process's pictures x (N, H, W, 3); returns their mean squared error."""
        progress = self.step / self.steps
        key = mx.random.key(self.step * group.size() + group.rank())
        (_, squared_error), gradients = self.value_and_grad(self.vae, x, L1_WEIGHT * (1 - progress), key)
        rate = min(1.0, (self.step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer, peak in zip(self.optimizer.optimizers, (MUON_LEARNING_RATE, ADAM_LEARNING_RATE), strict=True):
            optimizer.learning_rate = rate * peak
        self.optimizer.update(self.vae, averaged(gradients, group))
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        parameters = self.vae.named_parameters()
        self.average = {name: decay * self.average[name] + (1 - decay) * parameters[name] for name in parameters}
        mx.eval(self.vae.parameters(), self.optimizer.state, self.average, squared_error)
        self.step += 1
        return squared_error.item()

    def save(self, path: Path) -> None:
        state = {"model": self.vae.parameters(), "average": self.average, "optimizer": self.optimizer.state}
        with replacing(path) as temporary:
            mx.save_safetensors(str(temporary), tree_flatten(state, destination={}), {"step": str(self.step)})

    def load(self, path: Path) -> None:
        loaded: Any = mx.load(str(path), return_metadata=True)
        flat, metadata = loaded
        average = {name.removeprefix("average."): value for name, value in flat.items() if name.startswith("average.")}
        state = tree_unflatten([item for item in flat.items() if not item[0].startswith("average.")])
        self.vae.update(state["model"])
        self.optimizer.state = state["optimizer"]
        self.average = average
        self.step = int(metadata["step"])
        mx.eval(self.vae.parameters(), self.optimizer.state, self.average)

    def result(self, pictures: np.ndarray) -> AutoencoderKL:
        """The averaged model in float16, its scaling_factor one over the deviation of its latents of these pictures."""
        vae = AutoencoderKL(self.vae.config)
        vae.load_weights(list(self.average.items()))
        z = [vae.encode(mx.array(x[None] / 127.5 - 1, dtype=mx.float32)).latent_dist.mode() for x in pictures]
        scaling_factor = round(1 / mx.std(mx.concatenate(z)).item(), 5)
        measured = AutoencoderKL(replace(vae.config, scaling_factor=scaling_factor))
        measured.load_weights(list(self.average.items()))
        measured.set_dtype(mx.float16)
        return measured


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("work", type=Path, help="a folder for the pictures, the checkpoint and the model")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--pixels", type=int, default=16 * 64 * 64, help="in a step, of all processes together")
    parser.add_argument("--pictures", type=int, default=1600, help="how many to draw")
    arguments = parser.parse_args(argv)

    group = mx.distributed.init()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if group.rank() == 0:
        drawn_pictures(arguments.work / "pictures.npy", arguments.pictures)
    mx.eval(mx.distributed.all_sum(mx.zeros(1), group=group))  # wait for the pictures
    pictures = drawn_pictures(arguments.work / "pictures.npy", arguments.pictures)

    training = Training(CONFIG, arguments.steps)
    checkpoint = arguments.work / "checkpoint.safetensors"
    if checkpoint.exists():
        training.load(checkpoint)
    quiet = None if group.rank() == 0 else True
    with tqdm(total=training.steps, initial=training.step, unit="step", disable=quiet, mininterval=10) as bar:
        recent = 1.0
        while training.step < training.steps:
            side = side_of(training.step, training.steps)
            count = max(1, arguments.pixels // (side * side * group.size()))
            x = crops(pictures, count, side, (training.step, group.rank()))
            recent += 0.02 * (training.advance(x, group) - recent)
            bar.set_postfix(psnr=f"{10 * math.log10(4 / recent):.2f} dB", refresh=False)
            bar.update()
            if group.rank() == 0 and (training.step % 250 == 0 or training.step == training.steps):
                training.save(checkpoint)
    if group.rank() == 0:
        training.result(pictures[:64]).save_pretrained(arguments.work / "model")
        print(arguments.work / "model")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
