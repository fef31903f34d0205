"""What every store promises (stores/base.py). A new store adds a line to STORES."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cachegen.errors import InputError, KeyNotFound, RangeError, RangeNotSatisfiable, StoreFull, StoreUnavailable
from cachegen.stores import Store, open_store

STORES: dict[str, Callable[[Path], str]] = {
    "memory": lambda folder: "memory:",
    "file": lambda folder: f"file:{folder}/store",
}
"""Name -> URL of a fresh, empty store; `folder` is empty and the test's own."""

LIMITED: dict[str, Callable[[Path], str]] = {
    "memory": lambda folder: "memory:?max_bytes=1000",
    "file": lambda folder: f"file:{folder}/store?max_bytes=1000",
}
"""Stores that evict: the same, holding at most 1000 bytes."""

Body = Callable[[Store], Awaitable[None]]


@pytest.fixture(params=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return STORES[request.param](tmp_path)


@pytest.fixture(params=LIMITED)
def limited_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return LIMITED[request.param](tmp_path)


def run(url: str, body: Body) -> None:
    async def opened() -> None:
        async with open_store(url) as store:
            await body(store)

    asyncio.run(opened())


def on(fixture: str) -> Callable[[Body], Callable[..., None]]:
    """Run an async test on the store whose URL the fixture gives."""

    def decorate(body: Body) -> Callable[..., None]:
        if fixture == "url":

            def test(url: str) -> None:
                run(url, body)
        else:

            def test(limited_url: str) -> None:
                run(limited_url, body)

        functools.update_wrapper(test, body, assigned=("__name__", "__doc__", "__module__"))
        del test.__wrapped__  # pytest would read the fixtures' names from it
        return test

    return decorate


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        await asyncio.sleep(0)
        yield part


async def keys(store: Store, prefix: str = "") -> list[str]:
    return sorted([key async for key in store.list(prefix)])


@on("url")
async def test_returns_what_was_put(store: Store) -> None:
    data = bytes(range(256)) * 40
    await store.put("chunks/ab.kvc", data)
    assert await store.get("chunks/ab.kvc") == data
    assert await store.size("chunks/ab.kvc") == len(data)
    assert await store.exists("chunks/ab.kvc")


@on("url")
async def test_takes_every_kind_of_buffer(store: Store) -> None:
    for i, data in enumerate([b"abc", bytearray(b"abc"), memoryview(b"abc"), pieces(b"a", b"", b"bc")]):
        await store.put(f"k{i}", data)
        assert await store.get(f"k{i}") == b"abc"


@on("url")
async def test_keeps_its_own_copy(store: Store) -> None:
    data = bytearray(b"abc")
    await store.put("k", data)
    data[0] = 0
    assert await store.get("k") == b"abc"


@on("url")
async def test_empty_object(store: Store) -> None:
    await store.put("k", b"")
    assert await store.get("k") == b""
    assert await store.size("k") == 0
    assert await store.exists("k")
    with pytest.raises(RangeNotSatisfiable):
        await store.get_range("k", 0, 1)


@on("url")
async def test_ranges(store: Store) -> None:
    await store.put("k", b"0123456789")
    assert await store.get_range("k", 2, 5) == b"234"
    assert await store.get_range("k", 0, 16384) == b"0123456789", "a first read may be longer than the object"
    assert await store.get_range("k", 10, 10) == b""
    assert list(await store.get_ranges("k", [(8, 20), (0, 1), (3, 3)])) == [b"89", b"0", b""]
    assert list(await store.get_ranges("k", [])) == []


@on("url")
async def test_ranges_that_cannot_be(store: Store) -> None:
    await store.put("k", b"0123456789")
    for start, stop in [(10, 11), (11, 11), (99, 100)]:
        with pytest.raises(RangeNotSatisfiable) as caught:
            await store.get_ranges("k", [(0, 1), (start, stop)])
        assert caught.value.details["size"] == 10
    for start, stop in [(-1, 2), (5, 4)]:
        with pytest.raises(RangeError):
            await store.get_range("k", start, stop)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(0, 300), ranges=st.lists(st.tuples(st.integers(0, 320), st.integers(0, 320)), max_size=5))
