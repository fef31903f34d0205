"""A store in a folder: the default. Needs no server; several processes may use one folder at once.

    ROOT/objects/3f/KEY     an object ('/' in a key is written '%'; 3f: first byte of SHA-256 of the key)
    ROOT/partial/NAME       an object being written; its writer holds a lock on it
    ROOT/lock               taken to publish, evict and delete; holds the folder's total of bytes

An object is written under `partial`, synced, and renamed: readers see all of it or nothing of it. What a crash
leaves under `partial` is nobody's lock, and is removed by whoever writes next. A file's modification time is its
time of last use, kept by this store; beyond `max_bytes` the least recently used objects go.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from ..errors import InputError, KeyNotFound, StoreDenied, StoreError, StoreFull, StoreUnavailable
from .base import Buffer, Data, Store, check_key, check_part, clamp
from .url import StoreURL

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_ABANDONED_SECONDS = 60.0
"""A partial file younger than this is never swept: its writer may not have locked it yet."""
_SLACK = 64
"""An eviction frees 1/64 of max_bytes beyond need, so that a full store doesn't scan the folder on every put."""


class LocalStore(Store):
    """Objects as files under `root`, which is made if its parent exists.

    Args:
        max_bytes: size limit of all objects together (None: the disk's). Files being written come on top.

    Raises:
        StoreUnavailable: the folder and its parent are missing, or the path isn't a folder.
        StoreDenied: it may not be made.
    """

    def __init__(self, root: Path | str, max_bytes: int | None = None) -> None:
        self.root = Path(root).expanduser()
        self.max_bytes = max_bytes
        self._objects = self.root / "objects"
        self._partial = self.root / "partial"
        self._swept = False
        self._closed = False
        self._make_folders()

    @classmethod
    def from_url(cls, url: StoreURL) -> LocalStore:
        url.check_options("max_bytes")
        if url.host not in ("", "localhost") or not url.path:
            raise InputError(f"{url.text}: expected file:PATH or file:///PATH, of this machine")
        return cls(url.path, url.size("max_bytes"))

    def _make_folders(self) -> None:
        with self._errors(f"open {self.root}"):
            if not self.root.exists() and not self.root.parent.is_dir():
                raise StoreUnavailable(
                    f"local store: expected the folder {self.root}, or its parent to make it in; neither is there. "
                    "Create it, or mount the disk"
                )
            if self.root.exists() and not self.root.is_dir():
                raise StoreUnavailable(f"local store: expected a folder; {self.root} is a file")
            for folder, mode in ((self.root, 0o700), (self._objects, 0o777), (self._partial, 0o777)):
                if not folder.is_dir():
                    with suppress(FileExistsError):  # another process was first
                        folder.mkdir(mode)

    # ------------------------------------------------------------------ reading
    async def _get(self, key: str) -> bytes:
        return await self._in_thread(self._read, key, None)

    async def _get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        return await self._in_thread(self._read_ranges, key, ranges)

    def _read(self, key: str, ranges: None) -> bytes:
        return self._read_ranges(key, ranges)[0]

    def _read_ranges(self, key: str, ranges: Sequence[tuple[int, int]] | None) -> list[bytes]:
        with self._errors(f"get {key}"):
            fd = self._open_object(key)
            try:
                size = os.fstat(fd).st_size
                _mark_used(fd)
                wanted = [(0, size)] if ranges is None else [clamp(key, a, b, size) for a, b in ranges]
                return [_pread(fd, start, stop) for start, stop in wanted]
            finally:
                os.close(fd)

    def _open_object(self, key: str) -> int:
        try:
            return os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            raise self._missing(key) from None

    def _missing(self, key: str) -> StoreError:
        if not self._objects.is_dir():
            return self._root_gone()
        return KeyNotFound(f"local store {self.root}: no object {key}", key=key)

    def _root_gone(self) -> StoreUnavailable:
        return StoreUnavailable(f"local store: the folder {self.root} is no longer there. Mount or create it again")

    async def _exists(self, key: str) -> bool:
        def check() -> bool:
            with self._errors(f"exists {key}"):
                try:
                    self._path(key).stat()
                    _mark_used(self._path(key))
                except FileNotFoundError:
                    if not self._objects.is_dir():
                        raise self._root_gone() from None
                    return False
                return True

        return await self._in_thread(check)

    async def _size(self, key: str) -> int:
        def measure() -> int:
            with self._errors(f"size {key}"):
                try:
                    return self._path(key).stat().st_size
                except FileNotFoundError:
                    raise self._missing(key) from None

        return await self._in_thread(measure)

    async def _touch(self, keys: Sequence[str]) -> None:
        def mark() -> None:
            for key in keys:
                with self._errors(f"touch {key}"), suppress(FileNotFoundError):
                    _mark_used(self._path(key))

        await self._in_thread(mark)

    async def _list(self, prefix: str) -> AsyncIterator[str]:
        def names(folder: Path) -> list[str]:
            with self._errors(f"list {prefix!r}"):
                try:
                    return sorted(os.listdir(folder))
                except (FileNotFoundError, NotADirectoryError):
                    if folder == self._objects:
                        raise self._root_gone() from None
                    return []

        for shard in await self._in_thread(names, self._objects):
            for name in await self._in_thread(names, self._objects / shard):
                key = name.replace("%", "/")
                if key.startswith(prefix):
                    with suppress(InputError):  # a file that somebody else put here isn't an object
                        yield check_key(key)

    # ------------------------------------------------------------------ writing
    async def _put(self, key: str, data: Data) -> None:
        part = _Partial(self._partial)
        if not isinstance(data, AsyncIterable):
            await self._in_thread(self._put_whole, key, part, data)
            return
        try:
            await self._in_thread(self._begin, key, part)
            async for piece in data:
                await self._in_thread(self._append, key, part, check_part(key, piece))
            await self._in_thread(self._publish, key, part)
        finally:
            await _step(part.discard)

    def _put_whole(self, key: str, part: _Partial, data: Buffer) -> None:
        try:
            self._begin(key, part)
            self._append(key, part, data)
            self._publish(key, part)
        finally:
            part.discard()

    def _begin(self, key: str, part: _Partial) -> None:
        with self._errors(f"put {key}"):
            if not self._objects.is_dir():
                raise self._root_gone()
            if not self._partial.is_dir():  # cleaners of temporary files take empty folders too
                self._partial.mkdir(exist_ok=True)
            if not self._swept:
                self._swept = True
                self._sweep()
            part.open()

    def _append(self, key: str, part: _Partial, data: Buffer) -> None:
        with self._errors(f"put {key}"):
            size = part.size + memoryview(data).nbytes
            if self.max_bytes is not None and size > self.max_bytes:
                raise StoreFull(
                    f"put {key}: the object has {size} bytes or more, max_bytes of {self.root} is {self.max_bytes}; "
                    "raise max_bytes or store smaller chunks"
                )
            part.write(data)

    def _publish(self, key: str, part: _Partial) -> None:
        """Make a written file the object: room first, then the rename, then the folder's entry on disk."""
        with self._errors(f"put {key}"):
            os.fsync(part.fd)
            path = self._path(key)
            with self._locked() as total:
                made = not path.parent.is_dir()
                if made:
                    path.parent.mkdir()
                if self.max_bytes is not None and total.value - _size_or_zero(path) + part.size > self.max_bytes:
                    total.value = self._evict(self.max_bytes, part.size, path)
                # Counted before it is there: a crash in between leaves a total too high, which the next scan mends.
                total.value += part.size - _size_or_zero(path)
                _mark_used(part.fd)  # the kernel's own time of writing is coarser, and may lie before an older use
                part.rename(path)
            _sync_folder(path.parent)
            if made:
                _sync_folder(self._objects)

    def _evict(self, max_bytes: int, incoming: int, replaced: Path) -> int:
        """Make room for `incoming` bytes, which will replace the file `replaced`. Returns the bytes of what is left."""
        self._sweep()
        entries = sorted(entry for entry in self._scan() if entry[1] != replaced)
        kept = sum(size for _, _, size in entries)
        for _, path, size in entries:
            if kept + incoming <= max_bytes - max_bytes // _SLACK:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            kept -= size
        return kept + _size_or_zero(replaced)

    async def _delete(self, key: str) -> None:
        def remove() -> None:
            with self._errors(f"delete {key}"):
                path = self._path(key)
                if not self._objects.is_dir():
                    raise self._root_gone()
                if not path.exists():
                    return
                with self._locked() as total:
                    size = _size_or_zero(path)
                    path.unlink(missing_ok=True)
                    total.value -= size

        await self._in_thread(remove)

    async def close(self) -> None:
        self._closed = True

    # ------------------------------------------------------------------ the folder
    def _path(self, key: str) -> Path:
        return self._objects / sha256(key.encode()).hexdigest()[:2] / key.replace("/", "%")

    def _scan(self) -> Iterator[tuple[int, Path, int]]:
        """(time of last use, path, bytes) of every object."""
        for shard in os.scandir(self._objects):
            if not shard.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(shard.path):
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    yield found.st_mtime_ns, Path(entry.path), found.st_size

    def _sweep(self) -> None:
        """Remove partial files whose writers died: old enough, and no longer locked by anybody."""
        for entry in os.scandir(self._partial):
            with suppress(FileNotFoundError, BlockingIOError):  # finished, or swept by another; still being written
                if time.time() - entry.stat(follow_symlinks=False).st_mtime < _ABANDONED_SECONDS:
                    continue
                fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(entry.path)
                finally:
                    os.close(fd)

    @contextmanager
    def _locked(self) -> Iterator[_Total]:
        """The folder's lock, against other threads and processes; a crash releases it."""
        try:
            fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise self._root_gone() from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            total = _Total(fd)
            if total.unknown:
                total.value = sum(size for _, _, size in self._scan())
            yield total
        finally:
            os.close(fd)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """OSErrors as StoreErrors that say what to do."""
        try:
            yield
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else str(error)
            where = f"local store {self.root}: {what}: {why}"
            if error.errno in _FULL:
                raise StoreFull(f"{where}. Free space, raise the quota, or set max_bytes in the URL") from error
            if error.errno in _DENIED:
                raise StoreDenied(
                    f"{where}. Give this user read and write permission, or use another folder"
                ) from error
            if not self._objects.is_dir():
                raise self._root_gone() from error
            raise StoreUnavailable(f"{where}. Check the disk and that {self.root} is still mounted") from error

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        if self._closed:
            raise StoreUnavailable(f"local store {self.root}: it was closed; open it again")
        return await _step(work, *args)


