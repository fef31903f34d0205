"""CacheGen: a codec and an adaptive streamer for the KV caches of language models.

    codec = cachegen.Codec.for_model("path/to/model")
    encoded = codec.encode(chunk)                       # KVChunk -> bytes and a report
    chunk = codec.decode(encoded.data, level=2)         # bytes -> KVChunk
    store = cachegen.KVStore(codec, "file:cache")
    store.save(ids, cache); hit = store.load(ids)       # by chunks, longest stored prefix

Names are loaded on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .codec import Codec, Encoded
    from .errors import CacheGenError
    from .fingerprint import Fingerprint
    from .kv import KVChunk, KVSpec, LayerKind, LayerKV
    from .kvstore import KVStore
    from .profile import ModelProfile

_EXPORTS = {
    "CacheGenError": "errors",
    "Codec": "codec",
    "Encoded": "codec",
    "Fingerprint": "fingerprint",
    "KVChunk": "kv",
    "KVSpec": "kv",
    "KVStore": "kvstore",
    "LayerKV": "kv",
    "LayerKind": "kv",
    "ModelProfile": "profile",
}
__version__ = "0.1.0"
__all__ = [
    "CacheGenError",
    "Codec",
    "Encoded",
    "Fingerprint",
    "KVChunk",
    "KVSpec",
    "KVStore",
    "LayerKV",
    "LayerKind",
    "ModelProfile",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
