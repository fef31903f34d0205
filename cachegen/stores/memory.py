"""A store in this process's memory: for tests, and as a tier in front of slower stores."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Sequence

from ..errors import InputError, KeyNotFound, StoreFull, StoreUnavailable
from .base import Data, Store, check_part, clamp
from .url import StoreURL


class MemoryStore(Store):
    """Objects in a dict, the least recently used evicted beyond `max_bytes` (None: no limit)."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self._objects: OrderedDict[str, bytes] | None = OrderedDict()  # least recently used first; None: closed
        self._total = 0
        self._lock = threading.Lock()  # a store may serve several event loops, each on its own thread

    @classmethod
    def from_url(cls, url: StoreURL) -> MemoryStore:
        url.check_options("max_bytes")
        if url.host or url.path:
            raise InputError(f"{url.text}: expected memory: with no path")
        return cls(url.size("max_bytes"))

    async def close(self) -> None:
        with self._lock:
            self._objects, self._total = None, 0

    def _open(self) -> OrderedDict[str, bytes]:
        if self._objects is None:
            raise StoreUnavailable("memory store: it was closed; open a new one")
        return self._objects

    def _used(self, key: str) -> bytes:
        objects = self._open()
        if key not in objects:
            raise KeyNotFound(f"memory store: no object {key}", key=key)
        objects.move_to_end(key)
        return objects[key]

    async def _get(self, key: str) -> bytes:
        with self._lock:
            return self._used(key)

    async def _get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        with self._lock:
            data = self._used(key)
        found = []
        for start, stop in ranges:
            first, last = clamp(key, start, stop, len(data))
            found.append(data[first:last])
        return found

    async def _put(self, key: str, data: Data) -> None:
        if isinstance(data, AsyncIterable):
            gathered = bytearray()
            async for part in data:
                gathered += check_part(key, part)
                self._check_fits(key, len(gathered))
            data = gathered
        value = bytes(data)
        self._check_fits(key, len(value))
        with self._lock:
            objects = self._open()
            self._total += len(value) - len(objects.pop(key, b""))
            while self.max_bytes is not None and self._total > self.max_bytes:
                self._total -= len(objects.popitem(last=False)[1])
            objects[key] = value

    def _check_fits(self, key: str, size: int) -> None:
        if self.max_bytes is not None and size > self.max_bytes:
            raise StoreFull(
                f"put {key}: the object has {size} bytes or more, the memory store's max_bytes is {self.max_bytes}; "
                "raise max_bytes or store smaller chunks"
            )

    async def _exists(self, key: str) -> bool:
        with self._lock:
            objects = self._open()
            if key in objects:
                objects.move_to_end(key)
            return key in objects

    async def _size(self, key: str) -> int:
        with self._lock:
            objects = self._open()
            if key not in objects:
                raise KeyNotFound(f"memory store: no object {key}", key=key)
            return len(objects[key])

    async def _delete(self, key: str) -> None:
        with self._lock:
            self._total -= len(self._open().pop(key, b""))

    async def _touch(self, keys: Sequence[str]) -> None:
        with self._lock:
            objects = self._open()
            for key in keys:
                if key in objects:
                    objects.move_to_end(key)

    async def _list(self, prefix: str) -> AsyncIterator[str]:
        with self._lock:
            found = [key for key in self._open() if key.startswith(prefix)]
        for key in found:
            yield key
