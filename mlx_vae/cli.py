"""What the command lines have in common: how they end, and what they say about the machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import mlx.core as mx

from mlx_vae import BLAS_HINT

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
BAD_INPUT = 2
INTERRUPTED = 130


def notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(command: Callable[[argparse.Namespace], int | None], arguments: argparse.Namespace) -> int:
    """The exit status of a command: its own or 0, or 2 after one line about the user's mistake, or 130 after Ctrl-C.

    The library raises ValueError for what the user can mend, and the system OSError; anything else is ours to mend, and
    keeps its traceback.
    """
    if BLAS_HINT and mx.default_device() == mx.Device(mx.cpu):
        notice(BLAS_HINT)
    try:
        status = command(arguments)
    except (ValueError, OSError) as error:
        notice(f"error: {error}")
        return BAD_INPUT
    except KeyboardInterrupt:
        notice("interrupted")
        return INTERRUPTED
    return status or 0
