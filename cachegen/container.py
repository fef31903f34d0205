"""The .kvc object: header, index, payload. Normative text: docs/format.md.

A writer hands over an `ObjectHeader` and segments; a reader gets them back verified. Segments are laid level-major,
then by group, so one range is "everything up to level q"; an object can be read by ranges: head first, then any level
prefix, layer range or group.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import token_block
from .codecs.base import GroupSegments
from .errors import (
    CapacityError,
    ChecksumError,
    FormatError,
    InputError,
    LevelError,
    LimitExceeded,
    NotAnObject,
    RangeError,
    Truncated,
    VersionError,
)
from .header import (
    MAX_GROUPS,
    MAX_HEADER,
    MAX_LEVELS,
    MAX_TOKENS,
    CodecEntry,
    ObjectHeader,
    header_json,
    parse_header,
    with_token_ids,
)
from .native import crc32c

__all__ = [
    "HEAD_READ",
    "MAX_HEAD",
    "MAX_TOKENS",
    "ByteRange",
    "CodecEntry",
    "ObjectHeader",
    "ObjectReader",
    "trim",
    "verify",
    "write_object",
]

MAGIC = b"\x89KVC\r\n\x1a\n"
VERSION = 1
PRELUDE_BYTES = 64
HEAD_READ = 16 * 1024
"""Bytes of a first read: holds header and index of nearly every object; `ObjectReader.size_of_head` says if more."""
MAX_HEAD = 16 * 1024 * 1024
MAX_OBJECT = 1 << 44
MAX_SEGMENT = (1 << 32) - 1
WIDE, NARROW = 4, 2
"""Segments start at multiples of 16 bytes, or of 4 in small objects, where 16 would cost too much (shifts)."""

_PRELUDE = struct.Struct("<8sHHHBBIIIIQIIIQ")  # the CRC32C of these 60 bytes follows
_INDEX_ENTRY = np.dtype([("length", "<u4"), ("crc", "<u4")])


@dataclass(frozen=True)
class ByteRange:
    """Half-open range of an object's bytes."""

    start: int
    stop: int


@dataclass(frozen=True)
class _Prelude:
    """The first 64 bytes; sizes in bytes."""

    levels: int
    shift: int
    header: int
    tokens: int
    index: int
    groups: int
    total: int
    header_crc: int
    tokens_crc: int
    index_crc: int

    @property
    def head(self) -> int:
        """Bytes before the payload: prelude, header, tokens, index, and zeros up to a multiple of 16."""
        return _round_up(PRELUDE_BYTES + self.header + self.tokens + self.index, 16)

    def pack(self) -> bytes:
        fields = (self.levels, self.shift, self.header, self.tokens, self.index, self.groups, self.total)
        start = _PRELUDE.pack(MAGIC, VERSION, 0, 0, *fields, self.header_crc, self.tokens_crc, self.index_crc, 0)
        return start + struct.pack("<I", crc32c(start))

    @classmethod
    def unpack(cls, data: memoryview) -> _Prelude:
        """Parse and check; every size that follows from it is within this reader's limits."""
        start = bytes(data[:PRELUDE_BYTES])
        if start[:8] != MAGIC[: len(start)]:
            raise NotAnObject(_foreign(start))
        if len(start) < PRELUDE_BYTES:
            raise Truncated(f"prelude: expected {PRELUDE_BYTES} bytes; got {len(start)}. Fetch the object again")
        if crc32c(start[:60]) != int.from_bytes(start[60:], "little"):
            raise ChecksumError("prelude: its CRC32C doesn't match: the bytes were altered. Fetch the object again")
        _, version, must, _, *fields, reserved = _PRELUDE.unpack(start[:60])
        if version != VERSION or must:
            raise VersionError(
                f"expected format version {VERSION} without must-understand flags; got version {version}, "
                f"flags {must:#06x}. Update cachegen to read this object"
            )
        prelude = cls(*fields)
        prelude._check(reserved)
        return prelude

    def _check(self, reserved: int) -> None:
        if reserved:
            raise FormatError(f"prelude: expected zeros in its reserved bytes; got {reserved:#x}")
        for what, value, least, most in (
            ("levels", self.levels, 1, MAX_LEVELS),
            ("alignment", self.shift, 0, 4),
            ("groups", self.groups, 1, MAX_GROUPS),
            ("header bytes", self.header, 2, MAX_HEADER),
            ("head bytes", self.head, PRELUDE_BYTES, MAX_HEAD),
            ("object bytes", self.total, self.head, MAX_OBJECT),
        ):
            if not least <= value <= most:
                raise LimitExceeded(f"prelude: {what}: expected within {least}..{most}; got {value}")
        if self.index != self.levels * self.groups * _INDEX_ENTRY.itemsize:
            raise FormatError(f"prelude: expected an index of 8 bytes a level and group; got {self.index} bytes")


