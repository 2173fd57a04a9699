"""What the command lines take: files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

HIDDEN = "."
"""What the names of hidden files begin with, such as macOS's `._` companions and files that are still being written."""


class Input(NamedTuple):
    """A file to read, and its name below the folder or the glob that it was found by; a file that was named itself has
    its last part for a name."""

    path: Path
    name: PurePosixPath


def find_inputs(sources: Sequence[str | os.PathLike[str]], endings: Collection[str]) -> list[Input]:
    """The files that `sources` name, in their order.

    A folder gives all the files below it that have one of the `endings` (".png") and aren't hidden, sorted by name.
    So does a glob that no shell has expanded ("photos/**/*.jpg"); its names begin where its fixed part ends.

    Raises ValueError for a source that gives nothing.
    """
    found: list[Input] = []
    for source in sources:
        inputs = list(_below(os.fspath(source), endings))
        if not inputs:
            raise ValueError(f"{source}: holds no file that ends in {', '.join(sorted(endings))}")
        found += inputs
    return found


def _below(source: str, endings: Collection[str]) -> Iterator[Input]:
    path = Path(source)
    if path.is_file():
        yield Input(path, PurePosixPath(path.name))
        return
    if path.is_dir():
        root, files = path, list(_walk(path))
    elif glob.has_magic(source):
        fixed = _fixed_part_count(path)
        root = Path(*path.parts[:fixed])
        files = list(root.glob(str(Path(*path.parts[fixed:]))))
    else:
        raise ValueError(f"{source}: no such file or folder")
    found = [(file.relative_to(root), file) for file in files if file.suffix.lower() in endings and file.is_file()]
    for name, file in sorted(found, key=lambda pair: pair[0].parts):
        if not any(part.startswith(HIDDEN) for part in name.parts):
            yield Input(file, PurePosixPath(name.as_posix()))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        yield from (Path(parent, name) for name in files)


def _fixed_part_count(pattern: Path) -> int:
    """How many folders a glob has before its first wildcard: 2 in photos/2024/*/*.jpg."""
    return next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
