"""Matrices with escapes and low bits through torchac, which knows symbols alone: the rest goes beside them.

The symbols are those that the native coder codes, under the same tables. Bytes: docs/format-cachegen.md, *torchac*.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..entropy import torchac
from ..entropy.rans import Dequant, MatrixSpec
from ..entropy.tables import TableBank
from ..errors import CapacityError, CorruptStream, Truncated

_HEAD = struct.Struct("<I")
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


def _plain(spec: MatrixSpec) -> MatrixSpec:
    """The same tables, with the escape as a symbol like any other and no low bits."""
    bank = spec.bank
    low_bits = np.zeros(bank.tables, np.uint8)
    return replace(spec, bank=TableBank(bank.freqs, bank.offset, low_bits, False, bank.recon))


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
    coded = torchac.encode(
        torch.from_numpy(np.where(escaped, bank.alphabet - 1, symbols).astype(np.uint8)), _plain(spec)
    )
    raw = _pack((q - (high << low)), low)
    return _HEAD.pack(len(coded)) + coded + high[escaped].astype("<i2").tobytes() + raw


def _decode(data: bytes, spec: MatrixSpec) -> NDArray[np.int32]:
    bank = spec.bank
    low = bank.low_bits[spec.table_ids].astype(np.int64)
    if len(data) < _HEAD.size or len(data) < _HEAD.size + _HEAD.unpack_from(data)[0]:
        raise Truncated(f"torchac: expected a length and as many bytes; got {len(data)} bytes")
    end = _HEAD.size + _HEAD.unpack_from(data)[0]
    symbols = torch.empty(spec.tokens, spec.components, dtype=torch.uint8)
    torchac.decode(data[_HEAD.size : end], _plain(spec), symbols)
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
    return bytes(np.packbits(np.stack(planes, 1), bitorder="little").data) if planes else b""


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