def _view(data: bytes | bytearray | memoryview) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError as error:
        raise InputError(f"object: expected contiguous bytes; got {type(data).__name__} ({error})") from error


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _foreign(start: bytes) -> str:
    if start[:4] in (MAGIC[:4], b"\x09KVC", b"KVC\r", b"KVC\n"):
        return "expected a .kvc object; got one that a text-mode or 7-bit transfer has damaged. Copy it as binary"
    return f"expected a .kvc object, which starts with {MAGIC.hex()}; got {start[:8].hex() or 'no bytes'}"


# --------------------------------------------------------------------------- writing
def write_object(header: ObjectHeader, segments: Sequence[Sequence[bytes]]) -> bytes:
    """Serialise an object. `segments[group][level]`; a group with fewer levels than the object has empty ones after.

    Raises InputError (the header contradicts itself, or segments don't match it: nothing is written that a reader
    would refuse), CapacityError (beyond a limit).
    """
    levels = len(header.losses)
    if not 1 <= levels <= MAX_LEVELS:
        raise InputError(f"losses: expected one for each of 1..{MAX_LEVELS} levels; got {levels}")
    if len(segments) != len(header.groups) or max(map(len, segments), default=0) > levels:
        raise InputError(
            f"segments: expected one list for each of {len(header.groups)} groups, of at most {levels} levels (one per "
            f"stated loss); got {len(segments)} lists of up to {max(map(len, segments), default=0)}"
        )
    laid = [group[level] if level < len(group) else b"" for level in range(levels) for group in segments]
    lengths = np.array([len(segment) for segment in laid], dtype=np.int64)
    if lengths.size and lengths.max() > MAX_SEGMENT:
        raise CapacityError(f"segment: expected at most {MAX_SEGMENT} bytes; got {lengths.max()}. Use smaller chunks")
    index = np.zeros(len(laid), dtype=_INDEX_ENTRY)
    index["length"] = lengths
    index["crc"] = [crc32c(segment) for segment in laid]
    tokens = b"" if header.token_ids is None else token_block.pack(header.token_ids)
    text = header_json(header)
    shift = WIDE if int((-lengths % 16).sum()) * 256 <= int(lengths.sum()) else NARROW
    head = _head(text, tokens, index, levels, shift)
    _check_readable(head, header)
    parts: list[bytes] = [head]
    for segment, length in zip(laid, lengths.tolist(), strict=True):
        parts += (segment, bytes(-length % (1 << shift)))
    return b"".join(parts)


def _head(text: bytes, tokens: bytes, index: NDArray[Any], levels: int, shift: int) -> bytes:
    """Prelude, header, token block and index, padded."""
    entries = index.tobytes()
    payload = int((-(-index["length"].astype(np.int64) >> shift) << shift).sum())
    prelude = _Prelude(
        levels=levels,
        shift=shift,
        header=len(text),
        tokens=len(tokens),
        index=len(entries),
        groups=len(index) // max(1, levels),
        total=0,
        header_crc=crc32c(text),
        tokens_crc=crc32c(tokens),
        index_crc=crc32c(entries),
    )
    prelude = replace(prelude, total=prelude.head + payload)
    body = b"".join((prelude.pack(), text, tokens, entries))
    return body + bytes(prelude.head - len(body))


def _check_readable(head: bytes, header: ObjectHeader) -> None:
    """Nothing is written that a reader would refuse."""
    try:
        found = ObjectReader(head).header
    except FormatError as error:
        raise InputError(f"the object can't be written: {error.args[0]}") from error
    if replace(found, codecs=header.codecs) != header:
        raise InputError("the object can't be written: its header doesn't survive being written and read")


def trim(data: bytes | bytearray | memoryview, level: int) -> bytes:
    """The object cut to levels 0..level of its index: an object again. Raises LevelError, FormatError kinds."""
    reader = ObjectReader(data)
    kept_bytes = ByteRange(reader.head_size, reader.level_size(level))
    header = replace(reader.header, losses=reader.header.losses[: level + 1])
    kept = reader.index[: (level + 1) * len(header.groups)]
    tokens = b"" if header.token_ids is None else token_block.pack(header.token_ids)
    head = _head(header_json(header), tokens, kept, level + 1, reader.shift)
    return b"".join((head, reader.bytes_of(kept_bytes)))


