"""One tree of typed errors. Every error has a stable number: programs match on the class or on `code`.

A message says what was expected, what came, and what to do. Codes are listed in docs/errors.md and never reused;
hundreds group them: 1xx the caller's input, 2xx an object's bytes, 3xx identity, 4xx stores, 5xx this installation.
"""

from __future__ import annotations

from typing import Any, ClassVar


class CacheGenError(Exception):
    """Root of the tree. `code` is stable across versions; `details` holds the values behind the message."""

    code: ClassVar[int] = 100

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def __str__(self) -> str:
        return f"{self.args[0]} [CG{self.code}]"


# --------------------------------------------------------------------------- 1xx: what the caller passed
class InputError(CacheGenError, ValueError):
    """The caller's input can't be used."""

    code = 110


class ShapeError(InputError):
    """A tensor has the wrong shape, or tensors of one chunk disagree."""

    code = 111


class DtypeError(InputError):
    """A tensor has a dtype that the spec or the codec doesn't take."""

    code = 112


class DeviceError(InputError):
    """A tensor lives on a device that this codec can't reach."""

    code = 113


class LayoutError(InputError):
    """A tensor's memory layout can't be used (e.g. its last dimension is strided)."""

    code = 114


class RangeError(InputError):
    """Tokens, layers, heads or positions outside what the object or the model holds."""

    code = 115


class LevelError(InputError):
    """No such quality level."""

    code = 116


class UnknownCodec(InputError):
    """No codec of this name is registered."""

    code = 117


class UnsupportedModel(InputError):
    """The model's config has a shape, cache kind or RoPE that can't be described."""

    code = 118


class ProfileMissing(InputError):
    """The codec needs a profile calibrated for the model, and none was given or found."""

    code = 119


class QualityUnavailable(InputError):
    """No stored level meets the quality asked for."""

    code = 120


class PositionError(InputError):
    """Keys can't be moved to these positions (effective RoPE frequencies would differ)."""

    code = 121


class CapacityError(InputError):
    """A value is too large for the bitstream's integers."""

    code = 122


# --------------------------------------------------------------------------- 2xx: bytes that can't be trusted
class FormatError(CacheGenError):
    """Bytes that aren't a well-formed object."""

    code = 200


class NotAnObject(FormatError):
    """The bytes don't start like a .kvc object."""

    code = 201


class VersionError(FormatError):
    """The object (or a must-understand flag in it) is newer than this reader."""

    code = 202


class ChecksumError(FormatError):
    """A checksum doesn't match: the bytes were altered on the way."""

    code = 203


class Truncated(FormatError):
    """Bytes are missing. `highest_complete_level` is the best level that can still be decoded, or None."""

    code = 204

    def __init__(self, message: str, highest_complete_level: int | None = None, **details: Any) -> None:
        super().__init__(message, highest_complete_level=highest_complete_level, **details)
        self.highest_complete_level = highest_complete_level


class CorruptStream(FormatError):
    """An entropy-coded stream doesn't decode to its end (wrong final state, words left over or missing)."""

    code = 205


class TableError(FormatError):
    """A probability table isn't one (frequencies that don't sum, an alphabet out of range)."""

    code = 206


class LimitExceeded(FormatError):
    """A stated size is beyond this reader's limits; nothing was allocated for it."""

    code = 207


# --------------------------------------------------------------------------- 3xx: identity
class IdentityError(CacheGenError):
    """The object isn't the cache that was asked for."""

    code = 300


class FingerprintMismatch(IdentityError):
    """The cache belongs to another model. `fields` maps each differing field to (expected, found)."""

    code = 301

    def __init__(self, message: str, fields: dict[str, tuple[Any, Any]] | None = None, **details: Any) -> None:
        super().__init__(message, fields=fields or {}, **details)
        self.fields = fields or {}


class ProfileMismatch(IdentityError):
    """The profile isn't the one that the object, or the model, needs."""

    code = 302


class TokenMismatch(IdentityError):
    """The object's token digest isn't that of the tokens asked for."""

    code = 303


class LineageError(IdentityError):
    """A chunk computed on a lossy prefix was to be stored under an exact key."""

    code = 304


# --------------------------------------------------------------------------- 4xx: stores
class StoreError(CacheGenError):
    """A store failed."""

    code = 400


class KeyNotFound(StoreError, KeyError):
    """The store holds no object under this key."""

    code = 401


class StoreUnavailable(StoreError):
    """The store can't be reached, or its path is missing."""

    code = 402


class StoreFull(StoreError):
    """No room: disk full, quota or size limit."""

    code = 403


class StoreDenied(StoreError):
    """Permission denied or wrong credentials."""

    code = 404


class RangeNotSatisfiable(StoreError):
    """A byte range starts beyond the object's end."""

    code = 405


# --------------------------------------------------------------------------- 5xx: this installation
class InstallError(CacheGenError):
    """Something that this installation lacks."""

    code = 500


class NativeMissing(InstallError, ImportError):
    """The native library isn't built."""

    code = 501


class MissingExtra(InstallError, ImportError):
    """An optional dependency isn't installed; the message names the extra."""

    code = 502


def all_errors() -> list[type[CacheGenError]]:
    """Every error class, by code."""
    found: list[type[CacheGenError]] = []
    queue: list[type[CacheGenError]] = [CacheGenError]
    while queue:
        cls = queue.pop()
        found.append(cls)
        queue.extend(cls.__subclasses__())
    return sorted(found, key=lambda cls: cls.code)


def describe(items: Any, limit: int = 4) -> str:
    """`a, b, c, ... (9)`: a list for a message, cut to `limit` entries."""
    listed = [str(item) for item in items]
    tail = f", ... ({len(listed)})" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + tail
