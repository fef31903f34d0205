"""The native library: C++17 behind a C ABI (cachegen_native.h), loaded with ctypes, which releases the GIL."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

from ..errors import NativeMissing


@cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises NativeMissing with what to do."""
    path = Path(__file__).with_name("_native.so")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeMissing(
            f"the native library can't be loaded ({error}): install a wheel, or build it with g++: pip install ."
        ) from error
    lib.cg_crc32c.restype = ctypes.c_uint32
    lib.cg_crc32c.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t]
    lib.cg_isa_best.restype = ctypes.c_int
    lib.cg_isa_best.argtypes = []
    lib.cg_bank_create.restype = ctypes.c_int
    lib.cg_bank_create.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_float,
        ctypes.c_void_p,
    ]
    lib.cg_bank_free.restype = None
    lib.cg_bank_free.argtypes = [ctypes.c_void_p]
    lib.cg_decode.restype = ctypes.c_int
    lib.cg_decode.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    lib.cg_encode.restype = ctypes.c_int
    lib.cg_encode.argtypes = [*lib.cg_decode.argtypes[:4], ctypes.c_void_p, ctypes.c_void_p]
    lib.cg_blob_free.restype = None
    lib.cg_blob_free.argtypes = [ctypes.c_void_p]
    return lib


def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int:
    """CRC32C (Castagnoli) of a bytes-like object, continuing from `crc`."""
    if isinstance(data, bytes):
        return int(library().cg_crc32c(crc, data, len(data)))
    view = np.frombuffer(data, dtype=np.uint8)  # no copy, whether writable or not
    return int(library().cg_crc32c(crc, view.__array_interface__["data"][0], view.nbytes))
