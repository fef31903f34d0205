"""32-lane interleaved rANS, native. The bitstream: docs/format-entropy.md; plain twin: `reference`.

A *matrix* of values [tokens, components] is coded as one or more streams; lane = token of a 32-token block, stepping
over components, so every lane of a step shares one table: `table_ids[block, component]`.

Code for AVX-512 (VBMI2), AVX2 and any other processor gives the same bytes and the same numbers; the best that the
processor runs is chosen, or the one that the environment variable CACHEGEN_ISA (scalar, avx2, avx512) names.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import (
    CapacityError,
    CorruptStream,
    DeviceError,
    DtypeError,
    InputError,
    LayoutError,
    LimitExceeded,
    ShapeError,
    TableError,
    Truncated,
)
from ..native import library
from .tables import TableBank

LANES = 32
MAX_SIDE = 1 << 24
"""Most tokens, and most components, of a matrix."""
ISAS = ("scalar", "avx2", "avx512")
ISA_VARIABLE = "CACHEGEN_ISA"

_OK, _BAD_ARGUMENT, _BAD_TABLE, _CAPACITY, _CORRUPT, _TRUNCATED, _NO_MEMORY, _NO_ISA = range(8)
_INT_TYPES = {torch.uint8: 0, torch.int16: 1, torch.int32: 2}
_FLOAT_TYPES = {torch.bfloat16: 3, torch.float16: 4, torch.float32: 5}
_ENCODE_FIELDS = 10


@dataclass(frozen=True, eq=False)
class MatrixSpec:
    """What both sides know about a coded matrix.

    Attributes:
        tokens, components: its shape, each 1..2^24.
        bank: its tables.
        table_ids: uint16 [components] or [ceil(tokens / 32), components], each below the bank's number of tables.
    Raises:
        ShapeError, DtypeError, LimitExceeded.
    """

    tokens: int
    components: int
    bank: TableBank
    table_ids: NDArray[np.uint16]

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.components < 1:
            raise ShapeError(
                f"matrix: expected at least one token and component; got {self.tokens} x {self.components}"
            )
        if self.tokens > MAX_SIDE or self.components > MAX_SIDE:
            raise LimitExceeded(
                f"matrix: at most {MAX_SIDE} tokens and components; got {self.tokens} x {self.components}"
            )
        ids = self.table_ids
        if not isinstance(ids, np.ndarray) or ids.dtype != np.uint16:
            raise DtypeError(f"table_ids: expected a uint16 array; got {getattr(ids, 'dtype', type(ids).__name__)}")
        if ids.shape not in ((self.components,), (self.blocks, self.components)):
            raise ShapeError(
                f"table_ids: expected [{self.components}] or [{self.blocks}, {self.components}]; got {list(ids.shape)}"
            )
        if not ids.flags.c_contiguous:
            object.__setattr__(self, "table_ids", np.ascontiguousarray(ids))

    @cached_property
    def _native_fields(self) -> tuple[int, int, int, int, int]:
        """The first members of a native job. The arrays they point to live as long as this spec."""
        stride = 0 if self.table_ids.ndim == 1 else self.components
        return _native_bank(self.bank).address, _address(self.table_ids), stride, self.tokens, self.components

    @property
    def blocks(self) -> int:
        """32-token blocks, the last perhaps shorter."""
        return (self.tokens + LANES - 1) // LANES


@dataclass(frozen=True, eq=False)
class Dequant:
    """Fused dequantisation: value = ((recon * scale[block, c]) * token_scale[t]) + bias[c], each an fp32 operation.

    Attributes:
        scale: float32 [components] or [blocks, components]; None = 1.
        token_scale: float32 [tokens] or None (skipped).
        bias: float32 [components] or None (skipped).
    """

    scale: Tensor | None = None
    token_scale: Tensor | None = None
    bias: Tensor | None = None


def isa() -> str:
    """The instruction set that calls use now: the environment's choice, else the processor's best."""
    return ISAS[_isa_number(None)]


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this processor runs, slowest first."""
    return ISAS[: int(library().cg_isa_best()) + 1]


