"""Models of exponents for the `lossless` codec: a base per channel and a few measured tables, chosen by their cost.

A channel's exponents lie within a few octaves below its largest one. A symbol is the distance down from the channel's
*base*; types whose planes have no room for the sign carry it in the symbol's lowest bit, flipped where negative
numbers are the rule. Distances beyond the alphabet are escapes, and cost a byte beside the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..entropy.tables import PROB_SUM
from ..errors import ShapeError

MAX_TABLES = 16
_ROUNDS = 3
_MANY = 1 << 15  # numbers; from here on eight tables pay
_LONG = 128  # rows; from here on a side for each column pays


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


def fit(counts: NDArray[np.uint32], runs: NDArray[np.int64], kind: FloatType) -> tuple[ExponentModel, float]:
    """The cheapest model for a matrix, and the bits of its symbols, escapes, tables and side bytes.

    Args:
        counts: [columns, exponents] or [columns, exponents, 2] occurrences.
        runs: [runs] first column of each head.
    """
    columns = counts.reshape(counts.shape[0], 1 << kind.exponent_bits, 1 + kind.signs)
    total = int(columns.sum())
    many = total >= _MANY and len(columns) >= 64  # fewer columns can't fill eight tables
    shares = [(False, columns, (8,) if many else (1, 4))]
    if total < _LONG * len(columns):
        shares.append((True, np.add.reduceat(columns, runs, axis=0), (1,)))
    best: tuple[ExponentModel, float] | None = None
    for per_run, sides, choices in shares:
        base, flip = _bases(sides)
        for alphabet in kind.alphabets:
            symbols, escapes = _symbols(sides, base, flip, alphabet, kind)
            for tables in choices:
                if tables > 1 and tables > len(sides) // 8:
                    continue
                freqs, table, bits = _cluster(symbols, tables)
                bits += 8 * escapes + 16 * np.count_nonzero(freqs) + 8 * len(sides)
                if best is None or bits < best[1]:
                    model = ExponentModel(freqs, base, flip, table.astype(np.uint8), per_run)
                    best = (model, float(bits))
            if escapes < 0.02 * total:
                break  # larger alphabets save escapes only
    if best is None:
        raise ShapeError("lossless: a matrix without columns has no model")
    return best


def _bases(sides: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Bases (largest exponents but for one number in 64), and sign flips."""
    by_exponent = sides.sum(2, dtype=np.int64)
    used = np.flatnonzero(by_exponent.any(0))
    low, high = int(used[0]), int(used[-1]) + 1
    upto = by_exponent[:, low:high].cumsum(1)
    base = low + (64 * (upto[:, -1:] - upto) <= upto[:, -1:]).argmax(1)
    flip = np.zeros(len(sides), dtype=np.uint8)
    if sides.shape[2] == 2:
        flip = (sides[:, :, 1].sum(1) > sides[:, :, 0].sum(1)).astype(np.uint8)
    return base.astype(np.uint8), flip


def _symbols(
    sides: NDArray[np.uint32], base: NDArray[np.uint8], flip: NDArray[np.uint8], alphabet: int, kind: FloatType
) -> tuple[NDArray[np.float64], float]:
    """Occurrences by symbol [sides, alphabet], and how many numbers escape."""
    held, exponents = alphabet >> kind.signs, sides.shape[1]
    direct = exponents if held >= exponents else held - 1
    at = (base[:, None].astype(np.int64) - np.arange(direct)) % exponents
    symbols = np.zeros((len(sides), held, sides.shape[2]))
    symbols[:, :direct] = np.take_along_axis(sides, at[:, :, None], axis=1)
    escapes = 0.0
    if direct < exponents:
        symbols[:, held - 1] = sides.sum(1) - symbols[:, :direct].sum(1)
        escapes = float(symbols[:, held - 1].sum())
    swap = flip.astype(bool)
    symbols[swap] = symbols[swap][:, :, ::-1]
    return symbols.reshape(len(symbols), alphabet), escapes


def _cluster(symbols: NDArray[np.float64], tables: int) -> tuple[NDArray[np.uint16], NDArray[np.int64], float]:
    """Tables for groups of sides with like statistics (k-means in code length): freqs, table of each side, bits."""
    spread = symbols @ np.arange(symbols.shape[1]) / np.maximum(symbols.sum(1), 1)
    table = np.empty(len(symbols), dtype=np.int64)
    table[np.argsort(spread, kind="stable")] = np.arange(len(symbols)) * tables // len(symbols)
    costs = np.zeros((len(symbols), tables))
    for _ in range(_ROUNDS if tables > 1 else 0):
        sums = _sums(symbols, table, tables) + 0.02
        costs = symbols @ -np.log2(sums / sums.sum(1, keepdims=True)).T
        table = costs.argmin(1)
    used, table = np.unique(table, return_inverse=True)
    freqs = normalise(_sums(symbols, table, len(used)))
    bits = -np.log2(np.maximum(freqs, 1) / PROB_SUM)
    return freqs, table, float((symbols * bits[table]).sum())


def _sums(symbols: NDArray[np.float64], table: NDArray[np.int64], tables: int) -> NDArray[np.float64]:
    return np.eye(tables)[table].T @ symbols


def normalise(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Integer frequencies [tables, A] that sum to 4096, at least 1 where counts are positive, at most 4095."""
    counts = counts.copy()
    lonely = np.count_nonzero(counts, axis=1) < 2
    counts[lonely] += np.where(np.arange(counts.shape[1]) < 2, 1e-9, 0.0)  # two symbols at least: none may have 4096
    present = counts > 0
    room = PROB_SUM - present.sum(1, keepdims=True)
    freqs = np.floor(counts / counts.sum(1, keepdims=True) * room) + present
    freqs[np.arange(len(freqs)), freqs.argmax(1)] += PROB_SUM - freqs.sum(1)
    rounded: NDArray[np.uint16] = freqs.astype(np.uint16)
    return rounded
