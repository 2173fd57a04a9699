"""What all tests share."""

from __future__ import annotations

import importlib.util

import mlx_vae  # isort: skip  (before mlx: see blas.py)

import pytest
from models import SMALL, random_model

HAS_REFERENCE = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))
collect_ignore_glob = [] if HAS_REFERENCE else ["test_*_parity.py"]


def pytest_report_header() -> str:
    return (
        f"parity with diffusers: {'available' if HAS_REFERENCE else 'not collected; torch and diffusers are missing'}"
    )


@pytest.fixture
def vae() -> mlx_vae.AutoencoderKL:
    """A small model of factor 4 with random weights."""
    return random_model(SMALL)
