"""The folder store against crashes, other processes, full disks and folders it may not use."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cachegen.errors import InputError, KeyNotFound, StoreFull, StoreUnavailable
from cachegen.stores import LocalStore, MemoryStore, SyncStore, open_store

BEGINNING = """
import asyncio, concurrent.futures.thread, os, sys
from cachegen.errors import StoreError
from cachegen.stores import open_store
store = open_store(sys.argv[1])
async def slowly(part, seconds):
    yield part
    print("half", flush=True)
    await asyncio.sleep(seconds)
    yield part
"""


def start(body: str, *args: object) -> subprocess.Popen[str]:
    """A Python process that runs `body` on the store of the first argument."""
    command = [sys.executable, "-c", BEGINNING + body, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


def keys(store: LocalStore) -> list[str]:
    async def gather() -> list[str]:
        return sorted([key async for key in store.list()])

    return asyncio.run(gather())


def partials(root: Path) -> list[Path]:
    return sorted((root / "partial").iterdir())


# ---------------------------------------------------------------------- crashes
def test_a_writer_killed_halfway_leaves_nothing_visible(tmp_path: Path) -> None:
    asyncio.run(LocalStore(tmp_path).put("old", b"old"))
    put = (
        "async def main():\n await asyncio.gather(*(store.put(k, slowly(b'x' * 100_000, 60)) for k in ('old', 'new')))"
    )
    writer = start(put + "\nasyncio.run(main())", f"file:{tmp_path}")
    assert writer.stdout is not None
    assert [writer.stdout.readline() for _ in range(2)] == ["half\n"] * 2
    writer.send_signal(signal.SIGKILL)
    writer.communicate()

    store = LocalStore(tmp_path)
    assert keys(store) == ["old"]
    assert asyncio.run(store.get("old")) == b"old"
    assert len(partials(tmp_path)) == 2, "the crash leaves only partial files"
    long_ago = time.time() - 3600
    for left in partials(tmp_path):
        os.utime(left, (long_ago, long_ago))
    asyncio.run(store.put("new", b"new"))
    assert partials(tmp_path) == [], "the next writer sweeps them"
    assert asyncio.run(store.get("new")) == b"new"


def test_a_slow_writer_is_not_swept(tmp_path: Path) -> None:
    writer = start("asyncio.run(store.put('slow', slowly(b'x' * 1000, 1.0)))", f"file:{tmp_path}")
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    (left,) = partials(tmp_path)
    os.utime(left, (0, 0))
    store = LocalStore(tmp_path)
    asyncio.run(store.put("other", b"x"))
    output_of(writer)
    assert keys(store) == ["other", "slow"]
    assert asyncio.run(store.size("slow")) == 2000


def test_a_fresh_partial_file_is_not_swept(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "partial" / "about-to-be-locked").touch()
    asyncio.run(store.put("k", b"x"))
    assert [left.name for left in partials(tmp_path)] == ["about-to-be-locked"]


def test_objects_stay_whole_when_writers_are_killed(tmp_path: Path) -> None:
    body = "i = 0\nwhile True:\n asyncio.run(store.put('k', bytes([i % 256]) * 50_000)); i += 1; print(i, flush=True)"
    for count in (1, 4, 9):
        writer = start(body, f"file:{tmp_path}?max_bytes=200kB")
        assert writer.stdout is not None
        for _ in range(count):
            writer.stdout.readline()
        writer.kill()
        writer.communicate()
        data = asyncio.run(LocalStore(tmp_path).get("k"))
        assert len(data) == 50_000
        assert len(set(data)) == 1


# ---------------------------------------------------------------------- several processes
def test_processes_share_a_folder_and_its_limit(tmp_path: Path) -> None:
    body = """
async def main():
    mine = int(sys.argv[2])
    for i in range(40):
        key = f"k{(7 * i + mine) % 50}"
        await store.put(key, bytes([mine]) * (1000 + mine))
        try:
            data = await store.get(f"k{i}")
        except StoreError as error:
            assert error.code == 401, error
        else:
            assert len(set(data)) == 1 and len(data) == 1000 + data[0], "a half-written object"
