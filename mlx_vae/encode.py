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
import math
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
from itertools import islice
from pathlib import Path, PurePath
from typing import NamedTuple, TypeVar

import mlx.core as mx
import numpy as np
from PIL import Image, ImageColor
from tqdm import tqdm

from mlx_vae import cli, memory
from mlx_vae.autoencoder import AutoencoderKL
from mlx_vae.config import FAMILIES
from mlx_vae.convert.families import ANY, family_of
from mlx_vae.files import writing_into
from mlx_vae.images import Picture, load_image, pad_to_multiple, picture_endings
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
    """How pictures are encoded.

    `seed` is None for the mode of the posterior; otherwise it is sampled, with noise that depends on the seed and on
    the name of the picture. `background`, `resize` and `max_side` are those of `images.load_image`. `batch_size` is the
    most pictures that go through the model together. For large ones, `tile` has them go through it by blended tiles,
    and `max_memory` ("4GB") limits what that takes besides the weights, exactly, as in `AutoencoderKL.encode`.

    Raises ValueError for values that make no sense.
    """

    seed: int | None = None
    scaled: bool = True
    dtype: mx.Dtype = mx.float32
    batch_size: int = 8
    background: str = "white"
    resize: tuple[int, int] | None = None
    max_side: int | None = None
    tile: bool = False
    max_memory: str | int | None = None

    def __post_init__(self) -> None:
        ImageColor.getrgb(self.background)
        sizes = (*(self.resize or ()), self.max_side, self.batch_size)
        if any(size is not None and size < 1 for size in sizes):
            raise ValueError("a size of a picture or of a batch must be 1 or more")
        if self.resize is not None and self.max_side is not None:
            raise ValueError("resize and max_side exclude each other")
        if self.tile and self.max_memory is not None:
            raise ValueError("tile and max_memory exclude each other: tiles are approximate, max_memory is exact")
        if self.max_memory is not None:
            memory.parse(self.max_memory)

    def record(self) -> dict[str, str]:
        """As strings, for the metadata of a latent file: all but batch size and memory, which change rounding alone."""
        return {
            "posterior": "mode" if self.seed is None else f"sample, seed {self.seed}",
            "dtype": str(self.dtype).removeprefix("mlx.core."),
            "background": "#" + bytes(ImageColor.getrgb(self.background)[:3]).hex(),
            "resize": "x".join(map(str, self.resize or ())),
            "max_side": str(self.max_side or ""),
            "tile": str(self.tile).lower(),
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
    """A picture of height x width that is ready for the model: values (H, W, 3), padded, and its latents' record.

    Both are None where the latent file is there already.
    """

    job: Job
    height: int
    width: int
    values: np.ndarray | None = None
    record: dict[str, str] | None = None
    notices: Sequence[str] = ()


def encode_files(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: str | os.PathLike[str],
    settings: Settings | None = None,
    family: str | None = None,
) -> Report:
    """Encodes pictures into latent files: those that `sources` name, the folders and globs among them whole.

    `model` and `family` are those of `AutoencoderKL.from_pretrained`.

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
    vae = AutoencoderKL.from_pretrained(model, family=family, dtype=settings.dtype)
    if vae.config.in_channels != 3:
        raise ValueError(f"{model}: takes pictures of {vae.config.in_channels} channels; picture files give 3")
    if settings.tile:
        vae.enable_tiling()
    folder = _folder(Path(output))
    folder.mkdir(parents=True, exist_ok=True)
    mine = list(_chunks(jobs))[group.rank() :: group.size()]
    with (
        writing_into(folder, {job.target for job in jobs}),
        _quiet_pillow(),
        tqdm(total=sum(map(len, mine)), unit="picture", disable=True if group.rank() else None) as bar,
    ):
        run = _Run(vae, os.fspath(model), family, settings, bar)
        run.encode(mine)
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
    """Each picture once. Raises ValueError where two would be written to one file, letters' case aside as on a Mac."""
    if _is_file(output):
        if len(inputs) > 1:
            raise ValueError(f"{output}: one file for {len(inputs)} pictures; name a folder")
        if not output.parent.is_dir():
            raise ValueError(f"{output}: no such folder as {output.parent}")
        return [Job(inputs[0], output)]
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; wanted a folder, or a file that ends in .safetensors")
    jobs: dict[str, Job] = {}
    for picture in inputs:
        target = output / picture.name.with_suffix(".safetensors")
        other = jobs.setdefault(str(target).casefold(), Job(picture, target)).picture
        if other.path != picture.path:
            raise ValueError(
                f"{other.path} and {picture.path} would both be written to {target}; "
                "rename one, or encode them into different folders"
            )
    return list(jobs.values())


def _chunks(jobs: list[Job]) -> Iterator[list[Job]]:
    return (jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK))


