"""`ModelProfile`: what a codec learnt of a model, offline, in one safetensors file.

A profile is named by its content hash: an object names the profile that it needs, and a store can carry profiles
under their hashes. The file is data, never code, and everything in it is checked before it is used. Layout:
docs/format-cachegen.md, *Profile*.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import strict_json
from .entropy.tables import TableBank
from .errors import (
    CacheGenError,
    ChecksumError,
    FormatError,
    InputError,
    LimitExceeded,
    NotAnObject,
    ProfileMismatch,
    Truncated,
    VersionError,
)
from .fingerprint import Fingerprint
from .kv import KVSpec

FORMAT = 1
METADATA = "cachegen.profile"
HASH = "cachegen.hash"
MAX_BYTES = 4 << 30
MAX_HEADER = 16 << 20
MAX_ARRAYS = 4096
MAX_LEVELS = 64
DTYPES = {
    "U8": "|u1",
    "I8": "|i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "F16": "<f2",
    "F32": "<f4",
}
"""safetensors' names of the element types that a profile may hold, as numpy's."""
_NAMES = {np.dtype(code): name for name, code in DTYPES.items()}


@dataclass(frozen=True)
class Rung:
    """A level of the ladder, as measured in calibration on held-out text.

    Attributes:
        level: 0 the coarsest.
        bits_per_element: whole object, header and index included.
        kl: mean KL in nats over the 256 tokens that follow (docs: definitions), or None if not measured.
    """

    level: int
    bits_per_element: float
    kl: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What a profile was calibrated on: names and tokens of its texts, the seed, tokens per chunk."""

    texts: tuple[tuple[str, int], ...] = ()
    seed: int = 0
    chunk_size: int = 256

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(count for _, count in self.texts)


