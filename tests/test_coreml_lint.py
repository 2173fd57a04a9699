"""The lint and the evaluator on packages that we didn't make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.coreml

from packages import foreign, written  # noqa: E402

from mlx_vae import AutoencoderKL  # noqa: E402
from mlx_vae.coreml.check import check  # noqa: E402
from mlx_vae.coreml.evaluate import UnsupportedOperation, evaluate  # noqa: E402
from mlx_vae.coreml.lint import lint  # noqa: E402

SHAPE = (1, 4, 8, 32)


def mixed(mb: Any, x: Any) -> Any:
    half = mb.cast(x=x, dtype="fp16")
    return mb.add(x=mb.cast(x=mb.square(x=half, name="half"), dtype="fp32", name="back"), y=x, name="full")


@pytest.mark.parametrize(
    ("body", "shape", "finding"),
    [
        (lambda mb, x: mb.erf(x=x, name="e"), SHAPE, "error: e: erf is not known to run on the Neural Engine"),
        (
            lambda mb, x: mb.softmax(x=x, axis=-1, name="s"),
            SHAPE,
            "warning: s: softmax along axis -1, the engine wants the channels, 1",
        ),
        (
            lambda mb, x: mb.reshape(x=x, shape=[1, 1, 1, -1], name="r"),
            (1, 32, 32, 32),
            "error: r: an axis over 16384: float32[1, 1, 1, 32768]",
        ),
        (
            lambda mb, x: mb.reshape(x=x, shape=[1, 2, 2, 8, 32], name="r"),
            SHAPE,
            "error: r: rank 5, the engine wants 4: float32[1, 2, 2, 8, 32]",
        ),
        (lambda mb, x: mb.square(x=x, name="q"), (1, 64, 300, 33), "warning: q: the last axis is stored as 64, not 33"),
        (mixed, SHAPE, "error: full: add computes in float32"),
        (mixed, SHAPE, "warning: back: a cast between operations; casts belong at the borders"),
        (lambda mb, x: mb.square(x=x), SHAPE, "warning: main: computes in float32 throughout"),
    ],
)
def test_findings(body: Callable[..., Any], shape: tuple[int, ...], finding: str, tmp_path: Path) -> None:
    findings = [str(each) for each in lint(foreign(tmp_path / "a.mlpackage", body, shape))]
    assert any(each.startswith(finding) for each in findings), findings


def test_dynamic_dimensions(tmp_path: Path) -> None:
    from coremltools.converters.mil.mil import get_new_symbol

    package = foreign(tmp_path / "a.mlpackage", lambda mb, x: mb.square(x=x, name="q"), (1, 4, get_new_symbol(), 32))
    assert "error: q: dynamic dimensions: float32[1, 4, None, 32]" in map(str, lint(package))


def test_ours_is_clean(vae: AutoencoderKL, tmp_path: Path) -> None:
    for part in ("decoder", "encoder"):
        _, package = written(tmp_path / f"{part}.mlpackage", vae, part, io="image")
        assert lint(package) == []


def test_unknown_operations_are_named(tmp_path: Path) -> None:
    package = foreign(tmp_path / "a.mlpackage", lambda mb, x: mb.erf(x=mb.square(x=x), name="curve"), SHAPE)
    with pytest.raises(UnsupportedOperation, match="curve: the evaluator has no operation 'erf'"):
        evaluate(package.functions["main"], {"x0": np.zeros(SHAPE)})
    report = check(package.path)
    assert "main: curve: the evaluator has no operation 'erf'" in report.failures


def test_known_operations_in_unknown_forms_are_named(tmp_path: Path) -> None:
    package = foreign(tmp_path / "a.mlpackage", lambda mb, x: mb.cast(x=x, dtype="int32", name="whole"), SHAPE)
    with pytest.raises(UnsupportedOperation, match="whole: cast: casts to int32 are not supported"):
        evaluate(package.functions["main"], {"x0": np.zeros(SHAPE)})


def test_control_flow(tmp_path: Path) -> None:
    """Blocks inside operations are linted, too."""

    def body(mb: Any, x: Any) -> Any:
        positive = mb.greater(x=mb.reduce_sum(x=x, axes=[0, 1, 2, 3], keep_dims=False), y=0.0)
        return mb.cond(
            pred=positive, _true_fn=lambda: mb.erf(x=x, name="inner"), _false_fn=lambda: mb.square(x=x), name="choice"
        )

    package = foreign(tmp_path / "a.mlpackage", body, SHAPE)
    assert {"inner", "choice"} <= {finding.operation for finding in lint(package)}
    with pytest.raises(UnsupportedOperation, match="has no operation"):
        evaluate(package.functions["main"], {"x0": np.zeros(SHAPE)})


def test_a_package_of_others_is_linted_and_evaluated(tmp_path: Path) -> None:
    package = foreign(
        tmp_path / "a.mlpackage", lambda mb, x: mb.square(x=mb.silu(x=x), name="out"), SHAPE, dtype="fp16"
    )
    report = check(package.path)
    assert report.passed, report.failures
    assert "main: compared with no model" in report.lines
