"""Matrices with escapes and low bits through torchac, which knows symbols alone: the rest goes beside them.

The symbols are those that the native coder codes, under the same tables. Bytes: docs/format-cachegen.md, *torchac*.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..entropy import torchac
from ..entropy.rans import Dequant, MatrixSpec
from ..entropy.tables import PROB_BITS
from ..errors import CapacityError, CorruptStream, Truncated

PART_ENTRIES = 1 << 22
"""Entries of the tables that are expanded at once."""
_LENGTH = struct.Struct("<I")
_ESCAPES = 32768


def encode(values: Sequence[Tensor], specs: Sequence[MatrixSpec]) -> list[bytes]:
    """Encode int32 matrices [tokens, components]. Raises CapacityError, MissingExtra."""
    return [_encode(q.numpy().astype(np.int64), spec) for q, spec in zip(values, specs, strict=True)]


def decode_dequant(
    data: Sequence[bytes | memoryview],
    specs: Sequence[MatrixSpec],
    dequants: Sequence[Dequant],
    out: Sequence[Tensor],
) -> None:
    """As `rans.decode_dequant`, into fp32 [tokens, components]. Raises FormatError kinds, MissingExtra."""
    for stream, spec, dequant, target in zip(data, specs, dequants, out, strict=True):
        values = reconstruct(torch.from_numpy(_decode(bytes(stream), spec)), spec)
        if dequant.scale is not None:
            values = values * dequant.scale
        if dequant.token_scale is not None:
            values = values * dequant.token_scale[:, None]
        target.copy_(values if dequant.bias is None else values + dequant.bias)


def reconstruct(q: Tensor, spec: MatrixSpec) -> Tensor:
    """Reconstruction points, fp32, of int32 [tokens, components]: those that the native coder gives."""
    bank = spec.bank
    ids = torch.from_numpy(spec.table_ids.astype(np.int64))
    low = torch.from_numpy(bank.low_bits.astype(np.int32))[ids]
    symbol = (q >> low) + bank.offset
    inside = (symbol >= 0) & (symbol < bank.alphabet - bank.escape) & (low == 0)
    slot = ids * bank.alphabet + torch.where(inside, symbol, 0)
    coded = inside & (torch.from_numpy(bank.freqs.astype(np.int32)).flatten()[slot] > 0)
    wide = q.to(torch.float32) + torch.sign(q) * bank.escape_bias
    return torch.where(coded, torch.from_numpy(bank.recon.copy()).flatten()[slot], wide)


def _cumulative(spec: MatrixSpec) -> Tensor:
    """Cumulative frequencies of each table, 16 bits, 65536 written as 0, as torchac wants them: int16 [tables, A + 1].

    torchac can't tell symbols of frequency 0 from their neighbours: they get 1, off the likeliest symbol's.
    """
    freqs = spec.bank.freqs.astype(np.int64) << (torchac.PRECISION - PROB_BITS)
    none = freqs == 0
    freqs[none] = 1
    freqs[np.arange(len(freqs)), freqs.argmax(1)] -= none.sum(1)
    cumulative = np.concatenate([np.zeros((len(freqs), 1), np.int64), freqs.cumsum(1)], 1)
    return torch.from_numpy(cumulative.astype(np.uint16).view(np.int16))


def _parts(spec: MatrixSpec) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix whose expanded tables fit in memory, and those tables: int16 [rows * components, A + 1]."""
    row = _cumulative(spec)[torch.from_numpy(spec.table_ids.astype(np.int64))]
    size = max(1, PART_ENTRIES // row.numel())
    for first in range(0, spec.tokens, size):
        rows = slice(first, min(first + size, spec.tokens))
        yield rows, row.repeat(rows.stop - first, 1)


def _encode_symbols(symbols: Tensor, spec: MatrixSpec) -> bytes:
    """int16 [tokens, components] as parts, each a u32 length and torchac's bytes."""
    parts = []
    for rows, tables in _parts(spec):
        part = torchac.encode_symbols(tables, symbols[rows].flatten())
        parts += [_LENGTH.pack(len(part)), part]
    return b"".join(parts)


def _decode_symbols(data: bytes, spec: MatrixSpec) -> tuple[Tensor, int]:
    """int16 [tokens, components], and the bytes that they took."""
    symbols = torch.empty(spec.tokens, spec.components, dtype=torch.int16)
    at = 0
    for rows, tables in _parts(spec):
        if len(data) < at + _LENGTH.size or len(data) < at + _LENGTH.size + _LENGTH.unpack_from(data, at)[0]:
            raise Truncated(f"torchac: expected a length and as many bytes at {at}; got {len(data)} bytes")
        start = at + _LENGTH.size
        at = start + _LENGTH.unpack_from(data, at)[0]
        symbols[rows] = torchac.decode_symbols(tables, data[start:at]).view(-1, spec.components)
    return symbols, at


def _encode(q: NDArray[np.int64], spec: MatrixSpec) -> bytes:
    bank = spec.bank
    low = bank.low_bits[spec.table_ids].astype(np.int64)
    high = q >> low
    symbols = high + bank.offset
    inside = (symbols >= 0) & (symbols < bank.alphabet - bank.escape)
    freqs = bank.freqs[spec.table_ids, np.where(inside, symbols, 0)]
    escaped = ~inside | (freqs == 0)
    if escaped.any():
        possible = bank.escape and bool((bank.freqs[spec.table_ids, -1] > 0)[np.nonzero(escaped)[1]].all())
        if not possible or not ((high[escaped] >= -_ESCAPES) & (high[escaped] < _ESCAPES)).all():
            raise CapacityError("torchac: a value is beyond the escape's 16 bits, or there is no escape; clip it")
    coded = _encode_symbols(torch.from_numpy(np.where(escaped, bank.alphabet - 1, symbols).astype(np.int16)), spec)
    raw = _pack((q - (high << low)), low)
    return b"".join((coded, high[escaped].astype("<i2").tobytes(), raw))


def _decode(data: bytes, spec: MatrixSpec) -> NDArray[np.int32]:
    bank = spec.bank
    low = bank.low_bits[spec.table_ids].astype(np.int64)
    symbols, end = _decode_symbols(data, spec)
    high = symbols.numpy().astype(np.int64) - bank.offset
    escaped = (high == bank.alphabet - 1 - bank.offset) if bank.escape else np.zeros(high.shape, bool)
    count, bits = int(escaped.sum()), spec.tokens * int(low.sum())
    if len(data) != end + 2 * count + (bits + 7) // 8:
        raise CorruptStream(
            f"torchac: expected {count} escaped values and {bits} low bits; got {len(data) - end} bytes"
        )
    high[escaped] = np.frombuffer(data, "<i2", count, end)
    raw = _unpack(np.frombuffer(data, np.uint8, -1, end + 2 * count), low, spec.tokens)
    return ((high << low) + raw).astype(np.int32)


def _pack(raw: NDArray[np.int64], low: NDArray[np.int64]) -> bytes:
    """Low bits of a matrix, value by value in row order, least significant bit first, eight to a byte."""
    planes = [(raw[:, c] >> bit) & 1 for c in range(raw.shape[1]) for bit in range(int(low[c]))]
    return np.packbits(np.stack(planes, 1), bitorder="little").tobytes() if planes else b""


def _unpack(data: NDArray[np.uint8], low: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """Inverse of `_pack`: int64 [tokens, components]."""
    width = int(low.sum())
    bits = np.unpackbits(data, count=tokens * width, bitorder="little").reshape(tokens, width).astype(np.int64)
    raw = np.zeros((tokens, len(low)), np.int64)
    at = 0
    for c, count in enumerate(low):
        for bit in range(int(count)):
            raw[:, c] |= bits[:, at] << bit
            at += 1
    return raw
