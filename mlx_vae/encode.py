"""python -m mlx_vae.encode: pictures in, latents out, one file or a hundred thousand.

Pictures are taken in runs of CHUNK, in the order of their names, and inside a run those of one size go through the
model together. So what a picture is batched with depends on the list of pictures alone, not on the machine's timing, on
what an earlier run has done, or on how many processes share the work: every one of them writes the same bits.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import re
import sys
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
from PIL import Image, ImageColor
from tqdm import tqdm

from mlx_vae import cli
from mlx_vae.autoencoder import AutoencoderKL
from mlx_vae.files import writing_into
from mlx_vae.images import load_image, pad_to_multiple, picture_endings
from mlx_vae.inputs import Input, find_inputs
from mlx_vae.latents import Latents, read_metadata, save_latents
from mlx_vae.posterior import DiagonalGaussianDistribution

CHUNK = 32
BATCH_PIXELS = 2 << 20
"""No batch holds more pixels than this, unless it holds a single picture."""

READERS = 4
WRITERS = 2
FAILED = 1

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """What the latents of a picture depend on, besides the picture and the model.

    `seed` is None for the mode of the posterior; otherwise it is sampled, with noise that depends on the seed and on
    the name of the picture. `background`, `resize` and `max_side` are those of `images.load_image`.

    Raises ValueError for values that make no sense.
    """

    seed: int | None = None
    scaled: bool = True
    dtype: mx.Dtype = mx.float32
    batch_size: int = 8
    background: str = "white"
    resize: tuple[int, int] | None = None
    max_side: int | None = None

    def __post_init__(self) -> None:
        ImageColor.getrgb(self.background)
        if min(self.resize or (1,)) < 1 or (self.max_side or 1) < 1 or self.batch_size < 1:
            raise ValueError("a size of a picture or of a batch must be 1 or more")
        if self.resize and self.max_side:
            raise ValueError("resize and max_side exclude each other")

    def record(self) -> dict[str, str]:
        """As strings, for the metadata of a latent file."""
        return {
            "posterior": "mode" if self.seed is None else f"sample, seed {self.seed}",
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "batch_size": str(self.batch_size),
            "background": "#" + bytes(ImageColor.getrgb(self.background)[:3]).hex(),
            "resize": "x".join(map(str, self.resize or ())),
            "max_side": str(self.max_side or ""),
        }


@dataclass
class Report:
    """What a run has done: counts of pictures, over all processes; `failures` has a sentence for each of this one's."""

    encoded: int = 0
    skipped: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    model_seconds: float = 0.0

    def fail(self, reason: str) -> None:
        self.failed += 1
        self.failures.append(reason)

    def summary(self) -> str:
        done = f"{self.encoded} encoded, {self.skipped} already done, {self.failed} failed"
        if not self.encoded:
            return done
        rate, share = self.encoded / self.seconds, self.model_seconds / self.seconds
        return f"{done}; {self.seconds:.1f} s, {rate:.3g} pictures/s, {share:.0%} of it in the model"


class Job(NamedTuple):
    """A picture to encode, and the latent file to write."""

    picture: Input
    target: Path


class Entry(NamedTuple):
    """A picture that is ready for the model, (H, W, 3) before padding; or whose latent file is `done`, and then without
    its values."""

    job: Job
    height: int
    width: int
    values: np.ndarray | None = None
    record: dict[str, str] | None = None
    notices: Sequence[str] = ()

    @property
    def done(self) -> bool:
        return self.values is None


