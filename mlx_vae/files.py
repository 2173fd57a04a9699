"""Writing files whole: an interrupted run leaves the old file or the new one, never half of one."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY_NAME = re.compile(r"\.(.+)\.[0-9a-f]{8}(\.[^.]+)")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path`, with the same ending, to write to; moves it onto `path` when the block succeeds."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def making_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a new folder beside `path` to fill; makes it `path` when the block succeeds. `path` must not exist."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing_into(folder: Path, targets: Collection[Path]) -> Iterator[None]:
    """Removes what killed runs have left half-written of `targets`, files in or below `folder`.

    Never what another run is writing: each holds a lock on the folder, which ends when its process does, however that
    ends, and only who holds it alone removes anything. Where the file system has no locks nothing is removed.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_temporaries(targets)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def _remove_temporaries(targets: Collection[Path]) -> None:
    wanted = set(targets)
    for parent in {target.parent for target in wanted if target.parent.is_dir()}:
        for file in list(parent.iterdir()):
            match = TEMPORARY_NAME.fullmatch(file.name)
            if match and parent / "".join(match.groups()) in wanted:
                file.unlink(missing_ok=True)
