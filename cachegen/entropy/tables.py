"""Integer probability tables: frequencies that sum to 4096, and what their symbols mean.

A `TableBank` is a set of tables of one alphabet. Each table says how a signed value q maps to a symbol:

    q >> low_bits  =  symbol - offset        (arithmetic shift; low_bits raw bits follow the symbol)

The last symbol may be the *escape*: the value (q >> low_bits) then follows as a 16-bit word. An encoder takes it for
values whose own symbol has frequency 0, too. Reconstruction points turn symbols into numbers: recon[table, symbol]
where low_bits is 0, else q + sign(q) * escape_bias.

Tables come from counts (`from_counts`), from parametric densities (`density_bank`) or from the built-in bank
(`builtin_bank`), which is integers committed with the package: no float decides a byte of decoding.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import InputError, ShapeError, TableError

if TYPE_CHECKING:
    from torch import Tensor

    from .rans import MatrixSpec

PROB_BITS = 12
PROB_SUM = 1 << PROB_BITS
ALPHABETS = (16, 32, 64, 256)
"""Alphabet sizes the coder is compiled for; smaller ones use the next size with zero frequencies."""
MAX_LOW_BITS = 12
MAX_TABLES = 1 << 16
ESCAPE_BITS = 16
"""Bits of an escaped value, after the escape symbol."""

ALWAYS_CODED = 3
"""Largest |q >> low_bits| that a table of `density_table` codes without the escape, however narrow."""

_MAGIC = b"CGTB"
_HEADER = struct.Struct("<4sBBHIf")  # magic, log2(alphabet), escape, offset, tables, escape_bias


@dataclass(frozen=True, eq=False)
class TableBank:
    """Tables of one alphabet size A (16, 32, 64 or 256). Immutable; compare banks by `digest()`.

    Attributes:
        freqs: uint16 [tables, A], each row sums to 4096, each entry 0..4095; a symbol of frequency 0 can't be coded.
        offset: the symbol of q = 0 (shift of zero), the same for every table.
        low_bits: uint8 [tables], 0..12 raw bits per value.
        escape: whether the last symbol (A - 1) is the escape.
        recon: float32 [tables, A], reconstruction point of each symbol (low_bits = 0), in steps.
        escape_bias: float, added to |q| of escaped values and of tables with low bits.
    Raises:
        TableError: the arrays aren't a bank.
    """

    freqs: NDArray[np.uint16]
    offset: int
    low_bits: NDArray[np.uint8]
    escape: bool
    recon: NDArray[np.float32]
    escape_bias: float = 0.0

    def __post_init__(self) -> None:
        for name, dtype in (("freqs", np.uint16), ("low_bits", np.uint8), ("recon", np.float32)):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise TableError(
                    f"{name}: expected a {np.dtype(dtype)} array; got {getattr(array, 'dtype', type(array))}"
                )
            frozen = np.array(array, order="C")  # a copy that nobody can change
            frozen.setflags(write=False)
            object.__setattr__(self, name, frozen)
        object.__setattr__(self, "escape", bool(self.escape))
        object.__setattr__(self, "escape_bias", float(np.float32(self.escape_bias)))
        self.validate()

    @property
    def alphabet(self) -> int:
        return int(self.freqs.shape[1])

    @property
    def tables(self) -> int:
        return int(self.freqs.shape[0])

    @cached_property
    def simple(self) -> bool:
        """No escape and no low bits: symbols are values, and coding is fastest."""
        return not self.escape and not self.low_bits.any()

    def validate(self) -> None:
        """Check everything a coder relies on. Raises TableError."""
        freqs = self.freqs
        if freqs.ndim != 2 or freqs.shape[1] not in ALPHABETS:
            raise TableError(f"freqs: expected [tables, A] with A one of {ALPHABETS}; got {list(freqs.shape)}")
        if not 1 <= freqs.shape[0] <= MAX_TABLES:
            raise TableError(f"freqs: expected 1..{MAX_TABLES} tables; got {freqs.shape[0]}")
        if self.low_bits.shape != freqs.shape[:1] or self.recon.shape != freqs.shape:
            raise TableError(
                f"bank: expected low_bits [{freqs.shape[0]}] and recon {list(freqs.shape)}; "
                f"got {list(self.low_bits.shape)} and {list(self.recon.shape)}"
            )
        if int(freqs.max()) >= PROB_SUM:
            raise TableError(f"freqs: at most {PROB_SUM - 1} each; got {int(freqs.max())}")
        sums = freqs.sum(axis=1, dtype=np.int64)
        if (sums != PROB_SUM).any():
            bad = int(np.flatnonzero(sums != PROB_SUM)[0])
            raise TableError(f"freqs: every table must sum to {PROB_SUM}; table {bad} sums to {int(sums[bad])}")
        if int(self.low_bits.max()) > MAX_LOW_BITS:
            raise TableError(f"low_bits: at most {MAX_LOW_BITS}; got {int(self.low_bits.max())}")
        if not 0 <= self.offset < freqs.shape[1]:
            raise TableError(f"offset: expected 0..{freqs.shape[1] - 1}; got {self.offset}")
        if not np.isfinite(self.recon).all() or not np.isfinite(self.escape_bias):
            raise TableError("recon, escape_bias: expected finite numbers")

    def to_bytes(self) -> bytes:
        """The bank as bytes (docs/format-entropy.md, *A bank as bytes*)."""
        header = _HEADER.pack(
            _MAGIC, self.alphabet.bit_length() - 1, self.escape, self.offset, self.tables, self.escape_bias
        )
        arrays = (self.freqs.astype("<u2"), self.low_bits, self.recon.astype("<f4"))
        return header + b"".join(array.tobytes() for array in arrays)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> TableBank:
        """Inverse of `to_bytes`. Raises TableError on anything that isn't a bank, before allocating for it."""
        if len(data) < _HEADER.size:
            raise TableError(f"bank: expected at least {_HEADER.size} bytes; got {len(data)}")
        magic, log_alphabet, escape, offset, tables, escape_bias = _HEADER.unpack_from(data)
        alphabet = 1 << log_alphabet if log_alphabet <= 8 else 0
        if magic != _MAGIC or alphabet not in ALPHABETS or escape > 1 or not 1 <= tables <= MAX_TABLES:
            raise TableError("bank: the bytes don't start like a bank of tables")
        expected = _HEADER.size + tables * (6 * alphabet + 1)
        if len(data) != expected:
            raise TableError(f"bank: {tables} tables of {alphabet} symbols take {expected} bytes; got {len(data)}")
        at = _HEADER.size
        freqs = np.frombuffer(data, "<u2", tables * alphabet, at).reshape(tables, alphabet)
        low_bits = np.frombuffer(data, np.uint8, tables, at + 2 * freqs.size)
        recon = np.frombuffer(data, "<f4", tables * alphabet, at + 2 * freqs.size + tables).reshape(freqs.shape)
        return cls(freqs.astype(np.uint16), offset, low_bits, bool(escape), recon.astype(np.float32), escape_bias)

    def digest(self) -> bytes:
        """SHA-256 of `to_bytes()`: banks of one digest code and reconstruct alike."""
        return hashlib.sha256(self.to_bytes()).digest()