def encode_files(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str],
    settings: Settings | None = None,
) -> Report:
    """Encodes pictures into latent files: those that `sources` name, the folders and globs among them whole.

    `output` is a .safetensors file for a single picture, or a folder, where each latent file is called after its
    picture and lies as deep as it did. A file that is there already, whole, and made from the same picture by the same
    model with the same settings is left as it is. Under `mx.distributed` each process takes its share.

    A picture that can't be encoded is told of in the report. Raises ValueError for other mistakes of the user's, before
    anything is written, and OSError when there is no room left.
    """
    settings = settings or Settings()
    start, group = time.perf_counter(), mx.distributed.init()
    jobs = _jobs(find_inputs(sources, picture_endings()), Path(output))
    _check_agreement(jobs, group)
    vae = AutoencoderKL.from_pretrained(model, dtype=settings.dtype)
    if vae.config.in_channels != 3:
        raise ValueError(f"{model}: takes pictures of {vae.config.in_channels} channels; picture files give 3")
    folder = _folder(Path(output))
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(_chunks(jobs))[group.rank() :: group.size()]
    run = _Run(vae, os.fspath(model), settings)
    with (
        writing_into(folder, {job.target for job in jobs}),
        _quiet_pillow(),
        tqdm(total=sum(map(len, mine)), unit="picture", disable=True if group.rank() else None) as bar,
    ):
        run.encode(mine, bar)
    report = run.report
    report.encoded, report.skipped, report.failed = _summed([report.encoded, report.skipped, report.failed], group)
    report.seconds = time.perf_counter() - start
    return report


# Which pictures, and where to


def _folder(output: Path) -> Path:
    return output.parent if _is_file(output) else output


def _is_file(output: Path) -> bool:
    return output.suffix == ".safetensors" and not output.is_dir()


def _jobs(inputs: Sequence[Input], output: Path) -> list[Job]:
    """Raises ValueError where two pictures would be written to one file, letters' case aside as on a Mac."""
    if _is_file(output):
        if len(inputs) > 1:
            raise ValueError(f"{output}: one file for {len(inputs)} pictures; name a folder")
        if not output.parent.is_dir():
            raise ValueError(f"{output}: no such folder as {output.parent}")
        return [Job(inputs[0], output)]
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; wanted a folder, or a file that ends in .safetensors")
    taken: dict[str, Path] = {}
    for picture in inputs:
        name = picture.name.with_suffix("").as_posix()
        other = taken.setdefault(name.casefold(), picture.path)
        if other != picture.path:
            raise ValueError(
                f"{other} and {picture.path} would both be written to {output / name}.safetensors; "
                "rename one, or encode them into different folders"
            )
    return [Job(picture, output / picture.name.with_suffix(".safetensors")) for picture in inputs]


def _chunks(jobs: list[Job]) -> Iterator[list[Job]]:
    return (jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK))


def _check_agreement(jobs: Sequence[Job], group: mx.distributed.Group) -> None:
    """Raises ValueError unless all processes have found the same pictures: they divide them by counting."""
    names = "\n".join(str(job.picture.name) for job in jobs)
    digest = hashlib.sha256(names.encode(errors="surrogateescape")).digest()[:3]
    mark = int.from_bytes(digest, "big")  # of 24 bits, so that sums of a few hundred are exact
    if _summed([mark], group)[0] != mark * group.size():
        raise ValueError("the processes see different pictures: is the folder the same on all machines?")


def _summed(counts: Sequence[int], group: mx.distributed.Group) -> list[int]:
    total: list[int] = mx.distributed.all_sum(mx.array(counts, dtype=mx.int32), group=group).tolist()  # type: ignore
    return total


# Encoding them


class _Run:
    """Reads ahead, encodes and writes behind; what it did is in `report`."""

    def __init__(self, vae: AutoencoderKL, model: str, settings: Settings) -> None:
        self.vae = vae
        self.model = str(Path(model).resolve()) if Path(model).exists() else model
        self.settings = settings
        self.fixed = {"model_sha256": _digest(vae), **settings.record()}
        self.report = Report()

    def encode(self, chunks: Sequence[Sequence[Job]], bar: tqdm) -> None:
        readers, writers = ThreadPoolExecutor(READERS), ThreadPoolExecutor(WRITERS)
        pending: deque[tuple[Job, Future[None]]] = deque()
        try:
            jobs = (job for chunk in chunks for job in chunk)
            entries = _ahead(readers, self._read, jobs, depth=CHUNK)
            for chunk in chunks:
                for batch in self._batches(entry for entry, _ in zip(entries, chunk)):
                    for job, latents in self._encode(batch):
                        pending.append((job, writers.submit(_write, job, latents)))
                        while len(pending) > CHUNK:
                            self._settle(*pending.popleft())
                bar.update(len(chunk))
            while pending:
                self._settle(*pending.popleft())
        finally:
            for pool in (readers, writers):
                pool.shutdown(cancel_futures=True)
