"""The registry of codecs: a dict, and entry points (`cachegen.codecs`) for third parties, loaded when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from ..errors import UnknownCodec
from .base import ChunkCodec

if TYPE_CHECKING:
    from ..profile import ModelProfile

_BUILTIN = {
    "cachegen": "cachegen.codecs.cachegen:CacheGen",
    "cachegen_public": "cachegen.codecs.cachegen_public:CacheGenPublic",
    "channel": "cachegen.codecs.channel:Channel",
    "lossless": "cachegen.codecs.lossless:Lossless",
}
_loaded: dict[str, type[ChunkCodec]] = {}


def register(cls: type[ChunkCodec]) -> type[ChunkCodec]:
    """Make a codec known in this process (a decorator). Entry points make it known everywhere."""
    _loaded[cls.codec_id] = cls
    return cls


def codec_ids() -> list[str]:
    """Ids of every codec that can be loaded."""
    return sorted({*_BUILTIN, *_loaded, *(e.name for e in entry_points(group="cachegen.codecs"))})


def codec_class(codec_id: str) -> type[ChunkCodec]:
    """The class of a codec id. Raises UnknownCodec, which lists the ids there are."""
    if codec_id in _loaded:
        return _loaded[codec_id]
    if codec_id in _BUILTIN:
        module, _, name = _BUILTIN[codec_id].partition(":")
        return register(getattr(import_module(module), name))
    for entry in entry_points(group="cachegen.codecs"):
        if entry.name == codec_id:
            return register(entry.load())
    raise UnknownCodec(f"codec: expected one of {', '.join(codec_ids())}; got {codec_id!r}")


def make_codec(codec_id: str, config: Mapping[str, Any], profile: ModelProfile | None = None) -> ChunkCodec:
    """A codec from its id and config, as an object's header names them."""
    return codec_class(codec_id).from_config(config, profile)