def encode(
    values: Sequence[Tensor], specs: Sequence[MatrixSpec], threads: int = 1, *, isa: str | None = None
) -> list[bytes]:
    """Encode matrices [tokens, components], several streams in flight.

    Args:
        values: int16 or int32 values q, or uint8 symbols (q + offset; only for banks without escape and low bits);
            the last dimension contiguous.
        specs: one a matrix.
        threads: how many threads may work.
        isa: overrides the environment's choice.
    Raises:
        CapacityError: a value can't be coded: no escape, or q >> low_bits beyond 16 bits.
        TableError: a table id beyond the bank, or a bad bank.
        ShapeError, DtypeError, LayoutError, DeviceError, InputError.
    """
    _check_lengths("encode", values=values, specs=specs)
    if not specs:
        return []
    jobs = np.zeros((len(specs), _ENCODE_FIELDS), np.int64)
    for i, (value, spec) in enumerate(zip(values, specs, strict=True)):
        where = f"values[{i}]"
        if value.dtype not in _INT_TYPES:
            raise DtypeError(f"{where}: expected uint8, int16 or int32; got {value.dtype}")
        _check_matrix_tensor(where, value, spec)
        _check_symbols(where, value.dtype, spec.bank)
        jobs[i] = (
            *spec._native_fields,
            value.data_ptr(),
            _INT_TYPES[value.dtype],
            value.stride(0) if spec.tokens > 1 else spec.components,
            0,
            0,
        )
    lib, fault, blob = library(), (ctypes.c_int64 * 4)(), ctypes.c_void_p()
    code = lib.cg_encode(_address(jobs), len(specs), threads, _isa_number(isa), ctypes.byref(blob), ctypes.byref(fault))
    if code != _OK:
        _raise("encode", code, fault, values, specs)
    try:
        return [ctypes.string_at(int(job[-2]), int(job[-1])) for job in jobs]
    finally:
        lib.cg_blob_free(blob)


def decode(
    data: Sequence[bytes | bytearray | memoryview],
    specs: Sequence[MatrixSpec],
    out: Sequence[Tensor],
    threads: int = 1,
    *,
    isa: str | None = None,
) -> None:
    """Decode matrices to integers.

    Args:
        data: what `encode` made, one a matrix.
        specs: the ones given to `encode`.
        out: int16 or int32 values q, or uint8 symbols (q + offset; only for banks without escape and low bits),
            [tokens, components], the last dimension contiguous.
        threads, isa: as in `encode`.
    Raises:
        CorruptStream, Truncated, TableError: bad bytes (also: a value beyond int16 where `out` is int16). Then `out`
            may be partly written; nothing outside it is, and nothing outside `data` is read.
        ShapeError, DtypeError, LayoutError, DeviceError, InputError.
    """
    _check_lengths("decode", data=data, specs=specs, out=out)
    rows: list[tuple[int, ...]] = []
    keep: list[object] = []
    for i, (spec, target) in enumerate(zip(specs, out, strict=True)):
        where = f"out[{i}]"
        if target.dtype not in _INT_TYPES:
            raise DtypeError(f"{where}: expected uint8, int16 or int32; got {target.dtype}")
        _check_matrix_tensor(where, target, spec)
        _check_symbols(where, target.dtype, spec.bank)
        address, size = _bytes_of(data[i], keep)
        stride = target.stride(0) if spec.tokens > 1 else spec.components
        layout = (target.data_ptr(), _INT_TYPES[target.dtype], stride, 0, spec.components)
        rows.append((*spec._native_fields, address, size, *layout, 0, 0, 0, 0))
    _run_decode(rows, specs, data, threads, isa)


