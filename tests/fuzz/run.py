"""Fuzzes the native library under the address and undefined-behaviour sanitizers: `python tests/fuzz/run.py`.

    --seconds S   how long (60)
    --seed N      where the random numbers start (the time)

Builds tests/fuzz/fuzz_native.cpp with the whole library (g++, libasan, libubsan), gives it valid records of the
lossless codec to damage, and ends with status 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "native"))

import builds  # noqa: E402


def lossless_records() -> bytes:
    """Valid records for the harness: type, rows, columns and size (int64), then the body; caught on their way to the
    decoder."""
    from cachegen.codecs import float_records
    from cachegen.native import lossless

    caught: list[bytes] = []
    genuine = lossless.decode

    def catch(records: list[tuple[int, ...]], threads: int, isa: int) -> None:
        import ctypes

        for address, size, _, _, rows, columns, kind in records:
            caught.append(np.array([kind, rows, columns, size], "<i8").tobytes() + ctypes.string_at(address, size))
        genuine(records, threads, isa)

    float_records.native.decode = catch
    try:
        _round_trips()
    finally:
        float_records.native.decode = genuine
    return b"".join(caught)


def _round_trips() -> None:
    from cachegen.codecs import float_records
    from cachegen.native import lossless as native

    make = torch.Generator().manual_seed(1)
    for dtype in native.TYPES:
        for rows in (3, 37):
            tensors = [(torch.randn(rows, 2, 20, generator=make) * 2.0).to(dtype) for _ in range(2)]
            out = [torch.zeros_like(tensor) for tensor in tensors]
            record = float_records.write_record(tensors, None)
            float_records.decode(float_records.read_record(float_records.Cursor(memoryview(record)), out), 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    program = builds.sanitized_program(HERE / "fuzz_native.cpp")
    limits = {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    with tempfile.NamedTemporaryFile(suffix=".records") as records:
        records.write(lossless_records())
        records.flush()
        command = [str(program), str(options.seconds), str(options.seed), records.name]
        return subprocess.run(command, env={**os.environ, **limits}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
