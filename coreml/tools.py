"""coremltools, loaded when it is needed and kept quiet."""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType


class MissingCoremltools(ValueError):
    """coremltools is not installed: what to do about it, in one line."""


def coremltools() -> ModuleType:
    """The module. Raises MissingCoremltools."""
    try:
        with quiet():
            import coremltools
    except ImportError as error:
        raise MissingCoremltools(_advice(error)) from None
    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' progress bars, warnings and log: off macOS, its import alone reports eight failures."""
    log = logging.getLogger("coremltools")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _advice(error: ImportError) -> str:
    if sys.version_info >= (3, 14) or (sys.platform, platform.machine()) not in {
        ("darwin", "arm64"),
        ("darwin", "x86_64"),
        ("linux", "x86_64"),
    }:
        here = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        return f"coremltools has no build for {here}: use Python 3.10 to 3.13 on macOS or Linux x86_64"
    return f'the Core ML export needs coremltools ({error}): pip install "mlx-vae[coreml]"'
