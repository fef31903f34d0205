"""Bindings of lossless.h: floats <-> exponent symbols, bit planes and exceptions (docs/format-lossless.md)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CorruptStream, FormatError, InstallError, TableError, Truncated
from . import library

_BAD_ARGUMENT, _BAD_TABLE, _CORRUPT, _TRUNCATED, _NO_MEMORY, _NO_ISA, _EXCEPTIONS, _RECORD = 1, 2, 4, 5, 6, 7, 32, 33

TENSORS, COUNT, COLUMNS, TYPE, ALPHABET, ROW0, ROW1, BASE, FLIP, SYMBOLS, PLANE0, _, _, EXCEPTION, EXCEPTION_COUNT = (
    range(15)
)
MEMBERS = 15
"""Members of `cg_floats` as columns of an int64 table."""


@cache
def _functions() -> ctypes.CDLL:
    lib = library()
    lib.cg_lossless_count.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    lib.cg_lossless_split.argtypes = [ctypes.c_void_p]
    lib.cg_lossless_fit.argtypes = [ctypes.c_void_p]
    lib.cg_lossless_decode.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_int64),
    ]
    return lib


def rows_table(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    """`cg_rows` of tensors [rows, heads, dim] whose last dimension is contiguous: int64 [tensors, 5]."""
    table = []
    for tensor in tensors:
        size, (rows, heads, dim), strides = tensor.element_size(), tensor.shape, tensor.stride()
        head_stride = strides[1] * size if heads > 1 else dim * size
        table.append((tensor.data_ptr(), strides[0] * size if rows > 1 else 0, head_stride, heads, dim))
    return np.array(table, dtype=np.int64)


def count(job: NDArray[np.int64], counts: NDArray[np.uint32]) -> None:
    """Add up how often each exponent (and sign) occurs in each column; `job` is one row of `cg_floats`."""
    _check(_functions().cg_lossless_count(job.ctypes.data, counts.ctypes.data))


def split(job: NDArray[np.int64]) -> None:
    """Floats to symbols, planes and exceptions; sets the job's exception count."""
    _check(_functions().cg_lossless_split(job.ctypes.data))


def fit(
    counts: NDArray[np.uint32], runs: NDArray[np.int64], kind: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], bool, int]:
    """The model of exponents that codes cheapest.

    Args:
        counts: C-contiguous [columns, ...], as `count` makes them.
        runs: [runs] first column of each head, rising.
        kind: the element type's number.
    Returns:
        frequencies [tables, alphabet]; base, flip and table of each side [3, sides]; whether sides are heads rather
        than columns; bits of symbols, escapes, tables and sides.
    """
    columns = len(counts)
    freqs, sides = np.empty(8 * 256, dtype=np.uint16), np.empty((3, columns), dtype=np.uint8)
    side, runs = int(sides.ctypes.data), np.ascontiguousarray(runs, dtype=np.int64)
    job = np.array(
        [
            counts.ctypes.data,
            columns,
            kind,
            runs.ctypes.data,
            len(runs),
            freqs.ctypes.data,
            *(side + i * columns for i in range(3)),
            *[0] * 4,
        ],
        dtype=np.int64,
    )
    _check(_functions().cg_lossless_fit(job.ctypes.data))
    per_run, alphabet, tables, bits = job[-4:].tolist()
    return (
        freqs[: tables * alphabet].reshape(tables, alphabet),
        sides[:, : len(runs) if per_run else columns],
        bool(per_run),
        bits,
    )


def decode(records: Sequence[tuple[int, ...]], threads: int, isa: int) -> None:
    """Decode records: rows of `cg_record` (address and size of the body, `rows_table`, tensors, rows, columns, type).

    Raises:
        CorruptStream, Truncated, TableError, FormatError: bad bytes. Then tensors may be partly written; nothing
            outside them is, and nothing outside the records is read.
    """
    failed, table = ctypes.c_int64(-1), np.array(records, dtype=np.int64)
    status = _functions().cg_lossless_decode(table.ctypes.data, len(records), threads, isa, ctypes.byref(failed))
    _check(status, int(failed.value))


def _check(status: int, record: int = -1) -> None:
    where = f"lossless: record {record}" if record >= 0 else "lossless"
    if status == 0:
        return
    if status == _NO_MEMORY:
        raise MemoryError(f"{where}: no memory")
    if status == _TRUNCATED:
        raise Truncated(f"{where}: fewer bytes than it states; fetch the object again")
    if status == _BAD_TABLE:
        raise TableError(f"{where}: a table isn't one, or a channel names one that isn't there; fetch the object again")
    if status == _CORRUPT:
        raise CorruptStream(f"{where}: a stream doesn't decode to its end: the bytes were altered; fetch them again")
    if status == _EXCEPTIONS:
        raise CorruptStream(f"{where}: exceptions and escape symbols don't match: the bytes were altered")
    if status == _RECORD:
        raise FormatError(f"{where}: flags, alphabet or length contradict its type and shape")
    raise InstallError(f"{where}: the native library refused its arguments (status {status}); rebuild it")


TYPES: dict[torch.dtype, int] = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
"""Element types and their numbers in the bitstream."""