def _check_agreement(jobs: Sequence[Job], group: mx.distributed.Group) -> None:
    """Raises ValueError unless all processes have found the same pictures: they divide them by counting."""
    names = "\n".join(map(_readable, (job.picture.name for job in jobs)))
    mark = int.from_bytes(hashlib.sha256(names.encode()).digest()[:4], "big")
    marks: list[int] = mx.distributed.all_gather(mx.array([mark], dtype=mx.uint32), group=group).tolist()  # type: ignore
    if len(set(marks)) > 1:
        raise ValueError("the processes see different pictures: is the folder the same on all machines?")


def _summed(counts: Sequence[int], group: mx.distributed.Group) -> list[int]:
    total: list[int] = mx.distributed.all_sum(mx.array(counts, dtype=mx.int32), group=group).tolist()  # type: ignore
    return total


# Encoding them


class _Run:
    """Reads ahead, encodes and writes behind; `report` counts what became of the pictures."""

    def __init__(self, vae: AutoencoderKL, model: str, family: str | None, settings: Settings, bar: tqdm) -> None:
        self.vae = vae
        self.model = str(Path(model).resolve()) if model != "tiny" and Path(model).exists() else model
        self.family = family or family_of(vae.config)
        self.multiple = vae.config.factor * math.lcm(*(vae.config.patch_size or (1,)))
        self.settings = settings
        self.fixed = {"model_sha256": _model_digest(vae), **settings.record()}
        self.bar = bar
        self.report = Report()
        self.writing: deque[tuple[Job, Future[None]]] = deque()

    def encode(self, chunks: Sequence[Sequence[Job]]) -> None:
        readers, writers = ThreadPoolExecutor(READERS), ThreadPoolExecutor(WRITERS)
        jobs = [job for chunk in chunks for job in chunk]
        entries = _ahead(readers, self._read, jobs)
        try:
            for chunk in chunks:
                for batch in self._batches(islice(entries, len(chunk))):
                    for job, latents in self._encode(batch):
                        self.writing.append((job, writers.submit(_write, job.target, latents)))
                    self._settle(leave=CHUNK)
                    self.bar.update(len(batch))
            self._settle(leave=0)
        finally:
            for pool in (readers, writers):
                pool.shutdown(cancel_futures=True)

    def _read(self, job: Job) -> Entry:
        """Runs in a thread. Raises ValueError and OSError for pictures that can't be read."""
        record = {"source": _readable(job.picture.name), "source_sha256": _file_digest(job.picture.path), **self.fixed}
        found = read_metadata(job.target) or {}
        wanted = {**record, "scaled": "true" if self.settings.scaled else "false"}
        if all(found.get(key) == value for key, value in wanted.items()):
            return Entry(job, int(found["height"]), int(found["width"]))
        picture = self._load(job)
        height, width, _ = picture.values.shape
        return Entry(job, height, width, self._padded(picture), record, picture.notices)

    def _load(self, job: Job) -> Picture:
        settings = self.settings
        return load_image(job.picture.path, settings.background, settings.resize, settings.max_side)

    def _padded(self, picture: Picture) -> np.ndarray:
        return pad_to_multiple(picture.values, self.multiple)

    def _batches(self, entries: Iterable[tuple[Job, Future[Entry]]]) -> Iterator[list[Entry]]:
        """Entries of one padded size, as many as a batch may hold; those that can't be read go into the report."""
        waiting: dict[tuple[int, ...], list[Entry]] = defaultdict(list)
        for job, future in entries:
            try:
                entry = future.result()
            except (ValueError, OSError) as error:
                self.report.fail(str(error))
                self.bar.update()
                continue
            for notice in entry.notices:
                tqdm.write(f"{job.picture.path}: {notice}", file=sys.stderr)
            size = tuple(-(-side // self.multiple) * self.multiple for side in (entry.height, entry.width))
            waiting[size].append(entry)
            if len(waiting[size]) == self._capacity(math.prod(size)):
                yield waiting.pop(size)
        yield from waiting.values()

    def _capacity(self, pixels: int) -> int:
        return max(1, min(self.settings.batch_size, BATCH_PIXELS // pixels))

    def _encode(self, batch: Sequence[Entry]) -> Iterator[tuple[Job, Latents]]:
        """The latents of a batch that aren't there yet. Those that are go through the model with the others again: so
        each shares its rounding with the same neighbours as ever."""
        self.report.skipped += sum(entry.values is None for entry in batch)
        if all(entry.values is None for entry in batch):
            return
        images = [self._padded(self._load(entry.job)) if entry.values is None else entry.values for entry in batch]
        x = np.stack(images)
        start = time.perf_counter()
        try:
            moments = self.vae.encode(mx.array(x), max_memory=self.settings.max_memory).latent_dist.moments
        except ValueError as error:
            for entry in batch:
                self.report.fail(f"{entry.job.picture.path}: {error}")
            return
        mx.eval(moments)
        self.report.model_seconds += time.perf_counter() - start
        for i, entry in enumerate(batch):
            if entry.record is None:
                continue
            z = self._latents(DiagonalGaussianDistribution(moments[i : i + 1]), entry.record["source"])
            if not mx.all(mx.isfinite(z)).item():
                self.report.fail(f"{entry.job.picture.path}: its latents are not finite: use float32 or bfloat16")
                continue
            yield (
                entry.job,
                Latents(
                    z,
                    model=self.model,
                    family=self.family,
                    scaled=self.settings.scaled,
                    height=entry.height,
                    width=entry.width,
                    record=entry.record,
                ),
            )

    def _latents(self, posterior: DiagonalGaussianDistribution, name: str) -> mx.array:
        if self.settings.seed is None:
            z = posterior.mode()
        else:
            digest = hashlib.sha256(f"{self.settings.seed} {name}".encode()).digest()
            z = posterior.sample(mx.random.key(int.from_bytes(digest[:8], "big")))
        if self.settings.scaled:
            z = self.vae.scale(z.astype(mx.float32)).astype(z.dtype)
        return mx.contiguous(z)

    def _settle(self, leave: int) -> None:
        """Waits until no more than `leave` files are still to be written."""
        while len(self.writing) > leave:
            job, future = self.writing.popleft()
            try:
                future.result()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                self.report.fail(f"{job.target}: {error}")
            else:
                self.report.encoded += 1


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Sequence[Item]
) -> Iterator[tuple[Item, Future[Result]]]:
    """(item, future of function(item)) in order; begun early, but never for more than 2 * READERS of them."""
    begun: deque[tuple[Item, Future[Result]]] = deque()
    for item in items:
        begun.append((item, pool.submit(function, item)))
        if len(begun) == 2 * READERS:
            yield begun.popleft()
    yield from begun


def _write(target: Path, latents: Latents) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    save_latents(target, latents)


def _readable(name: PurePath) -> str:
    """A file's name as text, where the system allows it to be any bytes."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _model_digest(vae: AutoencoderKL) -> str:
    """Of the configuration and the weights: tells models apart, whatever they are called."""
    digest = hashlib.sha256(json.dumps(vae.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(vae.named_parameters().items()):
        digest.update(f"{name} {value.shape} {value.dtype}".encode())
        digest.update(np.array(value.view(mx.uint8)).data)
    return digest.hexdigest()


@contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Without the warnings that Pillow gives of odd files, for the time that threads read them: `load_image` tells."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


# The command


def configure_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_vae.encode", description="Encode pictures into latents.")
    parser.add_argument("pictures", nargs="+", metavar="INPUT", help="picture files, folders, or globs in quotes")
    parser.add_argument(
        "-o", "--output", required=True, help="a .safetensors file for one picture, or a folder, which keeps the names"
    )
    parser.add_argument("--model", required=True, help='"tiny", a model folder or file, or a model on the hub')
    parser.add_argument(
        "--family", choices=(*FAMILIES, ANY), help="which model's autoencoder it is, if it fits several"
    )
    parser.add_argument("--sample", action="store_true", help="sample the posterior; the default is its mode")
    parser.add_argument("--seed", type=int, help="of --sample (0); a picture's noise depends on it and on its name")
    scaling = parser.add_mutually_exclusive_group()
    scaling.add_argument(
        "--scaled", action="store_true", default=True, help="latents of a diffusion model (the default)"
    )
    scaling.add_argument("--unscaled", dest="scaled", action="store_false", help="latents as the encoder gives them")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--resize", type=_size, metavar="WxH", help="give pictures this size, stretched where need be")
    size.add_argument("--max-side", type=int, metavar="PIXELS", help="shrink pictures whose longer side is longer")
    parser.add_argument("--background", default="white", help="colour behind transparent pictures: a name or #rrggbb")
    parser.add_argument("--dtype", choices=tuple(cli.DTYPES), default="float32")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--max-memory", metavar="SIZE", help="such as 4GB, besides the weights: slower at worst, exact")
    memory.add_argument("--tile", action="store_true", help="encode by blended tiles: less memory, approximate")
    parser.add_argument("--batch-size", type=int, default=8, help="most pictures of one size to encode together (8)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_encode, configure_parser().parse_args(argv))


def _encode(arguments: argparse.Namespace) -> int:
    if arguments.seed is not None and not arguments.sample:
        raise ValueError("--seed is for --sample")
    settings = Settings(
        seed=(arguments.seed or 0) if arguments.sample else None,
        scaled=arguments.scaled,
        dtype=cli.DTYPES[arguments.dtype],
        batch_size=arguments.batch_size,
        background=arguments.background,
        resize=arguments.resize,
        max_side=arguments.max_side,
        tile=arguments.tile,
        max_memory=arguments.max_memory,
    )
    report = encode_files(arguments.pictures, arguments.output, arguments.model, settings, arguments.family)
    for failure in report.failures:
        cli.notice(f"error: {failure}")
    if mx.distributed.init().rank() == 0:
        cli.notice(report.summary())
        print(arguments.output)
    return FAILED if report.failed else 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no WIDTHxHEIGHT, such as 512x768")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    raise SystemExit(main())
