"""Folders of pictures for the tests of the encode command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def random_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def make_folder(folder: Path, count: int) -> None:
    """Pictures of three sizes, in a folder and one below it, their names in another order than their sizes."""
    (folder / "below").mkdir(parents=True)
    for i in range(count):
        parent = folder / "below" if i % 3 == 1 else folder
        random_picture(*[(10, 13), (12, 16), (9, 30)][i % 7 % 3], seed=i).save(parent / f"picture {i:03}.png")


def contents(folder: Path) -> dict[str, bytes]:
    """All that is below a folder, hidden or not: names and bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