def test_ranges_are_slices(url: str, size: int, ranges: list[tuple[int, int]]) -> None:
    data = bytes(i % 251 for i in range(size))
    ordered = [(min(pair), max(pair)) for pair in ranges]
    outside = any(start > size or (start == size < stop) for start, stop in ordered)

    async def body(store: Store) -> None:
        await store.put("k", data)
        if outside:
            with pytest.raises(RangeNotSatisfiable):
                await store.get_ranges("k", ordered)
        else:
            assert list(await store.get_ranges("k", ordered)) == [data[start:stop] for start, stop in ordered]

    run(url, body)


@on("url")
async def test_missing_keys(store: Store) -> None:
    assert not await store.exists("k")
    for ask in (store.get("k"), store.get_range("k", 0, 1), store.size("k")):
        with pytest.raises(KeyNotFound) as caught:
            await ask
        assert caught.value.details["key"] == "k"
    await store.delete("k")
    await store.touch(["k"])
    assert not await store.exists("k")


@on("url")
async def test_overwrites(store: Store) -> None:
    await store.put("k", b"a longer first value")
    await store.put("k", b"second")
    assert await store.get("k") == b"second"
    assert await store.size("k") == 6
    assert await keys(store) == ["k"]


@on("url")
async def test_deletes(store: Store) -> None:
    await store.put("a", b"1")
    await store.put("b", b"2")
    await store.delete("a")
    assert not await store.exists("a")
    assert await keys(store) == ["b"]
    await store.put("a", b"3")
    assert await store.get("a") == b"3"


@on("url")
async def test_lists_by_prefix(store: Store) -> None:
    for key in ("a/1", "a/2", "ab", "b/1", "B.x~_-"):
        await store.put(key, b"x")
    assert await keys(store) == ["B.x~_-", "a/1", "a/2", "ab", "b/1"]
    assert await keys(store, "a") == ["a/1", "a/2", "ab"]
    assert await keys(store, "a/") == ["a/1", "a/2"]
    assert await keys(store, "c") == []


@on("url")
async def test_key_and_a_key_below_it(store: Store) -> None:
    await store.put("a/b", b"1")
    await store.put("a", b"2")
    await store.put("a/b/c", b"3")
    assert [await store.get(key) for key in ("a/b", "a", "a/b/c")] == [b"1", b"2", b"3"]


BAD_KEYS = [
    *("", ".", "..", "../x", "a/../b", "a/..", ".hidden", "a/.hidden", "/abs", "a/", "a//b", "a\\b", "a b", "a%2fb"),
    *("a\x00b", "a\n", "ä", "a?b", "a#b", "a:b", "a" * 201, 7, None, b"bytes"),
]


@pytest.mark.parametrize("key", BAD_KEYS, ids=repr)
def test_refuses_keys(url: str, key: str) -> None:
    async def body(store: Store) -> None:
        for ask in (store.put(key, b"x"), store.get(key), store.get_ranges(key, []), store.exists(key)):
            with pytest.raises(InputError):
                await ask
        for ask in (store.size(key), store.delete(key), store.touch([key])):
            with pytest.raises(InputError):
                await ask
        assert await keys(store) == []

    run(url, body)


@on("url")
async def test_longest_key(store: Store) -> None:
    key = "a" * 200
    await store.put(key, b"x")
    assert await keys(store, "a") == [key]


@pytest.mark.parametrize("prefix", ["../", "/", ".", "a//", None])
def test_refuses_prefixes(url: str, prefix: str) -> None:
    async def body(store: Store) -> None:
        with pytest.raises(InputError):
            await keys(store, prefix)

    run(url, body)


@on("url")
async def test_refuses_data_that_is_not_bytes(store: Store) -> None:
    for data in ("text", 5, None, [b"a"], memoryview(b"abcd")[::2]):
        with pytest.raises(InputError):
            await store.put("k", data)  # type: ignore[arg-type]

    async def mixed() -> AsyncIterator[bytes]:
        yield b"a"
        yield "b"  # type: ignore[misc]

    with pytest.raises(InputError):
        await store.put("k", mixed())
    assert not await store.exists("k")


@on("url")
async def test_a_failed_put_changes_nothing(store: Store) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await store.put("new", failing())
    assert not await store.exists("new")
    assert await keys(store) == []
    await store.put("old", b"old")
    with pytest.raises(ZeroDivisionError):
        await store.put("old", failing())
    assert await store.get("old") == b"old"
    assert await keys(store) == ["old"]


