"""Stores: bytes under keys, by ranges, whole or not at all. `open_store("file:cache")` opens one from its URL."""

from __future__ import annotations

from importlib.metadata import entry_points

from ..errors import InputError
from .base import Buffer, Data, Store, check_key
from .local import LocalStore
from .memory import MemoryStore
from .sync import BackgroundLoop, SyncStore
from .url import StoreURL

ENTRY_POINTS = "cachegen.stores"
"""Entry-point group of stores from other packages: the name is the URL's scheme, the value a `Store` class."""

_BUILT_IN: dict[str, type[Store]] = {"file": LocalStore, "memory": MemoryStore}

__all__ = [
    "BackgroundLoop",
    "Buffer",
    "Data",
    "LocalStore",
    "MemoryStore",
    "Store",
    "StoreURL",
    "SyncStore",
    "check_key",
    "open_store",
    "schemes",
]


def schemes() -> list[str]:
    """URL schemes that this installation can open."""
    return sorted({*_BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def open_store(url: str) -> Store:
    """The store that a URL names: `file:PATH?max_bytes=20GiB`, `memory:`, or an installed package's scheme.

    Raises InputError for a URL that isn't one or whose scheme nobody serves; StoreError kinds from the store itself.
    """
    parsed = StoreURL.parse(url)
    cls = _BUILT_IN.get(parsed.scheme)
    if cls is None:
        found = list(entry_points(group=ENTRY_POINTS, name=parsed.scheme))
        if not found:
            raise InputError(f"store URL {url!r}: expected a scheme among {', '.join(schemes())}; got {parsed.scheme}")
        cls = found[0].load()
        if not (isinstance(cls, type) and issubclass(cls, Store)):
            raise InputError(f"entry point {found[0].value} of scheme {parsed.scheme} isn't a Store class")
    return cls.from_url(parsed)
