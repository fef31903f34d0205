"""Tails: where a saved context ended inside a chunk, so that a longer prompt finds its last, unfinished chunk too.

Keys say nothing of lengths: a reader whose prompt goes on beyond a saved context can't guess where that one ended. A
writer of an unfinished chunk leaves a hint beside it, under the key of the context up to the chunk's first token
(`t-...`): how many tokens the chunk holds, newest first, u32 little-endian, at most MAX_TAILS of them. A hint is only
a hint: what it leads to is verified like any chunk, and losing one costs a hit, no more.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .keys import ChunkKey

MAX_TAILS = 64


def hint_name(first_token: ChunkKey) -> str:
    """The store key of the hint, from the key of the context that ends with the chunk's first token."""
    return f"t{first_token.name[1:]}"


def pack(lengths: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(lengths)}I", *lengths)


def unpack(data: bytes) -> tuple[int, ...]:
    """Lengths in a hint; none where the bytes aren't one (somebody else's, or damaged)."""
    if len(data) % 4 or len(data) > 4 * MAX_TAILS:
        return ()
    return struct.unpack(f"<{len(data) // 4}I", data)


def added(data: bytes, length: int) -> bytes:
    """The hint with one more length, the newest first."""
    return pack([length, *(other for other in unpack(data) if other != length)][:MAX_TAILS])