@on("url")
async def test_a_put_under_way_is_invisible(store: Store) -> None:
    halfway, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * 100_000
        halfway.set()
        await go_on.wait()
        yield b"y"

    await store.put("old", b"old")
    puts = [asyncio.create_task(store.put("new", slow())), asyncio.create_task(store.put("old", slow()))]
    await halfway.wait()
    await asyncio.sleep(0.01)
    assert not await store.exists("new")
    assert await store.get("old") == b"old"
    assert await keys(store) == ["old"]
    go_on.set()
    await asyncio.gather(*puts)
    assert await store.get("new") == await store.get("old") == b"x" * 100_000 + b"y"


@on("url")
async def test_a_cancelled_put_changes_nothing(store: Store) -> None:
    halfway = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000
            halfway.set()
            await asyncio.sleep(0)

    put = asyncio.create_task(store.put("k", endless()))
    await halfway.wait()
    put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    assert not await store.exists("k")
    assert await keys(store) == []


@on("url")
async def test_writers_of_one_key_leave_one_whole_object(store: Store) -> None:
    values = [bytes([i]) * (1000 + 7 * i) for i in range(12)]

    async def read() -> None:
        for _ in range(20):
            if await store.exists("k"):
                assert await store.get("k") in values
            await asyncio.sleep(0)

    puts = [store.put("k", v if i % 2 else pieces(v[:300], v[300:])) for i, v in enumerate(values)]
    await asyncio.gather(*puts, read(), read())
    assert await store.get("k") in values
    await store.put("k", b"last")
    assert await store.get("k") == b"last"


@on("url")
async def test_many_keys_at_once(store: Store) -> None:
    await asyncio.gather(*(store.put(f"k{i}", bytes([i])) for i in range(50)))
    assert await asyncio.gather(*(store.get(f"k{i}") for i in range(50))) == [bytes([i]) for i in range(50)]


def test_a_store_serves_several_loops(url: str) -> None:
    store = open_store(url)
    asyncio.run(store.put("k", b"1"))
    assert asyncio.run(store.get("k")) == b"1"
    asyncio.run(store.close())


@on("url")
async def test_closed_stores_say_so(store: Store) -> None:
    await store.put("k", b"x")
    await store.close()
    await store.close()
    for ask in (store.get("k"), store.put("k", b"y"), store.exists("k")):
        with pytest.raises(StoreUnavailable):
            await ask


# ---------------------------------------------------------------------- stores that evict
@on("limited_url")
async def test_evicts_the_least_recently_used(store: Store) -> None:
    for key in "abc":
        await store.put(key, bytes(300))
    await store.get_range("a", 0, 1)
    await store.put("d", bytes(300))
    assert await keys(store) == ["a", "c", "d"]
    assert await store.exists("c")
    await store.put("e", bytes(300))
    assert await keys(store) == ["c", "d", "e"]


@on("limited_url")
async def test_touch_orders_eviction(store: Store) -> None:
    for key in "abc":
        await store.put(key, bytes(300))
    await store.touch(["c", "b", "missing", "a"])
    await store.put("d", bytes(600))
    assert await keys(store) == ["a", "d"]


@on("limited_url")
async def test_replacing_counts_once(store: Store) -> None:
    await store.put("a", bytes(400))
    for _ in range(5):
        await store.put("b", bytes(500))
    assert await keys(store) == ["a", "b"]
    await store.delete("b")
    await store.put("c", bytes(500))
    assert await keys(store) == ["a", "c"]


@on("limited_url")
async def test_replaces_by_a_larger_object(store: Store) -> None:
    for key in "abc":
        await store.put(key, bytes(300))
    await store.put("a", bytes(500))
    assert await store.size("a") == 500
    assert await keys(store) == ["a", "c"]
    await store.put("b", bytes(200))
    await store.put("b", bytes(450))
    assert await keys(store) == ["a", "b"], "what is replaced makes room itself"


@on("limited_url")
async def test_an_object_beyond_the_limit_is_refused(store: Store) -> None:
    await store.put("a", bytes(900))
    for data in (bytes(1001), pieces(bytes(900), bytes(900))):
        with pytest.raises(StoreFull):
            await store.put("b", data)
    assert await keys(store) == ["a"]
    await store.put("b", bytes(1000))
    assert await keys(store) == ["b"]
