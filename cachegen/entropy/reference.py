"""The coder's bitstream in plain Python: one readable screen per idea, no vectors, no tricks.

Slow (about 0.2 million values a second), meant to be read beside docs/format-entropy.md and to prove the native coder.
Values are q; a matrix is a list of rows, one a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import CapacityError, CorruptStream, Truncated
from .rans import LANES, MatrixSpec
from .tables import PROB_BITS, PROB_SUM, TableBank

STATE_MIN = 1 << 16
STREAM_SYMBOLS = 65536
TILE = 32


# ------------------------------------------------------------------------------------------------------ tables
@dataclass
class AliasTable:
    """A table in alias form: which symbol, and which of its ranks, a slot 0..4095 stands for.

    Slots are cut into A buckets of `width`. A bucket's first own[b] slots are symbol b's, the rest alias[b]'s.
    """

    freqs: list[int]
    own: list[int]
    alias: list[int]
    base: list[int]

    @property
    def width(self) -> int:
        return PROB_SUM // len(self.freqs)

    def lookup(self, slot: int) -> tuple[int, int]:
        """(symbol, rank) of a slot; rank is 0..freq - 1."""
        bucket, inside = divmod(slot, self.width)
        if inside < self.own[bucket]:
            return bucket, inside
        return self.alias[bucket], self.base[bucket] + inside - self.own[bucket]

    def slots(self) -> dict[tuple[int, int], int]:
        """The inverse of `lookup`."""
        return {self.lookup(slot): slot for slot in range(PROB_SUM)}


def alias_table(freqs: Sequence[int]) -> AliasTable:
    """Vose's construction in integers, with stacks, so that everyone builds the same table."""
    size, width = len(freqs), PROB_SUM // len(freqs)
    rest, own, alias = list(freqs), [width] * size, list(range(size))
    small = [s for s in range(size) if rest[s] < width]
    large = [s for s in range(size) if rest[s] >= width]
    while small:
        s, g = small.pop(), large[-1]
        own[s], alias[s] = rest[s], g  # bucket s: what s still needs, then g
        rest[g] -= width - rest[s]
        if rest[g] < width:
            small.append(large.pop())
    base, seen = [], list(own)  # a symbol's ranks: its own bucket's first, then its parts elsewhere, in bucket order
    for b in range(size):
        base.append(seen[alias[b]])
        seen[alias[b]] += width - own[b]
    return AliasTable(list(freqs), own, alias, base)


def _alias_tables(bank: TableBank) -> list[AliasTable]:
    return [alias_table([int(f) for f in row]) for row in bank.freqs]