def verify(data: bytes | bytearray | memoryview) -> None:
    """Check a whole object: its head, every segment and every byte of padding. Raises FormatError kinds."""
    reader = ObjectReader(data)
    reader.segments(reader.num_levels - 1)
    for padding in reader.paddings():
        if any(reader.bytes_of(padding)):
            raise ChecksumError(f"padding: expected zeros in bytes {padding.start}..{padding.stop}; got others")


# --------------------------------------------------------------------------- reading
class ObjectReader:
    """A verified view of an object's bytes, whole or partly fetched. Nothing is copied that need not be.

    Attributes:
        header: what the object says about itself.
        num_levels: levels in the index: 1 for a codec that isn't embedded.
        head_size: bytes before the first segment.
        total_size: bytes of the whole object.
        parts: bytes of header, token block and index.
        index: length and CRC32C of each segment, level-major.
        shift: log2 of the segments' alignment.
    """

    header: ObjectHeader
    num_levels: int
    head_size: int
    total_size: int
    parts: dict[str, int]
    index: NDArray[Any]
    shift: int

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        """Parse and verify prelude, header and index. `data` is a prefix of the object: at least the head.

        Raises NotAnObject, VersionError, ChecksumError, Truncated, LimitExceeded, FormatError.
        """
        view = _view(data)
        prelude = _Prelude.unpack(view)
        self.num_levels, self.shift = prelude.levels, prelude.shift
        self.parts = {"header": prelude.header, "token_block": prelude.tokens, "index": prelude.index}
        self.head_size, self.total_size = prelude.head, prelude.total
        if len(view) < self.head_size:
            raise Truncated(
                f"head: expected {self.head_size} bytes; got {len(view)}. Fetch at least that many", need=self.head_size
            )
        ends = np.cumsum([PRELUDE_BYTES, prelude.header, prelude.tokens, prelude.index]).tolist()
        text, tokens, entries = (view[a:b] for a, b in pairwise(ends))
        for what, part, crc in (
            ("header", text, prelude.header_crc),
            ("token block", tokens, prelude.tokens_crc),
            ("index", entries, prelude.index_crc),
        ):
            if crc32c(part) != crc:
                raise ChecksumError(f"{what}: its CRC32C doesn't match: the bytes were altered. Fetch the object again")
        if any(view[ends[-1] : self.head_size]):
            raise ChecksumError("head: expected zeros after the index; got others. Fetch the object again")
        self.index = np.frombuffer(entries, dtype=_INDEX_ENTRY)
        self._starts = self._lay(prelude)
        self.header = parse_header(text, prelude.levels, prelude.groups)
        if prelude.tokens:
            self.header = with_token_ids(self.header, token_block.unpack(tokens, self.header.num_tokens))
        self._pieces: list[tuple[int, memoryview]] = []
        self._verified: dict[tuple[int, int], memoryview] = {}
        self.add(0, view)

    def _lay(self, prelude: _Prelude) -> NDArray[np.int64]:
        """Where each segment starts, and where the last one's padding ends."""
        padded = -(-self.index["length"].astype(np.int64) >> self.shift) << self.shift
        starts = prelude.head + np.concatenate(([0], np.cumsum(padded)))
        if int(starts[-1]) != prelude.total:
            raise FormatError(
                f"index: expected segments up to byte {prelude.total}, the object's end; got {starts[-1]}"
            )
        return starts

    @staticmethod
    def size_of_head(data: bytes | bytearray | memoryview) -> int:
        """Bytes of prelude + header + index, from the object's first 64 bytes (to know how much more to read)."""
        return _Prelude.unpack(_view(data)).head

    def add(self, start: int, data: bytes | bytearray | memoryview) -> None:
        """Hand over bytes of the object fetched later, beginning at offset `start`; they replace any there.

        Raises FormatError if they reach beyond the object's end.
        """
        view = _view(data)
        stop = start + len(view)
        if start < 0 or stop > self.total_size:
            raise FormatError(f"object: expected bytes within 0..{self.total_size}; got {start}..{stop}")
        if not len(view):
            return
        kept: list[tuple[int, memoryview]] = [(start, view)]
        for first, piece in self._pieces:
            if first < start:
                kept.append((first, piece[: start - first]))
            if first + len(piece) > stop:
                kept.append((max(first, stop), piece[max(0, stop - first) :]))
        self._pieces = sorted(kept, key=lambda item: item[0])

    def bytes_of(self, where: ByteRange) -> memoryview:
        """Bytes fetched so far, unchecked; a copy only if they came in several pieces. Raises Truncated."""
        if len(self._pieces) == 1:
            first, piece = self._pieces[0]
            if first <= where.start and where.stop <= first + len(piece):
                return piece[where.start - first : where.stop - first]
        parts: list[memoryview] = []
        at = where.start
        while at < where.stop:
            i = bisect_right(self._pieces, at, key=lambda item: item[0]) - 1
            first, piece = self._pieces[i] if i >= 0 else (0, memoryview(b""))
            part = piece[max(0, at - first) : where.stop - first]
            if not len(part):
                raise Truncated(f"object: bytes {at}..{where.stop} are missing. Fetch them and add() them")
            parts.append(part)
            at += len(part)
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def segment_range(self, level: int, group: int) -> ByteRange:
        """Where a segment lies, without its padding. Raises LevelError, RangeError."""
        i = self._level(level) * len(self.header.groups) + self._all([group])[0]
        start = int(self._starts[i])
        return ByteRange(start, start + int(self.index["length"][i]))

    def paddings(self) -> list[ByteRange]:
        """The bytes between segments, all zero."""
        stops = (self._starts[:-1] + self.index["length"]).tolist()
        return [ByteRange(a, b) for a, b in zip(stops, self._starts[1:].tolist(), strict=True) if a < b]

    def ranges(self, level: int, groups: Sequence[int] | None = None) -> list[ByteRange]:
        """Byte ranges that hold levels 0..level of the given groups (default all), neighbours joined."""
        joined: list[ByteRange] = []
        count, chosen = len(self.header.groups), sorted(set(self._all(groups)))
        for q in range(self._level(level) + 1):
            edges = self._starts[q * count : (q + 1) * count + 1].tolist()
            for group in chosen:
                start, stop = edges[group], edges[group + 1]
                if joined and joined[-1].stop == start:
                    joined[-1] = ByteRange(joined[-1].start, stop)
                elif start < stop:
                    joined.append(ByteRange(start, stop))
        return joined

    def segment(self, level: int, group: int) -> memoryview:
        """A segment's bytes, CRC-checked once.

        Raises Truncated (with the highest level that all groups have whole), ChecksumError, LevelError, RangeError.
        """
        return self.segments(level, [group], lowest=level)[0].segments[0]

    def segments(self, level: int, groups: Sequence[int] | None = None, lowest: int = 0) -> list[GroupSegments]:
        """Levels lowest..level of the given groups (default all), as codecs take them.

        Raises Truncated with the highest level that these groups have whole, ChecksumError, LevelError, RangeError.
        """
        levels = range(lowest, self._level(level) + 1)
        chosen = self._all(groups)
        try:
            found = [self._checked(q, chosen) for q in levels]
        except Truncated as error:
            raise Truncated(error.args[0], self.complete_level(groups)) from error
        return [GroupSegments(self.header.groups[g], [views[i] for views in found]) for i, g in enumerate(chosen)]

    def _checked(self, level: int, groups: Sequence[int]) -> list[memoryview]:
        """Segments of one level, each compared with its CRC32C when first asked for."""
        slots = np.asarray(groups, dtype=np.int64) + level * len(self.header.groups)
        starts = self._starts[slots].tolist()
        lengths, crcs = (self.index[name][slots].tolist() for name in ("length", "crc"))
        views = []
        for group, start, length, crc in zip(groups, starts, lengths, crcs, strict=True):
            view = self._verified.get((level, group))
            if view is None:
                view = self.bytes_of(ByteRange(start, start + length))
                if crc32c(view) != crc:
                    raise ChecksumError(
                        f"segment of level {level}, group {group}: its CRC32C doesn't match: the bytes were altered. "
                        "Fetch them again",
                        level=level,
                        group=group,
                    )
                self._verified[level, group] = view
            views.append(view)
        return views

    def complete_level(self, groups: Sequence[int] | None = None) -> int | None:
        """The highest level whose segments (and all below) are present and intact, or None."""
        for level in range(self.num_levels):
            try:
                self._checked(level, self._all(groups))
            except (Truncated, ChecksumError):
                return level - 1 if level else None
        return self.num_levels - 1

    def level_size(self, level: int) -> int:
        """Bytes a reader must fetch for levels 0..level: head included."""
        return int(self._starts[(self._level(level) + 1) * len(self.header.groups)])

    def _all(self, groups: Sequence[int] | None) -> Sequence[int]:
        count = len(self.header.groups)
        for group in groups or ():
            if not 0 <= group < count:
                raise RangeError(f"group: the object has 0..{count - 1}; got {group}")
        return range(count) if groups is None else groups

    def _level(self, level: int) -> int:
        if not 0 <= level < self.num_levels:
            raise LevelError(f"level: the object has 0..{self.num_levels - 1}; got {level}")
        return level