def decode_dequant(
    data: Sequence[bytes | bytearray | memoryview],
    specs: Sequence[MatrixSpec],
    dequants: Sequence[Dequant],
    out: Sequence[Tensor],
    threads: int = 1,
    *,
    isa: str | None = None,
) -> None:
    """Decode and dequantise into `out`: bf16, fp16 or fp32, [tokens, components] or [tokens, heads, dim] with any token
    and head strides (last dim contiguous, heads * dim = components). Rounding to nearest even; NaN is the quiet NaN.

    Raises:
        CorruptStream, Truncated, TableError: bad bytes. Then `out` may be partly written; nothing outside it is.
        ShapeError, DtypeError, LayoutError, DeviceError, InputError.
    """
    _check_lengths("decode_dequant", data=data, specs=specs, dequants=dequants, out=out)
    rows: list[tuple[int, ...]] = []
    keep: list[object] = []
    for i, (spec, dequant, target) in enumerate(zip(specs, dequants, out, strict=True)):
        where = f"out[{i}]"
        if target.dtype not in _FLOAT_TYPES:
            raise DtypeError(f"{where}: expected bfloat16, float16 or float32; got {target.dtype}")
        if target.dim() == 3:
            if target.shape[0] != spec.tokens or target.shape[1] * target.shape[2] != spec.components:
                raise ShapeError(
                    f"{where}: expected [{spec.tokens}, heads, dim] with heads * dim = {spec.components}; "
                    f"got {list(target.shape)}"
                )
            dim, head_stride = target.shape[2], target.stride(1)
            if (dim > 1 and target.stride(2) != 1) or target.device.type != "cpu":
                _check_layout(where, target)
            if head_stride == dim or target.shape[1] == 1:
                dim = spec.components
        else:
            _check_matrix_tensor(where, target, spec)
            dim, head_stride = spec.components, 0
        address, size = _bytes_of(data[i], keep)
        scale, scale_stride = _vector(f"dequants[{i}].scale", dequant.scale, (spec.components,), spec.blocks)
        token_scale, _ = _vector(f"dequants[{i}].token_scale", dequant.token_scale, (spec.tokens,))
        bias, _ = _vector(f"dequants[{i}].bias", dequant.bias, (spec.components,))
        layout = (target.data_ptr(), _FLOAT_TYPES[target.dtype], target.stride(0), head_stride, dim)
        rows.append((*spec._native_fields, address, size, *layout, scale, scale_stride, token_scale, bias))
    _run_decode(rows, specs, data, threads, isa)


# ------------------------------------------------------------------------------------------ the native side
class _NativeBank:
    """A bank in the library's memory; freed with the last reference."""

    def __init__(self, bank: TableBank) -> None:
        lib, pointer = library(), ctypes.c_void_p()
        freqs = np.ascontiguousarray(bank.freqs)
        code = lib.cg_bank_create(
            _address(freqs),
            freqs.shape[0],
            freqs.shape[1],
            bank.offset,
            _address(bank.low_bits),
            int(bank.escape),
            _address(bank.recon),
            bank.escape_bias,
            ctypes.byref(pointer),
        )
        if code == _NO_MEMORY:
            raise MemoryError(f"no memory for a bank of {freqs.shape[0]} tables")
        if code != _OK or pointer.value is None:
            raise TableError("the native coder refuses the bank; check it with TableBank.validate()")
        self.address = pointer.value
        weakref.finalize(self, lib.cg_bank_free, ctypes.c_void_p(self.address))


def _native_bank(bank: TableBank) -> _NativeBank:
    """The bank's native form, built once and kept with it."""
    handle: _NativeBank | None = bank.__dict__.get("_native")
    if handle is None:
        bank.validate()
        handle = bank.__dict__.setdefault("_native", _NativeBank(bank))
    return handle


def _isa_number(isa: str | None) -> int:
    best = int(library().cg_isa_best())
    name = os.environ.get(ISA_VARIABLE, "") if isa is None else isa
    if not name:
        return best
    if name not in ISAS:
        raise InputError(f"{ISA_VARIABLE}: expected one of {', '.join(ISAS)}; got {name!r}")
    number = ISAS.index(name)
    if number > best:
        raise InputError(f"{ISA_VARIABLE}={name}: this processor has no more than {ISAS[best]}; unset it")
    return number


