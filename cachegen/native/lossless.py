"""Bindings of lossless.h: floats <-> exponent symbols, bit planes and exceptions (docs/format-lossless.md)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CorruptStream, InstallError
from . import library

ARGUMENT, EXCEPTIONS, MEMORY = 1, 2, 3

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
    lib.cg_lossless_merge.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
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


def merge(jobs: NDArray[np.int64]) -> None:
    """Symbols, planes and exceptions to floats. Raises CorruptStream if exceptions don't match the symbols."""
    failed = ctypes.c_int64(-1)
    _check(_functions().cg_lossless_merge(jobs.ctypes.data, len(jobs), ctypes.byref(failed)))


def _check(status: int) -> None:
    if status == EXCEPTIONS:
        raise CorruptStream(
            "lossless: the exceptions don't match the escape symbols: the segment's bytes were altered; fetch it again"
        )
    if status == MEMORY:
        raise MemoryError("lossless: no memory for a row of scratch")
    if status == ARGUMENT:
        raise InstallError(
            "lossless: the native library refused its arguments: it is older than the package; rebuild it"
        )


TYPES: dict[torch.dtype, int] = {
    torch.bfloat16: 0,
    torch.float16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}
"""Element types and their numbers in the bitstream."""
