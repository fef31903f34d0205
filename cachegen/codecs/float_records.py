"""Records of the `lossless` codec: matrices of floats, stored as they are, by planes and rANS, or by zstandard.

A matrix is one or more tensors [rows, heads, dim] of one dtype side by side. The bytes: docs/format-lossless.md.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from torch import Tensor

from ..entropy import rans
from ..entropy.tables import TableBank
from ..errors import CorruptStream
from ..native import lossless as native
from .exponents import FLOAT_TYPES, ExponentModel, FloatType, fit

RAW, RANS, ZSTD = range(3)
"""Modes of a record."""
BLOCK = 1 << 19
"""Symbols of a block: what a decoder keeps beside its output."""
MAX_COLUMNS = 4096
"""Columns into which a tensor without heads is folded, at most (if its last dimension allows)."""
_PER_RUN, _WIDE_BASE, _OMIT = 1, 2, 4  # flags; _OMIT << (plane - 1)


def write_record(tensors: Sequence[Tensor], zstd_level: int | None) -> bytes:
    """A matrix as bytes: by zstandard where a level is given, else by rANS; as it is where that isn't smaller.

    Args:
        tensors: [rows, heads, dim] of one dtype and row count.
    """
    tensors = [t if t.shape[2] < 2 or t.stride(2) == 1 else t.contiguous() for t in tensors]
    matrix = _Matrix(tensors)
    if matrix.nbytes == 0:
        return bytes([RAW])
    raw = 1 + matrix.nbytes
    coded = _write_rans(matrix, raw) if zstd_level is None else _write_zstd(matrix, zstd_level)
    if coded is not None and len(coded) < raw:
        return coded
    return bytes([RAW]) + _side_by_side([_bytes_of(t) for t in tensors])


# ---------------------------------------------------------------------- matrices
class _Matrix:
    """Tensors [rows, heads, dim] of one dtype side by side, as the native functions see them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.kind: FloatType = FLOAT_TYPES[native.TYPES[tensors[0].dtype]]
        self.rows = int(tensors[0].shape[0])
        self.columns = sum(int(t.shape[1] * t.shape[2]) for t in tensors)
        self.nbytes = self.rows * self.columns * self.kind.size
        self.table = native.rows_table(tensors)

    @property
    def widths(self) -> NDArray[np.int64]:
        """Columns of each head."""
        return np.concatenate([np.full(t.shape[1], t.shape[2], dtype=np.int64) for t in self.tensors])

    @property
    def block_rows(self) -> int:
        """Rows of a block: a multiple of 32."""
        return max(32, BLOCK // self.columns // 32 * 32)

    def edges(self) -> Iterator[tuple[int, int]]:
        """Row ranges of the blocks."""
        for start in range(0, self.rows, self.block_rows):
            yield start, min(self.rows, start + self.block_rows)

    def job(self, alphabet: int, rows: tuple[int, int]) -> NDArray[np.int64]:
        """A `cg_floats`, without its pointers."""
        job = np.zeros(native.MEMBERS, dtype=np.int64)
        job[: native.BASE] = (
            self.table.ctypes.data,
            len(self.tensors),
            self.columns,
            self.kind.code,
            alphabet,
            rows[0],
            rows[1],
        )
        return job


def fold(tensor: Tensor) -> Tensor:
    """A contiguous tensor of any shape as [rows, 1, columns]: its last dimension, halved while it is too wide."""
    columns = int(tensor.shape[-1]) if tensor.dim() and tensor.shape[-1] else 1
    while columns > MAX_COLUMNS and columns % 2 == 0:
        columns //= 2
    return tensor.reshape(-1, 1, columns)


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """uint8 [rows, heads, dim * size] over the same memory."""
    array: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return array


def _side_by_side(arrays: Sequence[NDArray[np.uint8]]) -> bytes:
    return np.concatenate([array.reshape(len(array), -1) for array in arrays], axis=1).tobytes()


# ---------------------------------------------------------------------- writing records
def _write_rans(matrix: _Matrix, raw: int) -> bytes | None:
    kind, rows, columns = matrix.kind, matrix.rows, matrix.columns
    counts = np.zeros((columns, 1 << kind.exponent_bits + kind.signs), dtype=np.uint32)
    native.count(matrix.job(16, (0, rows)), counts)
    widths = matrix.widths
    starts = np.concatenate([[0], widths.cumsum()[:-1]])
    model, bits = fit(counts, starts, kind)
    if bits / 8 + sum(kind.planes) * rows * columns / 8 >= raw:
        return None
    base, flip, table = _by_column(model, widths)
    bank = _bank(model.freqs)
    planes = [np.empty((rows, kind.plane_bytes(p, columns)), dtype=np.uint8) for p in range(len(kind.planes))]
    symbols, specs, exceptions = [], [], []
    for start, stop in matrix.edges():
        job = matrix.job(model.alphabet, (start, stop))
        coded = torch.empty(stop - start, columns, dtype=torch.uint8)
        escaped = np.empty((stop - start) * columns, dtype=np.uint8)
        job[native.BASE], job[native.FLIP] = base.ctypes.data, flip.ctypes.data
        job[native.SYMBOLS], job[native.EXCEPTION] = coded.data_ptr(), escaped.ctypes.data
        for p, plane in enumerate(planes):
            job[native.PLANE0 + p] = plane[start:].ctypes.data
        native.split(job)
        symbols.append(coded)
        exceptions.append(escaped[: job[native.EXCEPTION_COUNT]].tobytes())
        specs.append(rans.MatrixSpec(stop - start, columns, bank, table))
    streams = rans.encode(symbols, specs)
    omitted = [p > 0 and kind.size == 4 and not plane.any() for p, plane in enumerate(planes)]
    head = _model_bytes(model, kind, sum(_OMIT << p - 1 for p, gone in enumerate(omitted) if gone))
    sizes = struct.pack(
        f"<{2 * len(streams)}I", *(n for s, e in zip(streams, exceptions, strict=True) for n in (len(s), len(e)))
    )
    kept = [plane.tobytes() for plane, gone in zip(planes, omitted, strict=True) if not gone]
    body = b"".join([head, sizes, *exceptions, *kept, *streams])
    return struct.pack("<BI", RANS, len(body)) + body


def _model_bytes(model: ExponentModel, kind: FloatType, omitted: int) -> bytes:
    low = int(model.base.min())
    wide = int(model.base.max()) - low > 15 >> kind.signs
    flags = (_PER_RUN if model.per_run else 0) | (_WIDE_BASE if wide else 0) | omitted
    out = [struct.pack("<4B", flags, model.alphabet.bit_length() - 1, len(model.freqs) - 1, low)]
    ends = model.alphabet - (model.freqs[:, ::-1] != 0).argmax(1)
    for row, used in zip(model.freqs.astype("<u2"), ends.tolist(), strict=True):
        out += [bytes([used - 1]), row[:used].tobytes()]
    offset = model.base - low
    if wide:
        out += [offset.tobytes(), (model.table | model.flip << 7).tobytes()]
    else:
        out.append((model.table | offset << 4 | model.flip << 7).astype(np.uint8).tobytes())
    return b"".join(out)


def _by_column(
    model: ExponentModel, widths: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]:
    """Base, flip and table id of each column."""
    sides = (model.base, model.flip, model.table)
    if model.per_run:
        sides = tuple(np.repeat(side, widths) for side in sides)  # type: ignore[assignment]
    base, flip, table = (np.ascontiguousarray(side) for side in sides)
    return base, flip, table.astype(np.uint16)


def _bank(freqs: NDArray[np.uint16]) -> TableBank:
    tables, alphabet = freqs.shape
    return TableBank(
        freqs=freqs,
        offset=0,
        low_bits=np.zeros(tables, dtype=np.uint8),
        escape=False,
        recon=np.zeros((tables, alphabet), dtype=np.float32),
    )


def _write_zstd(matrix: _Matrix, level: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=True, write_checksum=False)
    frames: list[bytes] = []
    for start, stop in matrix.edges():
        views = [_bytes_of(t[start:stop]) for t in matrix.tensors]
        for byte in range(matrix.kind.size):
            frames.append(compressor.compress(_side_by_side([view[:, :, byte :: matrix.kind.size] for view in views])))
    body = b"".join([struct.pack(f"<{len(frames)}I", *map(len, frames)), *frames])
    return struct.pack("<BI", ZSTD, len(body)) + body


# ---------------------------------------------------------------------- reading
class Cursor:
    """Reads a segment front to back; every read is checked against what is left."""

    def __init__(self, data: memoryview) -> None:
        self.data = memoryview(data).cast("B")
        self.at = 0

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise CorruptStream(
                f"lossless: expected {n} more bytes at {self.at} of the segment; {len(self.data) - self.at} are left"
            )
        self.at += n
        return self.data[self.at - n : self.at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))

    def end(self) -> None:
        if self.at != len(self.data):
            raise CorruptStream(f"lossless: {len(self.data) - self.at} bytes are left over at the segment's end")