@dataclass(frozen=True)
class ModelProfile:
    """A codec's knowledge of one model. Immutable.

    Attributes:
        codec_id: the codec that it is for.
        fingerprint: the model.
        spec: the model's cache; arrays by layer and channel refer to it.
        calibration: what it was learnt from.
        ladder: measured levels, coarsest first; empty if none were measured.
        parameters: the codec's constants, JSON-able.
        arrays: the codec's arrays by name, of the types in DTYPES. Names are the codec's own: "steps", "tables.freqs".
    """

    codec_id: str
    fingerprint: Fingerprint
    spec: KVSpec
    calibration: Calibration
    ladder: tuple[Rung, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {}
        for name, array in self.arrays.items():
            little = np.ascontiguousarray(array, dtype=np.asarray(array).dtype.newbyteorder("<"))
            if little.dtype not in _NAMES:
                raise InputError(f"profile array {name!r}: expected one of {', '.join(DTYPES)}; got {array.dtype}")
            arrays[name] = little
        object.__setattr__(self, "arrays", MappingProxyType(arrays))

    @cached_property
    def hash(self) -> str:
        """Content hash: 64 hex digits, the same on every machine for the same content."""
        return _content_hash(self._described(), self.arrays)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def check(self, fingerprint: Fingerprint) -> None:
        """Raise ProfileMismatch unless the profile was calibrated for this model; the message names what differs.

        The cache's dtype may differ: what is learnt doesn't depend on it.
        """
        differing = {
            k: v for k, v in self.fingerprint.differences(fingerprint).items() if k not in ("dtype", "tokenizer")
        }
        if not differing:
            return
        listed = "; ".join(
            f"{name}: the profile has {_short(a)}, the model {_short(b)}" for name, (a, b) in differing.items()
        )
        raise ProfileMismatch(
            f"the profile was calibrated for another model ({listed}). Calibrate one for this model: "
            f"cachegen calibrate --codec {self.codec_id} --model DIR --text FILE --output P",
            fields=differing,
        )

    def array(self, name: str, dtype: str, shape: tuple[int | None, ...]) -> NDArray[Any]:
        """An array by name, checked: `dtype` is a key of DTYPES, None in `shape` takes any length.

        Raises ProfileMismatch: the profile has no such array, or another shape or type.
        """
        found = self.arrays.get(name)
        wanted = f"{dtype} {list(shape)}".replace("None", "any")
        if found is None:
            raise ProfileMismatch(f"profile array {name!r}: expected {wanted}; the profile has none of that name")
        fits = len(found.shape) == len(shape) and all(
            w is None or w == n for w, n in zip(shape, found.shape, strict=True)
        )
        if found.dtype != np.dtype(DTYPES[dtype]) or not fits:
            raise ProfileMismatch(
                f"profile array {name!r}: expected {wanted}; got {_NAMES[found.dtype]} {list(found.shape)}"
            )
        return found

    def bank(self, name: str) -> TableBank:
        """The table bank stored as bytes under `name` (`TableBank.to_bytes`). Raises ProfileMismatch, TableError."""
        return TableBank.from_bytes(self.array(name, "U8", (None,)).tobytes())

    # ------------------------------------------------------------------ file
    def to_bytes(self) -> bytes:
        """The profile as a safetensors file."""
        described = self._described()
        entries: dict[str, Any] = {"__metadata__": {METADATA: described.decode(), HASH: self.hash}}
        offset, parts = 0, []
        for name in sorted(self.arrays):
            array = self.arrays[name]
            span = [offset, offset + array.nbytes]
            entries[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": span}
            offset += array.nbytes
            parts.append(array.tobytes())
        header = strict_json.dumps(entries, "profile")
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header + b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> ModelProfile:
        """Read and verify a profile; arrays are read-only views of `data`.

        Raises:
            NotAnObject, Truncated, VersionError, ChecksumError, LimitExceeded, FormatError: the bytes aren't a
                well-formed profile.
        """
        described, stated, arrays = _parse(memoryview(data).cast("B"))
        found = _content_hash(described, arrays)
        if found != stated:
            raise ChecksumError(f"profile: expected content hash {stated[:16]}; got {found[:16]}. Fetch the file again")
        meta = strict_json.loads(described, "profile")
        if meta.get("format") != FORMAT:
            raise VersionError(
                f"profile: expected format {FORMAT}; got {meta.get('format')!r}. Update cachegen, or calibrate again"
            )
        try:
            profile = cls._from_meta(meta, arrays)
        except FormatError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, CacheGenError) as error:
            raise FormatError(
                f"profile: its description isn't well-formed ({type(error).__name__}: {error})"
            ) from error
        if profile._described() != described:
            raise FormatError("profile: its description isn't in canonical form")
        return profile

    def save(self, path: Path | str) -> Path:
        """Write the profile, whole or not at all (temporary name, fsync, rename). Returns the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: Path | str) -> ModelProfile:
        """Read and verify the profile in a file. Raises what `from_bytes` raises, InputError if there is no file."""
        path = Path(path)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"profile: expected a file; {path} can't be read ({error.strerror})") from error
        if size > MAX_BYTES:
            raise LimitExceeded(f"profile: expected at most {MAX_BYTES} bytes; {path} has {size}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"profile: expected a readable file; {path}: {error.strerror}") from error
        return cls.from_bytes(data)

    def _described(self) -> bytes:
        """Everything but the arrays, as canonical JSON."""
        calibration = self.calibration
        rungs = [{"level": r.level, "bits_per_element": r.bits_per_element, "kl": r.kl} for r in self.ladder]
        data = {
            "format": FORMAT,
            "codec": self.codec_id,
            "fingerprint": asdict(self.fingerprint),
            "spec": self.spec.to_json(),
            "calibration": {
                "texts": [{"name": name, "tokens": tokens} for name, tokens in calibration.texts],
                "seed": calibration.seed,
                "chunk_size": calibration.chunk_size,
            },
            "ladder": rungs,
            "parameters": dict(self.parameters),
        }
        return strict_json.dumps(data, "profile")

    @classmethod
    def _from_meta(cls, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> ModelProfile:
        calibration, rungs = meta["calibration"], meta["ladder"]
        if len(rungs) > MAX_LEVELS:
            raise LimitExceeded(f"profile: expected at most {MAX_LEVELS} levels; got {len(rungs)}")
        ladder = tuple(
            Rung(int(r["level"]), float(r["bits_per_element"]), None if r["kl"] is None else float(r["kl"]))
            for r in rungs
        )
        if [rung.level for rung in ladder] != list(range(len(ladder))):
            raise FormatError("profile: expected the ladder's levels to count up from 0")
        return cls(
            codec_id=str(meta["codec"]),
            fingerprint=_read_fingerprint(meta["fingerprint"]),
            spec=KVSpec.from_json(meta["spec"]),
            calibration=Calibration(
                texts=tuple((str(t["name"]), int(t["tokens"])) for t in calibration["texts"]),
                seed=int(calibration["seed"]),
                chunk_size=int(calibration["chunk_size"]),
            ),
            ladder=ladder,
            parameters=dict(meta["parameters"]),
            arrays=arrays,
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:16]}...{text[-8:]}"


def bank_array(bank: TableBank) -> NDArray[np.uint8]:
    """A table bank as the array that `ModelProfile.bank` reads."""
    return np.frombuffer(bank.to_bytes(), np.uint8)


def _read_fingerprint(data: Mapping[str, Any]) -> Fingerprint:
    """A fingerprint from its fields; types are checked, names too."""
    names = {f.name for f in fields(Fingerprint)}
    if set(data) != names:
        raise FormatError(f"profile: expected the fingerprint's fields {sorted(names)}; got {sorted(data)}")
    counts = {name: int(data[name]) for name in ("layers", "kv_heads")}
    dims = {name: tuple(int(v) for v in data[name]) for name in ("k_dims", "v_dims")}
    texts = {name: str(data[name]) for name in ("model_type", "weights", "dtype", "rope")}
    optional = {name: None if data[name] is None else str(data[name]) for name in ("tokenizer", "adapter")}
    return Fingerprint(**texts, **counts, **dims, **optional)  # type: ignore[arg-type]


def _content_hash(described: bytes, arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over the description and the arrays in the order of their names, each with its length."""
    digest = hashlib.sha256(b"cachegen profile\n")
    digest.update(struct.pack("<Q", len(described)) + described)
    for name in sorted(arrays):
        array = arrays[name]
        label = f"{name} {_NAMES[array.dtype]} {' '.join(map(str, array.shape))}\n".encode()
        digest.update(struct.pack("<Q", len(label)) + label)
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _parse(data: memoryview) -> tuple[bytes, str, dict[str, NDArray[Any]]]:
    """(description, stated hash, arrays) of a safetensors file; sizes are checked before anything is made."""
    if len(data) < 8:
        raise Truncated(f"profile: expected at least 8 bytes; got {len(data)}")
    (length,) = struct.unpack_from("<Q", data)
    if length > MAX_HEADER:
        raise NotAnObject(f"profile: expected a safetensors file with a header of at most {MAX_HEADER} bytes")
    if 8 + length > len(data):
        raise Truncated(f"profile: expected a header of {length} bytes; got {len(data) - 8}")
    entries = strict_json.loads(data[8 : 8 + length], "profile")
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not {METADATA, HASH} <= metadata.keys():
        raise NotAnObject(f"profile: expected a safetensors file that holds {METADATA!r}; this one doesn't")
    described, stated = metadata[METADATA], metadata[HASH]
    if not isinstance(described, str) or not isinstance(stated, str):
        raise FormatError("profile: expected its description and hash as strings")
    if len(entries) > MAX_ARRAYS:
        raise LimitExceeded(f"profile: expected at most {MAX_ARRAYS} arrays; got {len(entries)}")
    body, arrays, end = data[8 + length :], {}, 0
    for name, entry in entries.items():
        arrays[name], (start, stop) = _array(name, entry, body)
        if start != end:
            raise FormatError(f"profile array {name!r}: expected its bytes from {end}; got {start}")
        end = stop
    if end != len(body):
        raise FormatError(f"profile: expected {end} bytes of arrays; got {len(body)}")
    return described.encode("utf-8"), stated, arrays


def _array(name: str, entry: Any, body: memoryview) -> tuple[NDArray[Any], tuple[int, int]]:
    """An array as a view of the file's body, and its span."""
    try:
        dtype, shape, (start, stop) = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"profile array {name!r}: expected dtype, shape, data_offsets; got {entry!r}") from error
    numbers = [start, stop, *shape] if isinstance(shape, list) and len(shape) <= 8 else [None]
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_BYTES for n in numbers):
        raise FormatError(f"profile array {name!r}: expected sizes within 0..{MAX_BYTES}; got {entry!r}")
    size = math.prod(shape) * dtype.itemsize
    if stop - start != size:
        raise FormatError(f"profile array {name!r}: expected {size} bytes for {shape}; got {stop - start}")
    if stop > len(body):
        raise Truncated(f"profile array {name!r}: expected {stop} bytes of arrays; got {len(body)}")
    return np.frombuffer(body[start:stop], dtype).reshape(shape), (start, stop)
