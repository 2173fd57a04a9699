"""The fast BLAS: loaded where there is one, never in the way."""

from __future__ import annotations

import ctypes
import ctypes.util
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
        self.available, self.symbols, self.loaded = available, symbols, []

    def __call__(self, name: str, mode: int) -> Any:
        if name not in self.available:
            raise OSError(name)
        self.loaded.append((name, mode))
        return type("Library", (), {"cblas_sgemm": None} if self.symbols else {})()


@pytest.fixture(autouse=True)
def fresh_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv(blas.SWITCH, raising=False)
    monkeypatch.delitem(sys.modules, "mlx.core")


def test_one_thread_while_streams_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (
        ("openblas_get_num_threads", "openblas_set_num_threads"),
        ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
    ):
        counts = [4]
        functions = {
            library[0]: staticmethod(lambda counts=counts: counts[-1]),
            library[1]: staticmethod(counts.append),
        }
        monkeypatch.setattr(blas, "_loaded", [object(), type("Library", (), functions)()])
        with blas.single_threaded():
            assert counts == [4, 1]
        assert counts == [4, 1, 4]
    monkeypatch.setattr(blas, "_loaded", [])
    with blas.single_threaded():
        pass


def test_the_first_library_is_loaded_with_global_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader("libopenblas.so.0", "libmkl_rt.so.2")
    monkeypatch.setattr(ctypes, "CDLL", loader)
    assert blas.load_fast_blas() is None
    assert loader.loaded == [("libopenblas.so.0", ctypes.RTLD_GLOBAL)]


def test_mkl_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(Path(sys.prefix) / "lib" / "libmkl_rt.so.3")
    loader = Loader(path)
    monkeypatch.setattr(ctypes, "CDLL", loader)
    assert blas.load_fast_blas() is None
    assert loader.loaded == [(path, ctypes.RTLD_GLOBAL)]


@pytest.mark.parametrize("loader", [Loader(), Loader("libopenblas.so.0", symbols=False)])
def test_without_one_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, loader: Loader) -> None:
    monkeypatch.setattr(ctypes, "CDLL", loader)
    assert blas.load_fast_blas() == blas.INSTALL


def test_after_mlx_it_is_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader("libopenblas.so.0")
    monkeypatch.setattr(ctypes, "CDLL", loader)
    monkeypatch.setitem(sys.modules, "mlx.core", mx)
    assert blas.load_fast_blas() == blas.TOO_LATE
    assert loader.loaded == []


def test_never_on_macos_and_never_when_off(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Loader("libopenblas.so.0")
    monkeypatch.setattr(ctypes, "CDLL", loader)
    monkeypatch.setenv(blas.SWITCH, "off")
    assert blas.load_fast_blas() is None
    monkeypatch.delenv(blas.SWITCH)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.load_fast_blas() is None
    assert loader.loaded == []


@pytest.mark.parametrize("switch", ["", "off"])
def test_products_are_right_either_way(switch: str) -> None:
    code = (
        "import mlx_vae, mlx.core as mx, numpy as np\n"
        "a = mx.random.normal((64, 48)); b = mx.random.normal((48, 32))\n"
        "assert np.allclose(np.array(a @ b), np.array(a) @ np.array(b), atol=1e-4)"
    )
    environment = os.environ | {blas.SWITCH: switch}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(ctypes.util.find_library("openblas") is None, reason="this machine has no OpenBLAS")
def test_the_fast_library_serves() -> None:
    """A product of two 1024 x 1024 matrices is 2.1 GFLOP: more than half a second with the reference BLAS."""
    code = (
        "import mlx_vae, mlx.core as mx, time\n"
        "a = mx.random.normal((1024, 1024)); mx.eval(a @ a)\n"
        "start = time.perf_counter(); mx.eval(a @ a); print(time.perf_counter() - start)"
    )

    def seconds(switch: str) -> float:
        environment = os.environ | {blas.SWITCH: switch}
        return float(subprocess.check_output([sys.executable, "-c", code], env=environment, text=True))

    assert seconds("") < 0.5 * seconds("off")