# ------------------------------------------------------------------------------------------------------ layout
def stream_width(tokens: int) -> int:
    """Components per stream: about 64k values a stream, a multiple of 32."""
    blocks = (tokens + LANES - 1) // LANES
    return max(TILE, STREAM_SYMBOLS // (LANES * blocks) // TILE * TILE)


def _stream_ranges(spec: MatrixSpec) -> list[range]:
    width = stream_width(spec.tokens)
    return [range(c, min(c + width, spec.components)) for c in range(0, spec.components, width)]


def _steps(spec: MatrixSpec, components: range) -> Iterator[tuple[range, int, int]]:
    """(tokens, component, table) of every step of a stream, in decoding order."""
    for block in range(spec.blocks):
        tokens = range(block * LANES, min((block + 1) * LANES, spec.tokens))
        ids = spec.table_ids if spec.table_ids.ndim == 1 else spec.table_ids[block]
        for component in components:
            yield tokens, component, int(ids[component])


# ------------------------------------------------------------------------------------------------------ decoding
def decode(data: bytes, spec: MatrixSpec) -> list[list[int]]:
    """Values [tokens][components] of a matrix' bytes. Raises Truncated, CorruptStream."""
    tables, ranges = _alias_tables(spec.bank), _stream_ranges(spec)
    values = [[0] * spec.components for _ in range(spec.tokens)]
    at = 4 * (len(ranges) - 1)
    if len(data) < at:
        raise Truncated(f"matrix: expected at least {at} bytes; got {len(data)}")
    for i, components in enumerate(ranges):
        last = i == len(ranges) - 1
        size = len(data) - at if last else int.from_bytes(data[4 * i : 4 * i + 4], "little")
        if size > len(data) - at:
            raise Truncated(f"stream {i}: expected {size} bytes; got {len(data) - at}")
        _decode_stream(data[at : at + size], spec, components, tables, values)
        at += size
    return values


def _decode_stream(
    data: bytes, spec: MatrixSpec, components: range, tables: list[AliasTable], values: list[list[int]]
) -> None:
    bank, lanes = spec.bank, min(LANES, spec.tokens)
    if len(data) < 4 * lanes:
        raise Truncated(f"stream: expected {lanes} states; got {len(data)} bytes")
    if len(data) % 2:
        raise CorruptStream("stream: expected an even number of bytes")
    states = [int.from_bytes(data[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    if min(states) < STATE_MIN:
        raise CorruptStream("stream: a state is below 2^16")
    words = iter([int.from_bytes(data[i : i + 2], "little") for i in range(4 * lanes, len(data), 2)])

    def word() -> int:
        value = next(words, None)
        if value is None:
            raise CorruptStream("stream: words missing")
        return value

    for tokens, component, table in _steps(spec, components):
        symbols = []
        for lane in range(len(tokens)):
            symbol, rank = tables[table].lookup(states[lane] % PROB_SUM)
            states[lane] = tables[table].freqs[symbol] * (states[lane] >> PROB_BITS) + rank
            symbols.append(symbol)
            if states[lane] < STATE_MIN:
                states[lane] = states[lane] << 16 | word()
        low_bits = int(bank.low_bits[table])
        low = [0] * len(tokens)
        for bit in range(low_bits):
            plane = word() | (word() << 16 if len(tokens) > 16 else 0)
            low = [value | (plane >> lane & 1) << bit for lane, value in enumerate(low)]
        for lane, token in enumerate(tokens):
            high = symbols[lane] - bank.offset
            if bank.escape and symbols[lane] == bank.alphabet - 1:
                high = word()
                high -= (high & 0x8000) << 1  # two's complement
            values[token][component] = (high << low_bits) + low[lane]
    if any(state != STATE_MIN for state in states) or next(words, None) is not None:
        raise CorruptStream("stream: doesn't end in state 2^16 with its last word")


# ------------------------------------------------------------------------------------------------------ encoding
def encode(values: Sequence[Sequence[int]], spec: MatrixSpec) -> bytes:
    """Bytes of values [tokens][components]. Raises CapacityError."""
    tables = _alias_tables(spec.bank)
    slots = [table.slots() for table in tables]
    streams = [_encode_stream(values, spec, components, tables, slots) for components in _stream_ranges(spec)]
    return b"".join(len(stream).to_bytes(4, "little") for stream in streams[:-1]) + b"".join(streams)


def _symbol(value: int, low_bits: int, table: AliasTable, bank: TableBank) -> tuple[int, int | None]:
    """(symbol, the 16-bit word after it or None)."""
    high = value >> low_bits
    symbol = high + bank.offset
    if 0 <= symbol < bank.alphabet - bank.escape and table.freqs[symbol] > 0:
        return symbol, None
    if not bank.escape or table.freqs[-1] == 0 or not -0x8000 <= high < 0x8000:
        raise CapacityError(f"value {value} can't be coded by its table")
    return bank.alphabet - 1, high & 0xFFFF


def _encode_stream(
    values: Sequence[Sequence[int]],
    spec: MatrixSpec,
    components: range,
    tables: list[AliasTable],
    slots: list[dict[tuple[int, int], int]],
) -> bytes:
    """Everything happens backwards: the last step first, and within it the last thing a decoder reads first."""
    bank, lanes = spec.bank, min(LANES, spec.tokens)
    states, words = [STATE_MIN] * lanes, []
    for tokens, component, table in reversed(list(_steps(spec, components))):
        low_bits = int(bank.low_bits[table])
        coded = [_symbol(values[token][component], low_bits, tables[table], bank) for token in tokens]
        words += [escaped for _, escaped in reversed(coded) if escaped is not None]
        for bit in reversed(range(low_bits)):
            plane = sum((values[token][component] >> bit & 1) << lane for lane, token in enumerate(tokens))
            words += [plane >> 16, plane & 0xFFFF] if len(tokens) > 16 else [plane]
        for lane in reversed(range(len(tokens))):
            symbol = coded[lane][0]
            freq = tables[table].freqs[symbol]
            if states[lane] >= freq << (32 - PROB_BITS):
                words.append(states[lane] & 0xFFFF)
                states[lane] >>= 16
            quotient, rank = divmod(states[lane], freq)
            states[lane] = (quotient << PROB_BITS) + slots[table][symbol, rank]
    head = b"".join(state.to_bytes(4, "little") for state in states)
    return head + b"".join(word.to_bytes(2, "little") for word in reversed(words))