def _address(array: NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


def _bytes_of(data: bytes | bytearray | memoryview, keep: list[object]) -> tuple[int, int]:
    """Address and size of a bytes-like object, which `keep` then holds."""
    if len(data) == 0:
        return 0, 0
    array = np.frombuffer(data, np.uint8)
    keep.append(array)
    return _address(array), array.size


def _vector(where: str, tensor: Tensor | None, shape: tuple[int], blocks: int | None = None) -> tuple[int, int]:
    """Address and block stride of a float32 vector, or of one a block where `blocks` is given; (0, 0) for None."""
    if tensor is None:
        return 0, 0
    size = tuple(tensor.shape)
    if size != shape and (blocks is None or size != (blocks, *shape)):
        raise ShapeError(f"{where}: expected {list(shape)}{' or one row a block' if blocks else ''}; got {list(size)}")
    if tensor.dtype != torch.float32:
        raise DtypeError(f"{where}: expected float32; got {tensor.dtype}")
    if not tensor.is_contiguous():
        raise LayoutError(f"{where}: expected a contiguous tensor; got strides {tensor.stride()}")
    if tensor.device.type != "cpu":
        raise DeviceError(f"{where}: expected a cpu tensor; got {tensor.device}")
    return tensor.data_ptr(), (shape[0] if len(size) == 2 else 0)


def _check_lengths(what: str, **lists: Sequence[object]) -> None:
    if len({len(items) for items in lists.values()}) > 1:
        got = ", ".join(f"{name}: {len(items)}" for name, items in lists.items())
        raise ShapeError(f"{what}: expected lists of one length; got {got}")


def _check_matrix_tensor(where: str, tensor: Tensor, spec: MatrixSpec) -> None:
    if tensor.dim() != 2 or tensor.shape[0] != spec.tokens or tensor.shape[1] != spec.components:
        raise ShapeError(f"{where}: expected [{spec.tokens}, {spec.components}]; got {list(tensor.shape)}")
    if (tensor.stride(1) != 1 and spec.components > 1) or tensor.device.type != "cpu":
        _check_layout(where, tensor)


def _check_layout(where: str, tensor: Tensor) -> NoReturn:
    if tensor.device.type != "cpu":
        raise DeviceError(f"{where}: expected a cpu tensor; got {tensor.device}")
    raise LayoutError(f"{where}: the last dimension must be contiguous; got strides {tensor.stride()}")


def _check_symbols(where: str, dtype: torch.dtype, bank: TableBank) -> None:
    if dtype is torch.uint8 and not bank.simple:
        raise DtypeError(f"{where}: uint8 symbols can't hold escapes and low bits; use int16 or int32")


def _run_decode(
    rows: list[tuple[int, ...]],
    specs: Sequence[MatrixSpec],
    data: Sequence[bytes | bytearray | memoryview],
    threads: int,
    isa: str | None,
) -> None:
    if not rows:
        return
    jobs, fault = np.array(rows, np.int64), (ctypes.c_int64 * 4)()
    code = library().cg_decode(_address(jobs), len(rows), threads, _isa_number(isa), ctypes.byref(fault))
    if code != _OK:
        _raise("decode", code, fault, data, specs)


def _raise(
    what: str, code: int, fault: ctypes.Array[ctypes.c_int64], items: Sequence[object], specs: Sequence[MatrixSpec]
) -> NoReturn:
    job, stream, token, component = (int(v) for v in fault)
    where = f"{what}: matrix {job} of {len(specs)}" + (f", stream {stream}" if stream >= 0 else "")
    details = {"matrix": job, "stream": stream}
    if code == _CAPACITY:
        values, spec = items[job], specs[job]
        assert isinstance(values, Tensor)
        table = spec.table_ids.reshape(-1, spec.components)[
            token // LANES if spec.table_ids.ndim == 2 else 0, component
        ]
        raise CapacityError(
            f"{where}: value {int(values[token, component])} of token {token}, component {component} can't be coded "
            f"by table {int(table)} ({'beyond 16 bits' if spec.bank.escape else 'the bank has no escape'}); clip it, "
            "or use a bank with an escape or more low bits",
            token=token,
            component=component,
            **details,
        )
    if code == _TRUNCATED:
        raise Truncated(f"{where}: fewer bytes than its streams need; fetch the object again", **details)
    if code == _CORRUPT:
        raise CorruptStream(
            f"{where}: doesn't decode to its end (words missing or left over, or a wrong final state); the bytes were "
            "altered, or were made with other tables",
            **details,
        )
    if code == _BAD_TABLE:
        raise TableError(f"{where}: a table id is beyond the bank's {specs[job].bank.tables} tables", **details)
    if code == _NO_MEMORY:
        raise MemoryError(f"{where}: no memory")
    raise InputError(f"{where}: the native coder refuses the job (status {code})", **details)