asyncio.run(main())
"""
    writers = [start(body, f"file:{tmp_path}?max_bytes=20kB", mine) for mine in range(3)]
    for writer in writers:
        output_of(writer)
    store = LocalStore(tmp_path, max_bytes=20_000)
    sizes = [path.stat().st_size for path in (tmp_path / "objects").rglob("*") if path.is_file()]
    assert sum(sizes) <= 20_000
    assert len(sizes) >= 15, "eviction takes no more than it must"
    assert int((tmp_path / "lock").read_text()) == sum(sizes), "the total on record is the folder's"
    assert len(keys(store)) == len(sizes)
    assert partials(tmp_path) == []


def test_a_reader_keeps_an_object_that_is_evicted(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, max_bytes=2_000_000)
    asyncio.run(store.put("k", b"a" * 1_000_000))
    seen: list[bytes] = []

    def read() -> None:
        while len(seen) < 30:
            try:
                seen.append(asyncio.run(store.get("k")))
            except KeyNotFound:
                seen.append(b"")

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(12):
        asyncio.run(store.put(f"other{i}", bytes(1_500_000)))
        asyncio.run(store.put("k", b"a" * 1_000_000))
    reader.join()
    assert {len(data) for data in seen} <= {0, 1_000_000}


def test_the_limit_counts_what_writers_without_one_stored(tmp_path: Path) -> None:
    asyncio.run(LocalStore(tmp_path).put("a", bytes(900)))
    limited = LocalStore(tmp_path, max_bytes=1000)
    asyncio.run(limited.put("b", bytes(500)))
    assert keys(limited) == ["b"]


def test_a_wrong_total_is_mended(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, max_bytes=1000)
    asyncio.run(store.put("a", bytes(400)))
    (tmp_path / "lock").write_text("99999999")  # as after a crash between counting and renaming
    asyncio.run(store.put("b", bytes(400)))
    assert keys(store) == ["a", "b"]
    assert int((tmp_path / "lock").read_text()) == 800
    (tmp_path / "lock").write_text("not a number")
    asyncio.run(store.put("c", bytes(400)))
    assert keys(store) == ["b", "c"]
    asyncio.run(store.delete("b"))
    assert int((tmp_path / "lock").read_text()) == 400


# ---------------------------------------------------------------------- no room
def test_file_size_limit_is_store_full(tmp_path: Path) -> None:
    body = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
async def pieces():
    for _ in range(10):
        yield b"x" * 1000
async def main():
    await store.put("old", b"old")
    for data in (bytes(5000), pieces()):
        try:
            await store.put("old", data)
        except StoreError as error:
            print(error.code)
asyncio.run(main())
"""
    assert output_of(start(body, f"file:{tmp_path}")) == "403\n403"
    store = LocalStore(tmp_path)
    assert asyncio.run(store.get("old")) == b"old"
    assert keys(store) == ["old"]
    assert partials(tmp_path) == [], "what was written gives its room back"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB of the test's own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "cachegen-test", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_is_store_full(small_disk: Path) -> None:
    store = LocalStore(small_disk)
    asyncio.run(store.put("a", bytes(100_000)))
    for key in ("a", "b"):
        with pytest.raises(StoreFull, match="Free space"):
            asyncio.run(store.put(key, bytes(200_000)))
    assert keys(store) == ["a"]
    assert asyncio.run(store.get("a")) == bytes(100_000)
    assert partials(small_disk) == []
    asyncio.run(store.put("c", bytes(100_000)))


# ---------------------------------------------------------------------- folders that can't be used
def test_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="Create it, or mount the disk"):
        open_store(f"file:{tmp_path}/no/such")
    assert not (tmp_path / "no").exists()