def read_record(cursor: Cursor, tensors: Sequence[Tensor]) -> Sequence[Work]:
    """The parts of a record that decodes to `tensors`."""
    matrix = _Matrix(tensors)
    (mode,) = cursor.unpack("B")
    if mode == RAW:
        data = cursor.take(matrix.nbytes)
        return [_RawRows(matrix, data)] if matrix.nbytes else []
    if matrix.rows == 0 or matrix.columns == 0 or mode not in (RANS, ZSTD):
        raise CorruptStream(f"lossless: no record of mode {mode} can hold {matrix.rows} x {matrix.columns} elements")
    body = Cursor(cursor.take(cursor.unpack("I")[0]))
    if mode == RANS:
        return [RansRecord(matrix, body.data)]
    edges, planes = list(matrix.edges()), matrix.kind.size
    frames = [body.take(size) for size in body.unpack(f"{len(edges) * planes}I")]
    body.end()
    return [_ZstdBlock(matrix, rows, frames[i * planes : (i + 1) * planes]) for i, rows in enumerate(edges)]


def decode(works: Sequence[Work], threads: int) -> None:
    """Decode parts of records into their tensors."""
    coded = [work for work in works if isinstance(work, RansRecord)]
    if coded:
        native.decode([record.fields() for record in coded], threads, rans.ISAS.index(rans.isa()))
    others = [work for work in works if not isinstance(work, RansRecord)]
    if threads > 1 and len(others) > 1:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda work: work.run(), others))
    else:
        for work in others:
            work.run()


