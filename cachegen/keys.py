"""Names of chunks: what may be found under a key is exactly what its name says.

A *prefix* key (the default) is a link of a SHA-256 chain over cache salt, the model's fingerprint, the token ids from
the context's first to the chunk's last, and extras (adapter, hashes of images): two contexts share a key only if they
agree in all of these. A *content* key leaves the prefix out, for callers that blend moved text. Keys of lossy lineage
never equal exact ones.

Everything hashed is written by `_field`: a type letter, a length, the bytes. So no two different inputs write the same
bytes, and a salt can't be continued into an id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, LevelError, LineageError, RangeError, ShapeError
from .kv import Lineage

CHUNK_SIZE = 256
"""Tokens in a chunk, by default."""
MAX_LEVEL = 255

Mode = Literal["prefix", "content"]
Extra = str | bytes | tuple[int, str | bytes]
"""What else shapes a context's KV: for the whole of it, or (token position, value) from that token's chunk on."""


@dataclass(frozen=True)
class ChunkKey:
    """The name of a chunk: tokens start..stop of a context.

    Attributes:
        digest: 32 bytes.
        start, stop: half-open token range.
        mode: prefix, or content.
        level: for codecs that write an object per level; None where one object holds all.
        lineage: what the KV was computed on, if that was lossy.
    """

    digest: bytes
    start: int
    stop: int
    mode: Mode = "prefix"
    level: int | None = None
    lineage: Lineage | None = None

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def hex(self) -> str:
        """The digest as 64 hex digits."""
        return self.digest.hex()

    @property
    def name(self) -> str:
        """The key under which a store holds the object: characters a-z, 0-9 and `-` only, at most 80 of them.

        `p-` or `c-` (prefix, content), 64 hex digits, then `-lossy` and `-q<level>` where they apply.
        """
        lossy = "" if self.lineage is None else "-lossy"
        level = "" if self.level is None else f"-q{self.level}"
        return f"{self.mode[0]}-{self.hex}{lossy}{level}"

    def with_level(self, level: int) -> ChunkKey:
        """The name of one level's object. Raises LevelError outside 0..MAX_LEVEL."""
        if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= MAX_LEVEL:
            raise LevelError(f"level: expected an integer within 0..{MAX_LEVEL}; got {level!r}")
        return replace(self, level=level)

    def with_lineage(self, lineage: Lineage | None) -> ChunkKey:
        """The name of the same tokens' KV computed on a lossy prefix: another digest for each codec and level.

        The predicted loss isn't part of the name: it is an estimate, not an identity. None returns the key as it is.
        Raises LineageError where the key has a lineage already.
        """
        if lineage is None:
            return self
        if self.lineage is not None:
            raise LineageError(f"key {self.name}: expected one without lineage; got one of {self.lineage}")
        digest = _hash("lineage", self.digest, lineage.codec, lineage.level)
        return replace(self, digest=digest, lineage=lineage)


def chunk_keys(
    ids: Any,
    chunk_size: int = CHUNK_SIZE,
    *,
    salt: str = "",
    fingerprint: bytes,
    extras: Sequence[Extra] = (),
    codec: str = "",
    mode: Mode = "prefix",
) -> list[ChunkKey]:
    """Keys of a context's chunks, in order; the unfinished tail is a chunk of its own.

    Args:
        ids: token ids of the whole context from its first token: ints, an int tensor or array [tokens].
        chunk_size: tokens in a chunk, from 1.
        salt: separates tenants: the same context under another salt has other keys.
        fingerprint: the model's, 32 bytes (`Fingerprint.digest`).
        extras: see `Extra`. An extra with a position enters at the chunk that holds it, so that chunks before it are
            shared; one without enters from the first. Order matters.
        codec: separates objects that different codecs wrote; empty where any will do.
        mode: in `content`, the first chunk keeps its prefix key: what the first tokens' KV is depends on their being
            first (attention sinks).
    Raises:
        InputError: an id that is negative or no integer; a fingerprint that isn't 32 bytes; an unknown mode.
        RangeError: chunk_size below 1, or an extra beyond the context.
        ShapeError: ids aren't one-dimensional.
    """
    numbers = _token_array(ids)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise RangeError(f"chunk_size: expected at least 1 token; got {chunk_size!r}")
    if mode not in ("prefix", "content"):
        raise InputError(f"mode: expected 'prefix' or 'content'; got {mode!r}")
    whole, by_chunk = _sorted_extras(extras, len(numbers), chunk_size)
    link = _hash("prefix", *_identity(salt, fingerprint, codec), len(whole), *whole)
    keys = []
    for index, start in enumerate(range(0, len(numbers), chunk_size)):
        stop, here = min(start + chunk_size, len(numbers)), by_chunk.get(index, [])
        flat = [part for extra in here for part in extra]
        chunk = numbers[start:stop]
        link = _hash("link", link, chunk.tobytes(), *flat)
        if mode == "prefix" or start == 0:
            keys.append(ChunkKey(link, start, stop))
        else:
            keys.append(_content_key(chunk, start, salt, fingerprint, codec, whole, here))
    return keys


