"""The fast BLAS: loaded where there is one, never in the way."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_vae import blas


class Loader:
    """Stands in for ctypes.CDLL on a machine that has only the libraries it is told of."""

    def __init__(self, *available: str, symbols: bool = True) -> None:
        self.available, self.symbols, self.modes = available, symbols, []

    def __call__(self, name: str, mode: int) -> Any:
        if name not in self.available:
            raise OSError(name)
        self.modes.append(mode)
        return type("Library", (), {"cblas_sgemm": None} if self.symbols else {})()


@pytest.fixture(autouse=True)
def on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv(blas.SWITCH, raising=False)


def test_the_first_library_is_loaded_with_global_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader("libopenblas.so.0", "libmkl_rt.so.2")
    monkeypatch.setattr(ctypes, "CDLL", loader)
    assert blas.load_fast_blas() == "libopenblas.so.0"
    assert loader.modes == [ctypes.RTLD_GLOBAL]


def test_mkl_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(Path(sys.prefix) / "lib" / "libmkl_rt.so.3")
    monkeypatch.setattr(ctypes, "CDLL", Loader(path))
    assert blas.load_fast_blas() == path


def test_without_one_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Loader())
    assert blas.load_fast_blas() is None
    monkeypatch.setattr(ctypes, "CDLL", Loader("libopenblas.so.0", symbols=False))
    assert blas.load_fast_blas() is None


def test_never_on_macos_and_never_when_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", Loader("libopenblas.so.0"))
    monkeypatch.setenv(blas.SWITCH, "off")
    assert blas.load_fast_blas() is None
    assert not blas.is_missing(None)
    monkeypatch.delenv(blas.SWITCH)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.load_fast_blas() is None
    assert not blas.is_missing(None)


def test_the_hint_is_for_a_linux_cpu_without_one() -> None:
    assert blas.is_missing(None) == (mx.default_device() == mx.Device(mx.cpu))
    assert not blas.is_missing("libopenblas.so.0")


@pytest.mark.parametrize("switch", ["", "off"])
def test_products_are_right_either_way(switch: str) -> None:
    code = (
        "import mlx_vae, mlx.core as mx, numpy as np\n"
        "a = mx.random.normal((64, 48)); b = mx.random.normal((48, 32))\n"
        "assert np.allclose(np.array(a @ b), np.array(a) @ np.array(b), atol=1e-4)\n"
        "print(mlx_vae.LOADED_BLAS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {blas.SWITCH: switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert switch != "off" or done.stdout.strip() == "None"