class Work(ABC):
    """A part of a record that is decoded on its own."""

    @abstractmethod
    def run(self) -> None:
        """Write the decoded elements to their tensors."""


@dataclass
class _RawRows(Work):
    matrix: _Matrix
    data: memoryview

    def run(self) -> None:
        rows, at = np.frombuffer(self.data, dtype=np.uint8).reshape(self.matrix.rows, -1), 0
        for target in map(_bytes_of, self.matrix.tensors):
            width = target.shape[1] * target.shape[2]
            target[...] = rows[:, at : at + width].reshape(target.shape)
            at += width


@dataclass
class _ZstdBlock(Work):
    matrix: _Matrix
    rows: tuple[int, int]
    frames: Sequence[memoryview]

    @property
    def symbols(self) -> int:
        """Elements of the block: bytes of each frame's content."""
        return (self.rows[1] - self.rows[0]) * self.matrix.columns

    def run(self) -> None:
        size, (start, stop) = self.matrix.kind.size, self.rows
        for byte, frame in enumerate(self.frames):
            plane, at = self._decompress(frame).reshape(stop - start, -1), 0
            for target in map(_bytes_of, self.matrix.tensors):
                width = target.shape[1] * target.shape[2] // size
                part = plane[:, at : at + width].reshape(stop - start, target.shape[1], -1)
                target[start:stop, :, byte::size] = part
                at += width

    def _decompress(self, frame: memoryview) -> NDArray[np.uint8]:
        """A frame's content, whose stated size is checked before any memory is given."""
        try:
            header = zstandard.get_frame_parameters(frame)
            if header.content_size != self.symbols or header.dict_id != 0:
                raise CorruptStream(
                    f"lossless: expected a zstd frame of {self.symbols} bytes; got one of {header.content_size}"
                )
            data = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(frame, max_output_size=self.symbols)
        except zstandard.ZstdError as error:
            raise CorruptStream(
                f"lossless: a zstd frame doesn't decompress ({error}); fetch the object again"
            ) from error
        return np.frombuffer(data, dtype=np.uint8)


class RansRecord(Work):
    """A record of planes and rANS: decoded by native code, together with others."""

    def __init__(self, matrix: _Matrix, body: memoryview) -> None:
        self.matrix = matrix
        self.body = np.frombuffer(body, dtype=np.uint8)

    def fields(self) -> tuple[int, ...]:
        """A row of `cg_record`."""
        m = self.matrix
        address = int(self.body.__array_interface__["data"][0])
        table = int(m.table.__array_interface__["data"][0])
        return (address, self.body.size, table, len(m.tensors), m.rows, m.columns, m.kind.code)

    def run(self) -> None:
        decode([self], 1)
