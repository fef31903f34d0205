"""Stores from sync code: inside and outside event loops, interrupted, closed, forked."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cachegen.errors import InputError, KeyNotFound, RangeNotSatisfiable
from cachegen.stores import BackgroundLoop, MemoryStore, SyncStore


@pytest.fixture
def store() -> Iterator[SyncStore]:
    with SyncStore(MemoryStore()) as store:
        yield store


def threads() -> int:
    return sum(thread.name == "cachegen" for thread in threading.enumerate())


def test_every_method(store: SyncStore) -> None:
    store.put("a/1", b"0123456789")
    assert store.get("a/1") == b"0123456789"
    assert store.get_range("a/1", 2, 4) == b"23"
    assert list(store.get_ranges("a/1", [(0, 1), (9, 10)])) == [b"0", b"9"]
    assert store.exists("a/1")
    assert store.size("a/1") == 10
    store.put("a/2", (bytes([i]) for i in range(3)))
    assert store.get("a/2") == b"\x00\x01\x02"
    store.touch(["a/1"])
    assert sorted(store.list("a/")) == ["a/1", "a/2"]
    store.delete("a/1")
    assert not store.exists("a/1")


def test_typed_errors_come_through(store: SyncStore) -> None:
    with pytest.raises(KeyNotFound):
        store.get("missing")
    store.put("k", b"x")
    with pytest.raises(RangeNotSatisfiable):
        store.get_range("k", 5, 6)
    for data in ("text", 5):
        with pytest.raises(InputError):
            store.put("k", data)  # type: ignore[arg-type]
    assert store.get("k") == b"x"


def test_an_iterable_that_fails_changes_nothing(store: SyncStore) -> None:
    def failing() -> Iterator[bytes]:
        yield b"x"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put("k", failing())
    assert not store.exists("k")


def test_works_inside_a_running_loop(store: SyncStore) -> None:
    async def notebook_cell() -> bytes:
        store.put("k", b"x")
        return store.get("k")

    assert asyncio.run(notebook_cell()) == b"x"


def test_many_threads(store: SyncStore) -> None:
    def work(i: int) -> None:
        for _ in range(20):
            store.put(f"k{i}", bytes([i]))
            assert store.get(f"k{i}") == bytes([i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(list(store.list())) == 4


def test_a_call_from_its_own_loop_is_refused(store: SyncStore) -> None:
    class Nested(MemoryStore):
        async def _size(self, key: str) -> int:
            return nested.size(key)

    with SyncStore(Nested()) as nested, pytest.raises(InputError, match="await the async form"):
        nested.size("k")


def test_close_ends_the_thread() -> None:
    before = threads()
    store = SyncStore(MemoryStore())
    store.put("k", b"x")
    assert threads() == before + 1
    store.close()
    assert threads() == before


def test_a_forgotten_loop_ends_its_thread() -> None:
    before = threads()
    loop = BackgroundLoop()
    loop.run(asyncio.sleep(0))
    assert threads() == before + 1
    del loop
    assert threads() == before


def test_close_cancels_what_runs() -> None:
    loop = BackgroundLoop()
    started, cleaned = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    future = loop.submit(work())
    started.wait(10)
    loop.close()
    assert cleaned.is_set()
    assert future.cancelled()
    loop.close()
    assert loop.run(asyncio.sleep(0, "started anew")) == "started anew"
    loop.close()


def test_wait_passes_cancellation_on() -> None:
    loop = BackgroundLoop()
    started, cancelled = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            started.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def main() -> None:
        task = asyncio.create_task(loop.wait(work()))
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert cancelled.wait(10)
    loop.close()


def test_ctrl_c_cancels_waits_and_leaves() -> None:
    script = """
import asyncio, sys
from cachegen.stores import MemoryStore, SyncStore
class Slow(MemoryStore):
    async def _get(self, key):
        try:
            print("waiting", flush=True)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            print("cleaned up", flush=True)
store = SyncStore(Slow())
try:
    store.get("k")
except KeyboardInterrupt:
    store.put("k", b"still usable")
    print(store.size("k"), flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (out, err, process.returncode) == ("cleaned up\n12\n", "", 0)


def test_a_program_ends_without_closing() -> None:
    script = """
from cachegen.stores import MemoryStore, SyncStore
store = SyncStore(MemoryStore())
store.put("k", b"x")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_gets_a_loop_of_its_own() -> None:
    script = """
import os
from cachegen.stores import MemoryStore, SyncStore
store = SyncStore(MemoryStore())
store.put("k", b"x")
child = os.fork()
if child == 0:
    os._exit(7 if store.get("k") == b"x" else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), store.get("k"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.returncode) == ("7 b'x'\n", 0), done.stderr
