"""Bands of the `channel` codec: a run of tokens of one layer, as bytes and back. Normative: docs/format-channel.md."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..entropy import rans
from ..entropy.tables import (
    BUILTIN_ROUNDING,
    BUILTIN_SHAPES,
    BUILTIN_TABLES,
    ESCAPE_BITS,
    PROB_BITS,
    TableBank,
    builtin_bank,
    builtin_index,
)
from ..errors import CacheGenError, CapacityError, CorruptStream
from ..rope import Rope, rotate
from ..transforms.channel import BLOCK, MAX_WEIGHT, TokenOrder, natural_order, order_tokens, quantise, reference
from .base import ChunkInfo, GroupSegments, Targets

CHANNELS, UNCENTRED, HEADS, RAW = range(4)
"""Modes: mean and table a channel; a table a channel; a table a head; numbers as they are."""
BAND = 480
"""Tokens of a band, at most: 15 blocks, so that a token's block fits four bits beside the outliers'."""
BAND_ELEMENTS = 1 << 19
MEAN_STEPS = 8
"""Means are multiples of step / 8."""
_TURNED = 256
"""Tokens put back in their places, and turned, at once."""
_OF_THREAD = threading.local()
_SHORT = 96  # tokens; shorter bands try every mode, and tables by their cost
_CENTRE = BUILTIN_TABLES  # first table of the middle shape, which side information is coded with


@cache
def bank() -> TableBank:
    """The built-in tables of all shapes: table = shape * 68 + scale index."""
    banks = [builtin_bank(shape) for shape in BUILTIN_SHAPES]
    return TableBank(
        np.concatenate([b.freqs for b in banks]),
        banks[0].offset,
        np.concatenate([b.low_bits for b in banks]),
        banks[0].escape,
        np.concatenate([b.recon for b in banks]),
        banks[0].escape_bias,
    )


def band_edges(tokens: int, key_channels: int) -> Iterator[tuple[int, int]]:
    """Token ranges of a layer's bands: even parts of at most 480 tokens and 2^19 numbers of K, multiples of 32."""
    most = max(BLOCK, min(BAND, BAND_ELEMENTS // max(1, key_channels) // BLOCK * BLOCK))
    count = -(-tokens // most)
    size = -(-tokens // max(1, count * BLOCK)) * BLOCK
    for start in range(0, tokens, max(1, size)):
        yield start, min(tokens, start + size)


@dataclass
class _Side:
    """A tensor's side information.

    Attributes:
        step: the quantiser's step at weight 0, an fp32 number.
        shape, index: int64 [channels], the channel's table: density and scale index at weight 0.
        mean: int64 [channels], in eighths of a step; None where values are coded about zero.
    """

    step: float
    shape: NDArray[np.int64]
    index: NDArray[np.int64]
    mean: NDArray[np.int64] | None

    def bias(self) -> NDArray[np.float32] | None:
        if self.mean is None:
            return None
        return (self.mean * (self.step / MEAN_STEPS)).astype(np.float32)


def _tables(sides: Sequence[_Side], weights: Sequence[int]) -> NDArray[np.uint16]:
    """Table ids [blocks, channels] of tensors side by side, or [channels] where all blocks have one weight."""
    shift = 2 * np.array(weights if len(set(weights)) > 1 else weights[:1], dtype=np.int64)
    shape, index = (np.concatenate(part) for part in zip(*((s.shape, s.index) for s in sides), strict=True))
    index = np.clip(index + shift[:, None], 0, BUILTIN_TABLES - 1)
    ids: NDArray[np.uint16] = (shape * BUILTIN_TABLES + index).astype(np.uint16)
    return ids if len(shift) > 1 else ids[0]


def _dequant(sides: Sequence[_Side], weights: Sequence[int]) -> rans.Dequant:
    """Scales and biases of tensors side by side."""
    rows = weights if len(set(weights)) > 1 else weights[:1]
    channels = [len(side.index) for side in sides]
    scales = np.array([[block_step(side.step, w) for side in sides] for w in rows], dtype=np.float32)
    scale = torch.from_numpy(np.repeat(scales, channels, axis=1))
    biases = [side.bias() for side in sides]
    bias = None if biases[0] is None else torch.from_numpy(np.concatenate([b for b in biases if b is not None]))
    return rans.Dequant(scale if len(rows) > 1 else scale[0], None, bias)


def block_step(step: float, weight: int) -> float:
    """The step of a block of this weight: step * 2^(-weight / 2), in double precision, rounded to fp32."""
    return float(np.float32(step * 2.0 ** (-weight / 2)))


# ---------------------------------------------------------------------- writing
def encode_band(
    keys: Tensor, values: Tensor, steps: tuple[float, float], dtype: torch.dtype, starts_context: bool
) -> bytes:
    """A band as bytes.

    Args:
        keys, values: float32 [tokens, heads, dim], keys before RoPE.
        steps: of keys and values, in typical deviations.
        dtype: of the cache: what numbers are stored as where coding doesn't pay.
        starts_context: the band's first token is a context's first.
    Raises:
        CapacityError: numbers too far apart for the quantiser's integers.
    """
    tokens = int(keys.shape[0])
    order = order_tokens(keys, starts_context)
    if tokens == 1 and starts_context:
        raw = _raw(keys, values, dtype)
        if raw is not None:
            return raw
    best: bytes | None = None
    failed: CacheGenError | None = None
    for mode in (CHANNELS, UNCENTRED, HEADS) if tokens < _SHORT else (CHANNELS,):
        try:
            coded = _encode(mode, (keys, values), steps, order, dtype)
        except CapacityError as error:
            failed = error
            continue
        if best is None or len(coded) < len(best):
            best = coded
    if best is None and failed is not None:
        raise failed
    if best is not None and len(best) < 1 + (keys.numel() + values.numel()) * dtype.itemsize:
        return best
    raw = _raw(keys, values, dtype)
    return best if raw is None else raw  # type: ignore[return-value]


def _raw(keys: Tensor, values: Tensor, dtype: torch.dtype) -> bytes | None:
    """The numbers as they are; None if un-rotated keys overflow the dtype."""
    stored = [tensor.to(dtype) for tensor in (keys, values)]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in stored):
        return None
    return bytes([RAW]) + b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in stored)


def _encode(
    mode: int, tensors: Sequence[Tensor], steps: Sequence[float], order: TokenOrder, dtype: torch.dtype
) -> bytes:
    sides: list[_Side] = []
    columns: list[Tensor] = []
    main = order.order[order.outliers :]
    weights = torch.tensor(order.weights).repeat_interleave(BLOCK)[: len(main)]
    for tensor, relative in zip(tensors, steps, strict=True):
        rows = tensor.flatten(1)[main]
        step = float(np.float32(relative * reference(rows)))
        side = _measure(mode, rows, step, int(tensor.shape[1]))
        bias = side.bias()
        centred = rows if bias is None else rows - torch.from_numpy(bias)
        scales = torch.tensor([block_step(step, w) for w in order.weights])
        rows_scale = scales.repeat_interleave(BLOCK)[: len(main), None] if len(scales) > 1 else scales
        columns.append(quantise(centred, rows_scale, BUILTIN_ROUNDING))
        if len(order.order) < _SHORT:
            heads = int(tensor.shape[1]) if mode == HEADS else rows.shape[1]
            side = _cheapest(side, columns[-1].numpy().astype(np.int64), weights.numpy(), heads)
        sides.append(side)
    matrix = torch.cat(columns, dim=1)
    spec = rans.MatrixSpec(len(main), matrix.shape[1], bank(), _tables(sides, order.weights))
    (stream,) = rans.encode([matrix], [spec])
    head = [struct.pack("<BBB2f", mode, order.outliers, not order.natural, *(side.step for side in sides))]
    if not order.natural:
        head += [struct.pack(f"<{len(order.weights)}b", *order.weights), _pack_classes(order)]
        head.append(_outliers(tensors, order, dtype))
    heads_of = [int(tensor.shape[1]) for tensor in tensors]
    return b"".join([*head, _pack_sides(mode, sides, heads_of), struct.pack("<I", len(stream)), stream])


def _outliers(tensors: Sequence[Tensor], order: TokenOrder, dtype: torch.dtype) -> bytes:
    rows = torch.cat([tensor.flatten(1) for tensor in tensors], dim=1)[order.order[: order.outliers]].to(dtype)
    if not bool(torch.isfinite(rows).all()):
        raise CapacityError(f"channel: an outlier's key before RoPE is beyond {dtype}; carry this layer by lossless")
    return rows.view(torch.uint8).numpy().tobytes()


def _measure(mode: int, rows: Tensor, step: float, heads: int) -> _Side:
    """Side information from a tensor's rows, in rank order and without outliers."""
    scaled = rows / step  # at most 2^12 / the step in typical deviations: squares fit fp32
    mean: NDArray[np.int64] | None = None
    if mode == CHANNELS:
        rounded = torch.round(scaled.mean(0) * MEAN_STEPS)
        mean = rounded.to(torch.int64).numpy()
        scaled -= rounded / MEAN_STEPS
    squares, sizes = scaled.square().mean(0), scaled.abs_().mean(0)
    if mode == HEADS:
        width = rows.shape[1] // heads
        squares = squares.view(heads, width).mean(1).repeat_interleave(width)
        sizes = sizes.view(heads, width).mean(1).repeat_interleave(width)
    deviation = squares.sqrt()
    # E|x| / deviation: .707 for Laplace, .76 for shape 1.4, .798 for Gaussian
    peakedness = sizes / deviation.clamp_min(1e-30)
    shape = (peakedness > 0.735).long() + (peakedness > 0.78).long()
    return _Side(step, shape.numpy(), builtin_index(deviation.numpy()).astype(np.int64), mean)


@cache
def _code_lengths() -> NDArray[np.float32]:
    """Bits of each symbol under each table, low bits apart; an escape's word is included."""
    tables = bank()
    with np.errstate(divide="ignore"):
        bits = PROB_BITS - np.log2(tables.freqs.astype(np.float32))
    bits[:, -1] += ESCAPE_BITS
    lengths: NDArray[np.float32] = bits.astype(np.float32)
    return lengths


def _cheapest(side: _Side, values: NDArray[np.int64], weights: NDArray[np.int64], sides: int) -> _Side:
    """The side's tables chosen by what a few rows cost under them; deviations say little there, and tails much.

    Args:
        values: int64 [tokens, channels].
        weights: int64 [tokens].
        sides: channels, or heads, that share a table.
    """
    lengths, low, offset = _code_lengths(), bank().low_bits.astype(np.int64), bank().offset
    lanes = np.bincount(np.arange(len(values)) // BLOCK)
    low_bit = np.repeat(-(-lanes // 16) * 16 / lanes, lanes)[:, None]  # low bits are coded 16 lanes at a time
    width = values.shape[1] // sides
    start = side.index[::width]
    shape = 0 if sides < values.shape[1] else 1  # channels of one head together have the longer tails
    escape = lengths.shape[1] - 1
    costs, choices = [], []
    for step in range(-7, 3):
        index = np.clip(start + step, 0, BUILTIN_TABLES - 1)
        shifted = np.clip(np.repeat(index, width) + 2 * weights[:, None], 0, BUILTIN_TABLES - 1)
        table = shape * BUILTIN_TABLES + shifted
        symbol = (values >> low[table]) + offset
        bits = lengths[table, np.where((symbol >= 0) & (symbol < escape), symbol, escape)]
        bits = np.minimum(bits, lengths[table, escape]) + low_bit * low[table]  # symbols without a code escape
        costs.append(bits.reshape(len(values), sides, width).sum((0, 2)))
        choices.append(index)
    best = np.stack(choices)[np.argmin(costs, axis=0), np.arange(sides)]
    return _Side(side.step, np.full(values.shape[1], shape), np.repeat(best, width), side.mean)


def _pack_classes(order: TokenOrder) -> bytes:
    """Four bits a token: 0 for outliers, else 1 + its block."""
    classes = np.zeros(len(order.order) + 1 & ~1, dtype=np.uint8)
    ranks = np.arange(len(order.order))
    classes[order.order.numpy()] = np.where(ranks < order.outliers, 0, (ranks - order.outliers) // BLOCK + 1)
    return (classes[::2] | classes[1::2] << 4).astype(np.uint8).tobytes()


def _pack_sides(mode: int, sides: Sequence[_Side], heads: Sequence[int]) -> bytes:
    if mode == HEADS:
        tables = [(s.shape * BUILTIN_TABLES + s.index)[:: len(s.index) // h] for s, h in zip(sides, heads, strict=True)]
        return np.concatenate(tables).astype(np.uint8).tobytes()
    parts = [part for side in sides for part in (side.index, side.shape, side.mean) if part is not None]
    centres = [0 if any(part is side.mean for side in sides) else _median(part) for part in parts]
    columns = [part - centre for part, centre in zip(parts, centres, strict=True)]
    # A quarter octave wider than measured: few numbers, and an escape costs 16 bits.
    spreads = [math.sqrt(float(np.square(column, dtype=np.float64).mean()) + 0.05) for column in columns]
    scales = np.minimum(builtin_index(spreads).astype(np.int64) + 1, BUILTIN_TABLES - 1)
    head = np.stack([np.array(centres), scales], axis=1).ravel().tolist()
    ids = np.repeat(_CENTRE + scales, [len(column) for column in columns]).astype(np.uint16)
    row = np.concatenate(columns)
    if np.abs(row).max() >= 1 << 26:
        raise CapacityError("channel: a mean is too far from zero for its step")
    spec = rans.MatrixSpec(1, len(row), bank(), ids)
    (stream,) = rans.encode([torch.from_numpy(row.astype(np.int32))[None]], [spec])
    return struct.pack(f"<{len(head)}BI", *head, len(stream)) + stream


def _median(values: NDArray[np.int64]) -> int:
    ordered = np.sort(values)
    return round(float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


# ---------------------------------------------------------------------- reading
@dataclass(frozen=True)
class _Coded:
    """The coded matrix of a band's tokens but outliers, keys and values side by side."""

    data: memoryview
    spec: rans.MatrixSpec
    dequant: rans.Dequant


@dataclass(frozen=True)
class Band:
    """A band with its bytes, checked as far as they can be without decoding.

    Attributes:
        keys, values: the targets' rows, [tokens, heads, dim].
        positions: int64 [tokens] to rotate keys to.
        exact: numbers stored as they are: the outliers' rows; where nothing is coded, all keys, then all values.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    rope: Rope | None
    order: TokenOrder
    exact: memoryview
    coded: _Coded | None

    @property
    def elements(self) -> int:
        return self.keys.numel() + self.values.numel()

    def exact_numbers(self) -> Tensor:
        """`exact` in the cache's dtype."""
        return torch.frombuffer(bytearray(self.exact), dtype=self.keys.dtype)


class _Cursor:
    """Reads a segment front to back; every read is checked against what is left."""

    def __init__(self, data: memoryview) -> None:
        self.data = memoryview(data).cast("B")
        self.at = 0

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise CorruptStream(
                f"channel: expected {n} more bytes at {self.at} of the segment; {len(self.data) - self.at} are left"
            )
        self.at += n
        return self.data[self.at - n : self.at]

    def bytes(self, n: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.take(n), dtype=np.uint8)

    def end(self) -> None:
        if self.at != len(self.data):
            raise CorruptStream(f"channel: {len(self.data) - self.at} bytes are left over at the segment's end")


def read_segment(info: ChunkInfo, part: GroupSegments, targets: Targets) -> Iterator[Band]:
    """The bands of a group's segment."""
    cursor = _Cursor(part.segments[0])
    first, last = part.group.tokens or (0, info.num_tokens)
    for layer in range(*part.group.layers):
        keys, values = targets[layer, "k"], targets[layer, "v"]
        rope = info.spec.layers[layer].rope
        for start, stop in band_edges(last - first, keys.shape[1] * keys.shape[2]):
            positions = info.positions[first + start : first + stop]
            yield _read_band(cursor, keys[start:stop], values[start:stop], positions, rope)
    cursor.end()


def _read_band(cursor: _Cursor, keys: Tensor, values: Tensor, positions: Tensor, rope: Rope | None) -> Band:
    tokens = int(keys.shape[0])
    (mode,) = cursor.take(1)
    if mode == RAW:
        size = (keys.numel() + values.numel()) * keys.element_size()
        return Band(keys, values, positions, rope, natural_order(tokens), cursor.take(size), None)
    if mode not in (CHANNELS, UNCENTRED, HEADS):
        raise CorruptStream(f"channel: expected a mode of 0..3; got {mode}")
    outliers, ordered, *steps = struct.unpack("<BB2f", cursor.take(10))
    if not all(2.0**-126 <= step < 2.0**100 for step in steps):
        raise CorruptStream(f"channel: steps must be within 2^-126..2^100; got {steps}")
    order = _read_order(cursor, tokens, outliers, ordered)
    channels = (keys.numel() + values.numel()) // tokens
    exact = cursor.take(order.outliers * channels * keys.element_size())
    sides = _read_sides(cursor, mode, steps, (keys, values))
    spec = rans.MatrixSpec(tokens - order.outliers, channels, bank(), _tables(sides, order.weights))
    (size,) = struct.unpack("<I", cursor.take(4))
    coded = _Coded(cursor.take(size), spec, _dequant(sides, order.weights))
    return Band(keys, values, positions, rope, order, exact, coded)


def _read_order(cursor: _Cursor, tokens: int, outliers: int, ordered: int) -> TokenOrder:
    if ordered > 1 or (outliers and not ordered) or outliers > min(BLOCK, tokens - 1):
        raise CorruptStream(f"channel: {outliers} outliers of {tokens} tokens, order flag {ordered}")
    if not ordered:
        return natural_order(tokens)
    blocks = -(-(tokens - outliers) // BLOCK)
    weights = struct.unpack(f"<{blocks}b", cursor.take(blocks))
    packed = cursor.bytes(-(-tokens // 2))
    classes = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)
    if max(map(abs, weights)) > MAX_WEIGHT or classes[tokens:].any():
        raise CorruptStream("channel: a block's weight is beyond 4 half octaves, or padding isn't zero")
    classes = classes[:tokens]
    counts = np.bincount(classes, minlength=blocks + 1)
    expected = [outliers, *(min(BLOCK, tokens - outliers - BLOCK * b) for b in range(blocks))]
    if len(counts) != len(expected) or (counts != expected).any():
        raise CorruptStream("channel: the blocks don't hold the tokens that they must")
    return TokenOrder(torch.from_numpy(np.argsort(classes, kind="stable")), outliers, weights)


def _read_sides(cursor: _Cursor, mode: int, steps: Sequence[float], tensors: Sequence[Tensor]) -> list[_Side]:
    channels = [int(t.shape[1] * t.shape[2]) for t in tensors]
    if mode == HEADS:
        sides = []
        for tensor, step in zip(tensors, steps, strict=True):
            table = np.repeat(cursor.bytes(tensor.shape[1]).astype(np.int64), tensor.shape[2])
            sides.append(_checked(_Side(step, table // BUILTIN_TABLES, table % BUILTIN_TABLES, None)))
        return sides
    kinds = 3 if mode == CHANNELS else 2
    head = cursor.bytes(4 * kinds).reshape(2, kinds, 2).astype(np.int64)
    (size,) = struct.unpack("<I", cursor.take(4))
    if (head[:, :, 1] >= BUILTIN_TABLES).any():
        raise CorruptStream("channel: side information names a table that doesn't exist")
    ids = np.repeat(_CENTRE + head[:, :, 1].ravel(), np.repeat(channels, kinds)).astype(np.uint16)
    row = torch.empty(1, kinds * sum(channels), dtype=torch.int32)
    spec = rans.MatrixSpec(1, row.shape[1], bank(), ids)
    rans.decode([cursor.take(size)], [spec], [row])
    numbers, at, sides = row[0].numpy().astype(np.int64), 0, []
    for n, step, rows in zip(channels, steps, head, strict=True):
        parts = [numbers[at + i * n : at + (i + 1) * n] + rows[i, 0] for i in range(kinds)]
        sides.append(_checked(_Side(step, parts[1], parts[0], parts[2] if kinds == 3 else None)))
        at += kinds * n
    return sides


def _checked(side: _Side) -> _Side:
    bad_shape = (side.shape < 0) | (side.shape >= len(BUILTIN_SHAPES))
    bad_index = (side.index < 0) | (side.index >= BUILTIN_TABLES)
    if bad_shape.any() or bad_index.any():
        raise CorruptStream("channel: side information names a table that doesn't exist")
    return side


def decode_bands(bands: Sequence[Band]) -> None:
    """Decode bands into their targets."""
    coded, decoded = [], []
    room = _room(sum(band.elements for band in bands if band.coded is not None))
    for band in bands:
        if band.coded is None:
            keys, values = band.exact_numbers().split([band.keys.numel(), band.values.numel()])
            rotate(keys.view(band.keys.shape), band.positions, band.rope, out=band.keys)
            band.values.copy_(values.view(band.values.shape))
            continue
        rows, room = room[: band.elements].view(len(band.keys), -1), room[band.elements :]
        if band.order.outliers:
            rows[: band.order.outliers] = band.exact_numbers().view(band.order.outliers, -1)
        coded.append(band.coded)
        decoded.append((band, rows))
    rans.decode_dequant(
        [c.data for c in coded],
        [c.spec for c in coded],
        [c.dequant for c in coded],
        [rows[band.order.outliers :] for band, rows in decoded],
    )
    for band, rows in decoded:
        _hand_over(band, rows)


def _room(elements: int) -> Tensor:
    """fp32 memory of this thread's own, kept from band to band: a few MB, which fresh allocations would scatter."""
    held: Tensor | None = getattr(_OF_THREAD, "room", None)
    if held is None or held.numel() < elements:
        _OF_THREAD.room = held = torch.empty(elements, dtype=torch.float32)
    return held


def _hand_over(band: Band, rows: Tensor) -> None:
    """Decoded rows [tokens, channels], in rank order and before RoPE, to the band's targets."""
    order, split = band.order.order, band.keys.shape[1] * band.keys.shape[2]
    keys, values = rows[:, :split].view(band.keys.shape), rows[:, split:].view(band.values.shape)
    if band.order.natural:
        rotate(keys, band.positions, band.rope, out=band.keys)
        band.values.copy_(values)
        return
    rank = torch.argsort(order)
    for start in range(0, len(rank), _TURNED):
        rows_of = slice(start, start + _TURNED)  # neighbours again, whose rotations every layer shares
        rotate(keys.index_select(0, rank[rows_of]), band.positions[rows_of], band.rope, out=band.keys[rows_of])
        band.values[rows_of].copy_(values.index_select(0, rank[rows_of]))
