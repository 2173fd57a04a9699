"""What all tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mlx_vae  # isort: skip  (before mlx: see blas.py)

import pytest
from models import SMALL, random_model

from mlx_vae import cpu

NEEDS = {
    "test_*_parity.py": ("torch", "diffusers", "skimage"),
    "test_coreml*.py": ("coremltools", "tree_sitter", "tree_sitter_swift"),
}
MISSING = {
    pattern: missing
    for pattern, modules in NEEDS.items()
    if (missing := [name for name in modules if importlib.util.find_spec(name) is None])
}
collect_ignore_glob = list(MISSING)


def pytest_report_header() -> list[str]:
    return [f"not collected: {pattern}, for want of {', '.join(missing)}" for pattern, missing in MISSING.items()]


@pytest.fixture(autouse=True)
def _small_pictures_go_the_way_of_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WINOGRAD_PIXELS", 0)


@pytest.fixture
def vae() -> mlx_vae.AutoencoderKL:
    """A small model of factor 4 with random weights."""
    return random_model(SMALL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a model in a folder."""
    folder = tmp_path_factory.mktemp("models") / "a small model"
    random_model(SMALL).save_pretrained(folder)
    return folder
