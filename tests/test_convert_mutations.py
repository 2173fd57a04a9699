"""Damaged files, hundreds of them: each loads rightly or raises CheckpointError, soon and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

COUNT = 600


def test_damaged_files(tmp_path: Path) -> None:
    script = Path(__file__).with_name("mutate.py")
    command = [sys.executable, "-W", "error", script, tmp_path, "0", str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["crashes"] == []
    assert report["written"] == []
    assert report["loaded"] + report["refused"] == COUNT
    assert min(report["loaded"], report["refused"]) > COUNT // 20  # both ways are taken
    assert report["slowest"] < 10
    assert report["peak"] < 1 << 30