# ----------------------------------------------------------------------------------------------- building tables
def frequencies(counts: ArrayLike, floor: int = 1) -> NDArray[np.uint16]:
    """Round counts to frequencies of sum 4096 that code them in (nearly) the fewest bits; integer and deterministic.

    Start from floor(4096 * count / total), then give or take units one by one where the bits gained most or lost
    least: going from f to f + 1 saves count * log2((f + 1) / f), compared as count / (2 f + 1).

    Args:
        counts: non-negative integers [..., A], each row with a sum of 1..2^40.
        floor: least frequency of each symbol (0 or 1). With 0, symbols of count 0 get none; others get at least 1.
    Returns:
        uint16 [..., A].
    Raises:
        InputError: counts that aren't counts.
    """
    array = np.asarray(counts)
    if array.dtype.kind not in "iu" or array.ndim < 1 or not 2 <= array.shape[-1] <= PROB_SUM // 2:
        raise InputError(f"counts: expected integers [..., symbols]; got {array.dtype} {list(array.shape)}")
    if floor not in (0, 1):
        raise InputError(f"floor: expected 0 or 1; got {floor}")
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty(rows.shape, np.uint16)
    for i, row in enumerate(rows):
        out[i] = _round_row([int(v) for v in row], floor)
    return out.reshape(array.shape)