async def _step(work: Callable[..., T], *args: object) -> T:
    """Blocking file work off the event loop. A cancelled caller still waits for the step to end, so that no thread
    writes to a file that clean-up has closed."""
    step = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(step)
    except asyncio.CancelledError:
        while not step.done():
            with suppress(asyncio.CancelledError):  # cancelled once more: the step ends no sooner
                await asyncio.wait([step])
        if not step.cancelled():
            step.exception()  # seen; the cancellation is what the caller hears of
        raise


class _Partial:
    """A file being written, locked by its writer for as long as it lives."""

    def __init__(self, folder: Path) -> None:
        self._path: Path | None = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
        self.size = 0
        self.fd = -1

    def open(self) -> None:
        if self._path is not None:
            self.fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            fcntl.flock(self.fd, fcntl.LOCK_EX)

    def write(self, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self.size += len(view)
        while view:
            view = view[os.write(self.fd, view) :]

    def rename(self, path: Path) -> None:
        if self._path is not None:
            os.rename(self._path, path)
            self._path = None

    def discard(self) -> None:
        """Close the file; remove it unless it was renamed (or never opened)."""
        if self.fd >= 0:
            if self._path is not None:
                with suppress(OSError):  # gone with its folder; or left to the sweep
                    self._path.unlink()
                self._path = None
            os.close(self.fd)
            self.fd = -1


class _Total:
    """Bytes of all objects together, kept in the lock file."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        text = os.pread(fd, 32, 0).strip()
        self.unknown = not text.isdigit()
        self._value = 0 if self.unknown else int(text)

    @property
    def value(self) -> int:
        return self._value

    @value.setter
    def value(self, total: int) -> None:
        self._value = max(total, 0)
        os.pwrite(self._fd, f"{self._value:<32d}".encode(), 0)


def _pread(fd: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop:
        part = os.pread(fd, stop - start, start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _mark_used(file: int | Path) -> None:
    """Set the time of last use to now, where this process may.

    A given time may be set by the file's owner only, the kernel's own (coarser) "now" by whoever may write it. A
    folder that may only be read still serves reads: this reader evicts nothing there.
    """
    now = time.time_ns()
    try:
        os.utime(file, ns=(now, now))
    except OSError as error:
        if error.errno not in _DENIED:
            raise
        _mark_used_coarsely(file)


def _mark_used_coarsely(file: int | Path) -> None:
    try:
        os.utime(file)
    except OSError as error:
        if error.errno not in _DENIED:
            raise


def _size_or_zero(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
