"""Models of exponents for the `lossless` codec: a base per channel and a few measured tables, chosen by their cost.

A channel's exponents lie within a few octaves below its largest one. A symbol is the distance down from the channel's
*base*; types whose planes have no room for the sign carry it in the symbol's lowest bit, flipped where negative
numbers are the rule. Distances beyond the alphabet are escapes, and cost a byte beside the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ShapeError
from ..native import lossless as native


@dataclass(frozen=True)
class FloatType:
    """How an element type's bits are shared between symbols and planes.

    Attributes:
        code: its number in the bitstream.
        size: bytes an element.
        exponent_bits: bits of the exponent.
        signs: 1 if symbols carry the sign, else 0.
        planes: bits per element of each plane.
    """

    code: int
    size: int
    exponent_bits: int
    signs: int
    planes: tuple[int, ...]

    @property
    def alphabets(self) -> tuple[int, ...]:
        """Alphabets in which this type's symbols may be coded."""
        return tuple(a for a in (16, 32, 64, 256) if a <= 1 << self.exponent_bits + self.signs)

    def plane_bytes(self, plane: int, columns: int) -> int:
        """Bytes of one row of a plane."""
        per_byte = 8 // self.planes[plane]
        return -(-columns // per_byte)


FLOAT_TYPES = (
    FloatType(0, 2, 8, 0, (8,)),
    FloatType(1, 2, 5, 1, (8, 2)),
    FloatType(2, 4, 8, 0, (8, 8, 8)),
    FloatType(3, 1, 4, 0, (4,)),
    FloatType(4, 1, 5, 1, (2,)),
)


@dataclass(frozen=True)
class ExponentModel:
    """What a decoder needs to turn symbols back into exponents.

    Attributes:
        freqs: uint16 [tables, alphabet], rows sum to 4096.
        base: uint8 [sides], exponent of distance 0.
        flip: uint8 [sides], 0 or 1: the sign that a symbol's sign bit 0 stands for.
        table: uint8 [sides], row of `freqs`.
        per_run: sides are heads rather than channels.
    """

    freqs: NDArray[np.uint16]
    base: NDArray[np.uint8]
    flip: NDArray[np.uint8]
    table: NDArray[np.uint8]
    per_run: bool

    @property
    def alphabet(self) -> int:
        return int(self.freqs.shape[1])


def fit(counts: NDArray[np.uint32], runs: NDArray[np.int64], kind: FloatType) -> tuple[ExponentModel, int]:
    """The cheapest model for a matrix, and the bits of its symbols, escapes, tables and side bytes.

    Args:
        counts: [columns, exponents] or [columns, exponents, 2] occurrences.
        runs: [runs] first column of each head.
    Raises:
        ShapeError: no columns.
    """
    if len(counts) == 0:
        raise ShapeError("lossless: a matrix without columns has no model")
    freqs, (base, flip, table), per_run, bits = native.fit(np.ascontiguousarray(counts), runs, kind.code)
    return ExponentModel(freqs, base, flip, table, per_run), bits
