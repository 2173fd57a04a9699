"""A fast BLAS for MLX's CPU backend on Linux.

MLX's Linux wheel is linked against the reference BLAS, whose matrix products are about a hundred times slower than
OpenBLAS's or MKL's. But the dynamic linker looks for `cblas_sgemm` among the libraries that were loaded with global
symbols before it looks at the one that MLX brings: so a fast BLAS that is loaded first is the one that serves.

First means before `mlx.core` is imported, when all its symbols are bound: `import mlx_vae` goes before `import mlx`.
Nothing is rebuilt, and nothing happens on macOS (where MLX uses Accelerate) or with `MLX_VAE_BLAS=off`.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SWITCH = "MLX_VAE_BLAS"
LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0", "libmkl_rt.so.3", "libmkl_rt.so.2")
THREADS = (("openblas_get_num_threads", "openblas_set_num_threads"), ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"))
INSTALL = (
    "matrix products will be slow: no OpenBLAS or MKL was found. Install one: `apt install libopenblas0-pthread`, "
    "`dnf install openblas-threads` or `pip install mkl`"
)
TOO_LATE = "matrix products will be slow: mlx was imported before mlx_vae. Import mlx_vae first"


def load_fast_blas() -> str | None:
    """Loads the first of LIBRARIES that this machine has. Returns what to tell the user if there is none, else None."""
    if sys.platform != "linux" or os.environ.get(SWITCH, "").lower() == "off":
        return None
    if "mlx.core" in sys.modules:
        return TOO_LATE
    in_environment = Path(sys.prefix) / "lib"  # where `pip install mkl` puts its libraries
    for library in LIBRARIES:
        for name in (library, str(in_environment / library)):
            try:
                loaded = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
            except OSError:
                continue
            if hasattr(loaded, "cblas_sgemm"):
                _loaded.append(loaded)
                return None
    return INSTALL


_loaded: list[Any] = []


@contextmanager
def single_threaded() -> Iterator[None]:
    """Each product on one thread, for the time that streams compute side by side; left alone where it can't be set."""
    for library in _loaded:
        for get, put in THREADS:
            if hasattr(library, put):
                count = getattr(library, get)()
                getattr(library, put)(1)
                try:
                    yield
                finally:
                    getattr(library, put)(count)
                return
    yield
