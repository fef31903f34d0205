"""What a store is: bytes under keys, read by ranges, written whole or not at all.

A store knows nothing of objects, codecs or tokens. To add one, subclass `Store`, implement the underscored hooks
(keys and ranges reach them checked), give it `from_url`, and name the class under the entry-point group
`cachegen.stores` with its URL scheme; tests/stores/conformance.py then says whether it keeps the promises below.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError, RangeError, RangeNotSatisfiable

if TYPE_CHECKING:
    from .url import StoreURL

Buffer = bytes | bytearray | memoryview
Data = Buffer | AsyncIterable[Buffer]

MAX_KEY = 200
"""Characters of the longest key: a key fits in a file name on every common file system."""

_SEGMENT = r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_PREFIX = re.compile(rf"(?:{_SEGMENT}/)*(?:{_SEGMENT})?")
_KEY_RULE = (
    f"1..{MAX_KEY} characters of A-Z a-z 0-9 - . _ ~, in parts separated by single '/', no part starting with '.'"
)
_Self = TypeVar("_Self", bound="Store")


def check_key(key: str) -> str:
    """The key itself, if it is one. Raises InputError: keys are URL- and file-safe, and can't climb out of a folder."""
    if not isinstance(key, str) or len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise InputError(f"store key: expected {_KEY_RULE}; got {_shown(key)}")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself, if some key can start with it ('' matches all). Raises InputError."""
    if not isinstance(prefix, str) or len(prefix) > MAX_KEY or not _PREFIX.fullmatch(prefix):
        raise InputError(f"store prefix: expected the beginning of a key ({_KEY_RULE}), or ''; got {_shown(prefix)}")
    return prefix


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def clamp(key: str, start: int, stop: int, size: int) -> tuple[int, int]:
    """The part of start..stop that an object of `size` bytes has.

    A range may end beyond the object (the rest is simply not there), as in HTTP. Raises RangeNotSatisfiable if it
    starts there: at `size` for a range that isn't empty, beyond `size` for one that is.
    """
    if start > size or (start == size and stop > start):
        raise RangeNotSatisfiable(
            f"{key}: the range {start}..{stop} starts beyond the object's end; it has {size} bytes",
            key=key,
            start=start,
            stop=stop,
            size=size,
        )
    return start, min(stop, size)


class Store(ABC):
    """Bytes under keys. Safe to use from several tasks, threads and event loops at once.

    Promises that every store keeps:
        - `put` is whole or nothing: readers see the old object or the new one, never a part; an interrupted, failed
          or cancelled put leaves what was there before. Of several writers of a key, one whole object remains.
        - What `get_ranges` returns comes from one and the same object.
        - Errors are `StoreError` kinds, or InputError for keys and ranges that can't be meant.
    """

    @classmethod
    @abstractmethod
    def from_url(cls: type[_Self], url: StoreURL) -> _Self:
        """The store that a URL names. Raises InputError for options it doesn't know, StoreError kinds."""

    # ------------------------------------------------------------------ for callers
    async def get(self, key: str) -> bytes:
        """The whole object. Raises KeyNotFound."""
        return await self._get(check_key(key))

    async def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start..stop, fewer where the object ends before. Raises KeyNotFound, RangeNotSatisfiable."""
        (data,) = await self.get_ranges(key, [(start, stop)])
        return data

    async def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Several ranges of one object, in the order asked. Raises KeyNotFound, RangeNotSatisfiable, RangeError."""
        check_key(key)
        for start, stop in ranges:
            if not 0 <= start <= stop:
                raise RangeError(f"{key}: expected a byte range with 0 <= start <= stop; got {start}..{stop}")
        return await self._get_ranges(key, ranges) if ranges else []

    async def put(self, key: str, data: Data) -> None:
        """Store `data`, or the bytes that an async iterable yields, under `key`, replacing what was there.

        Raises StoreFull, StoreDenied, StoreUnavailable; whatever the iterable raises. Then nothing has changed.
        """
        check_key(key)
        if not isinstance(data, (bytes, bytearray, memoryview, AsyncIterable)):
            raise InputError(f"put {key}: expected bytes or an async iterable of bytes; got {type(data).__name__}")
        if isinstance(data, memoryview) and not data.c_contiguous:
            raise InputError(f"put {key}: expected contiguous bytes; got a memoryview with strides {data.strides}")
        await self._put(key, data)

    async def exists(self, key: str) -> bool:
        """Whether an object is stored under `key`. Counts as use where the store evicts."""
        return await self._exists(check_key(key))

    async def size(self, key: str) -> int:
        """Bytes of the object. Raises KeyNotFound."""
        return await self._size(check_key(key))

    async def delete(self, key: str) -> None:
        """Remove the object; a key that isn't there is no error."""
        await self._delete(check_key(key))

    async def touch(self, keys: Sequence[str]) -> None:
        """Mark objects as used just now, the last of `keys` most recently. Missing ones are passed over.

        A hint for stores that evict: readers of prefix chains give the chain backwards, so that its end goes first.
        """
        await self._touch([check_key(key) for key in keys])

    def list(self, prefix: str = "") -> AsyncIterator[str]:
        """Keys that start with `prefix`, in no particular order."""
        return self._list(check_prefix(prefix))

    async def close(self) -> None:
        """Let go of connections and files. Closing twice is no error; using a closed store is StoreUnavailable."""
        return None

    async def __aenter__(self: _Self) -> _Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------ for stores
    async def _get(self, key: str) -> bytes:
        """The whole object; stores that know a size only by asking override this."""
        return (await self._get_ranges(key, [(0, await self._size(key))]))[0]

    @abstractmethod
    async def _get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]: ...

    @abstractmethod
    async def _put(self, key: str, data: Data) -> None: ...

    @abstractmethod
    async def _exists(self, key: str) -> bool: ...

    @abstractmethod
    async def _size(self, key: str) -> int: ...

    @abstractmethod
    async def _delete(self, key: str) -> None: ...

    @abstractmethod
    def _list(self, prefix: str) -> AsyncIterator[str]: ...

    async def _touch(self, keys: Sequence[str]) -> None:
        """Nothing to do for stores that don't evict by use."""
        return None


def check_part(key: str, part: object) -> Buffer:
    """One element of a streamed put. Raises InputError if it isn't bytes."""
    if not isinstance(part, (bytes, bytearray, memoryview)):
        raise InputError(f"put {key}: expected an iterable of bytes; got an element of type {type(part).__name__}")
    return part
