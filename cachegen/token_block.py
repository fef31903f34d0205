"""Token ids in an object: byte planes, zstandard where it helps (docs/format.md, *Token block*)."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import zstandard

from .errors import FormatError, InputError, LimitExceeded
from .header import MAX_TOKEN_ID

HEADER_BYTES = 4
RAW, ZSTD = 0, 1
_OF_THREAD = threading.local()
_LEVEL = 19  # the block is small: the best level costs microseconds


def pack(ids: Sequence[int]) -> bytes:
    """The block of `ids`. Raises InputError for ids outside 0..2^32 - 1."""
    if ids and not 0 <= min(ids) <= max(ids) <= MAX_TOKEN_ID:
        raise InputError(f"token ids: expected within 0..{MAX_TOKEN_ID}; got {min(ids)}..{max(ids)}")
    width = max(1, (max(ids, default=0).bit_length() + 7) // 8)
    planes = np.asarray(ids, dtype="<u4").view(np.uint8).reshape(-1, 4)[:, :width].T.tobytes()
    packed = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(planes)
    coding, body = (ZSTD, packed) if len(packed) < len(planes) else (RAW, planes)
    return bytes([width, coding, 0, 0]) + body


def unpack(block: bytes | memoryview, count: int) -> tuple[int, ...]:
    """`count` ids. The size of what zstandard expands to is checked before it runs. Raises FormatError kinds."""
    data = bytes(block)
    if len(data) < HEADER_BYTES or not 1 <= data[0] <= 4 or data[1] not in (RAW, ZSTD) or data[2:4] != b"\0\0":
        raise FormatError(f"token block: expected width 1..4, coding 0..1 and two zeros; got {data[:4].hex()}")
    width, body = data[0], data[HEADER_BYTES:]
    if data[1] == ZSTD:
        body = _expand(body, width * count)
    if len(body) != width * count:
        raise FormatError(f"token block: expected {width} bytes for each of {count} ids; got {len(body)}")
    words = np.zeros((count, 4), dtype=np.uint8)
    words[:, :width] = np.frombuffer(body, dtype=np.uint8).reshape(width, count).T
    return tuple(words.view("<u4").reshape(-1).tolist())


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: making one costs more than a block's decoding."""
    if not hasattr(_OF_THREAD, "decompressor"):
        _OF_THREAD.decompressor = zstandard.ZstdDecompressor()
    made: zstandard.ZstdDecompressor = _OF_THREAD.decompressor
    return made


def _expand(frame: bytes, size: int) -> bytes:
    try:
        stated = zstandard.get_frame_parameters(frame)
        if stated.content_size != size or stated.dict_id:
            raise LimitExceeded(f"token block: expected a zstandard frame of {size} bytes; got {stated.content_size}")
        return _decompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"token block: expected one zstandard frame; got {error}") from error