def test_makes_the_folder_in_one_that_is_there(tmp_path: Path) -> None:
    open_store(f"file:{tmp_path}/new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700, "a cache is a prompt: nobody else's business"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailable, match="is a file"):
        open_store(f"file:{tmp_path}/file")


def test_a_folder_that_vanished(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    asyncio.run(store.put("k", b"x"))
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for ask in (store.get("k"), store.exists("k"), store.size("k"), store.put("k", b"y"), store.delete("k")):
        with pytest.raises(StoreUnavailable, match="no longer there"):
            asyncio.run(ask)
    with pytest.raises(StoreUnavailable):
        keys(store)
    assert not (tmp_path / "store").exists()


def test_survives_a_cleaner_of_empty_folders(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    (tmp_path / "partial").rmdir()
    asyncio.run(store.put("k", b"x"))
    assert asyncio.run(store.get("k")) == b"x"


def test_read_only_folder(tmp_path: Path) -> None:
    """Reads go on, writes are denied. As root, a process without root's rights tries."""
    root = Path(tempfile.mkdtemp(prefix="cachegen-test-"))
    try:
        asyncio.run(LocalStore(root).put("k", b"x"))
        for folder in (root, *(p for p in root.rglob("*") if p.is_dir())):
            folder.chmod(0o555)
        for file in (p for p in root.rglob("*") if p.is_file()):
            file.chmod(0o444)
        body = """
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
store = open_store(sys.argv[1])
assert asyncio.run(store.get("k")) == b"x"
assert asyncio.run(store.exists("k"))
for ask in (store.put("k", b"y"), store.put("new", b"y"), store.delete("k")):
    try:
        asyncio.run(ask)
    except StoreError as error:
        print(error.code)
"""
        assert output_of(start(body, f"file:{root}")) == "404\n404\n404"
        assert asyncio.run(LocalStore(root).get("k")) == b"x"
    finally:
        subprocess.run(["chmod", "-R", "u+w", str(root)], check=True)
        subprocess.run(["rm", "-r", str(root)], check=True)


def test_denied_where_the_parent_may_not_be_written() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give its rights up")
    body = """
os.setgid(65534)
os.setuid(65534)
try:
    open_store("file:/cachegen-test-denied")
except StoreError as error:
    print(error.code)
"""
    assert output_of(start(body, "memory:")) == "404"


# ---------------------------------------------------------------------- names
def test_files_of_others_are_no_objects(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    asyncio.run(store.put("a/b", b"x"))
    (shard,) = (tmp_path / "objects").iterdir()
    (shard / ".DS_Store").touch()
    (tmp_path / "objects" / "stray").touch()
    assert keys(store) == ["a/b"]


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    asyncio.run(store.put("k", b"x"))
    (tmp_path / "secret").write_bytes(b"secret")
    (path,) = (p for p in (tmp_path / "store" / "objects").rglob("k"))
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(StoreUnavailable):
        asyncio.run(store.get("k"))


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("cache", "expected e.g. file:PATH"),
        ("", "expected e.g. file:PATH"),
        ("ftp://host/x", "expected a scheme among file, memory"),
        ("file:", "expected file:PATH"),
        ("file://elsewhere/x", "of this machine"),
        ("file:/tmp/x?max_size=5", "unknown option 'max_size'"),
        ("file:/tmp/x?max_bytes=5&max_bytes=6", "given once"),
        ("file:/tmp/x?max_bytes=lots", "expected bytes such as"),
        ("file:/tmp/x?max_bytes=0", "expected bytes such as"),
        ("file:/tmp/x?max_bytes=-1", "expected bytes such as"),
        ("memory:somewhere", "with no path"),
        ("memory:?speed=9", "unknown option"),
    ],
)
def test_urls_that_are_none(url: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        open_store(url)


@pytest.mark.parametrize(
    ("text", "size"), [("1000", 1000), ("5kB", 5000), ("2KiB", None), ("3kiB", 3072), ("2GiB", 2 << 30), ("1T", 10**12)]
)
def test_sizes_in_urls(tmp_path: Path, text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(InputError):
            open_store(f"file:{tmp_path}/s?max_bytes={text}")
        return
    store = open_store(f"file:{tmp_path}/s%20t?max_bytes={text}")
    assert isinstance(store, LocalStore)
    assert (store.max_bytes, store.root) == (size, tmp_path / "s t")


def test_stores_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    import cachegen.stores

    points = {
        "shelf": EntryPoint("shelf", "cachegen.stores.memory:MemoryStore", "cachegen.stores"),
        "wrong": EntryPoint("wrong", "json:dumps", "cachegen.stores"),
    }

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "cachegen.stores"
        return [point for point in points.values() if name in (None, point.name)]

    monkeypatch.setattr(cachegen.stores, "entry_points", entry_points)
    assert cachegen.stores.schemes() == ["file", "memory", "shelf", "wrong"]
    assert isinstance(open_store("shelf:?max_bytes=5"), MemoryStore)
    with pytest.raises(InputError, match="isn't a Store class"):
        open_store("wrong:x")
    with pytest.raises(InputError, match="file, memory, shelf, wrong"):
        open_store("other:x")


def test_sync_facade_on_a_folder(tmp_path: Path) -> None:
    with SyncStore(open_store(f"file:{tmp_path}/s")) as store:
        store.put("a", iter([b"1", b"2"]))
        assert store.get("a") == b"12"
