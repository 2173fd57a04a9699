"""python tests/mutate.py FOLDER SEED COUNT: loads that many damaged checkpoints, and prints as JSON what came of them.

A process of its own, so that its memory is measured and a crash is seen.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from checkpoints import LAYOUTS, checkpoint_of
from memory import peak_bytes
from writers import write_config, write_legacy, write_safetensors, write_zip

from mlx_vae import AutoencoderKL
from mlx_vae.convert import CheckpointError

Mutation = Callable[[bytearray, random.Random], None]


def somewhere(data: bytearray, draw: random.Random) -> int:
    """Half of the time among the first bytes, or the last, where a file's tables are."""
    near = min(len(data), 4096)
    part = draw.randrange(4)
    if part == 0:
        return draw.randrange(near)
    return len(data) - 1 - draw.randrange(near) if part == 1 else draw.randrange(len(data))


def flip_bits(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 1, 3, 20])):
        data[somewhere(data, draw)] ^= 1 << draw.randrange(8)


def set_bytes(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 4])):
        data[somewhere(data, draw)] = draw.choice([0, 1, 0x2E, 0x7F, 0x80, 0xFF, *b'"{}[]:,.()tuQRc'])


def set_number(data: bytearray, draw: random.Random) -> None:
    at = somewhere(data, draw)
    number = draw.choice([0, 1, (1 << 31) - 1, (1 << 32) - 1, (1 << 63) - 1, (1 << 64) - 1, draw.getrandbits(64)])
    data[at : at + 8] = struct.pack("<Q", number)


def change_digit(data: bytearray, draw: random.Random) -> None:
    """In JSON and in names: an offset, a size, an index."""
    digits = [i for i in range(min(len(data), 8192)) if 0x30 <= data[i] <= 0x39]
    if digits:
        data[draw.choice(digits)] = draw.choice(b"0123456789-e.")


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[somewhere(data, draw) :]


def remove(data: bytearray, draw: random.Random) -> None:
    at = somewhere(data, draw)
    del data[at : at + draw.choice([1, 2, 8, 100])]


def insert(data: bytearray, draw: random.Random) -> None:
    at = somewhere(data, draw)
    data[at:at] = draw.randbytes(draw.choice([1, 2, 8, 100]))


def repeat(data: bytearray, draw: random.Random) -> None:
    """A piece of the file again, elsewhere."""
    start, at, size = somewhere(data, draw), somewhere(data, draw), draw.choice([8, 50, 500])
    data[at : at + size] = data[start : start + size]


MUTATIONS: tuple[Mutation, ...] = (flip_bits, set_bytes, set_number, change_digit, truncate, remove, insert, repeat)


def originals(folder: Path) -> list[Path]:
    """A small checkpoint of each kind, each in a folder of its own with its config.json."""
    made = []
    for layout in ("diffusers", "ldm", "first_stage_model", "flux2"):
        config, *spelling = LAYOUTS[layout]
        tensors = checkpoint_of(config, *spelling)
        halves = {name: value.astype(np.float16) if value.ndim else value for name, value in tensors.items()}
        for kind, write in (
            ("safetensors", lambda path, tensors: write_safetensors(path, tensors)),
            ("ckpt", lambda path, tensors: write_zip(path, tensors, nested=True)),
            ("pt", lambda path, tensors: write_legacy(path, tensors)),
        ):
            place = folder / f"{layout}-{kind}"
            place.mkdir()
            write_config(place / "config.json", config)
            made.append(write(place / f"vae.{kind}", halves))
    return made


def outcome(path: Path) -> str:
    """Loads a file. "loaded": all parameters are there, with their shapes, and are numbers; or "refused"."""
    try:
        vae = AutoencoderKL.from_single_file(path)
    except CheckpointError:
        return "refused"
    wanted = {name: value.shape for name, value in AutoencoderKL(vae.config).named_parameters().items()}
    found = vae.named_parameters()
    assert {name: value.shape for name, value in found.items()} == wanted
    assert all(mx.isfinite(value).all().item() for value in found.values())
    return "loaded"


def main(folder: Path, seed: int, count: int) -> None:
    draw = random.Random(seed)
    files = originals(folder)
    contents = {path: path.read_bytes() for path in (*files, *(path.with_name("config.json") for path in files))}
    outcomes: Counter[str] = Counter()
    crashes = []
    slowest = 0.0
    for number in range(count):
        path = draw.choice(files)
        victim = path if draw.random() < 0.9 else path.with_name("config.json")
        data = bytearray(contents[victim])
        mutation = draw.choice(MUTATIONS)
        mutation(data, draw)
        victim.write_bytes(data)
        start = time.process_time()
        try:
            outcomes[outcome(path)] += 1
        except Exception:
            crashes.append(f"{number} {mutation.__name__} {victim}\n{traceback.format_exc()}")
        slowest = max(slowest, time.process_time() - start)
        victim.write_bytes(contents[victim])
    left = sorted(str(path) for path in folder.rglob("*") if path.is_file() and path not in contents)
    report = {"crashes": crashes, "slowest": slowest, "peak": peak_bytes(), "written": left}
    print(json.dumps({**outcomes, **report}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
