"""The .kvc object: header, index, payload. Normative text: docs/format.md.

A writer hands over an `ObjectHeader` and segments; a reader gets them back verified. Segments are laid level-major,
then by group, so one range is "everything up to level q"; an object can be read by ranges: head first, then any level
prefix, layer range or group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .codecs.base import Group, LevelLoss
from .kv import KVSpec, Lineage

ALIGNMENT = 16
HEAD_READ = 16 * 1024
"""Bytes of a first read: holds header and index of nearly every object; `ObjectReader.head_size` says if more."""
MAX_HEAD = 16 * 1024 * 1024
MAX_TOKENS = 1 << 20


@dataclass(frozen=True)
class CodecEntry:
    """A codec used in an object: its id and config."""

    codec_id: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class ObjectHeader:
    """All that an object says about itself.

    Attributes:
        codecs: the codecs used; `Group.codec` indexes them. The first is the object's own.
        fingerprint: 32-byte digest of the model's fingerprint.
        profile: content hash (hex) of the profile needed to decode, or None.
        spec: the model's cache.
        num_tokens: tokens in the chunk.
        positions: runs (start, count) of consecutive positions, summing to num_tokens.
        head_range: the model's KV heads held.
        groups: every group, in order.
        losses: stated loss by level. Embedded objects have one entry per level; others one, for the level written.
        token_digest: 32-byte digest of the token ids (keys.token_digest), or None where the writer had none.
        token_ids: the ids themselves, or None.
        previous_ids: up to two ids before the chunk.
        lineage: what the chunk was computed on, if lossy.
    """

    codecs: tuple[CodecEntry, ...]
    fingerprint: bytes
    profile: str | None
    spec: KVSpec
    num_tokens: int
    positions: tuple[tuple[int, int], ...]
    head_range: tuple[int, int]
    groups: tuple[Group, ...]
    losses: tuple[LevelLoss, ...]
    token_digest: bytes | None = None
    token_ids: tuple[int, ...] | None = None
    previous_ids: tuple[int, ...] = ()
    lineage: Lineage | None = None


@dataclass(frozen=True)
class ByteRange:
    """Half-open range of an object's bytes."""

    start: int
    stop: int


def write_object(header: ObjectHeader, segments: Sequence[Sequence[bytes]]) -> bytes:
    """Serialise an object. `segments[group][level]`; a group with fewer levels than the object has empty ones after."""
    raise NotImplementedError


def trim(data: bytes | memoryview, level: int) -> bytes:
    """The object cut to levels 0..level: an object again. Raises LevelError, FormatError."""
    raise NotImplementedError


class ObjectReader:
    """A verified view of an object's bytes, whole or partly fetched."""

    header: ObjectHeader
    num_levels: int
    head_size: int
    total_size: int

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        """Parse and verify prelude, header and index. `data` is a prefix of the object: at least the head.

        Raises NotAnObject, VersionError, ChecksumError, Truncated, LimitExceeded, FormatError.
        """
        raise NotImplementedError

    @staticmethod
    def size_of_head(data: bytes | memoryview) -> int:
        """Bytes of prelude + header + index, from the object's first 64 bytes (to know how much more to read)."""
        raise NotImplementedError

    def add(self, start: int, data: bytes | memoryview) -> None:
        """Hand over bytes of the object fetched later, beginning at offset `start`."""
        raise NotImplementedError

    def ranges(self, level: int, groups: Sequence[int] | None = None) -> list[ByteRange]:
        """Byte ranges that hold levels 0..level of the given groups (default all), neighbours joined."""
        raise NotImplementedError

    def segment(self, level: int, group: int) -> memoryview:
        """A segment's bytes, CRC-checked. Raises Truncated, ChecksumError."""
        raise NotImplementedError

    def complete_level(self, groups: Sequence[int] | None = None) -> int | None:
        """The highest level whose segments (and all below) are present and intact, or None."""
        raise NotImplementedError

    def level_size(self, level: int) -> int:
        """Bytes a reader must fetch for levels 0..level: head included."""
        raise NotImplementedError
