"""A short run of the fuzzer, from a fixed seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_hostile_bytes_find_nothing_in_ten_seconds() -> None:
    run = [sys.executable, str(Path(__file__).with_name("run.py")), "--seconds", "10", "--seed", "20"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "nothing found" in done.stdout
