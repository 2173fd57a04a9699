"""What the command lines take: files, folders and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

TEMPORARY = "."
"""What hidden files begin with: a folder's own, macOS's `._` companions, and files that are still being written."""


class Input(NamedTuple):
    """A file to read, and its name below the folder or the glob that it was found by; a file that was named itself has
    its last part for a name."""

    path: Path
    name: PurePosixPath


def find_inputs(sources: Sequence[str | os.PathLike[str]], endings: Collection[str]) -> list[Input]:
    """The files that `sources` name, in their order and each once.

    A folder gives all the files below it that have one of the `endings` (".png") and aren't hidden, sorted by name.
    So does a glob that no shell has expanded ("photos/**/*.jpg"); its names begin where its fixed part ends.

    Raises ValueError for a source that gives nothing.
    """
    found: dict[Path, Input] = {}
    for source in map(os.fspath, sources):
        inputs = list(_below(source, endings))
        if not inputs:
            raise ValueError(f"{source}: holds no file that ends in {', '.join(sorted(endings))}")
        for item in inputs:
            found.setdefault(item.path, item)
    return list(found.values())


def _below(source: str, endings: Collection[str]) -> Iterator[Input]:
    path = Path(source)
    if path.is_file():
        yield Input(path, PurePosixPath(path.name))
        return
    if path.is_dir():
        root, files = path, _walk(path)
    elif glob.has_magic(source):
        root, files = _fixed_part(path), map(Path, glob.iglob(source, recursive=True))
    else:
        raise ValueError(f"{source}: no such file or folder")
    wanted = (file for file in files if file.suffix.lower() in endings and file.is_file())
    for file in sorted(wanted, key=lambda file: file.parts):
        yield Input(file, PurePosixPath(file.relative_to(root).as_posix()))


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(TEMPORARY)]
        yield from (Path(parent, name) for name in files if not name.startswith(TEMPORARY))


def _fixed_part(pattern: Path) -> Path:
    """The folders of a glob before its first wildcard: photos/2024 of photos/2024/*/*.jpg."""
    parts = pattern.parent.parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return Path(*parts[:wild])