def _round_row(counts: list[int], floor: int) -> list[int]:
    total = sum(counts)
    if min(counts) < 0 or not 1 <= total <= 1 << 40:
        raise InputError(f"counts: expected non-negative numbers of sum 1..2^40; got a sum of {total}")
    least = [1 if count > 0 or floor else 0 for count in counts]
    freqs = [max(low, count * PROB_SUM // total) for low, count in zip(least, counts, strict=True)]
    if max(freqs) == PROB_SUM:  # one symbol only: a table has at least two, the other being its neighbour
        i = freqs.index(PROB_SUM)
        freqs[i] -= 1
        freqs[i + 1 if i + 1 < len(freqs) else i - 1] += 1
    missing = PROB_SUM - sum(freqs)
    step = 1 if missing > 0 else -1
    # Fractions compared exactly: count / (2 f + step), scaled by 2^80. Ties go to the lower symbol.
    heap = [_change(counts, freqs, i, step) for i in range(len(freqs)) if freqs[i] + step >= least[i] and freqs[i] > 0]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        _, i = heapq.heappop(heap)
        freqs[i] += step
        if freqs[i] + step >= least[i]:
            heapq.heappush(heap, _change(counts, freqs, i, step))
    return freqs


def _change(counts: list[int], freqs: list[int], i: int, step: int) -> tuple[int, int]:
    """(cost, symbol) of changing a frequency by `step`."""
    gain = (counts[i] << 80) // (2 * freqs[i] + step)
    return (-gain if step > 0 else gain), i


def padded(counts: NDArray[np.int64], escape: bool) -> NDArray[np.int64]:
    """Counts [..., n] widened with zeros to the next alphabet; an escape stays the last symbol."""
    n = counts.shape[-1]
    alphabet = next((a for a in ALPHABETS if a >= n), None)
    if alphabet is None:
        raise ShapeError(f"counts: at most {ALPHABETS[-1]} symbols; got {n}")
    out = np.zeros((*counts.shape[:-1], alphabet), counts.dtype)
    out[..., : n - escape] = counts[..., : n - escape]
    if escape:
        out[..., -1] = counts[..., -1]
    return out


def from_counts(
    counts: ArrayLike,
    offset: int,
    *,
    low_bits: ArrayLike | None = None,
    escape: bool = False,
    recon: ArrayLike | None = None,
    escape_bias: float = 0.0,
    floor: int = 1,
) -> TableBank:
    """A bank whose tables suit counted symbols.

    Args:
        counts: non-negative integers [tables, n], n <= 256; the last is the escape's where `escape`.
        offset: the symbol of q = 0.
        low_bits: integers [tables] 0..12; None means 0.
        recon: floats [tables, n] (or [n]); None means symbol - offset.
        floor: least frequency of each of the n symbols: 1 keeps all codable, 0 only the counted ones.
    Raises:
        InputError, ShapeError, TableError.
    """
    table = np.asarray(counts)
    if table.ndim != 2:
        raise ShapeError(f"counts: expected [tables, symbols]; got {list(table.shape)}")
    freqs = padded(frequencies(table, floor).astype(np.int64), escape).astype(np.uint16)
    points = np.broadcast_to(np.arange(freqs.shape[1], dtype=np.float32) - np.float32(offset), freqs.shape).copy()
    if recon is not None:
        given = np.broadcast_to(np.asarray(recon, np.float32), table.shape)
        points[:, : table.shape[1]] = given
    low = np.zeros(freqs.shape[0], np.uint8) if low_bits is None else np.asarray(low_bits).astype(np.uint8)
    return TableBank(freqs, offset, low, escape, points, escape_bias)


def ideal_bits(values: Tensor, spec: MatrixSpec) -> float:
    """Bits that a perfect coder needs for a matrix under its tables: -log2(f / 4096) a symbol, low bits, escapes.

    Args:
        values: int16 or int32 [tokens, components], or uint8 symbols of a bank without escape and low bits.
    Raises:
        CapacityError: a value can't be coded.
    """
    import torch

    from ..errors import CapacityError

    bank = spec.bank
    q = values.numpy().astype(np.int64)
    if values.dtype is torch.uint8:
        q -= bank.offset
    ids = np.repeat(np.broadcast_to(spec.table_ids, (spec.blocks, spec.components)), 32, axis=0)[: spec.tokens]
    low = bank.low_bits[ids].astype(np.int64)
    high = q >> low
    symbols = high + bank.offset
    limit = bank.alphabet - bank.escape
    direct = (symbols >= 0) & (symbols < limit)
    freqs = bank.freqs[ids, np.where(direct, symbols, 0)].astype(np.int64)
    direct &= freqs > 0
    if bank.escape:
        freqs = np.where(direct, freqs, bank.freqs[ids, bank.alphabet - 1])
        bad = ~direct & ((freqs == 0) | (np.abs(2 * high + 1) > 65535))
    else:
        bad = ~direct
    if bad.any():
        token, component = (int(v) for v in np.argwhere(bad)[0])
        raise CapacityError(
            f"value {int(q[token, component])} of token {token}, component {component} can't be coded by table "
            f"{int(ids[token, component])}; clip it, or use a bank with an escape or more low bits"
        )
    return float((PROB_BITS - np.log2(freqs)).sum() + low.sum() + ESCAPE_BITS * np.count_nonzero(~direct))


# ------------------------------------------------------------------------------------------------ parametric tables
@dataclass(frozen=True)
class Density:
    """A symmetric density of variance 1 about 0: a mixture of generalised Gaussians.

    `parts` are (weight, standard deviation, shape): shape 1 is Laplace, 2 is Gaussian; exp(-|x / a|^shape) in general.
    Weights and deviations are normalised to sum 1 and variance 1. Uses scipy; offline only.
    """

    parts: tuple[tuple[float, float, float], ...]

    @classmethod
    def generalized_gaussian(cls, shape: float) -> Density:
        return cls(((1.0, 1.0, shape),))

    @classmethod
    def laplace(cls) -> Density:
        return cls.generalized_gaussian(1.0)

    @classmethod
    def gaussian(cls) -> Density:
        return cls.generalized_gaussian(2.0)

    @classmethod
    def gaussian_mixture(cls, weights: Sequence[float], deviations: Sequence[float]) -> Density:
        return cls(tuple((float(w), float(s), 2.0) for w, s in zip(weights, deviations, strict=True)))

    def _normalised(self) -> list[tuple[float, float, float]]:
        if not self.parts or min(min(part) for part in self.parts) <= 0:
            raise InputError(f"density: expected positive weights, deviations and shapes; got {self.parts}")
        total = sum(weight for weight, _, _ in self.parts)
        variance = sum(weight / total * deviation**2 for weight, deviation, _ in self.parts)
        return [(w / total, s / variance**0.5, shape) for w, s, shape in self.parts]

    def above(self, x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """P(X > x) and E[X; X > x] for x >= 0."""
        from scipy import special

        mass, moment = np.zeros_like(x), np.zeros_like(x)
        for weight, deviation, shape in self._normalised():
            log_ratio = special.gammaln(1 / shape) - special.gammaln(3 / shape)
            scale = deviation * np.exp(0.5 * log_ratio)
            t = (x / scale) ** shape
            mass += weight * 0.5 * special.gammaincc(1 / shape, t)
            mean = 0.5 * scale * np.exp(special.gammaln(2 / shape) - special.gammaln(1 / shape))
            moment += weight * mean * special.gammaincc(2 / shape, t)
        return mass, moment


def quantizer_bins(
    density: Density, sigma: float, rounding: float, most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities and centroids of q = sign(x) floor(|x| + rounding), x of deviation `sigma` steps.

    `rounding` 0.5 rounds to nearest; less widens the zero bin (a dead zone).

    Returns:
        P(q = m) for m = 0..most (P(q = -m) is the same), and E|x| within each bin, in steps (0 for m = 0).
    Raises:
        InputError.
    """
    if not 0 < sigma < 1e9 or not 0 <= rounding < 1 or most < 1:
        raise InputError(
            f"quantiser: expected sigma > 0, 0 <= rounding < 1, most >= 1; got {sigma}, {rounding}, {most}"
        )
    edges = np.concatenate([[0.0], np.arange(1, most + 2) - rounding])
    mass, moment = density.above(edges / sigma)
    inside, weighted = mass[:-1] - mass[1:], sigma * (moment[:-1] - moment[1:])
    # A bin too far out to have mass is never met; its middle is as good a point as any.
    centroids = np.arange(most + 1, dtype=np.float64) + (0.5 - rounding)
    known = inside > 1e-12
    centroids[known] = weighted[known] / inside[known]
    centroids[0] = 0.0
    inside[0] *= 2
    return inside, centroids


def density_table(
    density: Density, sigma: float, rounding: float, alphabet: int, low_bits: int
) -> tuple[NDArray[np.uint16], NDArray[np.float32], float]:
    """One table with escape for a dead-zone quantiser (see `quantizer_bins`); offset alphabet / 2 - 1.

    Symbols likelier than half a frequency unit get a code, and so do those up to 3 from zero, as real components have
    heavier tails than any density fitted to them; others go by the escape.

    Returns:
        freqs uint16 [alphabet], recon float32 [alphabet], and the expected bits a value.
    """
    offset = alphabet // 2 - 1
    near = np.abs(np.arange(alphabet - 1) - offset) <= ALWAYS_CODED
    inside, centroids = quantizer_bins(density, sigma, rounding, ((offset + 1) << low_bits) - 1)
    q = np.arange(-offset << low_bits, (offset + 1) << low_bits)
    probabilities = np.zeros(alphabet)
    probabilities[:-1] = inside[np.abs(q)].reshape(alphabet - 1, -1).sum(axis=1)
    probabilities[:-1] = np.where(near, np.maximum(probabilities[:-1], 2.0**-30), probabilities[:-1])
    probabilities[:-1][(probabilities[:-1] < 0.5 / PROB_SUM) & ~near] = 0
    probabilities[-1] = max(1.0 - probabilities.sum(), 2.0**-30)
    freqs = frequencies(np.round(probabilities * 2.0**36).astype(np.int64), floor=0)
    coded = freqs > 0
    bits = float((probabilities[coded] * (PROB_BITS - np.log2(freqs[coded]))).sum())
    recon = np.zeros(alphabet, np.float32)
    if low_bits == 0:
        recon[:-1] = np.sign(q) * centroids[np.abs(q)]
    return freqs, recon, bits + low_bits + ESCAPE_BITS * float(probabilities[-1])


def density_bank(density: Density, sigmas: ArrayLike, rounding: float, alphabet: int = 32) -> TableBank:
    """A bank with escape: table i for components of deviation `sigmas[i]` steps under a dead-zone quantiser.

    Each table takes as many low bits as give the fewest expected bits. Uses scipy; its integers may differ between
    machines in a last place, so a bank that both sides need is stored, never rebuilt.

    Args:
        sigmas: [tables] standard deviation / step.
        rounding: the quantiser's; `escape_bias` becomes 0.5 - rounding, the middle of a bin.
    """
    rows = []
    for sigma in np.asarray(sigmas, np.float64):
        tables = ((*density_table(density, float(sigma), rounding, alphabet, k), k) for k in range(MAX_LOW_BITS + 1))
        rows.append(min(tables, key=lambda table: table[2]))
    return TableBank(
        np.stack([freqs for freqs, _, _, _ in rows]),
        alphabet // 2 - 1,
        np.array([low_bits for _, _, _, low_bits in rows], np.uint8),
        True,
        np.stack([recon for _, recon, _, _ in rows]),
        0.5 - rounding,
    )


# --------------------------------------------------------------------------------------------------- the built-in bank
BUILTIN_SHAPES = ("laplace", "general", "gaussian")
"""Generalised Gaussians of shape 1, 1.4 and 2."""
BUILTIN_ROUNDING = 0.38
BUILTIN_TABLES = 68
"""Scale indices of the built-in bank."""


def builtin_sigma(index: int) -> float:
    """Standard deviation in steps that table `index` of the built-in bank is for: 2^((index - 12) / 4)."""
    if not 0 <= index < BUILTIN_TABLES:
        raise InputError(f"scale index: expected 0..{BUILTIN_TABLES - 1}; got {index}")
    return float(2.0 ** ((index - 12) / 4))


def builtin_index(sigma: ArrayLike) -> NDArray[np.uint16]:
    """Scale indices of the tables nearest to deviations in steps (any shape); beyond the grid, its ends."""
    with np.errstate(divide="ignore"):
        index = np.round(4 * np.log2(np.asarray(sigma, np.float64)) + 12)
    clipped: NDArray[np.float64] = np.clip(np.nan_to_num(index), 0, BUILTIN_TABLES - 1)
    return clipped.astype(np.uint16)


@cache
def builtin_bank(shape: str = "laplace") -> TableBank:
    """The bank that comes with the package: a dead-zone quantiser's tables (rounding 0.38) by scale index.

    32 symbols, the last the escape, q = 0 at symbol 15; table i is for standard deviation `builtin_sigma(i)` steps,
    from 1/8 (0.01 bit a value) to 2^13.75 (up to 12 low bits). The integers are data (`builtin_data`), remade by
    `python -m cachegen.entropy.make_builtin`.

    Args:
        shape: one of BUILTIN_SHAPES: the density's shape.
    Raises:
        InputError: no such shape.
    """
    from .builtin_data import BANKS

    if shape not in BANKS:
        raise InputError(f"built-in bank: expected one of {', '.join(BANKS)}; got {shape!r}")
    return TableBank.from_bytes(zlib.decompress(base64.b85decode("".join(BANKS[shape]))))