def content_key(
    ids: Any,
    *,
    start: int,
    salt: str = "",
    fingerprint: bytes,
    extras: Sequence[Extra] = (),
    codec: str = "",
) -> ChunkKey:
    """The key of one chunk whatever stands before it. For callers who blend KV of moved text.

    Args:
        ids: the chunk's own token ids.
        start: position of the first in its context; not part of the key.
        extras: as in `chunk_keys`, positions counted in the context.
    Raises:
        RangeError: start is 0 (a context's first tokens are never shared by content), or no ids.
    """
    numbers = _token_array(ids)
    if start < 1:
        raise RangeError("content key: expected a chunk after the context's first tokens; got start 0. Use chunk_keys")
    if not len(numbers):
        raise RangeError("content key: expected at least one token id; got none")
    shifted = [(e[0] - start, e[1]) if isinstance(e, tuple) else e for e in extras]
    whole, by_chunk = _sorted_extras(shifted, len(numbers), len(numbers))
    return _content_key(numbers, start, salt, fingerprint, codec, whole, by_chunk.get(0, []))


def token_digest(ids: Any) -> bytes:
    """32 bytes that name a sequence of token ids: SHA-256 of `cachegen.tokens`, a zero byte, the ids as int64 LE."""
    return hashlib.sha256(b"cachegen.tokens\0" + _token_array(ids).tobytes()).digest()


def _content_key(
    chunk: NDArray[np.int64],
    start: int,
    salt: str,
    fingerprint: bytes,
    codec: str,
    whole: list[str | bytes],
    here: list[tuple[int, str | bytes]],
) -> ChunkKey:
    flat = [part for extra in here for part in extra]
    digest = _hash("content", *_identity(salt, fingerprint, codec), len(whole), *whole, chunk.tobytes(), *flat)
    return ChunkKey(digest, start, start + len(chunk), "content")


def _identity(salt: str, fingerprint: bytes, codec: str) -> tuple[str, bytes, str]:
    if not isinstance(salt, str) or not isinstance(codec, str):
        raise InputError(f"salt and codec: expected strings; got {type(salt).__name__} and {type(codec).__name__}")
    if not isinstance(fingerprint, bytes) or len(fingerprint) != 32:
        raise InputError("fingerprint: expected the 32 bytes of Fingerprint.digest()")
    return salt, fingerprint, codec


def _sorted_extras(
    extras: Sequence[Extra], num_tokens: int, chunk_size: int
) -> tuple[list[str | bytes], dict[int, list[tuple[int, str | bytes]]]]:
    """Extras of the whole context, and by chunk those with a position (made relative to their chunk)."""
    whole: list[str | bytes] = []
    by_chunk: dict[int, list[tuple[int, str | bytes]]] = {}
    for extra in extras:
        if isinstance(extra, (str, bytes)):
            whole.append(extra)
            continue
        position, value = extra
        if not 0 <= position < num_tokens:
            raise RangeError(f"extras: expected positions within the {num_tokens} tokens; got {position}")
        by_chunk.setdefault(position // chunk_size, []).append((position % chunk_size, value))
    return whole, by_chunk


def _token_array(ids: Any) -> NDArray[np.int64]:
    """Any sequence of ids as contiguous little-endian int64."""
    if hasattr(ids, "detach"):  # a tensor, on whatever device
        ids = ids.detach().cpu().numpy()
    elif not isinstance(ids, np.ndarray):
        ids = np.array(list(ids) if isinstance(ids, Iterable) else ids)
        if ids.size == 0:
            ids = ids.reshape(0).astype(np.int64)
    if ids.ndim != 1:
        raise ShapeError(f"token ids: expected one dimension; got {ids.ndim}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise InputError(f"token ids: expected integers below 2**63; got {ids.dtype}")
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 63:
        raise InputError(f"token ids: expected within 0..2**63-1; got {int(ids.min())}..{int(ids.max())}")
    return np.ascontiguousarray(ids, dtype="<i8")


def _hash(purpose: str, *parts: str | bytes | int) -> bytes:
    """SHA-256 over fields, the first being this function's name for the purpose."""
    state = hashlib.sha256()
    for part in (f"cachegen.key.{purpose}.1", *parts):
        state.update(_field(part))
    return state.digest()


def _field(value: str | bytes | int) -> bytes:
    """Injective, prefix-free bytes of a value: type letter, u64 length, content."""
    if isinstance(value, str):
        letter, raw = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        letter, raw = b"b", value
    elif isinstance(value, int) and not isinstance(value, bool):
        letter, raw = b"i", str(value).encode("ascii")
    else:
        raise InputError(f"keys: expected text, bytes or an integer; got {type(value).__name__}")
    return letter + len(raw).to_bytes(8, "little") + raw
