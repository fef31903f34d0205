"""Stores from code that isn't async: an event loop on a thread of its own, and a store that runs on it.

Works inside a running event loop too (a notebook's, say), since the work happens on the other thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from types import TracebackType
from typing import Any, TypeVar

from ..errors import InputError
from .base import Buffer, Store

T = TypeVar("T")
_SHUTDOWN_SECONDS = 10.0


class BackgroundLoop:
    """An event loop on a thread of its own, started on first use; started anew in a forked child.

    `close()`, the garbage collector and the interpreter's exit all stop it: what still runs is cancelled and awaited.
    """

    def __init__(self, name: str = "cachegen") -> None:
        self._name = name
        self._start_lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._stop: Callable[[], object] | None = None

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._pid != os.getpid():
            # A forked child has neither the thread nor a lock it could trust: both are made anew.
            self._start_lock = threading.Lock()
            self._loop = self._thread = self._stop = None
            self._pid = os.getpid()
        with self._start_lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                thread = threading.Thread(target=_serve, args=(loop,), name=self._name, daemon=True)
                thread.start()
                self._loop, self._thread = loop, thread
                self._stop = weakref.finalize(self, _shut_down, loop, thread, os.getpid())
            return self._loop

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work` on the loop; cancelling the future cancels the work."""
        return asyncio.run_coroutine_threadsafe(work, self._running())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for `work`. An interrupt (Ctrl-C) cancels it, waits until it has cleaned up, and goes on its way.

        Raises InputError when called from the loop's own thread, which would wait for itself.
        """
        loop = self._running()
        if threading.current_thread() is self._thread:
            work.close()
            raise InputError("a sync call was made from inside this store's own event loop; await the async form there")
        outcome: Future[T] = Future()
        tasks: list[asyncio.Task[T]] = []

        def start() -> None:
            tasks.append(loop.create_task(work))
            tasks[0].add_done_callback(lambda task: _hand_over(task, outcome))

        loop.call_soon_threadsafe(start)
        try:
            return outcome.result()
        except BaseException:
            if not outcome.done():
                loop.call_soon_threadsafe(lambda: [task.cancel() for task in tasks])
                wait([outcome], _SHUTDOWN_SECONDS)
            raise

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Await `work`, which runs on this loop, from a task of any other; cancelling the task cancels the work."""
        if asyncio.get_running_loop() is self._running():
            return await work
        return await asyncio.wrap_future(self.submit(work))

    def close(self) -> None:
        """Cancel what runs, wait for it, end the thread. Closing twice is no error; using it again starts it anew."""
        if self._pid == os.getpid() and self._stop is not None:
            self._stop()
            self._loop = self._thread = self._stop = None


def _hand_over(task: asyncio.Task[T], outcome: Future[T]) -> None:
    if task.cancelled():
        outcome.set_exception(CancelledError())
    elif (error := task.exception()) is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(task.result())


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(asyncio.sleep(0))  # what was handed over just before the stop becomes tasks
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


def _shut_down(loop: asyncio.AbstractEventLoop, thread: threading.Thread, pid: int) -> None:
    if pid != os.getpid() or loop.is_closed():
        return
    loop.call_soon_threadsafe(loop.stop)
    if threading.current_thread() is not thread:  # the garbage collector may run on any thread
        thread.join(_SHUTDOWN_SECONDS)


class SyncStore:
    """A `Store` for sync code: the same methods, which wait. Owns the store, and a background loop unless given one."""

    def __init__(self, store: Store, loop: BackgroundLoop | None = None) -> None:
        self.store = store
        self._owns_loop = loop is None
        self._loop = loop or BackgroundLoop()

    def get(self, key: str) -> bytes:
        """The whole object. Raises KeyNotFound."""
        return self._loop.run(self.store.get(key))

    def get_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes start..stop, fewer where the object ends before. Raises KeyNotFound, RangeNotSatisfiable."""
        return self._loop.run(self.store.get_range(key, start, stop))

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """Several ranges of one object, in the order asked."""
        return self._loop.run(self.store.get_ranges(key, ranges))

    def put(self, key: str, data: Buffer | Iterable[Buffer]) -> None:
        """Store bytes, or the bytes that an iterable yields, whole or not at all."""
        if isinstance(data, (bytes, bytearray, memoryview)):
            self._loop.run(self.store.put(key, data))
        elif isinstance(data, Iterable) and not isinstance(data, str):
            self._loop.run(self.store.put(key, _from_iterator(iter(data))))
        else:
            raise InputError(f"put {key}: expected bytes or an iterable of bytes; got {type(data).__name__}")

    def exists(self, key: str) -> bool:
        """Whether an object is stored under `key`."""
        return self._loop.run(self.store.exists(key))

    def size(self, key: str) -> int:
        """Bytes of the object. Raises KeyNotFound."""
        return self._loop.run(self.store.size(key))

    def delete(self, key: str) -> None:
        """Remove the object; a key that isn't there is no error."""
        self._loop.run(self.store.delete(key))

    def touch(self, keys: Sequence[str]) -> None:
        """Mark objects as used just now, the last of `keys` most recently."""
        self._loop.run(self.store.touch(keys))

    def list(self, prefix: str = "") -> Iterator[str]:
        """Keys that start with `prefix`, in no particular order."""
        return iter(self._loop.run(_gather(self.store.list(prefix))))

    def close(self) -> None:
        """Close the store, and the background loop if it is this object's own."""
        try:
            self._loop.run(self.store.close())
        finally:
            if self._owns_loop:
                self._loop.close()

    def __enter__(self) -> SyncStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _gather(keys: AsyncIterator[str]) -> tuple[str, ...]:
    return tuple([key async for key in keys])


async def _from_iterator(parts: Iterator[Buffer]) -> AsyncIterator[Buffer]:
    end = object()
    while True:
        part = await asyncio.to_thread(next, parts, end)  # the caller's iterator may block
        if part is end:
            return
        yield part  # type: ignore[misc]  # anything but the sentinel is the iterator's own
