"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel is linked against the reference BLAS, whose matrix products are about a hundred times slower than
OpenBLAS's or MKL's. The dynamic linker binds `cblas_sgemm` when MLX first calls it, and looks among the libraries that
are loaded with global symbols before it looks at MLX's own: so a fast BLAS that is loaded first is the one that serves.

Nothing is rebuilt, and nothing happens on macOS (where MLX uses Accelerate) or with `MLX_VAE_BLAS=off`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

SWITCH = "MLX_VAE_BLAS"
HINT = (
    "matrix products will be slow: no OpenBLAS or MKL was found. Install one: `apt install libopenblas0-pthread`, "
    "`dnf install openblas-threads` or `pip install mkl`"
)
LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")


def load_fast_blas() -> str | None:
    """Loads the first of LIBRARIES that this machine has and returns its name, or None. Never raises."""
    if sys.platform != "linux" or os.environ.get(SWITCH, "").lower() == "off":
        return None
    in_environment = Path(sys.prefix) / "lib"  # where `pip install mkl` puts its libraries
    for library in LIBRARIES:
        for name in (library, str(in_environment / library)):
            try:
                loaded = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
                loaded.cblas_sgemm  # noqa: B018  a library without it would serve nothing
            except (OSError, AttributeError):
                continue
            return name
    return None


def is_missing(loaded: str | None) -> bool:
    """Whether HINT is worth saying: MLX computes on a Linux CPU, and `load_fast_blas` looked and found nothing."""
    import mlx.core as mx

    wanted = sys.platform == "linux" and os.environ.get(SWITCH, "").lower() != "off"
    return wanted and loaded is None and mx.default_device() == mx.Device(mx.cpu)
